"""The clients of a round trained, and what they send merged: by the programs, or in Python."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jfed.algorithms.algorithm import Server
from jfed.data.preprocessing import Images
from jfed.engine import debug
from jfed.engine.devices import put
from jfed.engine.lanes import SCHEDULE, Inputs
from jfed.engine.merging import Report
from jfed.engine.packing import Load, Schedule, Work, load, pack
from jfed.models.model import Params
from jfed.simulation.client_rows import ClientRows, Trained
from jfed.simulation.groups import TierGroup
from jfed.simulation.programs import (
    SERVER,
    Compiled,
    Program,
    Specification,
    TrainArguments,
    make_merged,
    programs,
)
from jfed.simulation.training_images import TrainingImages
from jfed.tiers.parts import is_like


class Outcome(NamedTuple):
    """What a round's training came to; by default nobody trained.

    Attributes:
      server: what the server keeps after it.
      latest: see `State`.
      finite: whether all variables are.
      reports: of each program.
      load: of the devices.
    """

    server: Server
    latest: Any
    finite: Array | np.bool_ = np.bool_(True)
    reports: Sequence[Report] = ()
    load: Load = Load()


class CohortTraining:
    """Trains the clients of rounds on what lies on the devices.

    Args:
      spec: of the programs.
      groups: of tiers, one for each training.
      images: that clients train on.
      rows: of what they remember.
      message: shapes of the merged message.
    """

    def __init__(
        self,
        spec: Specification,
        groups: Sequence[TierGroup],
        images: TrainingImages,
        rows: ClientRows,
        message: Mapping[str, Any],
    ) -> None:
        self.spec, self.groups, self.rows = spec, groups, rows
        self._images, self._message = images, message
        self._mesh = spec.trainings[0].mesh

    def run(
        self,
        compiled: Compiled,
        inputs: Inputs,
        number: int,
        latest: Any,
        work: Sequence[Sequence[Work]],
    ) -> Outcome:
        """A round by the programs, or by the debug engine.

        Args:
          compiled: gives the programs.
          inputs: of the round.
          number: of the round.
          latest: see `State`.
          work: of each program.
        """
        if self.spec.trainings[0].mapping == "debug":
            return self._debug(inputs, number, latest, work)
        delivered, tiers, loads, kept = [], [], [], []
        for training, group, items in zip(self.spec.trainings, self.groups, work, strict=True):
            packed = pack(items, group.packing)
            loads.append(load(items, packed, group.packing))
            given = self.given(group, items, packed, inputs, latest)
            told, rows = compiled(Program("train", training.tiers))(*given)
            delivered.append(told)
            tiers.append(given.schedule.cohort.tier)
            kept.append(Trained(items, packed, group.packing, rows))
        reports = [told.report for told in delivered]
        server, finite = compiled(SERVER)(inputs.server, delivered, tiers, inputs.round, inputs.key)
        latest = self.rows.keep(number, latest, kept)
        return Outcome(server, latest, finite, reports, functools.reduce(Load.plus, loads))

    def _debug(
        self, inputs: Inputs, number: int, latest: Any, work: Sequence[Sequence[Work]]
    ) -> Outcome:
        sent: list[debug.Sent] = []
        reports, rows = [], {}
        for training, items in zip(self.spec.trainings, work, strict=True):
            told = []
            for item in items:
                before = self.rows.row(item.client, latest)
                one, rows[item.client] = debug.train(training, inputs, item, before)
                told.append(one)
            sent += told
            reports.append(debug.report(told))
        latest = self.rows.keep_rows(number, latest, rows)
        server, counts = inputs.server, sum(one.counts for one in sent)
        algorithm = self.spec.trainings[0].algorithm
        if counts or algorithm.is_private:
            message, owners = self._silence(server.variables)
            if counts:
                message, owners = debug.merge(sent, self.spec.aggregator, server.variables)
            merged = make_merged(
                self.spec, server.variables, inputs.key, inputs.round, message, owners, counts
            )
            server = algorithm.server_step(server, merged)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(server.variables)]
        return Outcome(server, latest, jnp.stack(finite).all(), reports)

    def _silence(self, variables: Params) -> tuple[dict[str, Any], Params]:
        """The merged message of a round in which nobody delivers, and the owners in it."""
        zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
        nothing, like = zeros(variables), self.spec.trainings[0].tiers[0].shapes(variables)
        parts = self._message.items()
        return {n: nothing if is_like(p, like) else zeros(p) for n, p in parts}, nothing

    def send(self, group: TierGroup, packed: Schedule) -> tuple[Schedule, Images]:
        """Sends each device its lanes and images, and all of them the table of clients."""
        lanes = packed.lanes
        needed = self._images.needed((np.asarray(lanes.examples), np.asarray(lanes.real)))
        packed = packed._replace(lanes=lanes._replace(examples=needed.indices[0]))
        parts = (put(x, self._mesh, spec) for x, spec in zip(packed, SCHEDULE, strict=True))
        return Schedule(*parts), self._images.send(needed, group.images)

    def given(
        self,
        group: TierGroup,
        items: Sequence[Work],
        packed: Schedule,
        inputs: Inputs,
        latest: Any,
    ) -> TrainArguments:
        """The arguments of a group's program, for clients that are packed."""
        schedule, images = self.send(group, packed)
        rows = self.rows.packed(items, packed, group.packing, latest)
        return TrainArguments(inputs._replace(images=images), schedule, rows)

    def arguments(self, inputs: Inputs, latest: Any) -> dict[Program, tuple[Any, ...]]:
        """The arguments of every program that trains, and of the server's, or like them."""
        found: dict[Program, tuple[Any, ...]] = {}
        delivered, tiers = [], []
        for training, group in zip(self.spec.trainings, self.groups, strict=True):
            program = Program("train", training.tiers)
            given = self.given(group, [], pack([], group.packing), inputs, latest)
            told, _ = programs(self.spec).shapes(program, *given)
            delivered.append(told)
            tiers.append(given.schedule.cohort.tier)
            found[program] = given
        return found | {SERVER: (inputs.server, delivered, tiers, inputs.round, inputs.key)}
