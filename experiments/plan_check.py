"""What `jfed plan` counts beside what a device does: seconds, FLOPs and bytes of a round.

    python experiments/plan_check.py

Rounds of equal clients with random images, on one device of this machine, a CPU or an accelerator.
Its peak and its bandwidth are measured in turns with the rounds: products of large matrices in the
dtype of the network, and a large array read and written; of each the fastest turn counts.
"arithmetic" and "moving" are the seconds that the counted FLOPs and bytes take at these rates, and
"of floor" is what a round takes, over the longer of both. Caches may keep what is counted as moved:
where arrays fit into them a round can be faster than "moving". "FLOPs" is the count in the compiled
program over the model's own, of ordinary convolutions. "temporary" is what the compiler says that
the training program needs while it runs, "grew" by how much the process's memory grew at most in a
round (on a CPU). It writes `experiments/results/plan_check_PLATFORM.csv`. Expected on two cores:
rounds of 2.1 to 2.6 times the floor, 4 where four lanes step together; the ODENet grows within 4 %
of "temporary", the small CNN by a third more (or less, of memory that the round before has left).
"""

import ctypes
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from script import finish, table_of

from jfed import provenance
from jfed.benchmark.matmul import XlaProducts, product_flops
from jfed.benchmark.tasks import Task
from jfed.benchmark.timing import interleaved, timed
from jfed.benchmark.workers import resident
from jfed.engine.devices import EngineConfig
from jfed.models.ode_nets import ODENetConfig
from jfed.planning.compiling import plan_federation
from jfed.planning.targets import Target

CNN = Task(100, 50, 8, size=32, batch_size=10)
ODE = Task(
    8, 64, 8, size=32, batch_size=32, network=ODENetConfig(widths=(16, 32, 64)), iterations=(1, 4)
)
WIDE = dataclasses.replace(ODE, network=ODENetConfig(widths=(64, 128, 256)), iterations=(4,))
SMOKE = Task(4, 10, 2, size=8, batch_size=10, conv="transposed")
# Networks by name, those for accelerators alone, and how a device runs its lanes.
TASKS = {"small CNN": CNN, "ODENet 16/32/64": ODE}
LARGE = {"ODENet 64/128/256": WIDE}
ENGINES = {"1 lane": ("map", 1), "4 lanes, map": ("map", 4), "4 lanes, vmap": ("vmap", 4)}


def measure(task: Task, engine: EngineConfig, repeats: int, *, small: bool) -> dict[str, Any]:
    """What is counted of a task's rounds, and what they take."""
    federation = task.federation(engine)
    device = jax.devices()[0]
    plan = plan_federation(federation, Target(device.device_kind, None, (1,), (device,), 1))
    for program in plan.programs:
        assert (program.error, program.unread) == (None, None), program
    federation.compile()
    state, number = federation.start, 0

    def round_() -> None:
        nonlocal state, number
        state, _ = federation.round(state, number)
        jax.block_until_ready(state.server)
        number += 1

    round_()
    grown = growth(round_)
    size, count = (128, 2**18) if small else (2048, 2**26)
    if device.platform != "cpu" and not small:
        size, count = 8192, 2**29
    products, stream = XlaProducts(size, task.dtype), Stream(count)
    runs: dict[str, Callable[[], object]] = {"round": round_}
    runs |= {"products": lambda: products.round(0), "stream": stream.pass_}
    for run in runs.values():
        run()
    found = interleaved({name: timed(run) for name, run in runs.items()}, repeats)
    seconds = min(found["round"])
    flops = sum(sum(program.counts.flops.values()) for program in plan.of_round)
    moved = sum(program.counts.bytes for program in plan.of_round)
    peak = product_flops(size) / min(found["products"])
    bandwidth = stream.bytes / min(found["stream"])
    (training,) = plan.training
    return {
        "FLOPs": round(flops / task.work().flops, 3),
        "GFLOP/s": round(peak / 1e9, 1),
        "GB/s": round(bandwidth / 1e9, 1),
        "arithmetic": float(f"{flops / peak:.3g}"),
        "moving": float(f"{moved / bandwidth:.3g}"),
        "round": float(f"{seconds:.3g}"),
        "of floor": float(f"{seconds / max(flops / peak, moved / bandwidth):.3g}"),
        "temporary MB": float(f"{training.temporary / 1e6:.3g}"),
        "grew MB": "" if grown is None else float(f"{grown / 1e6:.3g}"),
    }


class Stream:
    """An array of so many numbers that is read and written in place."""

    def __init__(self, count: int) -> None:
        self._x = jnp.zeros(count)
        self._add = jax.jit(lambda x: x + 1, donate_argnums=0)
        self.bytes = 2 * self._x.nbytes

    def pass_(self) -> None:
        """Reads and writes it once."""
        self._x = jax.block_until_ready(self._add(self._x))


def growth(run: Callable[[], None]) -> int | None:
    """By how many bytes the process grows at most while something runs on a CPU, under Linux."""
    if jax.default_backend() != "cpu" or resident("VmRSS") is None:
        return None  # accelerators' peaks never begin anew
    ctypes.CDLL(None).malloc_trim(0)  # what the program before has given back
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS") or 0
    run()
    return (resident("VmHWM") or 0) - before


def main(
    scale: Literal["all", "smoke"] = "all",
    dtype: Literal["float32", "bfloat16"] = "float32",
    repeats: int = 5,
    output: pathlib.Path | None = None,
) -> None:
    """Plans and runs every network with every engine.

    Args:
      scale: all (eight minutes on two cores) or smoke (one small network).
      dtype: that the networks compute in.
      repeats: timed rounds.
      output: of the CSV; experiments/results/plan_check_PLATFORM.csv where not given, but nowhere
        for smoke.
    """
    small = scale == "smoke"
    output = table_of(__file__, "smoke" if small else jax.default_backend(), output)
    hardware = provenance.hardware()
    about = {name: hardware[name] for name in ("machine", "jax", "commit")}
    about["command"] = f"python experiments/plan_check.py --dtype {dtype} --repeats {repeats}"
    rows: list[dict[str, Any]] = []
    large = {} if jax.default_backend() == "cpu" else LARGE
    tasks = {"smoke": SMOKE} if small else TASKS | large
    for name, task in tasks.items():
        for lanes, (mapping, count) in ENGINES.items():
            engine = EngineConfig(devices=1, lanes=count, mapping=mapping)
            found = measure(dataclasses.replace(task, dtype=dtype), engine, repeats, small=small)
            rows.append({"network": name, "lanes": lanes, **found})
            print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    finish(rows, about, output)


if __name__ == "__main__":
    tyro.cli(main)
