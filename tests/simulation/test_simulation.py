"""Whole simulations against NumPy, and what a simulation promises."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax._src.array import ArrayImpl

import jfed
from jfed.algorithms import Codec, compressed, fedavg
from jfed.data import Dataset, Split
from jfed.engine.faults import NON_FINITE, draw_fate, hostile_clients
from jfed.engine.packing import client_batches
from jfed.errors import ConfigError, DataError, DivergedError
from jfed.seeds import generator
from jfed.simulation.federation import Federation
from jfed.simulation.loop import check_finite


def _dataset(train=60, test=30, seed=0):
    """Two blobs of 4x4 images for each of three classes; separable except for noise."""
    rng = np.random.default_rng(seed)
    prototypes = rng.integers(40, 216, (3, 4, 4, 1))

    def split(count):
        labels = rng.integers(0, 3, count).astype(np.int32)
        noise = rng.integers(-40, 41, (count, 4, 4, 1))
        return Split((prototypes[labels] + noise).astype(np.uint8), labels)

    return Dataset("blobs", split(train), split(test), ("a", "b", "c"))


def _softmax_regression():
    def init(key):
        return {"w": 0.1 * jax.random.normal(key, (16, 3)), "b": jnp.zeros(3)}

    def apply(params, images):
        return images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None]

    return jfed.models.Model(init, apply)


DATA = _dataset()
MODEL = _softmax_regression()
PARTS = tuple(np.sort(p) for p in np.split(np.random.default_rng(0).permutation(60), [5, 20, 38]))
QUIET = jfed.EvaluationConfig(every=0, batch_size=30)


def _numpy_inputs(data=DATA):
    images = data.train.images.astype(np.float64)
    return ((images - images.mean()) / images.std()).reshape(60, -1)


def _numpy_gradient(params, x, labels):
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    return {"w": x.T @ p / len(labels), "b": p.mean(0)}


def _start(seed):
    state = Federation(DATA, PARTS, MODEL, rounds=1, seed=seed).start
    return {k: np.asarray(v, np.float64) for k, v in state.server.variables.items()}


def _numpy_client(params, client, number, config, x, seed=5, steps=None):
    """What a client trains, as a plain loop over its first steps."""
    rng = generator(seed, "batches", number, int(client))
    for batch in client_batches(PARTS[client], config, rng)[:steps]:
        batch = batch[batch >= 0]
        gradient = _numpy_gradient(params, x[batch], DATA.train.labels[batch])
        params = {k: params[k] - config.learning_rate * gradient[k] for k in params}
    return params


def _numpy_round(params, cohort, number, config, x):
    """FedAvg's mean of what the cohort's clients train."""
    total, weight = {k: np.zeros_like(v) for k, v in params.items()}, 0
    for client in cohort:
        own = _numpy_client(params, client, number, config, x)
        total = {k: total[k] + len(PARTS[client]) * own[k] for k in own}
        weight += len(PARTS[client])
    return {k: total[k] / weight for k in total}


def test_fedavg_rounds_equal_a_plain_numpy_loop():
    config = jfed.ClientConfig(epochs=2, batch_size=4, learning_rate=0.05)
    result = jfed.simulate(
        DATA, PARTS, MODEL, rounds=3, cohort=3, client=config, evaluation=QUIET, seed=5
    )
    params = _start(5)
    for number in range(3):
        cohort = generator(5, "cohort", number).choice(4, 3, replace=False)
        params = _numpy_round(params, cohort, number, config, _numpy_inputs())
    for name, value in params.items():
        np.testing.assert_allclose(result.variables[name], value, rtol=1e-4, atol=1e-5)
    assert [r.clients for r in result.history] == [3, 3, 3]


def test_one_client_with_one_full_batch_is_centralised_sgd():
    config = jfed.ClientConfig(batch_size=60, learning_rate=0.2)
    everything = (np.arange(60),)
    result = jfed.simulate(
        DATA, everything, MODEL, rounds=4, client=config, evaluation=QUIET, seed=2
    )
    params = _start(2)
    for _ in range(4):
        gradient = _numpy_gradient(params, _numpy_inputs(), DATA.train.labels)
        params = {k: params[k] - 0.2 * gradient[k] for k in params}
    for name, value in params.items():
        np.testing.assert_allclose(result.variables[name], value, rtol=1e-4, atol=1e-5)


def test_a_client_does_not_depend_on_who_else_trains():
    """Two clients' mean is that of the two trained alone, and alone gives the same bits twice."""
    config = jfed.ClientConfig(epochs=2, batch_size=4)

    def train(clients):
        federation = Federation(
            DATA,
            PARTS,
            MODEL,
            rounds=1,
            cohort=3,
            sampler=lambda *_: clients,
            client=config,
            seed=1,
        )
        start = jax.device_get(federation.start.server.variables)
        after = federation.round(federation.start, 0)[0].server.variables
        return jax.tree.map(lambda a, b: np.asarray(a) - b, after, start)

    together, alone = train([0, 1, 2]), [train([c]) for c in (0, 1, 2)]
    shares = np.array([len(PARTS[c]) for c in (0, 1, 2)]) / sum(len(PARTS[c]) for c in (0, 1, 2))
    for name, value in together.items():
        mean = sum(share * one[name] for share, one in zip(shares, alone, strict=True))
        np.testing.assert_allclose(value, mean, rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, train([1]), alone[1])


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    def run(seed):
        return jfed.simulate(DATA, PARTS, MODEL, rounds=2, cohort=2, seed=seed)

    first, again, other = run(3), run(3), run(4)
    jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
    strip = [dataclasses.replace(r, seconds=0.0) for r in first.history]
    assert strip == [dataclasses.replace(r, seconds=0.0) for r in again.history]
    assert np.abs(first.variables["w"] - other.variables["w"]).max() > 1e-4


def test_a_round_waits_for_no_device_and_copies_nothing_by_accident(monkeypatch):
    """Every copy to the devices is an explicit one, and none comes back before `fetch`."""
    federation = Federation(DATA, PARTS, MODEL, rounds=3, cohort=3, evaluation=QUIET)
    federation.compile()
    read = []
    value = ArrayImpl._value

    def spy(array):
        read.append(array)
        return value.fget(array)

    monkeypatch.setattr(ArrayImpl, "_value", property(spy))
    state, rounds = federation.start, []
    with jax.transfer_guard("disallow"):
        for number in range(3):
            state, under_way = federation.round(state, number)
            rounds.append(under_way)
    assert rounds[-1].evaluations
    assert not read
    assert rounds[-1].fetch(None, 0.0).examples > 0
    assert read  # so the spy would have seen one


def test_history_accuracies_and_bytes():
    heard = []
    result = jfed.simulate(
        DATA,
        PARTS,
        MODEL,
        rounds=5,
        cohort=3,
        client=jfed.ClientConfig(epochs=3, batch_size=5),
        evaluation=jfed.EvaluationConfig(every=2, batch_size=7),
        callbacks=[heard.append],
    )
    assert list(result.history) == heard
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(heard))
    assert [r.round for r in heard] == [1, 2, 3, 4, 5]
    assert [bool(r.evaluations) for r in heard] == [False, True, False, True, True]
    assert result.accuracies["full"] > 0.9
    size = 4 * (16 * 3 + 3)
    assert [r.bytes_up for r in heard] == [3 * size] * 5
    assert heard[-1].bytes_down_total == 15 * size
    assert all(0.25 < r.lane_utilisation <= 1 for r in heard)
    assert all(0.25 < r.padded_utilisation <= 1 for r in heard)
    assert result.traffic == {"full": (size, size)}
    assert result.plot().axes[0].get_lines()


@pytest.fixture(scope="module")
def ode_federation():
    config = jfed.models.ODENetConfig(
        widths=(4,), channels=1, classes=3, unroll=False, conv="transposed"
    )
    tiers = jfed.tiers.ode(config, (0, 1))
    return jfed.simulate(
        DATA,
        PARTS,
        tiers,
        rounds=3,
        shares=(0.25, 0.75),
        client=jfed.ClientConfig(batch_size=8, epochs=2),
        evaluation=jfed.EvaluationConfig(every=0, iterations=(1, 2), calibration_examples=30),
        seed=1,
    )


def test_tiers_train_together_and_any_depth_is_evaluated(ode_federation):
    result = ode_federation
    assert list(result.accuracies) == ["0", "1", "2"]
    assert [tier.name for tier in result.evaluated] == ["0", "1", "2"]
    assert list(result.traffic) == ["0", "1"]
    assert result.compile_seconds > 0
    assert result.history[-1].examples == 2 * 60


def test_tiers_are_kept_or_drawn():
    tiers = [jfed.tiers.Tier(name, MODEL) for name in "ab"]
    group = jfed.tiers.Tiers(MODEL.init, tuple(tiers))

    def sampled(draw):
        federation = Federation(DATA, PARTS, group, rounds=9, draw_tiers=draw, seed=0)
        return [tuple(federation.population.sample(r)[0].tolist()) for r in range(9)]

    assert len(set(sampled(0))) == 1
    assert len(set(sampled(1))) > 3


def test_a_round_in_which_nobody_can_train_changes_nothing_and_is_recorded():
    tiers = jfed.tiers.exclusive(MODEL, 0.25)
    config = jfed.ServerConfig(momentum=0.9)
    federation = Federation(DATA, PARTS, tiers, rounds=6, cohort=1, server=config, seed=3)
    state, before, trained = federation.start, None, []
    for number in range(6):
        (clients,) = federation.population.sample(number)
        kept = jax.device_get(federation.copy(state))
        later, under_way = federation.round(state, number)
        record = before = under_way.fetch(before, 0.0)
        moved = [
            not np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(kept.server), jax.tree.leaves(later.server), strict=True
            )
        ]
        assert record.clients == len(clients) == bool(record.bytes_up)
        assert all(moved) if len(clients) else not any(moved)
        assert np.isnan(record.train_loss) == (len(clients) == 0)
        trained.append(len(clients))
        state = later
    assert 0 < sum(trained) < 6


def test_nobody_able_in_any_round_is_a_run_all_the_same():
    tiers = jfed.tiers.exclusive(MODEL, 0.25)
    options = {"rounds": 1, "cohort": 1, "evaluation": QUIET}
    idle = next(s for s in range(9) if not _sampled(tiers, s))
    result = jfed.simulate(DATA, PARTS, tiers, seed=idle, **options)
    assert result.history[0].examples == result.history[0].bytes_down_total == 0
    start = Federation(DATA, PARTS, tiers, seed=idle, **options).start.server.variables
    jax.tree.map(np.testing.assert_array_equal, result.variables, start)


def _sampled(tiers, seed):
    federation = Federation(DATA, PARTS, tiers, rounds=1, cohort=1, seed=seed)
    return len(federation.population.sample(0)[0])


def test_what_a_tier_owns_may_move_with_the_round_on_any_devices():
    def window(variables, round_):
        rows = (jnp.arange(8, dtype=jnp.int32) + round_) % 16
        return {"w": jnp.take(variables["w"], rows, axis=0), "b": variables["b"]}

    def apply(params, images):
        return images.reshape(images.shape[0], -1)[:, :8] @ params["w"] + params["b"][None]

    rolling = jfed.tiers.Tier("rolling", jfed.models.Model(MODEL.init, apply), window)
    tiers = jfed.tiers.Tiers(MODEL.init, (rolling,))
    client = jfed.ClientConfig(batch_size=20, mask_absent_classes=True)
    engines = (jfed.EngineConfig(devices=1), jfed.EngineConfig(devices=2, lanes=2))
    one, many = (
        jfed.simulate(
            DATA, PARTS, tiers, rounds=3, client=client, evaluation=QUIET, engine=engine, seed=4
        ).variables
        for engine in engines
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, many)
    moved = np.any(np.abs(np.asarray(one["w"]) - _start(4)["w"]) > 1e-6, axis=1)
    assert moved.tolist() == [row < 10 for row in range(16)]  # rows 0 to 7, 1 to 8, 2 to 9


def test_masked_logits_know_which_classes_each_client_has():
    """Two clients of one class and all: the first learns nothing about the classes it has not."""
    labels = DATA.train.labels
    parts = (np.flatnonzero(labels == 2), np.flatnonzero(labels != 2))
    config = jfed.ClientConfig(batch_size=60, learning_rate=0.2, mask_absent_classes=True)
    result = jfed.simulate(DATA, parts, MODEL, rounds=1, client=config, evaluation=QUIET, seed=2)
    start = {
        k: np.asarray(v, np.float64)
        for k, v in Federation(DATA, parts, MODEL, rounds=1, seed=2).start.server.variables.items()
    }
    x, expected = _numpy_inputs(), {k: np.zeros_like(v) for k, v in start.items()}
    for part in parts:
        present = np.isin(np.arange(3), labels[part])
        logits = np.where(present, x[part] @ start["w"] + start["b"], 0)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        error = np.where(present, p - np.eye(3)[labels[part]], 0) / len(part)
        own = {"w": x[part].T @ error, "b": error.sum(0)}
        for k in expected:
            expected[k] += len(part) / 60 * (start[k] - 0.2 * own[k])
    for name, value in expected.items():
        np.testing.assert_allclose(result.variables[name], value, rtol=1e-4, atol=1e-5)


def test_a_tier_that_owns_nothing_is_refused():
    empty = jfed.tiers.Tier("empty", MODEL, lambda variables, round_: {})
    with pytest.raises(ConfigError, match="'empty' owns nothing"):
        jfed.simulate(DATA, PARTS, jfed.tiers.Tiers(MODEL.init, (empty,)), rounds=1)


def _nan_once_grown(params, images):
    """The logits of `MODEL`, not a number once the first weights have grown."""
    grown = jnp.abs(params["w"]).max() > 0.5
    return jnp.where(grown, jnp.nan, MODEL.apply(params, images))


def test_a_diverged_run_stops_names_the_round_and_keeps_its_records():
    heard = []
    model = jfed.models.Model(MODEL.init, _nan_once_grown)
    config = jfed.ClientConfig(batch_size=60, learning_rate=0.5)
    with pytest.raises(DivergedError, match=r"round (\d+) diverged: no client that") as e:
        jfed.simulate(
            DATA, PARTS, model, rounds=99, client=config, evaluation=QUIET, callbacks=[heard.append]
        )
    assert len(heard) > 0
    assert e.value.history == tuple(heard)
    assert f"round {len(heard) + 1} diverged" in str(e.value)
    assert all(np.isfinite(r.train_loss) for r in heard)


def _nan_of_white(params, images):
    """The logits of `MODEL`, not a number for white images."""
    white = images.min((1, 2, 3)) > 0.9
    return jnp.where(white[:, None], jnp.nan, MODEL.apply(params, images))


def test_an_update_that_is_not_finite_is_left_out_and_counted():
    white = np.array(DATA.train.images)
    white[PARTS[1]] = 255
    data = dataclasses.replace(DATA, train=Split(white, DATA.train.labels))
    model = jfed.models.Model(MODEL.init, _nan_of_white)
    config = jfed.ClientConfig(batch_size=5, learning_rate=0.05)
    engine = jfed.EngineConfig(devices=1)  # so that other clients train before and after it
    options = {"client": config, "evaluation": QUIET, "engine": engine}
    result = jfed.simulate(data, PARTS, model, rounds=3, seed=5, **options)
    params = _start(5)
    for number in range(3):
        params = _numpy_round(params, [0, 2, 3], number, config, _numpy_inputs(data))
    for name, value in params.items():
        np.testing.assert_allclose(result.variables[name], value, rtol=1e-4, atol=1e-5)
    size = 4 * (16 * 3 + 3)
    for record in result.history:
        assert (record.clients, record.delivered, record.rejected, record.dropped) == (4, 3, 1, 0)
        assert record.examples == 45
        assert np.isfinite(record.train_loss)
        assert record.bytes_up == 4 * size


def test_a_run_diverges_once_no_client_has_a_finite_update():
    model = jfed.models.Model(MODEL.init, lambda p, x: MODEL.apply(p, x) * jnp.nan)
    with pytest.raises(DivergedError, match=r"round 1 diverged: no client .* than 0\.1"):
        jfed.simulate(DATA, PARTS, model, rounds=3, evaluation=QUIET)


@pytest.mark.parametrize("aggregator", ["mean", "median", "norm-clipping"])
def test_rounds_with_faults_equal_a_plain_numpy_loop(aggregator):
    faults = jfed.FaultConfig(
        dropout=0.25,
        stragglers=0.5,
        straggler_steps=0.4,
        non_finite=0.2,
        hostile=0.25,
        attack="scaled",
        attack_scale=-3.0,
    )
    config = jfed.ClientConfig(epochs=2, batch_size=4, learning_rate=0.05)
    clip = 0.05 if aggregator == "norm-clipping" else None
    server = jfed.ServerConfig(aggregator=aggregator, clip_updates=clip)
    result = jfed.simulate(
        DATA,
        PARTS,
        MODEL,
        rounds=4,
        client=config,
        server=server,
        evaluation=QUIET,
        engine=jfed.EngineConfig(devices=2, lanes=1),
        faults=faults,
        seed=5,
    )
    x, params, hostile = _numpy_inputs(), _start(5), hostile_clients(faults, 4, seed=5)
    for record in result.history:
        number, sent, weights = record.round - 1, [], []
        fates = [draw_fate(faults, number, c, hostile=bool(hostile[c]), seed=5) for c in range(4)]
        for client, fate in enumerate(fates):
            if fate.drops or fate.fault == NON_FINITE:
                continue
            steps = len(client_batches(PARTS[client], config, np.random.default_rng(0)))
            steps = max(1, round(0.4 * steps)) if fate.straggles else steps
            own = _numpy_client(params, client, number, config, x, steps=steps)
            factor = -3.0 if hostile[client] else 1.0
            update = np.concatenate([np.ravel(factor * (own[k] - params[k])) for k in "wb"])
            if clip is not None:
                update *= min(1, clip / np.linalg.norm(update))
            sent.append(update)
            weights.append(len(PARTS[client]))
        dropped = sum(fate.drops for fate in fates)
        assert (record.dropped, record.delivered) == (dropped, len(sent))
        assert record.clients == 4 == record.delivered + record.rejected + record.dropped
        if sent:
            stacked = np.array(sent)
            by_median = aggregator == "median"
            mean = np.median(stacked, 0) if by_median else np.average(stacked, 0, weights)
            change = {"w": mean[:48].reshape(16, 3), "b": mean[48:]}
            params = {k: params[k] + change[k] for k in params}
    assert sum(r.rejected for r in result.history) > 0 < sum(r.dropped for r in result.history)
    for name, value in params.items():
        np.testing.assert_allclose(result.variables[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", ["dropout", "non_finite"])
def test_a_round_that_nobody_delivers_in_changes_nothing(share):
    """After a round that counts, so that the server's momentum is there to be kept."""
    server = jfed.ServerConfig(momentum=0.9)
    plain = Federation(DATA, PARTS, MODEL, rounds=2, server=server, evaluation=QUIET)
    state, started = plain.round(plain.start, 0)
    faults = jfed.FaultConfig(**{share: 1.0})
    faulty = Federation(DATA, PARTS, MODEL, rounds=2, server=server, faults=faults)
    before = jax.device_get(faulty.copy(state))
    assert np.abs(before.server.state[0].trace["w"]).max() > 0
    after, under_way = faulty.round(state, 1)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    record = under_way.fetch(started.fetch(None, 0.0), 0.0)
    assert not under_way.diverged()
    assert (record.delivered, record.examples, record.clients) == (0, 0, 4)
    assert (record.dropped, record.rejected) == ((4, 0) if share == "dropout" else (0, 4))
    assert np.isnan(record.train_loss)
    assert np.isnan(record.train_accuracy)
    size = 4 * (16 * 3 + 3)
    assert record.bytes_down == 4 * size
    assert record.bytes_up == (0 if share == "dropout" else 4 * size)
    check_finite(record, faulty, bool(under_way.finite), [], under_way.diverged())


def test_robust_aggregators_take_tiers_and_devices():
    """The same updates stacked from other lanes, of tiers that own different parts."""
    part = jfed.models.Model(
        lambda key: {"w": MODEL.init(key)["w"]},
        lambda p, images: images.reshape(images.shape[0], -1) @ p["w"],
    )
    members = (
        jfed.tiers.Tier("whole", MODEL),
        jfed.tiers.Tier("part", part, lambda v, r: {"w": v["w"]}),
    )
    tiers = jfed.tiers.Tiers(MODEL.init, members)
    server = jfed.ServerConfig(aggregator="multi-krum", krum_byzantine=0)

    def run(devices, lanes):
        engine = jfed.EngineConfig(devices=devices, lanes=lanes, mapping="vmap")
        return jfed.simulate(
            DATA, PARTS, tiers, rounds=3, server=server, evaluation=QUIET, engine=engine
        )

    one, many = run(1, 1), run(2, 2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        one.variables,
        many.variables,
    )
    assert min(one.accuracies.values()) > 0.6


def test_krum_is_refused_for_too_few_clients():
    server = jfed.ServerConfig(aggregator="krum", krum_byzantine=1)
    with pytest.raises(ConfigError, match="krum_byzantine 1 needs 5 clients in a round, got 4"):
        jfed.simulate(DATA, PARTS, MODEL, rounds=1, server=server)


def test_divergence_in_the_last_round_is_noticed():
    config = jfed.ClientConfig(learning_rate=3e38, batch_size=60)
    with pytest.raises(DivergedError, match="round 1 diverged"):
        jfed.simulate(DATA, PARTS, MODEL, rounds=1, client=config, evaluation=QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"cohort": 5}, "at most the 4 clients, got 5"),
        ({"cohort": 0}, "cohort must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"shares": (0.5, 0.5)}, "for each of 1 tiers"),
        ({"evaluation": jfed.EvaluationConfig(iterations=(3,))}, "need tiers of iteration counts"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        jfed.simulate(DATA, PARTS, MODEL, **({"rounds": 1} | changes))


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("every", "eval_every"),
        ("batch_size", "eval_batch_size"),
        ("calibration_examples", "calibration_examples"),
    ],
)
def test_bad_evaluation_settings_are_quoted(name, called):
    with pytest.raises(ConfigError, match=f"{called} must be .*, got -1"):
        jfed.EvaluationConfig(**{name: -1})


def test_bad_augmentation_is_quoted():
    with pytest.raises(ConfigError, match="got -2"):
        jfed.Augmentation(pad=-2)


def test_a_model_of_the_wrong_shape_is_refused_before_it_is_compiled():
    wrong = jfed.models.Model(MODEL.init, lambda params, images: images.mean((1, 2)))
    with pytest.raises(ConfigError, match=r"expected logits \(250, 3\) float32"):
        jfed.simulate(DATA, PARTS, wrong, rounds=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            jfed.models.Model(MODEL.init, lambda params: params),
            "model of tier 'full' cannot be used on images",
        ),
        (
            jfed.models.Model(lambda key: {"w": jnp.zeros(3, jnp.int32)}, MODEL.apply),
            r"that at \['w'\] of tier 'full' is int32",
        ),
        (
            jfed.models.Model(MODEL.init, lambda params, x: (MODEL.apply(params, x), params)),
            r"expected logits \(250, 3\) float32 and nothing else",
        ),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        jfed.simulate(DATA, PARTS, model, rounds=1)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ((np.arange(40), np.arange(30, 60)), "example 30 is dealt out 2 times"),
        ((np.arange(60) < 30, np.arange(60) >= 30), "type bool; expected"),
        ((), "names no clients"),
    ],
)
def test_a_partition_that_cannot_be_is_refused(partition, message):
    with pytest.raises(ConfigError, match=message):
        jfed.simulate(DATA, partition, MODEL, rounds=1)


@pytest.mark.parametrize(
    ("network", "tiers", "options"),
    [
        pytest.param(
            {"solver": "Heun", "horizon": "proportional"},
            {"sharing": "norms-per-depth"},
            {"engine": jfed.EngineConfig(devices=2, lanes=2)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"solver": "Bosh3", "norm": "group", "function": "postactivation"},
            {},
            {"draw_tiers": 1, "client": jfed.ClientConfig(steps=3, batch_size=8)},
            marks=pytest.mark.slow,
        ),
        (
            {"separable": True, "dtype": "bfloat16"},
            {},
            {"augmentation": jfed.Augmentation(pad=1, flip=True), "shares": (0.7, 0.3)},
        ),
    ],
    ids=["heun", "bosh3", "dsodenet"],
)
def test_every_kind_of_odenet_trains(network, tiers, options):
    config = jfed.models.ODENetConfig(
        widths=(4,), channels=1, classes=3, unroll=False, conv="auto", **network
    )
    options = {"client": jfed.ClientConfig(batch_size=8, epochs=2)} | options
    result = jfed.simulate(
        DATA, PARTS, jfed.tiers.ode(config, (1, 2), **tiers), rounds=12, evaluation=QUIET, **options
    )
    assert result.history[-1].train_loss < 0.8 * result.history[0].train_loss
    assert min(result.accuracies.values()) > 0.5


def _doubling(learning_rate):
    """An optimizer whose updates are twice as wide as the parameters."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.stack([u, u]), updates))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (Codec(lambda u, key: u["w"]), r"codec .*lambda.* makes .* of .*must stay"),
        (Codec(lambda update: update), r"codec .*lambda.* cannot be used"),
        (_doubling, r"optimizer .*_doubling.* of tier 'full' cannot be used"),
    ],
)
def test_what_changes_the_tree_is_refused(changes, message):
    def simulate():
        if isinstance(changes, Codec):
            options = {"algorithm": compressed(fedavg(), changes)}
        else:
            options = {"client": jfed.ClientConfig(optimizer=changes)}
        jfed.simulate(DATA, PARTS, MODEL, rounds=1, **options)

    with pytest.raises(ConfigError, match=message):
        simulate()


def test_out_of_memory_names_what_to_lower():
    def apply(params, images):
        rows = jax.lax.broadcasted_iota(jnp.float32, (2**24, 2**24), 0)
        return MODEL.apply(params, images) + jnp.sort(rows * images.sum(), 0)[0, 0]

    model = jfed.models.Model(MODEL.init, apply)
    engine = jfed.EngineConfig(devices=1, lanes=3)
    with pytest.raises(jfed.DeviceMemoryError, match=r"3 lanes on each of 1 devices.*lower lanes"):
        jfed.simulate(DATA, PARTS, model, rounds=1, engine=engine, evaluation=QUIET)


def test_labels_out_of_range_are_refused():
    with pytest.raises(DataError, match=r"train label 2 is outside"):
        Dataset("bad", DATA.train, DATA.test, ("a", "b"))


def _digits(model, rounds, train_examples=400):
    data = jfed.data.load("digits", train_examples=train_examples, test_examples=200)
    clients = jfed.data.iid(data.train.labels, 4, seed=0)
    client = jfed.ClientConfig(batch_size=20, epochs=2, learning_rate=0.1)
    return jfed.simulate(data, clients, model, rounds=rounds, client=client, evaluation=QUIET)


def _digits_accuracy(model, rounds):
    return _digits(model, rounds).accuracies["full"]


@pytest.mark.slow
def test_bfloat16_computes_as_well_as_float32():
    """Parameters and their mean stay float32; losses and accuracies are those of float32."""

    def run(dtype):
        config = jfed.models.ODENetConfig(
            widths=(8, 16), channels=1, iterations=2, unroll=False, conv="im2col", dtype=dtype
        )
        return _digits(jfed.models.odenet(config), 4, train_examples=1400)

    single, half = run("float32"), run("bfloat16")
    assert single.accuracies["full"] > 0.8
    assert abs(single.accuracies["full"] - half.accuracies["full"]) < 0.04
    assert half.history[-1].train_loss == pytest.approx(single.history[-1].train_loss, rel=0.03)
    assert half.history[-1].train_loss != single.history[-1].train_loss
    assert {leaf.dtype for leaf in jax.tree.leaves(half.variables)} == {jnp.dtype("float32")}


def test_a_model_of_two_functions_learns_digits():
    """The benchmark CNN, written without Flax."""
    assert _digits_accuracy(jfed.models.cnn(channels=1, size=8, form="im2col"), 3) > 0.7


def test_a_flax_module_learns_digits():
    class Perceptron(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

        def __call__(self, images):
            x = nnx.relu(self.hidden(images.reshape(images.shape[0], -1)))
            return self.out(x)

    assert _digits_accuracy(jfed.models.from_nnx(Perceptron), 5) > 0.7
