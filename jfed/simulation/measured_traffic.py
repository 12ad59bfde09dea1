"""Bytes of messages of a run, as they would travel: what codecs come to."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from jfed.algorithms.algorithm import Algorithm, Server, one_each
from jfed.algorithms.messages import to_bytes
from jfed.engine import debug
from jfed.engine.devices import to_host
from jfed.engine.lanes import Inputs
from jfed.engine.packing import Work, pack
from jfed.models.model import Params, path_name
from jfed.simulation.cohort_training import CohortTraining
from jfed.simulation.population import Population
from jfed.simulation.programs import Compiled, Program
from jfed.tiers import Tier
from jfed.tiers.communication import Traffic
from jfed.tiers.parts import map_parts

# `[tiers, 2]` bytes of one client of each tier: from the server, and to it.
Sizes = Int[np.ndarray, "tiers 2"]


def as_sizes(each: list[Traffic]) -> Sizes:
    """Traffic of every tier as an array, which a checkpoint can hold."""
    return np.asarray(each, np.int64).reshape(-1, 2)


class TrafficMeter:
    """Measures bytes of clients, on messages of a round.

    Args:
      training: of the federation.
      population: its clients.
    """

    def __init__(self, training: CohortTraining, population: Population) -> None:
        self._training, self._population = training, population
        self._algorithm = training.spec.trainings[0].algorithm

    def measure(
        self,
        compiled: Compiled,
        inputs: Inputs,
        number: int,
        latest: Any,
        sizes: Sizes,
        by_tier: Sequence[Sequence[Work]],
    ) -> Sizes:
        """Bytes of a client of each tier, of messages of this round: of the first of its clients.

        That one trains for it alone; nothing of it is kept.

        Args:
          compiled: gives the programs.
          inputs: of the round.
          number: of the round.
          latest: see `State`.
          sizes: as known before.
          by_tier: the work of the round.
        """
        found = np.zeros_like(sizes)
        for i, group in enumerate(self._training.groups):
            for place, tier in enumerate(group.tiers):
                if by_tier[tier]:
                    client = by_tier[tier][0].client
                else:
                    client = int(np.flatnonzero(self._population.tier == tier)[0])
                item = self._population.alone(number, client, place)
                message = self._message(compiled, i, inputs, item, latest)
                if message is None:  # it would not count; so nothing is known anew
                    found[tier] = sizes[tier]
                    continue
                member = self._training.spec.trainings[i].tiers[place]
                shapes = member.shapes(inputs.server.variables)
                cut = to_host(self._send(member, inputs.server, inputs.round))
                found[tier] = [
                    wire_bytes(member, self._algorithm, shapes, tree) for tree in (cut, message)
                ]
        return found

    @functools.cached_property
    def _send(self) -> Callable[[Tier, Server, Array], Any]:
        """What the server sends to a client of a tier, and when."""

        def send(tier: Tier, server: Server, round_: Array) -> Any:
            whole = self._algorithm.send(server)
            return map_parts(lambda v: tier.extract(v, round_), server.variables, whole)

        return jax.jit(send, static_argnums=0)

    def _message(
        self, compiled: Compiled, i: int, inputs: Inputs, item: Work, latest: Any
    ) -> dict[str, Any] | None:
        """What one client sends that trains alone by a program, cut to its tier, on the host.

        None if it would not count. Where the program changes what arrives, by weights other than 1
        or the server's clipping, the debug engine trains the client.
        """
        group, training = self._training.groups[i], self._training.spec.trainings[i]
        weights = [self._algorithm.weights.get(n, one_each) for n in self._algorithm.parts]
        is_changed = training.clip is not None or any(w is not one_each for w in weights)
        if is_changed or training.mapping == "debug":
            plain = dataclasses.replace(training, clip=None)
            row = self._training.rows.row(item.client, latest)
            one, _ = debug.train(plain, inputs, item, row)
            like, tier = inputs.server.variables, training.tiers[item.tier]
            found = map_parts(lambda v: tier.extract(v, inputs.round), like, one.parts)
            return to_host(found) if one.counts else None
        packed = pack([item], group.packing)
        given = self._training.given(group, [item], packed, inputs, latest)
        told, _ = compiled(Program("train", training.tiers))(*given)
        found = told.of_one(training.tiers[0].shapes(inputs.server.variables))
        return to_host(found) if np.asarray(told.report.delivered).any() else None


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
