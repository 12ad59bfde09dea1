"""The lanes against the debug engine and closed forms, and what their programs look like."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jfed
from jfed.algorithms import (
    Algorithm,
    ClientConfig,
    Codec,
    Server,
    ServerConfig,
    compressed,
    fedavg,
    local_training,
    make_optimizer,
    one_each,
    step_owned,
)
from jfed.algorithms.codecs import named
from jfed.data import Dataset, Split
from jfed.data.preprocessing import Augmentation, Images
from jfed.engine.devices import EngineConfig, make_mesh, useful_lanes
from jfed.engine.faults import FaultConfig
from jfed.engine.lanes import Inputs, Training, make_trainer
from jfed.engine.packing import Packing, Work, client_batches, pack
from jfed.errors import ConfigError
from jfed.models import Model, cnn
from jfed.models.losses import Metrics
from jfed.planning.counting import Walk
from jfed.planning.hlo import parse
from jfed.simulation.federation import Federation
from jfed.tiers import Tier, Tiers
from jfed.tiers.communication import tree_bytes

ENGINES = [(1, 1, "map"), (1, 3, "vmap"), (1, 3, "map"), (1, 2, "unroll"), (4, 1, "map")]
ENGINES += [(4, 2, "vmap")]
USUAL_ENGINE, USUAL_CASES = (1, 3, "vmap"), ("momentum", "memory")  # met by all of the others
PARTS = np.split(np.random.default_rng(1).permutation(48), [3, 12, 13, 27, 34])


def _data(classes=4):
    rng = np.random.default_rng(0)

    def split(count):
        images = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
        return Split(images, rng.integers(0, classes, count).astype(np.int32))

    return Dataset("noise", split(48), split(8), tuple("abcd"[:classes]))


DATA = _data()


def _init(key):
    return {"w": 0.1 * jax.random.normal(key, (16, 4)), "b": jnp.zeros(4)}


def _of_rows(setting, largest):
    """A linear model of the first rows of its weights, whose number is the tier's setting."""

    def apply(params, images):
        w = jnp.where(jnp.arange(16)[:, None] < setting[0], params["w"], 0)
        return images.reshape(images.shape[0], -1) @ w + params["b"][None]

    return Model(_init, apply)


def _rows(like, setting):
    rows = (jnp.arange(16)[:, None] < setting[0]).astype(jnp.float32)
    return {"w": jnp.broadcast_to(rows, (16, 4)), "b": jnp.ones(4)}


def _cut(variables, round_):
    """A window of the weights that moves over the rounds."""
    return {"w": jax.lax.dynamic_slice(variables["w"], (4 * round_, 0), (6, 4))}


NARROW = Model(
    _init, lambda params, images: images.reshape(images.shape[0], -1)[:, :6] @ params["w"]
)
# Two tiers of one program, told apart by their settings, and one of another.
THREE = Tiers(
    _init,
    (
        Tier("16", _of_rows, setting=(16,), mask=_rows),
        Tier("9", _of_rows, setting=(9,), mask=_rows),
        Tier("window", NARROW, _cut),
    ),
)


def _remembering(client):
    """Clients that begin a little further on where they went last, and count their rounds."""

    def start(client, memory):
        return jax.tree.map(lambda s, d: s + 0.5 * d, client.sent, memory["drift"])

    training = local_training(make_optimizer(client), start=start)

    def client_final(client, local, key):
        update = jax.tree.map(jnp.subtract, local.params, client.sent)
        rounds = local.memory["rounds"] + 1
        drawn = jax.random.uniform(key)
        message = {"update": update, "told": {"rounds": rounds.astype(jnp.float32), "u": drawn}}
        return message, {"drift": update, "rounds": rounds}

    def server_step(server, merged):
        optimizer = optax.sgd(1.0)
        variables, _ = step_owned(
            optimizer,
            merged.message["update"],
            merged.owners,
            optimizer.init(server.variables),
            server.variables,
        )
        return Server(variables, merged.message["told"])

    return Algorithm(
        *training,
        client_final,
        server_step,
        server_init=lambda variables: {"rounds": jnp.zeros(()), "u": jnp.zeros(())},
        memory_init=lambda v: {"drift": jax.tree.map(jnp.zeros_like, v), "rounds": jnp.int32(0)},
        weights={"told": one_each},
    )


def _largest(stack):
    """An aggregator of the user's own."""
    return jax.tree.map(lambda u, o: jnp.where(o, u, -jnp.inf).max(0), stack.updates, stack.owned)


def _rounded(update, key):
    noisy = jax.tree.map(lambda u: 512 * u + jax.random.uniform(key, u.shape), update)
    return jax.tree.map(lambda u: jnp.floor(u) / 512, noisy)


MOMENTUM = ClientConfig(epochs=2, batch_size=4, momentum=0.9, learning_rate=0.05)
WILD = FaultConfig(non_finite=0.2, exploding=0.2, explosion=10.0, hostile=0.34, attack="noise")
AGGREGATORS = {
    "median": {},
    "trimmed-mean": {"trim": 0.2},
    "krum": {"krum_byzantine": 1},
    "multi-krum": {"krum_byzantine": 1},
    "norm-clipping": {},
}

# What may go wrong in lanes, by name; each is trained for two rounds.
CASES = {
    "momentum": {"augmentation": Augmentation(pad=1, flip=True)},
    "adam": {
        "client": ClientConfig(batch_size=4, optimizer="adam", learning_rate=0.01),
        "server": ServerConfig(optimizer="adam", learning_rate=0.01, weights="count"),
    },
    "decay": {
        "client": dataclasses.replace(MOMENTUM, weight_decay=0.3, clip_norm=0.5),
        "server": ServerConfig(momentum=0.9),
    },
    "absent classes": {"client": dataclasses.replace(MOMENTUM, mask_absent_classes=True)},
    "codecs": {
        "algorithm": compressed(fedavg(MOMENTUM), Codec(_rounded), named(("bfloat16",))),
    },
    "codec with feedback": {
        "algorithm": compressed(_remembering(MOMENTUM), named(("topk:0.3", "int4"))),
    },
    "clipping": {
        "client": dataclasses.replace(MOMENTUM, weight_decay=0.3),
        "server": ServerConfig(aggregator="norm-clipping", clip_updates=0.2),
    },
    "faults": {"faults": WILD},
    "attacks on the median": {
        "faults": dataclasses.replace(WILD, attack="scaled", non_finite=0.4),
        "server": ServerConfig(aggregator="median"),
    },
    "memory": {"algorithm": _remembering(MOMENTUM)},
    "own": {"server": ServerConfig(aggregator=_largest)},
    **{
        name: {"server": ServerConfig(aggregator=name, **needs)}
        for name, needs in AGGREGATORS.items()
    },
}
CASES = {name: {"client": MOMENTUM} | settings for name, settings in CASES.items()}


def _two_rounds(name, engine):
    """Both rounds' variables and reports, and what clients remember at last."""
    federation = Federation(
        DATA,
        PARTS,
        THREE,
        rounds=9,
        shares=(0.34, 0.33, 0.33),
        evaluation=jfed.EvaluationConfig(every=0, batch_size=8, calibration_examples=8),
        engine=engine,
        seed=3,
        **CASES[name],
    )
    state, found = federation.start, []
    for number in range(2):
        state, under_way = federation.round(state, number)
        reports = jax.device_get(under_way.reports)
        found.append((jax.device_get(state.server), reports, bool(under_way.finite)))
    if federation.memory is None:
        return found, None
    everybody = range(len(PARTS))
    return found, federation.memory.rows(everybody, state.latest, (everybody, len(PARTS)))


@functools.cache
def _expected(name):
    return _two_rounds(name, EngineConfig(mapping="debug"))


def _close(a, b):
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1e-5)


def _check(name, engine):
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
        found, remembered = _two_rounds(name, EngineConfig(*engine))
        expected, expected_memory = _expected(name)
    for (server, reports, finite), (own_server, own_reports, own_finite) in zip(
        found, expected, strict=True
    ):
        assert finite
        assert own_finite
        jax.tree.map(_close, server, own_server)
        jax.tree.map(_close, [_sent(r) for r in reports], [_sent(r) for r in own_reports])
    jax.tree.map(_close, remembered, expected_memory)
    return found


def _sent(report):
    """A report without the slots of clients that sent nothing, and its padding."""
    there = np.asarray(report.delivered) + np.asarray(report.rejected) > 0
    return jax.tree.map(lambda x: np.asarray(x)[there], report)


@pytest.mark.parametrize("name", CASES)
def test_lanes_equal_the_debug_engine(name):
    found = _check(name, USUAL_ENGINE)
    moved = np.abs(found[1][0].variables["w"] - found[0][0].variables["w"])
    assert moved.max() > 1e-3
    rejected = sum(int(np.sum(report.rejected)) for _, reports, _ in found for report in reports)
    assert (rejected > 0) == ("faults" in CASES[name])


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("name", USUAL_CASES)
def test_every_mapping_equals_the_debug_engine(name, engine):
    _check(name, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [e for e in ENGINES if e != USUAL_ENGINE], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name not in USUAL_CASES])
def test_every_other_case_on_every_other_mapping_equals_the_debug_engine(name, engine):
    _check(name, engine)


# What follows runs the training program alone.


def _images(pixels=None, labels=None, classes=10):
    rng = np.random.default_rng(0)
    if pixels is None:
        pixels = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(0, classes, len(pixels)) if labels is None else labels
    moments = jnp.float32([128.0]), jnp.float32([64.0])
    return Images(jnp.asarray(pixels, jnp.uint8), jnp.asarray(labels, jnp.int32), *moments)


WIDE = Model(lambda key: jnp.zeros((64, 10)), lambda p, x: x.reshape(x.shape[0], -1) @ p)


def _work(config, cut=(3, 12, 13, 27), examples=40):
    parts = np.split(np.arange(examples), cut)
    return [
        Work(c, 0, client_batches(own, config, np.random.default_rng(c)), len(own), float(len(own)))
        for c, own in enumerate(parts)
    ]


def _trainer(work, client, devices=1, lanes=1, mapping="map", *, model=WIDE, images=None, **more):
    """A training program, and its arguments; `more` changes `Training` and `Inputs`."""
    mesh, slots = make_mesh(devices), more.pop("slots", len(work))
    of_inputs = {k: more.pop(k) for k in ("key", "round") if k in more}
    algorithm = more.pop("algorithm", None) or fedavg(client)
    lockstep, size = mapping == "vmap", client.batch_size
    steps = more.pop("steps", None) or sum(len(w.batches) for w in work)
    packing = Packing(devices, lanes * devices, lockstep, size, steps, slots, slots, (1.0,))
    config = Training((Tier("t", model),), algorithm, Augmentation(), mesh, mapping, slots, **more)
    variables = model.init(jax.random.key(0))
    inputs = Inputs(
        Server(variables, algorithm.server_init(variables)),
        _images() if images is None else images,
        None,
        of_inputs.get("key", jax.random.key(7)),
        jnp.int32(of_inputs.get("round", 0)),
        jnp.float32(client.learning_rate),
    )
    nothing = jax.eval_shape(algorithm.memory_init, variables)  # which has no leaves
    return make_trainer(config), (inputs, pack(work, packing), nothing)


def _train(*args, **kwargs):
    train, arguments = _trainer(*args, **kwargs)
    return train(*arguments)[0]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_sgd_steps_equal_a_numpy_loop(engine):
    """Momentum and weight decay included, each client's sum and what it reports."""
    config = ClientConfig(epochs=2, batch_size=4, momentum=0.9, weight_decay=0.1, learning_rate=0.1)
    images, work = _images(), _work(config)
    x = ((np.asarray(images.pixels, np.float64) - 128) / 64).reshape(40, 64)
    labels = np.asarray(images.labels)
    total, losses = np.zeros((64, 10)), []
    for item in work:
        w, trace, loss = np.zeros((64, 10)), np.zeros((64, 10)), 0.0
        for batch in item.batches:
            own = batch[batch >= 0]
            logits = x[own] @ w
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            loss -= np.log(p[np.arange(len(own)), labels[own]]).sum()
            p[np.arange(len(own)), labels[own]] -= 1
            trace = 0.9 * trace + x[own].T @ p / len(own) + 0.1 * w
            w = w - 0.1 * trace
        total += item.weight * w
        losses.append(loss)
    told = _train(work, config, *engine)
    np.testing.assert_allclose(told.parts["update"], total, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(told.weights["update"], [w.weight for w in work])
    np.testing.assert_allclose(told.report.metrics.loss, losses, rtol=1e-4)
    np.testing.assert_array_equal(told.report.metrics.examples, [2 * w.examples for w in work])
    assert np.asarray(told.report.delivered).all()
    assert not np.asarray(told.report.rejected).any()


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_what_a_client_is_padded_with_is_its_own(engine):
    """A model that is infinite at an image of one client only: that client is rejected, no other.

    Batches of 19, of which each client fills 7: the rest of them is padding, as are lanes that
    idle, and the image is the first of the training set.
    """
    pixels = np.random.default_rng(0).integers(0, 250, (21, 8, 8, 1))
    pixels[0, 0, 0] = 255

    def apply(params, x):
        marked = (x[:, 0, 0, 0] > (254 - 128) / 64)[:, None]
        return jnp.where(marked, jnp.inf, x.reshape(x.shape[0], -1)) @ params

    config = ClientConfig(epochs=2, batch_size=19)
    work, images = _work(config, (7, 14), 21), _images(pixels)
    model = Model(WIDE.init, apply)
    told = _train(work, config, *engine, model=model, images=images)
    np.testing.assert_array_equal(told.report.rejected, [1, 0, 0])
    np.testing.assert_array_equal(told.report.delivered, [0, 1, 1])
    np.testing.assert_array_equal(told.report.metrics.examples, [0, 14, 14])
    assert np.isfinite(told.parts["update"]).all()
    others = _train(work[1:], config, *engine, model=model, images=images)
    np.testing.assert_allclose(told.parts["update"], others.parts["update"], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["noisy_sgd", "typed"])
def test_every_client_of_every_round_has_noise_of_its_own(optimizer):
    """The gradient of this loss is 0, so that the updates are noise alone."""

    def typed(rate):
        del rate

        def update(gradient, key, params=None):
            key, own = jax.random.split(key)
            return optax.tree.random_like(own, gradient), key

        return optax.GradientTransformation(lambda params: jax.random.key(0), update)

    def loss(params, batch, key):
        metrics = Metrics(jnp.float32(0), jnp.float32(0), batch.mask.sum())
        return 0 * params.sum(), metrics

    model = Model(lambda key: jnp.zeros(200), WIDE.apply, loss=loss)
    with jax.numpy_dtype_promotion("standard"):
        config = ClientConfig(
            batch_size=10, optimizer=typed if optimizer == "typed" else optimizer, epochs=2
        )
        drawn = [
            update
            for round_ in (0, 1)
            for update in np.asarray(
                _train(
                    _work(config, (10, 20, 30)),
                    config,
                    1,
                    2,
                    "vmap",
                    model=model,
                    stacked=True,
                    round=round_,
                ).parts["update"]
            )
        ]
    assert len(drawn) == 8
    assert min(np.std(update) for update in drawn) > 0.01
    correlation = np.corrcoef(drawn) - np.eye(8)
    assert np.abs(correlation).max() < 0.35  # five standard deviations of that of 200 numbers


def test_rounds_of_other_cohorts_run_the_same_program():
    traces = 0

    def apply(params, images):
        nonlocal traces
        traces += 1
        return WIDE.apply(params, images)

    config, model = ClientConfig(batch_size=4), Model(WIDE.init, apply)
    work = _work(config)
    train, arguments = _trainer(work, config, 1, 2, "vmap", model=model)
    train(*arguments)
    before = traces
    for cohort in (work[:2], work[1:4]):
        _, (inputs, schedule, _) = _trainer(
            cohort, config, 1, 2, "vmap", slots=len(work), steps=sum(len(w.batches) for w in work)
        )
        told, _ = train(inputs, schedule, ())
        assert int(told.report.delivered.sum()) == len(cohort)
    assert before > 0
    assert traces == before


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_the_only_collective_is_a_sum_over_devices_at_the_end(mapping):
    config = ClientConfig(batch_size=4)
    train, arguments = _trainer(_work(config), config, 4, 2, mapping)
    text = train.lower(*arguments).compile().as_text()
    collectives = re.findall(r"(all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    assert set(collectives) == {"all-reduce"}
    assert all("while" not in line for line in text.splitlines() if "all-reduce(" in line)


def _paths(jaxpr, found, path=()):
    """Through which loops and branches each marked primitive of a program is reached."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in found:
            found[name].append(path)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                _paths(inner, found, (*path, name))
    return found


def _op_names(program, visits):
    """Where JAX's program has what kernels do, and what is fused into them."""
    found = set()
    for computation, kernel, *_ in visits:
        fused = kernel.called("calls") + kernel.called("to_apply")
        for where in (computation, *map(program.computation, fused)):
            found |= {one.op_name for one in where}
    return found


@pytest.mark.parametrize("engine", [(1, 3, "vmap"), (1, 1, "map"), (1, 2, "unroll")], ids=str)
def test_beginnings_and_ends_are_outside_the_loop_over_steps(engine):
    """Where lanes step together too: they are rare, and a `select` would do them at every step."""
    plain, config = fedavg(ClientConfig()), ClientConfig(batch_size=4)

    algorithm = dataclasses.replace(
        plain,
        client_init=lambda c, m, k: plain.client_init(c._replace(sent=jax.lax.acos(c.sent)), m, k),
        client_step=lambda c, local, batch, k: plain.client_step(
            c, local._replace(params=jax.lax.atan(local.params)), batch, k
        ),
        client_final=lambda c, local, k: plain.client_final(
            c, local._replace(params=jax.lax.asinh(local.params)), k
        ),
    )
    train, arguments = _trainer(_work(config), config, *engine, algorithm=algorithm)
    program = jax.make_jaxpr(train)(*arguments).jaxpr
    found = _paths(program, {"acos": [], "atan": [], "asinh": []})
    depths = {name: {path.count("while") for path in paths} for name, paths in found.items()}
    assert depths == {"acos": {0, 1}, "atan": {2}, "asinh": {1}}  # and a start for idle lanes
    # Nor is there anything of them in the compiled loop, which does not copy its state either.
    text = train.lower(*arguments).compile().as_text()
    walk = Walk(parse(text), {"turns": 1.0, "steps": 1.0})
    visits = list(walk.visits(walk.program.entry))
    in_steps = [v for v in visits if any("steps" in walk.scopes(loop) for loop in v.loops)]
    anywhere, inside = _op_names(walk.program, visits), _op_names(walk.program, in_steps)
    for name in ("acos", "atan", "asinh"):
        assert any(f"/{name}" in one for one in anywhere), name
        assert any(f"/{name}" in one for one in inside) == (name == "atan"), name
    copied = [v.instruction.shapes[0].bytes for v in in_steps if v.instruction.opcode == "copy"]
    assert sum(copied) < tree_bytes(arguments[0].server.variables) / 4


@pytest.mark.parametrize("engine", [(1, 2, "map"), (2, 2, "vmap")], ids=str)
def test_stacked_updates_are_those_that_are_summed(engine):
    config = ClientConfig(batch_size=4, momentum=0.9)
    work = _work(config)

    def run(work, stacked):
        return _train(work, config, *engine, slots=7, stacked=stacked)

    total, stacked = run(work, False), run(work, True)
    weights = np.asarray(stacked.weights["update"])
    np.testing.assert_array_equal(weights, [w.weight for w in work] + [0, 0])
    jax.tree.map(np.testing.assert_array_equal, total.report, stacked.report)
    each = np.asarray(stacked.parts["update"])
    np.testing.assert_allclose(
        np.tensordot(weights, each, 1), total.parts["update"], rtol=1e-4, atol=1e-5
    )
    assert not each[5:].any()
    alone = run(work[1:2], True).parts["update"]
    np.testing.assert_allclose(alone[0], each[1], rtol=1e-5, atol=1e-6)


def _working_bytes(clients, lanes, mapping, *, stacked=False, model):
    config = ClientConfig(batch_size=4)
    own = client_batches(np.arange(8), config, np.random.default_rng(0))
    work = [Work(c, 0, own, 8, 8.0) for c in range(clients)]
    train, arguments = _trainer(work, config, 1, lanes, mapping, model=model, stacked=stacked)
    memory = train.lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_memory_does_not_grow_with_the_cohort():
    model = cnn(channels=1, size=8, form="transposed")
    few, many = (_working_bytes(clients, 2, "map", model=model) for clients in (10, 1000))
    assert few > 3 * tree_bytes(jax.eval_shape(model.init, jax.random.key(0)))
    assert many - few < 100 * 990  # bytes of what each client reports


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_a_device_holds_one_stack_however_many_lanes_it_has(mapping):
    model = Model(lambda key: jnp.zeros((64, 500)), WIDE.apply)
    stack = 64 * 64 * 500 * 4
    one, eight = (_working_bytes(64, lanes, mapping, stacked=True, model=model) for lanes in (1, 8))
    assert one >= stack
    assert eight - one < 0.6 * stack  # the local states of 7 lanes more


@pytest.mark.parametrize("devices", [1, 4])
def test_gradients_are_not_summed_over_devices(devices):
    """What `shard_map` does to gradients of replicated parameters, were it to check replication."""
    images, config = _images(), ClientConfig(batch_size=10)
    x = ((np.asarray(images.pixels, np.float64) - 128) / 64).reshape(40, 64)
    p = np.full((40, 10), 0.1)
    p[np.arange(40), np.asarray(images.labels)] -= 1
    told = _train(_work(config, (10, 20, 30)), config, devices)
    np.testing.assert_allclose(told.parts["update"], -0.1 * x.T @ p, rtol=1e-4, atol=1e-5)


def test_a_codec_sees_a_clients_whole_update_and_has_a_key_of_its_own():
    """Scaled to one of two norms at random."""
    norms = [0.5, 3.0]

    def apply(update, key):
        return update * jnp.where(jax.random.bernoulli(key), *norms) / optax.tree.norm(update)

    config = ClientConfig(batch_size=4)
    work, algorithm = _work(config), compressed(fedavg(config), Codec(apply))

    def total(work):
        return _train(work, config, 2, algorithm=algorithm, slots=5, steps=20).parts["update"]

    alone = [total([item]) for item in work]
    found = [float(jnp.linalg.norm(a)) / w.weight for a, w in zip(alone, work, strict=True)]
    assert all(min(abs(f - n) for n in norms) < 1e-4 for f in found)
    assert len({round(f, 3) for f in found}) == 2
    np.testing.assert_allclose(total(work), sum(alone), rtol=1e-4, atol=1e-4)


def test_what_a_client_does_not_own_is_no_part_of_its_updates_norm():
    """Weight decay moves weights that the model of a tier does not use; they are not sent."""
    federation = Federation(
        DATA,
        [np.arange(48)],
        dataclasses.replace(THREE, members=THREE.members[1:2]),
        rounds=2,
        client=ClientConfig(batch_size=4, weight_decay=2.0),
        server=ServerConfig(aggregator="norm-clipping", clip_updates=0.01),
        evaluation=jfed.EvaluationConfig(every=0, batch_size=8),
        engine=EngineConfig(1, 1, "map"),
    )
    start = jax.device_get(federation.start.server.variables)
    after = jax.device_get(federation.round(federation.start, 0)[0].server.variables)
    moved = jax.tree.map(lambda a, b: a - b, after, start)
    assert not moved["w"][9:].any()
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in moved.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 0}, "lanes must be 1 or more, got 0"),
        ({"devices": 0}, "devices must be 1 or more, got 0"),
        ({"devices": 99}, r"at most the \d+ there are, got 99"),
        ({"mapping": "vmapp"}, r"unknown mapping 'vmapp'\. Did you mean 'vmap'"),
    ],
)
def test_bad_engine_settings_are_quoted(changes, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**changes).resolve(10, None, _eight)


def _eight(device):
    return 8


def test_lanes_keep_a_device_busy_and_fit_into_half_of_it():
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2000})
    assert useful_lanes(device, 1e11, lambda: 1) == 10
    assert useful_lanes(device, 1e13, lambda: 1) == 1
    assert useful_lanes(device, 1e9, lambda: 40) == 25
    assert useful_lanes(device, 1e9, lambda: 4000) == 1
    unknown = types.SimpleNamespace(memory_stats=lambda: None)
    assert useful_lanes(unknown, 1e10, lambda: 1 / 0) == 100


def test_the_engine_picks_by_platform():
    device = functools.partial(types.SimpleNamespace, process_index=0)
    cpu, gpu, tpu = ([device(platform=kind)] * 4 for kind in ("cpu", "gpu", "tpu"))
    assert EngineConfig(devices=2).resolve(10, cpu, _eight) == EngineConfig(2, 1, "map")
    assert EngineConfig(devices=2).resolve(10, gpu, _eight) == EngineConfig(2, 5, "vmap")
    assert EngineConfig().resolve(2, tpu, _eight) == EngineConfig(4, 1, "vmap")
    assert EngineConfig(devices=2).resolve(100, gpu, _eight).lanes == 8
    assert EngineConfig(devices=2).resolve(100, gpu, lambda device: 70).lanes == 50
    given = EngineConfig(devices=1, lanes=3, mapping="unroll")
    assert given.resolve(10, gpu, _eight) == given.resolve(10, cpu, _eight) == given
    debug = EngineConfig(devices=4, lanes=3, mapping="debug")
    assert debug.resolve(10, gpu, _eight) == EngineConfig(1, 1, "debug")
