"""A contender's process: it builds, says that it is ready, and does a round whenever it is told."""

import contextlib
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax

from jfed import provenance
from jfed.benchmark.contenders import Contender, build, set_up_jax
from jfed.benchmark.tasks import RoundWork
from jfed.runs import huge_pages

_LAST_LINES = 3  # of an error's text, in reports


class WorkerError(Exception):
    """A contender could not be built, or failed later."""


class NotInstalledError(WorkerError):
    """A contender's library cannot be imported here."""


class Ready(NamedTuple):
    """What a process says when it is ready.

    Attributes:
      work: what a round amounts to.
      seconds: that building and compiling took, while other processes did the same.
    """

    work: RoundWork
    seconds: float


class Seconds(NamedTuple):
    """What a round took.

    Attributes:
      wall: seconds on the clock.
      cpu: seconds of all cores together.
    """

    wall: float
    cpu: float


class Memory(NamedTuple):
    """Peak memory of a process, in bytes.

    Attributes:
      host: resident, of everything since the process began.
      device: of its accelerator; None on the CPU, and where JAX cannot tell.
    """

    host: int
    device: int | None


class Worker:
    """The parent's end of a contender's process."""

    def __init__(self, contender: Contender, platform: str) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, contender, platform), name=contender.name, daemon=True
        )
        self._process.start()
        theirs.close()

    def ready(self) -> Ready:
        """Waits until the contender is built; WorkerError if it could not be."""
        return self._receive()

    def ask(self, command: str, *arguments: Any) -> Any:
        """Has the process do something and waits for its answer; WorkerError if it fails.

        Commands: `round number` (its `Seconds` and its loss), `variables`, `memory`,
        `host_seconds number`.
        """
        try:
            self._connection.send((command, *arguments))
        except OSError:
            raise WorkerError(self._death()) from None
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._connection.send(("stop",))
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            error, answer = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError(self._death()) from None
        if error is not None:
            raise error(answer)
        return answer

    def _death(self) -> str:
        self._process.join(timeout=5)
        return f"the process ended with exit status {self._process.exitcode}"


@contextlib.contextmanager
def started(contenders: list[Contender], platform: str) -> Iterator[list[Worker]]:
    """Starts a process for each contender, all with huge pages; ends them afterwards."""
    workers: list[Worker] = []
    try:
        with huge_pages.for_children():
            for contender in contenders:
                workers.append(Worker(contender, platform))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _serve(connection: Connection, contender: Contender, platform: str) -> None:
    """What a contender's process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several share a GPU
    try:
        began = time.perf_counter()
        set_up_jax(contender, platform)
        runner, work = build(contender, platform)
        connection.send((None, Ready(work, time.perf_counter() - began)))
        while (message := connection.recv())[0] != "stop":
            connection.send((None, _answer(runner, *message)))
    except EOFError:
        return  # the parent is gone
    except ImportError as error:
        connection.send((NotInstalledError, text_of(error)))
    except Exception as error:  # whatever a contender raises is its result
        connection.send((WorkerError, text_of(error)))


def _answer(runner: Any, command: str, *arguments: Any) -> Any:
    if command == "round":
        began, cpu = time.perf_counter(), time.process_time()
        loss = runner.round(*arguments)
        return Seconds(time.perf_counter() - began, time.process_time() - cpu), loss
    if command == "memory":
        return peak_memory()
    return getattr(runner, command)(*arguments)


def text_of(error: Exception) -> str:
    """An error in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:_LAST_LINES])}"


def peak_memory() -> Memory:
    """Of this process, and of the accelerator that uses most."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return Memory(_peak_resident(), max(peaks) if peaks else None)


def _peak_resident() -> int:
    # On Linux `ru_maxrss` starts at what the parent had; the kernel's other count does not.
    if (peak := resident("VmHWM")) is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident(name: str) -> int | None:
    """Bytes of this process by Linux's name, "VmRSS" now or "VmHWM" at most; else None."""
    status = pathlib.Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def hardware() -> dict[str, Any]:
    """`jfed.provenance.hardware` told by a process of its own, so that this one opens no device."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_tell_hardware, args=(theirs, jax.config.values["jax_platforms"])
    )
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise WorkerError("JAX found no device to run on.") from None
    finally:
        process.join()


def _tell_hardware(connection: Connection, platforms: str | None) -> None:
    if platforms:
        jax.config.update("jax_platforms", platforms)
    connection.send(provenance.hardware())
