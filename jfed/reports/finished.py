"""Finished runs, read from their folders."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jfed import files
from jfed.errors import RunFolderError
from jfed.reports.labels import arm_labels
from jfed.settings import flat, read_settings


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
      round: after which it was.
      bytes_total: sent by then.
      accuracies: on the test set, by tier.
      local: mean accuracy of clients on examples of their own; None where that is not tested.
      seconds: simulated, by then; None where clients have no devices.
    """

    round: int
    bytes_total: int
    accuracies: Mapping[str, float]
    local: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What the folder of a finished run holds.

    Attributes:
      arm: what runs that differ only in their seed have in common; "" where not told.
      config: the settings in its `config.json`, nested as in `jfed.runs.config.RunConfig`.
      summary: its `summary.json`.
      history: its evaluations, from `metrics.csv`.
      source: the folder or table that it was read from; "" where not told.
    """

    arm: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: tuple[Point, ...]
    source: str = ""

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.config["seed"]

    @property
    def tiers(self) -> list[Mapping[str, Any]]:
        """What `jfed.reports.summary.TierSummary` says of each evaluated tier."""
        return self.summary["tiers"]

    @property
    def trained(self) -> list[Mapping[str, Any]]:
        """Likewise of those that clients trained."""
        return [tier for tier in self.tiers if tier["trained"]]

    @property
    def worst(self) -> float:
        """Test accuracy of the worst of the trained tiers."""
        return min(tier["accuracy"] for tier in self.trained)

    @property
    def average(self) -> float:
        """Test accuracy, the mean over the trained tiers, however many clients each has."""
        return float(np.mean([tier["accuracy"] for tier in self.trained]))

    @property
    def bytes_total(self) -> int:
        """Of all clients and rounds, in both directions."""
        return self.history[-1].bytes_total

    def average_at(self, point: Point) -> float:
        """As `average`, at an earlier evaluation."""
        return float(np.mean([point.accuracies[tier["tier"]] for tier in self.trained]))

    @property
    def local(self) -> Mapping[str, Any] | None:
        """What `jfed.simulation.records.LocalEvaluation.summary` says of the last round."""
        return self.summary.get("local")

    @property
    def seconds(self) -> float | None:
        """Simulated, of all rounds; None where clients have no devices."""
        return self.summary.get("simulated_seconds")

    @property
    def epsilon(self) -> float | None:
        """That its clients spent, where they are private."""
        found = self.summary.get("epsilon")
        return None if found is None else float(found)

    def reaching(self, target: float, *, local: bool = False) -> Point | None:
        """The first evaluation at which `average` was at least `target`; None if it never was.

        Args:
          target: from 0 to 1.
          local: of the mean accuracy of clients on examples of their own instead.
        """
        for point in self.history:
            value = point.local if local else self.average_at(point)
            if value is not None and value >= target:
                return point
        return None


def read(folder: epath.PathLike, arm: str = "") -> FinishedRun:
    """Reads a run folder; RunFolderError if it holds no finished run, or a damaged one."""
    path = files.absolute(folder)
    for name in ("config.json", "summary.json", "metrics.csv"):
        if not (path / name).exists():
            what = "no run" if name == "config.json" else "no finished run"
            raise RunFolderError(f"{str(path)!r} holds {what}: it has no {name}.")
    config, summary = read_settings(path)[0], files.read_json(path / "summary.json")
    try:
        history = _points((path / "metrics.csv").read_text())
        run = FinishedRun(arm, config, summary, history, str(folder))
        # What tables need, which a damaged file or another version of jfed may lack.
        _ = run.seed, run.bytes_total, summary["rounds"], summary["hardware"]["commit"]
        _ = [(t["kind"], t["flops"], t["iterations"], t["solver"]) for t in run.tiers]
        _ = [run.average, *map(run.average_at, run.history)]
        asked, done = config["rounds"], summary["rounds"]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{str(path)!r} is damaged, or of another version of jfed: {error!r}."
        ) from error
    if asked != done:
        raise RunFolderError(f"{str(path)!r} has not finished: it got {asked} rounds after {done}.")
    return run


def _points(metrics: str) -> tuple[Point, ...]:
    """The rounds of a `metrics.csv` that were evaluated."""
    prefix, points = "test_accuracy_", []
    for row in csv.DictReader(io.StringIO(metrics)):
        found = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix) and v}
        if found:
            sent = int(row["bytes_down_total"]) + int(row["bytes_up_total"])
            accuracies = {tier: float(accuracy) for tier, accuracy in found.items()}
            others = (row.get("local_accuracy_mean"), row.get("simulated_seconds"))
            local, seconds = (float(text) if text else None for text in others)
            points.append(Point(int(row["round"]), sent, accuracies, local, seconds))
    return tuple(points)


def read_all(
    paths: Sequence[epath.PathLike],
    names: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
) -> tuple[list[FinishedRun], list[str]]:
    """Reads run folders, and names arms by the settings in which they differ.

    Args:
      paths: of the folders.
      names: of settings, by their path, such as `client.learning_rate`; others go by their path.
      defaults: of settings, by name, which need not be told; see `arm_labels`.

    Returns:
      The runs, and why folders were left out, one text for each of those.

    Raises:
      RunFolderError: none of them holds a finished run.
    """
    if not paths:
        raise RunFolderError("no run folder was given; name at least one.")
    found, left_out = [], []
    for path in paths:
        try:
            found.append(read(path))
        except RunFolderError as error:
            left_out.append(str(error))
    if not found:
        raise RunFolderError(f"no finished run among {[str(path) for path in paths]}.")
    settings = [
        {names.get(path, path): value for path, value in flat(run.config).items()} for run in found
    ]
    arms = arm_labels(settings, defaults or {})
    runs = [dataclasses.replace(run, arm=arm) for run, arm in zip(found, arms, strict=True)]
    return runs, left_out
