"""Huge pages for the working memory of programs on a CPU.

XLA takes a program's working memory from the system each time that it runs, and gives it back. In
pages of 4 KiB, a round of one tier of an ODENet 16/32/64 (batch 32) then takes 22,000 page faults
on each device. Many Linux systems give huge pages only to who asks for them ("madvise"); glibc 2.35
and newer asks where the variable `GLIBC_TUNABLES` says so, which a process reads once, when it
starts. `jfed run` therefore starts itself again, before it imports JAX; `--no-huge-pages` keeps it
from that, as does a `GLIBC_TUNABLES` that sets `glibc.malloc.hugetlb`. (Keeping the memory ends the
faults as well, by `mallopt`: one arena, no `mmap`, no trimming. But then rounds took longer.)
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import pkgutil
import sys
from collections.abc import Iterator

VARIABLE = "GLIBC_TUNABLES"
_TUNABLE, _SINCE = "glibc.malloc.hugetlb", (2, 35)
_RESTARTED = "JFED_RESTARTED"
_STATUS = pathlib.Path("/proc/self/status")
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

    Once: some interpreters are started by scripts, or with rights, that drop the variable. Never
    where an accelerator computes, whose memory this is not about and whose driver may have begun,
    or where a debugger, tracer or profiler is at work, which the new process would not have.
    """
    value = tunables()
    if value is None or _RESTARTED in os.environ or accelerated() or watched():
        return
    environment = {**os.environ, VARIABLE: value, _RESTARTED: "1"}
    with contextlib.suppress(OSError):
        os.execve(sys.executable, sys.orig_argv, environment)


def accelerated() -> bool:
    """Whether JAX will compute on an accelerator, told without importing it.

    Asking JAX would start it, and a process in which JAX's drivers run should not be replaced. What
    decides is the platform that the user named (`JAX_PLATFORMS`). If none is named, JAX takes an
    accelerator if a plugin for one is installed. Those for NVIDIA and AMD do nothing without a
    device file of the driver; of any other it is not known what it needs: it counts as at work.
    """
    named = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    return named.split(",")[0] != "cpu" if named else any(map(_works, _plugins()))


_ROOT = pathlib.Path("/")
# By how the names of plugins begin (xla_cuda13, xla_rocm7); on Windows' Linux it is dxg.
_DEVICE_FILES = {"xla_cuda": ("dev/nvidia*", "dev/dxg"), "xla_rocm": ("dev/kfd",)}


def _works(plugin: str) -> bool:
    """Whether an accelerator's plugin may find a device."""
    needed = [files for kind, files in _DEVICE_FILES.items() if plugin.startswith(kind)]
    found = (next(_ROOT.glob(file), None) for files in needed for file in files)
    return not needed or any(found)


def _plugins() -> set[str]:
    """The names of the accelerators' plugins that are installed for JAX, found where it looks."""
    found = {point.value for point in importlib.metadata.entry_points(group="jax_plugins")}
    names = {value.removeprefix("jax_plugins.").partition(":")[0] for value in found}
    if (package := importlib.util.find_spec("jax_plugins")) is not None:
        folders = package.submodule_search_locations or ()
        names |= {module.name for module in pkgutil.iter_modules(folders)}
    if importlib.util.find_spec("libtpu") is not None:
        names.add("libtpu")
    return names


def watched() -> bool:
    """Whether a debugger, tracer or profiler is attached to this process."""
    monitoring = getattr(sys, "monitoring", None)  # since Python 3.12, which has 6 numbers of tools
    return (
        sys.gettrace() is not None
        or sys.getprofile() is not None
        or any(name in sys.modules for name in ("debugpy", "pydevd"))
        or (monitoring is not None and any(map(monitoring.get_tool, range(6))))
        or _traced()
    )


def _traced() -> bool:
    """Whether another process traces this one, such as gdb or strace."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:  # not Linux
        return False
    tracers = [line.split()[1] for line in lines if line.startswith("TracerPid:")]
    return any(tracer != "0" for tracer in tracers)


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
