"""The clients of a round trained, and what they send merged: by the programs, or in Python."""

import dataclasses
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
from jfed.engine.lanes import SCHEDULE
from jfed.engine.merging import Report
from jfed.engine.packing import Load, Schedule, Work, load, pack
from jfed.models.model import Params
from jfed.simulation.client_rows import ClientRows, Trained
from jfed.simulation.groups import TierGroup
from jfed.simulation.programs import (
    SERVER,
    Arguments,
    Compiled,
    Program,
    RoundStart,
    Specification,
    TrainArguments,
    all_finite,
    make_merged,
    programs,
)
from jfed.simulation.training_images import TrainingImages
from jfed.tiers.parts import map_parts


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


@dataclasses.dataclass(frozen=True, eq=False)
class CohortTraining:
    """Trains the clients of rounds on what lies on the devices, and merges what they send.

    Attributes:
      spec: of the programs.
      images: that clients train on.
      rows: of what they remember.
      groups: of tiers, one for each training.
      message: shapes of the merged message.
    """

    spec: Specification
    images: TrainingImages
    rows: ClientRows
    groups: Sequence[TierGroup]
    message: Mapping[str, Any]

    def run(self, compiled: Compiled, start: RoundStart, work: Sequence[Sequence[Work]]) -> Outcome:
        """A round in which each program has this work, by the programs or by the debug engine."""
        if self.spec.trainings[0].mapping == "debug":
            return self._debug(start, work)
        inputs, delivered, tiers, loads, kept = start.inputs, [], [], [], []
        for group, items in zip(self.groups, work, strict=True):
            packed = pack(items, group.packing)
            loads.append(load(items, packed, group.packing))
            given = self.given(group, items, packed, start)
            told, rows = compiled(group.program)(*given)
            delivered.append(told)
            tiers.append(given.schedule.cohort.tier)
            kept.append(Trained(items, packed, group.packing, rows))
        reports = [told.report for told in delivered]
        server, finite = compiled(SERVER)(inputs.server, delivered, tiers, inputs.round, inputs.key)
        latest = self.rows.keep(start.number, start.latest, kept)
        return Outcome(server, latest, finite, reports, functools.reduce(Load.plus, loads))

    def _debug(self, start: RoundStart, work: Sequence[Sequence[Work]]) -> Outcome:
        inputs, reports, rows = start.inputs, [], {}
        sent: list[debug.Sent] = []
        for training, items in zip(self.spec.trainings, work, strict=True):
            told = []
            for item in items:
                before = self.rows.row(item.client, start.latest)
                one, rows[item.client] = debug.train(training, inputs, item, before)
                told.append(one)
            sent += told
            reports.append(debug.report(told))
        latest = self.rows.keep_rows(start.number, start.latest, rows)
        server, counts = inputs.server, sum(one.counts for one in sent)
        if counts or self.spec.algorithm.is_private:
            message, owners = self._silence(server.variables)
            if counts:
                message, owners = debug.merge(sent, self.spec.aggregator, server.variables)
            merged = make_merged(
                self.spec, server.variables, inputs.key, inputs.round, message, owners, counts
            )
            server = self.spec.algorithm.server_step(server, merged)
        return Outcome(server, latest, all_finite(server.variables), reports)

    def _silence(self, variables: Params) -> tuple[dict[str, Any], Params]:
        """The merged message of a round in which nobody delivers, and the owners in it."""
        like = self.spec.trainings[0].tiers[0].shapes(variables)
        message = map_parts(lambda part: variables, like, dict(self.message))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (message, variables))

    def send(self, group: TierGroup, packed: Schedule) -> tuple[Schedule, Images]:
        """Sends each device its lanes and images, and all of them the table of clients."""
        lanes = packed.lanes
        needed = self.images.needed((np.asarray(lanes.examples), np.asarray(lanes.real)))
        packed = packed._replace(lanes=lanes._replace(examples=needed.indices[0]))
        parts = (put(x, self.spec.mesh, how) for x, how in zip(packed, SCHEDULE, strict=True))
        return Schedule(*parts), self.images.send(needed, group.images)

    def given(
        self, group: TierGroup, items: Sequence[Work], packed: Schedule, start: RoundStart
    ) -> TrainArguments:
        """The arguments of a group's program, for clients that are packed."""
        schedule, images = self.send(group, packed)
        rows = self.rows.packed(items, packed, group.packing, start.latest)
        return TrainArguments(start.inputs._replace(images=images), schedule, rows)

    def arguments(self, start: RoundStart) -> Arguments:
        """The arguments of every program that trains, and of the server's, or like them."""
        found: dict[Program, tuple[Any, ...]] = {}
        inputs, delivered, tiers = start.inputs, [], []
        for group in self.groups:
            given = self.given(group, [], pack([], group.packing), start)
            told, _ = programs(self.spec).shapes(group.program, *given)
            delivered.append(told)
            tiers.append(given.schedule.cohort.tier)
            found[group.program] = given
        return found | {SERVER: (inputs.server, delivered, tiers, inputs.round, inputs.key)}
