"""Groups of tiers that share a program, and what the clients of each are packed on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jfed.data import Dataset
from jfed.engine.devices import EngineConfig
from jfed.engine.packing import Packing, Work, capacity
from jfed.models.flops import forward_flops
from jfed.models.model import Params
from jfed.simulation.population import Population
from jfed.simulation.programs import Program
from jfed.tiers.tier import Tier


class TierGroup(NamedTuple):
    """Tiers that share a program.

    Attributes:
      program: that trains their clients.
      tiers: their numbers.
      packing: what their clients are packed on.
      images: the most that a device needs in a round.
    """

    program: Program
    tiers: tuple[int, ...]
    packing: Packing
    images: int

    def own(self, by_tier: Sequence[Sequence[Work]]) -> list[Work]:
        """Its work, with tiers numbered as in the program, in the order of the program's slots."""
        found = [w._replace(tier=i) for i, tier in enumerate(self.tiers) for w in by_tier[tier]]
        return sorted(found, key=lambda item: item.client)


def group_tiers(tiers: Sequence[Tier]) -> tuple[tuple[int, ...], ...]:
    """The tiers that share programs: groups of their numbers, in the order of the first ones."""
    groups: dict[Any, list[int]] = {}
    for i, tier in enumerate(tiers):
        groups.setdefault(tier.program, []).append(i)
    return tuple(map(tuple, groups.values()))


def make_groups(
    tiers: Sequence[Tier],
    like: Params,
    population: Population,
    engine: EngineConfig,
    data: Dataset,
    remember: bool,
) -> list[TierGroup]:
    """Which tiers train together, and on what.

    Args:
      tiers: that clients train.
      like: global variables; only shapes and dtypes matter.
      population: the clients.
      engine: how they are spread over devices, resolved.
      data: that they train on.
      remember: whether they have rows of memory.
    """
    devices, groups = engine.devices or 1, []
    lanes = (engine.lanes or 1) * devices
    for members in group_tiers(tiers):
        own = tuple(tiers[i] for i in members)
        costs: tuple[float, ...] = (1.0,)
        if len(own) > 1:
            flops = [forward_flops(t.bound(), t.shapes(like), data.image_shape) for t in own]
            costs = tuple(float(max(n, 1)) for n in flops)
        slots = max(1, population.most(members))
        even = -(-slots // devices)  # a few more rows of memory than that leave packing free
        packing = Packing(
            devices=devices,
            lanes=lanes,
            lockstep=engine.mapping == "vmap",
            batch_size=population.client.batch_size,
            steps=capacity(population.steps(), population.cohort, lanes, costs),
            slots=slots,
            rows=min(slots, even + max(2, even // 4)) if remember else slots,
            costs=costs,
        )
        sizes = sorted(map(len, population.partition))
        most = min(sum(sizes[-slots:]), lanes // devices * packing.steps * packing.batch_size)
        program, images = Program("train", own), min(most, len(data.train))
        groups.append(TierGroup(program, members, packing, images))
    return groups
