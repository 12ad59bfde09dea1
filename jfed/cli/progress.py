"""The progress bar of a run."""

from tqdm import tqdm

from jfed.simulation.records import Record


class Progress:
    """A progress bar of rounds, with the latest loss and accuracies: a `records.Writer`."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._tested = rounds, ""
        self._bar: tqdm | None = None

    @property
    def began(self) -> bool:
        """Whether any rounds were left to do."""
        return self._bar is not None

    def begin(self, done: int) -> "Progress":
        """Shows the bar, some rounds done already."""
        self._bar = tqdm(
            total=self._rounds, initial=done, unit="round", dynamic_ncols=True, smoothing=0.1
        )
        return self

    def write(self, record: Record) -> None:
        parts = [f"loss {record.train_loss:.3f}", f"train {record.train_accuracy:.1%}"]
        parts = parts if record.examples else ["nobody delivered"]
        parts += [f"{record.rejected} rejected"] if record.rejected else []
        if record.evaluations:
            tested = [f"{name}: {e.accuracy:.1%}" for name, e in record.evaluations.items()]
            self._tested = "test " + " ".join(tested)
        parts += [self._tested] if self._tested else []
        assert self._bar is not None
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
