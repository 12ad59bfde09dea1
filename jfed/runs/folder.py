"""The folder of a run: whose it is, what it holds, and that only one process works in it."""

import contextlib
import dataclasses
import errno
import functools
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
import numpy as np
from etils import epath

from jfed.errors import JfedError, RunFolderError, name_of
from jfed.files import is_local, read_json, write_json

_LOCK = ".lock"
_CONFIG, _MADE_WITH = "config.json", "made_with"
# What writing to an open file may end with, of which the error names no file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
FOUND = ("nothing", "begun", "finished")


def as_json(value: Any) -> Any:
    """Settings, dataclasses of dataclasses, as JSON can hold them.

    A function is its qualified name, so that two lambdas of one place are taken for the same.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: as_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(inner) for inner in value]
    if isinstance(value, functools.partial):
        return {"partial": as_json([value.func, value.args, value.keywords])}
    if callable(value):
        return name_of(value)
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)


def write_settings(
    folder: epath.Path, settings: Mapping[str, Any], made_with: Mapping[str, Any]
) -> None:
    """Writes `config.json`, which makes a folder a run's.

    Args:
      folder: of the run.
      settings: see `as_json`.
      made_with: see `jfed.provenance.made_with`.
    """
    write_json(folder / _CONFIG, {**settings, _MADE_WITH: made_with})


def read_settings(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run, and what it was made with.

    Raises:
      RunFolderError: `config.json` is damaged, or of an older version of jfed.
    """
    settings = read_json(folder / _CONFIG)
    if _MADE_WITH not in settings:
        raise RunFolderError(
            f"the run folder {str(folder)!r} is of an older version of jfed, whose {_CONFIG} is "
            "another; go on with that version, or choose another folder."
        )
    made_with = settings.pop(_MADE_WITH)
    return settings, made_with


def inspect(folder: epath.Path, settings: Mapping[str, Any]) -> str:
    """What a run with these settings finds in a folder, one of `FOUND`.

    Args:
      folder: of the run.
      settings: see `as_json`; they may lack "inputs", what the run is made of.

    Raises:
      RunFolderError: the folder belongs to other settings or to an older version of jfed, is no
        run folder, or cannot be read.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"the run folder {str(folder)!r} is a file; choose another one.")
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise RunFolderError(f"cannot read the run folder {str(folder)!r}: {error}.") from error
    if not names - {_LOCK, "config.partial", "clients.png"}:  # what comes before config.json
        return "nothing"
    if _CONFIG not in names:
        raise RunFolderError(
            f"the run folder {str(folder)!r} exists already and holds no run but "
            f"{sorted(names)[:5]}; choose another one."
        )
    there, _ = read_settings(folder)
    if "inputs" not in settings:  # they are known only once the data are read
        there.pop("inputs", None)
    found = differences(there, settings)
    if found:
        raise RunFolderError(
            f"the run folder {str(folder)!r} belongs to a run with other settings: "
            f"{'; '.join(found)}. Choose another folder, or give the same settings to go on."
        )
    return "finished" if "summary.json" in names else "begun"


def warn_of_others(folder: epath.Path, made_with: Mapping[str, Any]) -> None:
    """Warns if a run was begun with another jfed, JAX or other devices than it goes on with."""
    found = differences(read_settings(folder)[1], made_with)
    if found:
        warnings.warn(
            f"the run in {str(folder)!r} goes on with what it was not begun with, so it may end "
            f"otherwise than if it had not been stopped: {'; '.join(found)}",
            stacklevel=2,
        )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their path, such as `client.learning_rate`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ, by dotted path, with the values of both."""
    there, here, missing = flat(there), flat(here), "not set"
    return [
        f"{name} is {there.get(name, missing)!r} there, {here.get(name, missing)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name, missing) != here.get(name, missing)
    ]


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
