"""Repeats of several runs, interleaved so that what else the machine does hits all alike."""

import time
from collections.abc import Callable, Collection


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """A function that does `run` and returns its seconds."""

    def seconds() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return seconds


def interleaved(
    runs: dict[str, Callable[[], float | None]],
    repeats: int,
    *,
    once: Collection[str] = (),
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Does the runs in turns, A B C A B C ..., and returns the seconds of each.

    Args:
      runs: by name; each takes its turn and returns the seconds that count, or None if it cannot go
        on, after which it is left out.
      repeats: turns.
      once: names of those, slow ones, that take part in the first turn only.
      pause: seconds to wait before each run, in which the threads of the one before fall asleep.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    out: set[str] = set()
    for turn in range(repeats):
        for name, run in runs.items():
            if name in out or (turn and name in once):
                continue
            time.sleep(pause)
            taken = run()
            if taken is None:
                out.add(name)
            else:
                seconds[name].append(taken)
    return seconds
