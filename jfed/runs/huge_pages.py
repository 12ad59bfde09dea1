"""Huge pages for the working memory of programs on a CPU.

XLA takes a program's working memory from the system each time that it runs, and gives it back. In
pages of 4 KiB, a round of one tier of an ODENet 16/32/64 (batch 32) then takes 22,000 page faults
on each device. Many Linux systems give huge pages only to who asks for them ("madvise"); glibc 2.35
and newer asks where the variable `GLIBC_TUNABLES` says so, which a process reads once, when it
starts. (Keeping the memory ends the faults as well, by `mallopt`: one arena, no `mmap`, no
trimming. But then rounds took longer.)
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

VARIABLE = "GLIBC_TUNABLES"
_TUNABLE, _SINCE = "glibc.malloc.hugetlb", (2, 35)
_RESTARTED = "JFED_RESTARTED"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def tunables() -> str | None:
    """What `VARIABLE` has to be to ask for huge pages; None where that is done or has no effect."""
    given = os.environ.get(VARIABLE, "")
    try:
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
        version, mode = tuple(map(int, glibc.split("."))), _MODE.read_text()
    except (AttributeError, ValueError, OSError):  # not Linux, or another C library
        return None
    if _TUNABLE in given or version < _SINCE or "[madvise]" not in mode:
        return None
    return ":".join(filter(None, (given, f"{_TUNABLE}=1")))


def restart() -> None:
    """Starts this process again, with its arguments and its number, if it lacks huge pages.

    Once: some interpreters are started by scripts, or with rights, that drop the variable.
    """
    value = tunables()
    if value is None or _RESTARTED in os.environ:
        return
    environment = {**os.environ, VARIABLE: value, _RESTARTED: "1"}
    with contextlib.suppress(OSError):
        os.execve(sys.executable, sys.orig_argv, environment)


@contextlib.contextmanager
def for_children() -> Iterator[None]:
    """Processes that are started within it have huge pages."""
    before, value = os.environ.get(VARIABLE), tunables()
    if value is None:
        yield
        return
    os.environ[VARIABLE] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
