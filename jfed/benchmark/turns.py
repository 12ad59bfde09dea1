"""A race: contenders in their processes, checked to do the same work, timed in turns.

In a simulation one round follows another, so a turn is two rounds, of which the second is timed.
After the others' turns, the first finds cold caches, and must get back the memory that it had
freed: from the host, where a virtual machine reports free pages to it. On such a machine (AMD EPYC,
Linux 6.18, 2026-11-23) the first round of an ODENet 16/32/64 took 1.1 s, the next 0.7.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jfed.benchmark.contenders import Contender
from jfed.benchmark.tasks import RoundWork
from jfed.benchmark.timing import interleaved
from jfed.benchmark.workers import (
    Memory,
    NotInstalledError,
    Ready,
    Seconds,
    Worker,
    WorkerError,
    started,
)

# Of the global update of one round, relative to its size. Rounding makes 1e-6 to 1e-4 of it;
# another order of examples, or another network, makes 1.
TOLERANCE = 0.02


@dataclasses.dataclass
class Measured:
    """What came of a contender.

    Attributes:
      contender: which.
      seconds: of each timed round.
      work: what a round amounts to.
      build_seconds: of building and compiling, while other processes did the same.
      cpu_seconds: of all cores together in each timed round. Other programs lengthen them far less
        than they lengthen `seconds`.
      losses: mean training loss of each round, the untimed ones included, where it is known.
      disagreement: of its global update after the first round with the first contender's, relative.
      memory: peak of the process after the last round.
      host_seconds: of jfed's work on the host in some rounds, where asked for.
      skipped: why it did not take part: what it needs is not installed.
      error: what failed.
    """

    contender: Contender
    seconds: list[float] = dataclasses.field(default_factory=list)
    work: RoundWork | None = None
    build_seconds: float | None = None
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    disagreement: float | None = None
    memory: Memory | None = None
    host_seconds: list[float] = dataclasses.field(default_factory=list)
    skipped: str | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        """Of the seconds a round; None where none was timed."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def flops_per_second(self) -> float | None:
        """By the median."""
        if self.median is None or self.work is None:
            return None
        return self.work.flops / self.median

    @property
    def out_of_memory(self) -> bool:
        """Whether it failed for want of memory."""
        signs = ("RESOURCE_EXHAUSTED", "out of memory", "MemoryError", "exit status -9")
        return self.error is not None and any(sign in self.error for sign in signs)


Progress = Callable[[str], None]


class _Entry:
    """A contender in the race: its process, and what was measured of it."""

    def __init__(self, worker: Worker, progress: Progress) -> None:
        self.worker, self.measured = worker, Measured(worker.contender)
        self.rounds, self._progress = 0, progress

    @property
    def running(self) -> bool:
        return self.measured.error is None and self.measured.skipped is None

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Does something with the process; an error takes the contender out of the race."""
        if not self.running:
            return None
        try:
            return action(*arguments)
        except NotInstalledError as error:
            self.measured.skipped = str(error)
        except WorkerError as error:
            self.measured.error = str(error)
        return None

    def await_ready(self) -> None:
        ready: Ready | None = self.attempt(self.worker.ready)
        if ready is not None:
            self.measured.work, self.measured.build_seconds = ready

    def turn(self) -> float | None:
        """Does a round untimed and times the next; None if it failed.

        A slow contender that has done a round before is spared the untimed one.
        """
        if not (self.worker.contender.once and self.rounds):
            self.round()
        found = self.round()
        if found is None:
            return None
        self.measured.cpu_seconds.append(found.cpu)
        return found.wall

    def round(self) -> Seconds | None:
        """Does the next round; None if it failed."""
        answer = self.attempt(self.worker.ask, "round", self.rounds)
        if answer is None:
            return None
        seconds, loss = answer
        self._progress(f"  {self.worker.contender.name}, round {self.rounds}: {seconds.wall:.3f} s")
        self.rounds += 1
        if loss is not None:
            self.measured.losses.append(loss)
        return seconds

    def variables(self) -> dict[str, np.ndarray] | None:
        return self.attempt(self.worker.ask, "variables")

    def host_seconds(self, rounds: int) -> None:
        for number in range(rounds):
            taken = self.attempt(self.worker.ask, "host_seconds", number)
            if taken is not None:
                self.measured.host_seconds.append(taken)


def race(
    contenders: Sequence[Contender],
    *,
    platform: str,
    repeats: int,
    pause: float,
    compare: bool = True,
    host_rounds: int = 0,
    progress: Progress = lambda text: None,
) -> list[Measured]:
    """Times contenders side by side.

    With `compare`, each that trains starts from the same weights and does one round untimed; one
    whose global model then is another than the first contender's is out. Then come the turns, two
    rounds each, of which the second is timed.

    Args:
      contenders: of the same task, and such as measure the machine's peak.
      platform: JAX's.
      repeats: timed rounds of each.
      pause: seconds between turns.
      compare: check the first round; for contenders of the same task only.
      host_rounds: rounds to measure jfed's work on the host of.
      progress: called with what was done, as text.
    """
    with started(list(contenders), platform) as workers:
        entries = [_Entry(worker, progress) for worker in workers]
        for entry in entries:
            entry.await_ready()
        if compare:
            _compare([e for e in entries if not e.worker.contender.is_peak])
        once = [c.name for c in contenders if c.once]
        runs = {e.worker.contender.name: e.turn for e in entries if e.running}
        seconds = interleaved(runs, repeats, once=once, pause=pause)
        for entry in entries:
            entry.measured.seconds = seconds.get(entry.worker.contender.name, [])
            if entry.worker.contender.kind == "jfed":
                entry.host_seconds(host_rounds)
            entry.measured.memory = entry.attempt(entry.worker.ask, "memory")
        return [entry.measured for entry in entries]


def _compare(entries: Sequence[_Entry]) -> None:
    """Has each do its first round; those that disagree with the first that could are out."""
    start, after = None, None
    for entry in entries:
        mine = entry.variables()
        entry.round()
        end = entry.variables()
        if mine is None or end is None:
            continue
        if start is None or after is None:
            start, after = mine, end
        entry.attempt(_check, entry.measured, (mine, end), (start, after))


def _check(
    measured: Measured,
    mine: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    reference: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
) -> None:
    """Records how far the weights before and after the first round are from the reference's."""
    size = difference(*reference)
    far = [difference(a, b) / size for a, b in zip(mine, reference, strict=True)]
    measured.disagreement = far[1]
    if not all(distance <= TOLERANCE for distance in far):
        raise WorkerError(
            f"its first round is another: its weights differ by {far[0]:.2g} before and "
            f"{far[1]:.2g} after it, relative to the round's update; allowed is {TOLERANCE:g}."
        )


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Euclidean norm of a - b over all weights together."""
    if a.keys() != b.keys():
        raise WorkerError(f"its weights are {sorted(a)}, expected {sorted(b)}")
    squares = [np.square(a[n].astype(np.float64) - b[n].astype(np.float64)).sum() for n in a]
    return float(np.sqrt(sum(squares)))
