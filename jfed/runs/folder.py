"""The folder of a run: whose it is, what it holds, and that only one process works in it."""

import contextlib
import errno
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
from etils import epath

from jfed.errors import JfedError, RunFolderError
from jfed.files import is_local
from jfed.runs import growth
from jfed.settings import CONFIG, differences, read_settings

_LOCK = ".lock"
_TOLD = 8  # settings that differ
# What writing to an open file may end with, of which the error names no file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
FOUND = ("nothing", "begun", "finished")


def inspect(folder: epath.Path, settings: Mapping[str, Any]) -> str:
    """What a run with these settings finds in a folder, one of `FOUND`.

    Args:
      folder: of the run.
      settings: see `jfed.settings.as_json`; they may lack "inputs", what the run is made of.

    Raises:
      RunFolderError: the folder belongs to other settings or to an older version of jfed, is no
        run folder, or cannot be read.
    """
    try:
        is_file = folder.exists() and not folder.is_dir()
        names = {p.name for p in folder.iterdir()} if folder.exists() and not is_file else set()
    except OSError as error:
        raise RunFolderError(f"cannot read the run folder {str(folder)!r}: {error}.") from error
    if is_file:
        raise RunFolderError(f"the run folder {str(folder)!r} is a file; choose another one.")
    if not names - {_LOCK, "config.json.partial", "clients.png"}:  # what comes before config.json
        return "nothing"
    if CONFIG not in names:
        raise RunFolderError(
            f"the run folder {str(folder)!r} exists already and holds no run but "
            f"{sorted(names)[:5]}; choose another one."
        )
    there, _ = read_settings(folder)
    makers = [found.get("made_by", "jfed run") for found in (there, settings)]
    if makers[0] != makers[1]:
        raise RunFolderError(
            f"the run in {str(folder)!r} was made by {makers[0]}, this one is of {makers[1]}; "
            "choose another folder."
        )
    if "inputs" not in settings:  # they are known only once the data are read
        there.pop("inputs", None)
    found = growth.differing(folder, there, settings)
    if found:
        more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        raise RunFolderError(
            f"the run folder {str(folder)!r} belongs to a run with other settings: "
            f"{'; '.join(found[:_TOLD])}{more}. Choose another folder, or give the same settings "
            "to go on."
        )
    return "finished" if growth.rounds_done(folder) == settings["rounds"] else "begun"


def warn_of_others(
    folder: epath.Path, made_with: Mapping[str, Any], saved_with: Mapping[str, Any] | None = None
) -> None:
    """Warns if a run was begun, or last saved, with another jfed, JAX or other devices than now."""
    found = differences(read_settings(folder)[1], made_with)
    if saved_with:
        found = found or differences(saved_with, made_with)
    if found:
        warnings.warn(
            f"the run in {str(folder)!r} goes on with what it was not begun with, or not saved by, "
            f"so it may end otherwise than if it had not been stopped: {'; '.join(found)}",
            stacklevel=2,
        )


@contextlib.contextmanager
def claim(folder: epath.Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps other processes out of it.

    The lock is the operating system's: a process that dies loses it. Remote folders have none. A
    folder that is empty at the end is taken away again.

    Raises:
      RunFolderError: it cannot be made or written to, or another process works in it.
    """
    lock = filelock.FileLock(folder / _LOCK, is_singleton=False) if is_local(folder) else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunFolderError(
            f"another process is running in {str(folder)!r}; wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise RunFolderError(f"cannot write a run to {str(folder)!r}: {error}.") from error
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                if {path.name for path in folder.iterdir()} <= {_LOCK}:
                    (folder / _LOCK).unlink()
                    folder.rmdir()
            lock.release()


@contextlib.contextmanager
def explain_disk(folder: epath.Path) -> Iterator[None]:
    """Turns what the operating system says of a full or failing disk into a RunFolderError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, JfedError) or not _of_disk(error, folder):
            raise
        raise RunFolderError(
            f"cannot write to the run folder {str(folder)!r}: {error}. What was saved before is "
            "kept; the same command goes on from there."
        ) from error


def _of_disk(error: OSError, folder: epath.Path) -> bool:
    """Whether an error is of the run folder's disk, not of another file or of a network."""
    if not is_local(folder):
        return True  # whose libraries raise OSErrors of many kinds
    if isinstance(error.filename, str):
        there = pathlib.Path(error.filename).resolve()
        return there.is_relative_to(pathlib.Path(folder).resolve())
    return error.errno in _DISK_ERRORS
