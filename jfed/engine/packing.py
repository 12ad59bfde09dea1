"""Packing: which lane trains which client's batches, and when. Host work, in NumPy.

Clients are packed on lanes longest first. A lane trains client after client without pause, so
clients of different sizes cost no padding.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jfed.engine.client import ClientConfig

IntArray = Int[Array, "..."] | Int[np.ndarray, "..."]


class Work(NamedTuple):
    """One client's work in a round.

    Attributes:
      client: its number, part of the random keys.
      batches: `[steps, B]` indices of examples, -1 for padding.
      weight: of its update in the mean.
      fault: what is wrong with its update, see `jfed.engine.faults`; 0 for nothing.
    """

    client: int
    batches: Int[np.ndarray, "steps B"]
    weight: float
    fault: int = 0


class Steps(NamedTuple):
    """What each lane does at each step, with axes lane and step.

    Attributes:
      examples: `[L, S, B]` indices, -1 for padding.
      client: `[L, S]` which client.
      step: `[L, S]` which of the client's steps, from 0.
      start: `[L, S]` True at a client's first step.
      weight: `[L, S]` the client's weight at its last step, 0 elsewhere.
      fault: `[L, S]` that of the client's work.
      slot: `[L, S]` the client's place among the tier's clients of the round, by their numbers.
    """

    examples: IntArray
    client: IntArray
    step: IntArray
    start: Bool[np.ndarray, "..."] | Bool[Array, "..."]
    weight: Float[np.ndarray, "..."] | Float[Array, "..."]
    fault: IntArray
    slot: IntArray


class Schedule(NamedTuple):
    """A tier's cohort packed on lanes.

    Attributes:
      steps: what each lane does; after `length` steps only padding.
      length: how many steps the longest lane does.
    """

    steps: Steps
    length: Int[Array, ""] | Int[np.ndarray, ""]


class Load(NamedTuple):
    """How well packing fills the lanes; loads of several tiers add up.

    Attributes:
      steps: of all clients.
      lanes: steps of the longest lane times lanes: what the devices spend.
      padded: steps of the largest client times clients: what a vmap over clients would spend.
    """

    steps: int
    lanes: int
    padded: int

    def plus(self, other: "Load") -> "Load":
        return Load(*map(sum, zip(self, other, strict=True)))


def client_steps(examples: int, config: ClientConfig) -> int:
    """How many batches a client with that many examples trains on in a round."""
    return config.steps or config.epochs * -(-examples // config.batch_size)


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


def pack(work: Sequence[Work], lanes: int, batch_size: int, steps: int) -> Schedule:
    """Packs clients on lanes, longest first, each on the lane with the least work so far.

    The step axis is padded to `steps`, see `capacity`, so that every round runs the same compiled
    program; a lane does not run the padding.
    """
    queues: list[list[Work]] = [[] for _ in range(lanes)]
    loads = [(0, lane) for lane in range(lanes)]
    for item in sorted(work, key=lambda w: (-len(w.batches), w.client)):
        load, lane = heapq.heappop(loads)
        queues[lane].append(item)
        heapq.heappush(loads, (load + len(item.batches), lane))
    length = max(load for load, _ in loads)
    slots = {number: slot for slot, number in enumerate(sorted(w.client for w in work))}
    shape = (lanes, steps)
    packed = Steps(
        examples=np.full((*shape, batch_size), -1, np.int32),
        client=np.zeros(shape, np.int32),
        step=np.zeros(shape, np.int32),
        start=np.zeros(shape, bool),
        weight=np.zeros(shape, np.float32),
        fault=np.zeros(shape, np.int32),
        slot=np.zeros(shape, np.int32),
    )
    for lane, queue in enumerate(queues):
        at = 0
        for item in queue:
            end = at + len(item.batches)
            packed.examples[lane, at:end] = item.batches
            packed.client[lane, at:end] = item.client
            packed.step[lane, at:end] = np.arange(end - at)
            packed.start[lane, at] = True
            packed.weight[lane, end - 1] = item.weight
            packed.fault[lane, at:end] = item.fault
            packed.slot[lane, at:end] = slots[item.client]
            at = end
    return Schedule(packed, np.asarray(length, np.int32))


def load(work: Sequence[Work], schedule: Schedule) -> Load:
    """How well `pack` filled the lanes with this work."""
    steps = [len(item.batches) for item in work]
    lanes = len(schedule.steps.start) * int(schedule.length)
    return Load(sum(steps), lanes, max(steps, default=0) * len(steps))


def capacity(steps: Sequence[int], cohort: int, lanes: int) -> int:
    """The most steps that a lane can be given in any round: `pack` is at most that uneven.

    Args:
      steps: of each client of the population in a round.
      cohort: how many of them train in a round.
      lanes: that they are packed on.
    """
    largest = sorted(steps, reverse=True)[:cohort]
    return -(-sum(largest) // lanes) + (largest[0] if lanes > 1 else 0)
