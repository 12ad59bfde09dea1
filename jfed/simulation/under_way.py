"""A round that is under way on the devices, and the record that it ends with."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jfed.engine.merging import Report
from jfed.engine.packing import Load, Work
from jfed.models.losses import Metrics
from jfed.models.model import by_name
from jfed.simulation.evaluation import Tested
from jfed.simulation.local_tests import local_evaluation
from jfed.simulation.records import Evaluation, Record
from jfed.tiers.communication import Traffic


class UnderWay(NamedTuple):
    """What the host knows of a round under way, and arrays to come.

    Attributes:
      number: from 0.
      clients: how many got the model.
      work: of those that send something, by program, in the order of its slots.
      learning_rate: of the clients.
      traffic: of all clients together.
      load: of the devices.
      reports: of each program that trained, on the devices.
      evaluations: of each evaluated tier, on the devices.
      finite: whether all variables after the round are.
      local: of each call that tests clients on examples of their own, their numbers, and metrics on
        the devices.
      score: further metrics of a test, by name, of the probabilities of its examples.
      tier_of: the name of a client's tier.
      epsilon: spent by then.
      lasts: simulated seconds, where clients have devices.
    """

    number: int
    clients: int
    work: Sequence[Sequence[Work]]
    learning_rate: float
    traffic: Traffic
    load: Load
    reports: Sequence[Report]
    evaluations: dict[str, Tested]
    finite: Array | np.bool_
    local: Sequence[tuple[Sequence[int], Metrics]] = ()
    score: Callable[[np.ndarray], dict[str, float]] = lambda probabilities: {}
    tier_of: Callable[[int], str] = str
    epsilon: float | None = None
    lasts: float | None = None

    def ready(self) -> bool:
        """Whether all arrays have come."""
        arrays = jax.tree.leaves((self.reports, self.evaluations, self.finite, self.local))
        return all(x.is_ready() for x in arrays if isinstance(x, jax.Array))  # type: ignore[attr-defined]

    def fetch(self, before: Record | None, began: float) -> Record:
        """Waits for the arrays and makes the record that follows `before`.

        Loss and accuracy of a round in which no update counts are nan.

        Args:
          before: the record of the round before, None for the first round.
          began: `time.perf_counter()` when the first round began.
        """
        tested = {n: t._replace(statistics=None) for n, t in self.evaluations.items()}
        reports, tested, local = jax.device_get((self.reports, tested, self.local))
        sums = _sums([report.metrics for report in reports])
        examples = sums.get("examples", 0.0) or math.nan
        sent = sum(map(len, self.work))
        delivered = sum(int(report.delivered.sum()) for report in reports)
        return Record(
            round=self.number + 1,
            clients=self.clients,
            delivered=delivered,
            rejected=sent - delivered,
            dropped=self.clients - sent,
            examples=round(sums.get("examples", 0.0)),
            learning_rate=self.learning_rate,
            train_loss=sums.get("loss", math.nan) / examples,
            train_accuracy=sums.get("correct", math.nan) / examples,
            bytes_down=self.traffic.down,
            bytes_up=self.traffic.up,
            bytes_down_total=self.traffic.down + (before.bytes_down_total if before else 0),
            bytes_up_total=self.traffic.up + (before.bytes_up_total if before else 0),
            lane_utilisation=self.load.cost / (self.load.spent or 1.0),
            padded_utilisation=self.load.cost / (self.load.padded or 1.0),
            seconds=time.perf_counter() - began,
            # In their own order, which JAX does not keep.
            evaluations={name: self._evaluation(tested[name]) for name in self.evaluations},
            metrics=_means([report.metrics for report in reports]),
            local=local_evaluation(local, self.tier_of) if local else None,
            epsilon=self.epsilon,
            simulated_seconds=self._simulated(before),
        )

    def _simulated(self, before: Record | None) -> float | None:
        if self.lasts is None:
            return None
        return self.lasts + ((before and before.simulated_seconds) or 0.0)

    def _evaluation(self, tested: Tested) -> Evaluation:
        metrics, count, others = tested.metrics, int(tested.metrics.examples), {}
        if tested.probabilities is not None:
            others = self.score(np.asarray(tested.probabilities))
        others |= {name: float(value) / count for name, value in by_name(metrics.others).items()}
        return Evaluation(float(metrics.correct) / count, float(metrics.loss) / count, others)

    def diverged(self) -> bool:
        """Whether clients trained honestly and the updates of all of them were rejected."""
        if not self.reports:  # nobody sent anything
            return False
        rejected = [np.asarray(jax.device_get(report.rejected)) for report in self.reports]
        honest = [
            bool(gone[slot])
            for work, gone in zip(self.work, rejected, strict=True)
            for slot, item in enumerate(work)
            if item.fault == 0
        ]
        return bool(honest) and all(honest)


def _sums(metrics: Sequence[Any]) -> dict[str, float]:
    """Over all clients of all programs, in float64; a client's own count is exact in float32."""
    sums: dict[str, float] = {}
    for one in metrics:
        for name, values in by_name(one).items():
            sums[name] = sums.get(name, 0.0) + float(np.asarray(values, np.float64).sum())
    return sums


def _means(metrics: Sequence[Metrics]) -> dict[str, float]:
    """Of the users' own metrics, each over the examples of the programs that have it."""
    names = dict.fromkeys(name for one in metrics for name in by_name(one.others))
    found = {}
    for name in names:
        sums = _sums([one for one in metrics if name in by_name(one.others)])
        found[name] = sums[f"others/{name}"] / (sums["examples"] or math.nan)
    return found
