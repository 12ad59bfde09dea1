"""Bytes of messages of a run, as they would travel: what codecs come to."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from jfed.algorithms.algorithm import Algorithm, Server, one_each
from jfed.algorithms.messages import to_bytes
from jfed.engine import debug
from jfed.engine.devices import to_host
from jfed.engine.packing import Work, pack
from jfed.models.model import Params, path_name
from jfed.seeds import generator
from jfed.simulation.cohort_training import CohortTraining
from jfed.simulation.population import Population
from jfed.simulation.programs import Compiled, RoundStart
from jfed.tiers import Tier
from jfed.tiers.communication import Traffic
from jfed.tiers.parts import map_parts

# `[tiers, 2]` bytes of one client of each tier: from the server, and to it.
Sizes = Int[np.ndarray, "tiers 2"]


def as_sizes(each: list[Traffic]) -> Sizes:
    """Traffic of every tier as an array, which a checkpoint can hold."""
    return np.asarray(each, np.int64).reshape(-1, 2)


def measure(
    training: CohortTraining,
    population: Population,
    compiled: Compiled,
    start: RoundStart,
    by_tier: Sequence[Sequence[Work]],
    before: Sizes,
) -> Sizes:
    """Bytes of a client of each tier, of messages of a round: of one of its clients, at random.

    That one trains for it alone; nothing of it is kept.

    Args:
      training: of the federation.
      population: its clients.
      compiled: gives the programs.
      start: of the round.
      by_tier: the work of the round.
      before: the sizes as last known, which stay where a message would not count.
    """
    found, inputs = before.copy(), start.inputs
    for i, (group, own) in enumerate(zip(training.groups, training.spec.trainings, strict=True)):
        for place, (number, tier) in enumerate(zip(group.tiers, own.tiers, strict=True)):
            some = [item.client for item in by_tier[number]]
            some = some or np.flatnonzero(population.tier == number).tolist()
            rng = generator(population.seed, "measured traffic", start.number, number)
            client = some[rng.integers(len(some))]
            item = population.alone(start.number, client, place)
            message = _message(training, compiled, i, item, start)
            if message is not None:
                sent = to_host(_sent(own.algorithm, tier, inputs.server, inputs.round))
                shapes = tier.shapes(inputs.server.variables)
                each = [wire_bytes(tier, own.algorithm, shapes, tree) for tree in (sent, message)]
                found[number] = each
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sent(algorithm: Algorithm, tier: Tier, server: Server, round_: Array) -> Any:
    """What the server sends to a client of a tier, and when."""
    return map_parts(lambda v: tier.extract(v, round_), server.variables, algorithm.send(server))


def _message(
    training: CohortTraining, compiled: Compiled, i: int, item: Work, start: RoundStart
) -> dict[str, Any] | None:
    """What one client sends that trains alone by a program, cut to its tier, on the host.

    None if it would not count. Where the program changes what arrives, by weights other than 1 or
    the server's clipping, the debug engine trains the client.
    """
    group, own = training.groups[i], training.spec.trainings[i]
    inputs, weights = start.inputs, own.algorithm.weights
    variables = inputs.server.variables
    is_weighted = any(weights.get(part, one_each) is not one_each for part in own.algorithm.parts)
    if is_weighted or own.clip is not None or own.mapping == "debug":
        row, tier = training.rows.row(item.client, start.latest), own.tiers[item.tier]
        one, _ = debug.train(dataclasses.replace(own, clip=None), inputs, item, row)
        found = map_parts(lambda v: tier.extract(v, inputs.round), variables, one.parts)
        return to_host(found) if one.counts else None
    given = training.given(group, [item], pack([item], group.packing), start)
    told, _ = compiled(group.program)(*given)
    counts = np.asarray(told.report.delivered).any()
    return to_host(told.of_one(own.tiers[0].shapes(variables))) if counts else None


def round_traffic(
    sizes: Sizes, cohort: Sequence[np.ndarray], done: Sequence[Sequence[Work]]
) -> Traffic:
    """The model to the whole cohort, and an update from each client that did work, by tier."""
    counts = [[len(c), len(work)] for c, work in zip(cohort, done, strict=True)]
    return Traffic(*map(int, (np.asarray(counts, np.int64) * sizes).sum(0)))


def wire_bytes(tier: Tier, algorithm: Algorithm, like: Params, tree: Any) -> int:
    """Bytes of what goes between the server and a client of a tier, in one message.

    Args:
      tier: of the client. Of trees like its variables, what it owns travels.
      algorithm: whose personal leaves do not travel.
      like: the tier's variables; only shapes and dtypes matter.
      tree: what is sent, arrays on the host.
    """
    arrays: list[np.ndarray] = []

    def owned(part: Params) -> Params:
        arrays.extend(_travelling(tier, algorithm, part))
        return part

    def other(leaf: Any) -> Any:
        arrays.append(np.asarray(leaf))
        return leaf

    map_parts(owned, like, tree, otherwise=other)
    return len(to_bytes(arrays))


def _travelling(tier: Tier, algorithm: Algorithm, part: Params) -> list[np.ndarray]:
    """Of a tree like the tier's variables, the arrays that travel; of some, a few entries."""
    found = []
    own = None if tier.mask is None else jax.tree.leaves(tier.mask(part, tier.setting))
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(part)):
        if algorithm.personal is not None and algorithm.personal(path_name(path)):
            continue
        array = np.asarray(leaf)
        if own is not None and not np.all(mine := np.asarray(own[i]) > 0):
            mine = np.broadcast_to(mine, array.shape).reshape(len(array), -1)
            rows = mine[:, 0]  # of tiers that have a row of their own, which keeps its shape
            is_rows = (mine == rows[:, None]).all()
            array = array[rows] if is_rows else array.reshape(mine.shape)[mine]
        found.append(array)
    return found
