"""How a run tells how far it is."""

import sys
import time

from tqdm import tqdm

from jfed.simulation.records import Record

_EVERY = 30.0  # seconds between two lines of a log


class Progress:
    """A bar of rounds, with the latest loss and accuracies: a `records.Writer`.

    Where no terminal shows it, as in the log of a batch job, a line at most every half a minute,
    and of the last round.
    """

    def __init__(self, rounds: int) -> None:
        self._rounds, self._tested, self._told = rounds, "", time.monotonic()
        self._bar: tqdm | None = None
        self._line = ""  # of the last round, while it is not written

    @property
    def began(self) -> bool:
        """Whether any rounds were left to do."""
        return self._bar is not None

    def begin(self, done: int) -> "Progress":
        """Shows the bar, some rounds done already."""
        self._bar = tqdm(
            total=self._rounds,
            initial=done,
            unit="round",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=None,  # where there is no terminal
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
        told, now = ", ".join(parts), time.monotonic()
        assert self._bar is not None
        self._bar.set_postfix_str(told, refresh=False)
        self._bar.update()
        self._line = f"round {record.round} of {self._rounds}: {told}"
        if now - self._told > _EVERY:
            self._tell()
            self._told = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._tell()

    def _tell(self) -> None:
        if self._bar is not None and self._bar.disable and self._line:
            print(self._line, file=sys.stderr, flush=True)
            self._line = ""
