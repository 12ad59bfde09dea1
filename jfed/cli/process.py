"""The process that a run takes for its own: the devices it makes, the signals it hears."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from jfed.engine import hosts
from jfed.engine.devices import use_cores
from jfed.engine.hosts import HostsConfig


def start_devices(together: HostsConfig) -> None:
    """Joins the other hosts, and makes a device of each core of a CPU, before JAX starts.

    Raises:
      ConfigError: the others cannot be joined, or there are none.
    """
    use_cores()
    hosts.join(together)


@contextlib.contextmanager
def terminable(distributed: bool, begun: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM or Ctrl-C has come.

    Before rounds begin there is nothing to save, and they end the process at once.

    Of several hosts each hears of it through JAX's preemption service, which lets all of them stop
    after the same round.
    """
    heard = False

    def hear(signal_: int, _: object) -> None:
        nonlocal heard
        heard = True
        if signal_ == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once
            if not begun():
                raise KeyboardInterrupt
        elif not begun():
            print("jfed: terminated before any round began.", file=sys.stderr, flush=True)
            os._exit(143)  # no exception: threads that compile cannot be stopped

    if distributed:
        yield lambda: False
        return
    try:
        before = {s: signal.signal(s, hear) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: heard
    finally:
        for signal_, handler in before.items():
            signal.signal(signal_, handler)
