"""How often the loops of a federation's programs run whose lengths are data.

The programs name these loops by scopes: `turns` of the lanes, each until one of them ends a client;
the `steps` of a turn; `ode0`, `ode1`, ... iterations of each stage; and of tests of clients
`tests`, `tuning` and `norms`.
"""

from collections.abc import Sequence

import numpy as np

from jfed.engine.packing import Packing, Schedule
from jfed.simulation.local_tests import Chunk
from jfed.tiers.tier import Tier

Lengths = dict[str, float]


def of_training(
    rounds: Sequence[tuple[Packing, Schedule]], tiers: Sequence[Tier], mapping: str
) -> Lengths:
    """Of a training program, the mean over rounds, on the device that has most to do.

    Args:
      rounds: its schedule in each of them.
      tiers: of the program.
      mapping: how a device runs its lanes, see `EngineConfig`.
    """
    stages = _iterations(tiers)
    found = [_of_round(packing, schedule, stages, mapping) for packing, schedule in rounds]
    steps, turns = sum(one[0] for one in found), sum(one[1] for one in found)
    loops = 1 if mapping == "vmap" else rounds[0][0].lanes // rounds[0][0].devices
    lengths = {"turns": turns / len(rounds) / loops, "steps": steps / max(turns, 1)}
    stage = np.sum([one[2] for one in found], axis=0) / max(steps, 1)
    return lengths | {f"ode{k}": float(mean) for k, mean in enumerate(stage)}


def _of_round(
    packing: Packing, schedule: Schedule, stages: np.ndarray, mapping: str
) -> tuple[int, int, np.ndarray]:
    """Steps, turns and iterations of each stage on the device that has most to do."""
    lanes, cohort = schedule.lanes, schedule.cohort
    active = np.asarray(lanes.slot) < packing.slots  # [L, S]
    slot = np.minimum(lanes.slot, packing.slots - 1)
    tier = np.asarray(cohort.tier)[slot]
    shape = (packing.devices, packing.lanes // packing.devices, active.shape[1])
    ends = (active & (lanes.step == np.asarray(cohort.steps)[slot] - 1)).reshape(shape)
    counts = np.where(active[..., None], stages[tier], 0).reshape(*shape, stages.shape[1])
    cost = np.where(active, np.asarray(packing.costs)[tier], 0.0).reshape(shape)
    if mapping == "vmap":  # the lanes of a device are one loop, as long as the longest
        ends, counts, cost = (x.max(1, keepdims=True) for x in (ends, counts, cost))
    busiest = int(cost.sum((1, 2)).argmax())
    steps = int((cost[busiest] > 0).sum())
    return steps, int(ends[busiest].sum()), counts[busiest].sum((0, 1))


def of_testing(tiers: Sequence[Tier]) -> Lengths:
    """Of a program that tests, the mean over its tiers."""
    return {f"ode{k}": float(n) for k, n in enumerate(_iterations(tiers).mean(0))}


def of_clients_tests(chunks: Sequence[Chunk], tiers: Sequence[Tier]) -> Lengths:
    """Of a program that tests clients on examples of their own.

    Means over the places of its calls, of which some may have no client.
    """

    def column(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(chunk.numbers, name)) for chunk in chunks])

    tests, epoch = column("tests"), column("epoch")
    lengths = {"tests": tests, "tuning": column("steps"), "norms": np.maximum(epoch - 1, 0)}
    found = {name: float(lengths[name].mean()) for name in lengths}
    counts = np.average(_iterations(tiers)[column("tier")], axis=0, weights=tests)
    return found | {f"ode{k}": float(n) for k, n in enumerate(counts)}


def _iterations(tiers: Sequence[Tier]) -> np.ndarray:
    """`[tiers, stages]` lengths of the loops of iterations; the last one stands outside of it."""
    counts = np.asarray([tier.iterations or () for tier in tiers], np.int32)
    return counts - np.minimum(counts.min(0), 1)
