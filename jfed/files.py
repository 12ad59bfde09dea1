"""Files, local or remote, that a reader never sees half of."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jfed.errors import RunFolderError


def absolute(folder: epath.PathLike) -> epath.Path:
    """The folder's full path, which Orbax wants."""
    path = epath.Path(folder)
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


def read_json(path: epath.Path) -> Any:
    """Reads what `write_json` wrote; RunFolderError if it is damaged."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"it holds {value!r}")
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{str(path)!r} is damaged: {error}. Remove the run folder to start anew."
        ) from error
    return value


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON that a reader never sees half of."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(rows: Sequence[Mapping[str, Any]], path: epath.PathLike) -> None:
    """Writes dictionaries as a CSV table, whole or not at all; what one lacks stays empty."""
    names, text = list(dict.fromkeys(name for row in rows for name in row)), io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def is_local(path: epath.PathLike) -> bool:
    """Whether the path is in a file system of this machine."""
    return "://" not in str(path)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file that a reader never sees half of."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file that a reader never sees half of."""
    whole = epath.Path(path)
    if not whole.name or whole.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder, not a file")
    partial = whole.with_name(f"{whole.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
