"""What a run records: one `Record` a round."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from jfed.errors import ConfigError
from jfed.files import is_local, write_text


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How one tier does on the test set.

    Attributes:
      accuracy: from 0 to 1.
      loss: in nats an example.
      metrics: those of `EvaluationConfig.metrics`, and means over the examples of its `measure`, by
        name; nan where a metric has no value.
    """

    accuracy: float
    loss: float
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LocalEvaluation:
    """How clients do, each on test examples of its own, see `EvaluationConfig.local_test`.

    Attributes:
      clients: their numbers, ascending; those without a tier are left out.
      tiers: the name of each one's tier.
      accuracies: of each, from 0 to 1.
      examples: that each was tested on.
    """

    clients: tuple[int, ...]
    tiers: tuple[str, ...]
    accuracies: tuple[float, ...]
    examples: tuple[int, ...]

    @property
    def summary(self) -> dict[str, float]:
        """Over clients: mean, mean by examples, worst, 10th percentile, standard deviation."""
        values = np.asarray(self.accuracies)
        return {
            "mean": float(values.mean()),
            "weighted": float(np.average(values, weights=self.examples)),
            "worst": float(values.min()),
            "p10": float(np.percentile(values, 10)),
            "std": float(values.std()),
        }

    @property
    def by_tier(self) -> dict[str, float]:
        """Mean accuracy over the clients of each tier."""
        names, values = np.asarray(self.tiers), np.asarray(self.accuracies)
        order = sorted(set(self.tiers), key=lambda name: (len(name), name))
        return {name: float(values[names == name].mean()) for name in order}

    def columns(self) -> dict[str, float]:
        """As columns of `metrics.csv`."""
        found = {f"local_accuracy_{name}": value for name, value in self.summary.items()}
        return found | {f"local_accuracy_of_{name}": v for name, v in self.by_tier.items()}


@dataclasses.dataclass(frozen=True)
class Record:
    """One round.

    Attributes:
      round: from 1.
      clients: how many got the model: those that were sampled and have a tier.
      delivered: how many of them sent an update that counts.
      rejected: how many sent an update that is not finite, or had such a loss; these are left out
        of the model and of the columns below.
      dropped: how many sent nothing; `clients` is the sum of the three.
      examples: how many examples those that delivered trained on, epochs counted.
      learning_rate: of the clients.
      train_loss: mean over these examples while training, in nats; nan if nobody delivered.
      train_accuracy: likewise, from 0 to 1.
      bytes_down: from the server to the clients in this round.
      bytes_up: from the clients to the server in this round.
      bytes_down_total: since the first round.
      bytes_up_total: since the first round.
      lane_utilisation: share of what all devices spent until the last one was done that trained
        clients, from 0 to 1; by cost, where tiers differ in it.
      padded_utilisation: what that share would be, had every client been padded to its tier's
        largest, as a plain vmap over clients does.
      seconds: since the first round began; compiling happens before.
      evaluations: by tier name; empty in a round without evaluation.
      metrics: means over the examples trained on, of a loss's `Metrics.others`, by name.
      local: how clients do on examples of their own, where that is tested.
      epsilon: spent since the first round, where clients are private; None in a round without
        evaluation.
      simulated_seconds: since the first round, on the clients' devices; None where they have none.
    """

    round: int
    clients: int
    delivered: int
    rejected: int
    dropped: int
    examples: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    bytes_down: int
    bytes_up: int
    bytes_down_total: int
    bytes_up_total: int
    lane_utilisation: float
    padded_utilisation: float
    seconds: float
    evaluations: dict[str, Evaluation] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    local: LocalEvaluation | None = None
    epsilon: float | None = None
    simulated_seconds: float | None = None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Record":
        """The inverse of `dataclasses.asdict`."""
        evaluations = {name: Evaluation(**e) for name, e in fields["evaluations"].items()}
        local = fields["local"]
        if local is not None:  # whose sequences JSON made lists
            local = LocalEvaluation(**{name: tuple(values) for name, values in local.items()})
        return cls(**fields | {"evaluations": evaluations, "local": local})

    def row(self) -> dict[str, Any]:
        """The record as flat columns."""
        flat = dataclasses.asdict(self)
        for name in _NESTED:
            del flat[name]
        flat |= {f"train_{name}": value for name, value in self.metrics.items()}
        for name, evaluation in self.evaluations.items():
            measured = {"accuracy": evaluation.accuracy, "loss": evaluation.loss}
            measured |= evaluation.metrics
            flat |= {f"test_{what}_{name}": value for what, value in measured.items()}
        single = {name: getattr(self, name) for name in _SOMETIMES}
        flat |= {name: value for name, value in single.items() if value is not None}
        return flat | (self.local.columns() if self.local else {})


# The fields of a record that are a column of some runs, and those that are several columns or none.
_SOMETIMES = ("epsilon", "simulated_seconds")
_NESTED = ("evaluations", "metrics", "local", *_SOMETIMES)


def columns(
    tiers: Sequence[str],
    trained: Sequence[str] = (),
    tested: Sequence[str] = (),
    local: Sequence[str] = (),
    *,
    is_private: bool = False,
    is_timed: bool = False,
) -> list[str]:
    """The columns of `metrics.csv`; ConfigError if two have one name.

    Args:
      tiers: that are evaluated.
      trained: names of `Record.metrics`.
      tested: names of `Evaluation.metrics`.
      local: tiers of clients that are tested on examples of their own.
      is_private: whether clients are.
      is_timed: whether they have devices.
    """
    own = [f.name for f in dataclasses.fields(Record) if f.name not in _NESTED]
    train = [f"train_{name}" for name in trained]
    kinds = ("accuracy", "loss", *tested)
    found = own + train + [f"test_{what}_{tier}" for tier in tiers for what in kinds]
    found += [n for n, there in zip(_SOMETIMES, (is_private, is_timed), strict=True) if there]
    if local:
        found += [f"local_accuracy_{what}" for what in ("mean", "weighted", "worst", "p10", "std")]
        found += [f"local_accuracy_of_{tier}" for tier in local]
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ConfigError(f"metrics.csv would have two columns {twice[0]!r}; rename the metric.")
    return found


@runtime_checkable
class Writer(Protocol):
    """Where records go as rounds end."""

    def write(self, record: Record) -> None:
        """Takes the record of the next round."""

    def close(self) -> None:
        """Writes what is left."""


class CsvWriter:
    """Records as lines of a CSV file, each on disk before `write` returns.

    Where files cannot be appended to (`gs://`) lines are written on `flush` and `close`.

    Args:
      path: of the file; replaced if it exists.
      names: of its columns, see `columns`.
      history: records to begin with.
    """

    def __init__(
        self, path: epath.PathLike, names: Sequence[str], history: Sequence[Record] = ()
    ) -> None:
        self._path, self._columns = epath.Path(path), names
        self._text = csv_text(names, history)
        write_text(self._path, self._text)
        self._file = open(self._path, "a", newline="") if is_local(path) else None  # noqa: SIM115

    def write(self, record: Record) -> None:
        """Appends a line in one piece."""
        line = _lines(self._columns, [record])
        if self._file is None:
            self._text += line
        else:
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        """Writes the lines that are held back."""
        if self._file is None:
            self._path.write_text(self._text)

    def close(self) -> None:
        """Writes the lines that are held back, and closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def csv_text(names: Sequence[str], history: Sequence[Record]) -> str:
    """What `metrics.csv` holds after these records, given the names of its columns."""
    return ",".join(names) + "\n" + _lines(names, history)


def _lines(names: Sequence[str], records: Sequence[Record]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, names, lineterminator="\n").writerows(r.row() for r in records)
    return text.getvalue()
