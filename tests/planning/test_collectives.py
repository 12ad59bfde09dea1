"""Programs for several hosts, compiled for them: what travels between their devices."""

import jax
import numpy as np
import pytest

import jfed
from jfed.data import Dataset, Split
from jfed.planning.compiling import plan_federation
from jfed.planning.targets import open_target
from jfed.simulation.federation import Federation


def _plan(target, **options):
    rng = np.random.default_rng(0)

    def split(count):
        images = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
        return Split(images, rng.integers(0, 4, count).astype(np.int32))

    data = Dataset("noise", split(128), split(32), tuple("abcd"))
    network = jfed.models.ODENetConfig(widths=(4, 8), channels=1, classes=4)
    federation = Federation(
        data,
        np.split(np.arange(128), 32),
        jfed.tiers.ode(network, (1, 2)),
        rounds=2,
        client=jfed.ClientConfig(batch_size=2),
        evaluation=jfed.EvaluationConfig(batch_size=4, calibration_examples=32),
        devices=target.devices,
        **options,
    )
    return plan_federation(federation, target)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "hosts"), [("v5e:4x4", 4), ("h100:1x2x8", 2)])
def test_a_round_has_one_sum_over_the_devices_of_all_hosts(name, hosts, request):
    compiler = "gpu" if name.startswith("h100") else "tpu"
    request.getfixturevalue(f"needs_{compiler}_compiler")
    with _optimised():
        plan = _plan(open_target(name))
    assert plan.hosts == hosts
    assert plan.devices == 16
    assert not any(program.error for program in plan.programs)
    kinds = {p.name: [(one.kind, one.times) for one in p.counts.collectives] for p in plan.programs}
    assert kinds["train 1, 2"] == [("all-reduce", 1.0)]
    assert kinds["server"] == []
    # What a device sends is the update, and what is told of 32 clients; of a TPU in whole tiles.
    (update,) = plan.training[0].counts.collectives
    assert plan.held["variables"] < update.bytes
    assert compiler == "tpu" or update.bytes < plan.held["variables"] + 32 * 100


@pytest.mark.slow
@pytest.mark.usefixtures("needs_gpu_compiler")
def test_no_convolution_of_lanes_is_grouped_on_a_gpu():
    with _optimised():
        plan = _plan(open_target("h100"), engine=jfed.EngineConfig(lanes=4))
    assert plan.engine.lanes == 4
    assert not any("groups" in one.what for p in plan.programs for one in p.findings)
    assert plan.fits


class _optimised:
    """The tests compile without most optimisations; here the compiler is what is looked at."""

    def __enter__(self):
        jax.config.update("jax_disable_most_optimizations", False)

    def __exit__(self, *error):
        jax.config.update("jax_disable_most_optimizations", True)
