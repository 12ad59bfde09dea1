"""The settings of a run as its `config.json` holds them: nested, as plain values."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jfed.errors import RunFolderError, name_of
from jfed.files import read_json, write_json
from jfed.seeds import is_key

CONFIG, _MADE_WITH = "config.json", "made_with"


def as_json(value: Any) -> Any:
    """Settings, dataclasses of dataclasses, as JSON can hold them.

    A function is its qualified name; one made inside of another, as a lambda is, has a digest after
    it, of its code and of what it closes over.
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
        name = name_of(value)
        return f"{name} {_digest(value)}" if "<" in name else name
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _digest(function: Any) -> str:
    """Of a function's code, defaults and what it closes over; the same in every process."""
    return hashlib.sha256(repr(_contents(function, ())).encode()).hexdigest()[:12]


def _contents(value: Any, within: tuple[int, ...]) -> Any:
    """What tells a value from others of its type, as nested tuples of plain values."""
    if id(value) in within:  # a function that closes over itself
        return "itself"
    inner = (*within, id(value))
    if isinstance(value, types.FunctionType):
        code = value.__code__
        cells = map(_held, value.__closure__ or ())
        held = (code, value.__defaults__, value.__kwdefaults__, *cells)
        return (value.__qualname__, *(_contents(part, inner) for part in held))
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, _contents(value.co_consts, inner)
    if isinstance(value, functools.partial):
        return _contents((value.func, value.args, value.keywords), inner)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _contents(list(vars(value).items()), inner)
    if isinstance(value, Mapping):
        return _contents(list(value.items()), inner)
    if isinstance(value, tuple | list):
        return tuple(_contents(part, inner) for part in value)
    if isinstance(value, jax.Array) and is_key(value):
        return str(value.dtype), _contents(jax.random.key_data(value), inner)
    if isinstance(value, np.ndarray | jax.Array):
        return str(value.dtype), value.shape, np.asarray(value).tobytes()
    if value is None or isinstance(value, str | bytes | int | float | complex):
        return value
    return name_of(value) if callable(value) else type(value).__qualname__


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that has no value yet
        return None


def write_settings(
    folder: epath.Path, settings: Mapping[str, Any], made_with: Mapping[str, Any]
) -> None:
    """Writes `config.json`, which makes a folder a run's.

    Args:
      folder: of the run.
      settings: see `as_json`.
      made_with: see `jfed.provenance.made_with`.
    """
    write_json(folder / CONFIG, {**settings, _MADE_WITH: made_with})


def read_settings(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run, and what it was made with.

    Raises:
      RunFolderError: `config.json` is damaged, or of an older version of jfed.
    """
    settings = read_json(folder / CONFIG)
    if _MADE_WITH not in settings:
        raise RunFolderError(
            f"the run folder {str(folder)!r} is of an older version of jfed, whose {CONFIG} is "
            "another; go on with that version, or choose another folder."
        )
    made_with = settings.pop(_MADE_WITH)
    return settings, made_with


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
