"""Parameters by name, as weights from elsewhere are read and compared."""

import fnmatch
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jfed.errors import ConfigError, check_sequence, did_you_mean


def as_float32(name: str, value: Any) -> np.ndarray:
    """An array of weights as NumPy's float32; ConfigError unless it holds finite floats.

    Args:
      name: what messages call it.
      value: anything that `np.asarray` takes, of any floating-point type.
    """
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the library raises that the value is of
        raise ConfigError(f"weights {name!r} cannot be read as an array: {error}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ConfigError(f"weights {name!r} must be floating-point numbers, got {array.dtype}.")
    with np.errstate(over="ignore"):  # which makes it infinite
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ConfigError(
            f"weights {name!r} must be finite, got {array[~np.isfinite(array)].flat[0]}."
        )
    return array


def chosen(patterns: Sequence[str], names: Sequence[str], *, title: str) -> set[str]:
    """The names that shell patterns such as "classifier/*" match; `*` matches slashes too.

    Args:
      patterns: of names.
      names: all that there are.
      title: how errors call the patterns.

    Raises:
      ConfigError: a pattern is no text, or matches none of the names.
    """
    found: set[str] = set()
    for pattern in check_sequence(title, patterns):
        if not isinstance(pattern, str):
            raise ConfigError(f"{title} must name patterns of entries, got {pattern!r}.")
        matching = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            groups = sorted({re.sub("/.*", "/*", name) for name in names})
            hint, some = did_you_mean(pattern, groups), ", ".join(map(repr, groups))
            raise ConfigError(f"{title} {pattern!r} matches no entry.{hint} There are: {some}.")
        found |= matching
    return found


def misfit(name: str, there: Sequence[int], here: Sequence[int]) -> str:
    """What to say of weights of one shape for an entry of another, and what can be done."""
    pattern = "classifier/*" if name.startswith("classifier/") else name
    return (
        f"weights {name!r} are of shape {tuple(there)}, the network's are of {tuple(here)}. Train "
        "the network that they are of, or let the network's begin anew: "
        f"fresh=({pattern!r},), on the command line --init-fresh {pattern!r}."
    )


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays and their names, in any order."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].shape} {arrays[name].dtype}\n".encode())
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()
