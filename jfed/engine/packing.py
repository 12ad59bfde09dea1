"""Packing: which lane trains which client's batches, and when. Host work, in NumPy.

A lane trains client after client without pause, of whatever tier, so clients of different sizes and
tiers cost no padding. Clients are given to lanes by what they cost, the most expensive first.
"""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jfed.algorithms.clients import ClientConfig

IntArray = Int[Array, "..."] | Int[np.ndarray, "..."]


class Work(NamedTuple):
    """One client's work in a round.

    Attributes:
      client: its number, part of the random keys.
      tier: its number among the tiers of the federation.
      batches: `[steps, B]` indices of examples, -1 for padding at a batch's end.
      examples: how many the client holds.
      weight: of the client in the mean.
      fault: what is wrong with its update, see `jfed.engine.faults`; 0 for nothing.
    """

    client: int
    tier: int
    batches: Int[np.ndarray, "steps B"]
    examples: int
    weight: float
    fault: int = 0


class Lanes(NamedTuple):
    """What each lane does at each step, with axes lane and step.

    Attributes:
      examples: `[L, S, B]` indices; the client's own also where a batch is padded.
      real: `[L, S]` how many of them count, the first ones.
      slot: `[L, S]` which client of the cohort; the number of slots where the lane idles.
      step: `[L, S]` which of the client's steps, from 0.
    """

    examples: IntArray
    real: IntArray
    slot: IntArray
    step: IntArray


class Cohort(NamedTuple):
    """The clients of a round that share a program, by slots: in the order of their numbers.

    Attributes:
      client: `[slots]` their numbers.
      tier: `[slots]` their tiers, by place among those of the program.
      examples: `[slots]` that they hold.
      steps: `[slots]` of theirs in the round; 0 in slots without a client.
      weight: `[slots]` in the mean.
      fault: `[slots]` of their work.
      row: `[slots]` which of its device's rows of client memory is theirs.
    """

    client: IntArray
    tier: IntArray
    examples: IntArray
    steps: IntArray
    weight: Float[Array, " slots"] | Float[np.ndarray, " slots"]
    fault: IntArray
    row: IntArray


class Schedule(NamedTuple):
    """A cohort packed on lanes; `length` `[L]` is how many steps each lane does."""

    lanes: Lanes
    cohort: Cohort
    length: IntArray


class Packing(NamedTuple):
    """What clients are packed on, the same in every round of a federation.

    Attributes:
      devices: how many.
      lanes: of all devices together, a device's lanes next to each other.
      lockstep: the lanes of a device take their steps together, each as long as the most expensive
        of them (`vmap`), or one lane after another.
      batch_size: of clients.
      steps: that a lane has room for, see `capacity`.
      slots: that a cohort has room for.
      rows: of client memory that a device has room for.
      costs: of a step in each of the program's tiers, in any unit.
    """

    devices: int
    lanes: int
    lockstep: bool
    batch_size: int
    steps: int
    slots: int
    rows: int
    costs: tuple[float, ...]


class Load(NamedTuple):
    """How well packing fills the devices, by cost; loads of several programs add up.

    Attributes:
      cost: of all clients' steps.
      spent: by all devices, until the last one is done.
      padded: what a `vmap` over each tier's clients would spend, padded to the largest.
    """

    cost: float = 0.0
    spent: float = 0.0
    padded: float = 0.0

    def plus(self, other: "Load") -> "Load":
        return Load(*map(sum, zip(self, other, strict=True)))


def client_steps(examples: int, config: ClientConfig) -> int:
    """How many batches a client with that many examples trains on in a round."""
    return config.steps or config.epochs * -(-examples // config.batch_size)


def client_examples(examples: int, config: ClientConfig, steps: int | None = None) -> int:
    """How many examples a client processes in its first `steps` batches of a round, or in all."""
    steps = client_steps(examples, config) if steps is None else steps
    epochs, rest = divmod(steps, -(-examples // config.batch_size))
    return epochs * examples + min(rest * config.batch_size, examples)


def client_batches(
    examples: Int[np.ndarray, " N"], config: ClientConfig, rng: np.random.Generator
) -> Int[np.ndarray, "steps B"]:
    """A client's batches of one round: each epoch shuffled anew, every example once an epoch."""
    size = config.batch_size
    per_epoch = -(-len(examples) // size)
    epochs = -(-client_steps(len(examples), config) // per_epoch)
    batches = np.full((epochs, per_epoch * size), -1, np.int32)
    for epoch in batches:
        epoch[: len(examples)] = rng.permutation(examples)
    return batches.reshape(-1, size)[: config.steps]


def pack(work: Sequence[Work], packing: Packing) -> Schedule:
    """Packs clients on lanes, each on the lane with the least cost so far, the costliest first.

    On its lane a client of an expensive tier comes before one of a cheap tier, so that lanes that
    take their steps together are in tiers of like cost. The step axis is padded to `packing.steps`,
    so that every round runs the same compiled program; a lane does not run the padding.
    """
    costs, per_device = packing.costs, packing.lanes // packing.devices
    loads, rows = [(0.0, lane) for lane in range(packing.lanes)], [0] * packing.devices
    queues: list[list[Work]] = [[] for _ in loads]
    at_row: dict[int, int] = {}
    for item in sorted(work, key=lambda w: (-costs[w.tier] * len(w.batches), w.client)):
        load, lane = heapq.heappop(loads)
        device = lane // per_device
        at_row[item.client] = rows[device]
        rows[device] += 1
        queues[lane].append(item)
        # A device whose rows of memory are all taken gets no more clients.
        if rows[device] < packing.rows:
            heapq.heappush(loads, (load + costs[item.tier] * len(item.batches), lane))
        else:
            loads = [entry for entry in loads if entry[1] // per_device != device]
            heapq.heapify(loads)
    cohort = _cohort(work, packing.slots, at_row)
    slots = {item.client: slot for slot, item in enumerate(sorted(work, key=lambda w: w.client))}
    shape = (packing.lanes, packing.steps)
    lanes = Lanes(
        examples=np.zeros((*shape, packing.batch_size), np.int32),
        real=np.zeros(shape, np.int32),
        slot=np.full(shape, packing.slots, np.int32),
        step=np.zeros(shape, np.int32),
    )
    length = np.zeros(packing.lanes, np.int32)
    for lane, queue in enumerate(queues):
        for item in sorted(queue, key=lambda w: (-costs[w.tier], -len(w.batches), w.client)):
            at = slice(length[lane], length[lane] + len(item.batches))
            # What does not count is the client's own all the same: its values reach its norms.
            lanes.examples[lane, at] = np.where(item.batches < 0, item.batches[:, :1], item.batches)
            lanes.real[lane, at] = (item.batches >= 0).sum(1)
            lanes.slot[lane, at] = slots[item.client]
            lanes.step[lane, at] = np.arange(len(item.batches))
            length[lane] = at.stop
    return Schedule(lanes, cohort, length)


def _cohort(work: Sequence[Work], slots: int, at_row: dict[int, int]) -> Cohort:
    """The table of the clients, padded to `slots`."""
    found = sorted(work, key=lambda w: w.client)

    def column(values: list[Any], dtype: type) -> np.ndarray:
        return np.pad(np.asarray(values, dtype), (0, slots - len(found)))

    return Cohort(
        client=column([w.client for w in found], np.int32),
        tier=column([w.tier for w in found], np.int32),
        examples=column([w.examples for w in found], np.int32),
        steps=column([len(w.batches) for w in found], np.int32),
        weight=column([w.weight for w in found], np.float32),
        fault=column([w.fault for w in found], np.int32),
        row=column([at_row[w.client] for w in found], np.int32),
    )


def load(work: Sequence[Work], schedule: Schedule, packing: Packing) -> Load:
    """How well `pack` filled the devices with this work."""
    tier_costs = np.asarray(packing.costs)
    slot_costs = np.append(tier_costs[np.asarray(schedule.cohort.tier)], 0.0)
    steps = slot_costs[np.asarray(schedule.lanes.slot)]
    lanes = steps.reshape(packing.devices, -1, steps.shape[-1])
    together = lanes.max(1) * lanes.shape[1] if packing.lockstep else lanes.sum(1)
    padded = 0.0
    for tier, cost in enumerate(packing.costs):
        own = [len(item.batches) for item in work if item.tier == tier]
        padded += cost * max(own, default=0) * len(own)
    return Load(float(steps.sum()), packing.devices * float(together.sum(-1).max()), padded)


def capacity(steps: Sequence[int], cohort: int, lanes: int, costs: Sequence[float]) -> int:
    """The most steps that a lane can be given in any round: `pack` is at most that uneven.

    Rounded up to a power of two or one and a half of it, so that populations of like size share a
    compiled program.

    Args:
      steps: of each client of the population in a round.
      cohort: how many of them train in a round.
      lanes: that they are packed on.
      costs: of a step in each tier.
    """
    largest = sorted(steps, reverse=True)[:cohort]
    all_on_one, spread = sum(largest), max(costs) / min(costs)
    even = spread * (all_on_one / lanes + (largest[0] if lanes > 1 else 0))
    need = int(min(all_on_one, np.ceil(even)))
    power = 1 << max(need - 1, 0).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= need else power
