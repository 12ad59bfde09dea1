"""Plans of runs, against counts made from the models and the arrays themselves."""

import jax
import numpy as np
import pytest

import jfed
from jfed.data import Dataset, Split
from jfed.engine.devices import EngineConfig
from jfed.models.flops import forward_flops, training_flops
from jfed.planning import compiling
from jfed.planning.compiling import bytes_on_device, plan_federation
from jfed.planning.targets import open_target
from jfed.simulation.federation import Federation

SIZES = (5, 11, 3, 8, 8, 1)  # of clients
BATCH = 4


def _data():
    rng = np.random.default_rng(0)

    def split(count):
        images = rng.integers(0, 256, (count, 12, 12, 3)).astype(np.uint8)
        return Split(images, rng.integers(0, 10, count).astype(np.int32))

    return Dataset("noise", split(sum(SIZES)), split(8), tuple("abcdefghij"))


DATA = _data()
PARTITION = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
ODE = jfed.models.ODENetConfig(widths=(8, 16), conv="im2col")
NETWORKS = {
    "ODENet": lambda: jfed.tiers.ode(ODE, (1, 2, 4)),
    "ResNet": lambda: jfed.models.resnet(jfed.models.ResNetConfig((8, 16), (1, 2), conv="im2col")),
    "CNN": lambda: jfed.models.cnn(size=12, form="im2col"),
}


def _federation(tiers, *, lanes, mapping, devices=None, **options):
    return Federation(
        DATA,
        PARTITION,
        tiers,
        rounds=6,
        client=jfed.ClientConfig(batch_size=BATCH),
        evaluation=jfed.EvaluationConfig(every=2, batch_size=8, calibration_examples=8),
        engine=EngineConfig(1, lanes, mapping),
        devices=devices,
        **options,
    )


@pytest.fixture(scope="module")
def cpu():
    return open_target("cpu")


@pytest.mark.parametrize(
    "name", ["CNN", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ODENet", "ResNet"))]
)
def test_flops_are_those_that_the_model_has(name, cpu):
    federation = _federation(NETWORKS[name](), lanes=1, mapping="map")
    plan = plan_federation(federation, cpu)
    like = jax.eval_shape(federation.tiers.init, jax.random.key(0))
    batches = [-(-size // BATCH) for size in SIZES]
    own = sum(
        batches[client] * BATCH * training_flops(tier.bound(), tier.shapes(like), (12, 12, 3))
        for i, tier in enumerate(federation.tiers.members)
        for client in np.flatnonzero(federation.population.tier == i)
    )
    (training,) = plan.training
    assert sum(training.counts.flops.values()) == pytest.approx(own, rel=0.05)
    # Of a test of the first tier and of the others, each 8 images, after 8 that norms are measured
    # on; a model alone counts the plane of the time for each image, a batch once.
    forward = [
        forward_flops(tier.bound(), tier.shapes(like), (12, 12, 3)) for tier in federation.evaluated
    ]
    (test,) = (p for p in plan.programs if p.kind == "evaluate")
    batches = 1 + (tier_measures := federation.evaluated[0].bound().measure is not None)
    assert tier_measures == (name != "CNN")
    expected = 8 * batches * np.mean(forward)
    assert sum(test.counts.flops.values()) == pytest.approx(expected, rel=0.12)
    assert not any(program.counts.unknown for program in plan.programs)


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "mapping"), [(3, "map"), (2, "unroll")])
def test_lanes_one_after_another_do_the_same_work(lanes, mapping, cpu):
    tiers = NETWORKS["ODENet"]()
    one = plan_federation(_federation(tiers, lanes=1, mapping="map"), cpu).training[0].counts
    many = plan_federation(_federation(tiers, lanes=lanes, mapping=mapping), cpu).training[0].counts
    assert many.flops == pytest.approx(one.flops, rel=1e-6)


def test_lanes_in_lockstep_do_the_steps_of_the_longest(cpu):
    """Clients of 3, 2, 2, 2, 1, 1 batches on two lanes: 11 / 2 rounded up by how they fit."""
    federation = _federation(jfed.models.cnn(size=12, form="im2col"), lanes=2, mapping="vmap")
    ((_, schedule),) = federation.schedules(0)
    assert sorted(np.asarray(schedule.length).tolist()) == [5, 6]
    plan = plan_federation(federation, cpu)
    (training,) = plan.training
    alone = plan_federation(
        _federation(jfed.models.cnn(size=12, form="im2col"), lanes=1, mapping="map"), cpu
    )
    assert sum(training.step.flops.values()) == pytest.approx(
        2 * sum(alone.training[0].step.flops.values()), rel=1e-6
    )
    assert sum(training.counts.flops.values()) == pytest.approx(
        6 * sum(training.step.flops.values()), rel=1e-3
    )


def test_what_fails_is_told_by_program_and_the_others_go_on(cpu, monkeypatch):
    federation = _federation(NETWORKS["CNN"](), lanes=1, mapping="map")
    lower = type(federation).lower

    def failing(self, arguments):
        if any(program.kind == "server" for program in arguments):
            raise NotImplementedError("no lowering")
        return lower(self, arguments)

    monkeypatch.setattr(type(federation), "lower", failing)
    monkeypatch.setattr(compiling, "count_body", lambda *_: {}["operand"])
    found = {p.kind: p for p in plan_federation(federation, cpu).programs}
    assert found["server"].error == "NotImplementedError: no lowering"
    assert found["train"].error is None
    assert found["train"].unread == f"KeyError: 'operand' (JAX {jax.__version__})"
    assert found["train"].temporary > 0
    assert found["evaluate"].error is None
    assert found["evaluate"].counts.flops


@pytest.mark.usefixtures("needs_tpu_compiler")
def test_arrays_fill_up_the_tiles_of_a_tpu():
    there = jax.sharding.SingleDeviceSharding(open_target("v5e").devices[0])
    shapes = [((3, 3, 16, 16), np.float32), ((10,), np.float32), ((5, 7), jax.numpy.bfloat16)]
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=there) for shape, dtype in shapes]
    compiled = jax.jit(lambda *xs: [x.sum() for x in xs]).lower(*given).compile()
    formats = jax.tree.leaves(compiled.input_formats)
    found = sum(bytes_on_device(x, one) for x, one in zip(given, formats, strict=True))
    assert found == compiled.memory_analysis().argument_size_in_bytes
    assert found > 5 * sum(map(bytes_on_device, given))


@pytest.mark.slow
def test_calls_and_what_devices_hold_are_those_of_the_run(cpu):
    tiers = NETWORKS["ODENet"]()
    federation = _federation(tiers, lanes=1, mapping="map")
    plan = plan_federation(federation, cpu)
    assert {p.name: p.calls for p in plan.programs} == {
        "evaluate 1, 2, 4": 9,
        "train 1, 2, 4": 6,
        "server": 6,
    }
    pixels = (len(DATA.train) + len(DATA.test)) * (12 * 12 * 3 + 4)  # with labels
    weights = sum(
        x.nbytes
        for x in jax.tree.leaves(jax.eval_shape(tiers.init, jax.random.key(0)))
        for x in [np.zeros(x.shape, x.dtype)]
    )
    assert pixels < plan.held["images"] < 1.05 * pixels  # moments, and indices of batches
    assert plan.held["variables"] == weights
    assert plan.memory > sum(plan.held.values())
    assert plan.fits is None
    assert plan.least_seconds(plan.of_round, calls=False) is None


@pytest.mark.slow
def test_tests_of_clients_are_planned_with_their_own_loops(cpu):
    tiers = NETWORKS["ODENet"]()
    federation = Federation(
        DATA,
        np.split(np.arange(36), 6),
        tiers,
        rounds=2,
        evaluation=jfed.EvaluationConfig(
            every=1, batch_size=2, local_test=0.5, finetune_epochs=2, calibration_examples=8
        ),
        client=jfed.ClientConfig(batch_size=BATCH),
        engine=EngineConfig(1),
    )
    plan = plan_federation(federation, cpu)
    found = {p.name: p for p in plan.programs}
    assert not any(p.counts.unknown for p in plan.programs)
    # Three examples to tune on, a batch each of two epochs, and three to test on in two batches.
    assert found["local 1, 2, 4"].calls == 2
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    training = [
        training_flops(tier.bound(), tier.shapes(like), (12, 12, 3)) for tier in tiers.members
    ]
    # Two clients of each tier; norms are measured on one batch, and a test is a forward pass.
    own = sum(2 * (f * 2 * BATCH + f / 3 * (BATCH + 2 * 2)) for f in training)
    assert sum(found["local 1, 2, 4"].counts.flops.values()) == pytest.approx(own, rel=0.1)
