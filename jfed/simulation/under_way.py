"""A round that is under way on the devices, and the record that it ends with."""

import math
import time
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jfed.engine.lanes import Report
from jfed.engine.packing import Load
from jfed.models.losses import Metrics
from jfed.simulation.records import Evaluation, Record
from jfed.tiers.communication import Traffic


class UnderWay(NamedTuple):
    """What the host knows of a round under way, and arrays to come.

    Attributes:
      number: from 0.
      clients: how many got the model.
      dropped: how many of them send nothing.
      honest: how many send what they trained.
      learning_rate: of the clients.
      traffic: of all clients together.
      load: of the lanes.
      reports: of each tier that trained, on the devices.
      evaluations: of each evaluated tier, on the devices.
      finite: whether all variables after the round are.
    """

    number: int
    clients: int
    dropped: int
    honest: int
    learning_rate: float
    traffic: Traffic
    load: Load
    reports: list[Report]
    evaluations: dict[str, Metrics]
    finite: Array | np.bool_

    def ready(self) -> bool:
        """Whether all arrays have come."""
        arrays = jax.tree.leaves((self.reports, self.evaluations, self.finite))
        return all(x.is_ready() for x in arrays if isinstance(x, jax.Array))  # type: ignore[attr-defined]

    def fetch(self, before: Record | None, began: float) -> Record:
        """Waits for the arrays and makes the record that follows `before`.

        Loss and accuracy of a round in which no update counts are nan.

        Args:
          before: the record of the round before, None for the first round.
          began: `time.perf_counter()` when the first round began.
        """
        sums, evaluations = self._sums(), jax.device_get(self.evaluations)
        examples = sums["examples"] or math.nan
        return Record(
            round=self.number + 1,
            clients=self.clients,
            delivered=int(sums["delivered"]),
            rejected=int(sums["rejected"]),
            dropped=self.dropped,
            examples=int(sums["examples"]),
            learning_rate=self.learning_rate,
            train_loss=sums["loss"] / examples,
            train_accuracy=sums["correct"] / examples,
            bytes_down=self.traffic.down,
            bytes_up=self.traffic.up,
            bytes_down_total=self.traffic.down + (before.bytes_down_total if before else 0),
            bytes_up_total=self.traffic.up + (before.bytes_up_total if before else 0),
            lane_utilisation=self.load.steps / max(self.load.lanes, 1),
            padded_utilisation=self.load.steps / max(self.load.padded, 1),
            seconds=time.perf_counter() - began,
            evaluations={
                name: Evaluation(float(m.correct / m.examples), float(m.loss / m.examples))
                for name, m in evaluations.items()
            },
        )

    def diverged(self) -> bool:
        """Whether clients trained honestly and the updates of all of them were rejected."""
        return 0 < self.honest == int(self._sums()["lost"])

    def _sums(self) -> dict[str, float]:
        """The fields of the reports, summed over tiers."""
        reports = jax.device_get(self.reports)
        return {
            name: sum((float(getattr(report, name)) for report in reports), start=0.0)
            for name in Report._fields
        }
