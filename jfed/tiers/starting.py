"""Tiers whose global variables begin with given weights, such as pretrained ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jfed.errors import ConfigError
from jfed.models.model import Model, Params, by_name, path_name
from jfed.models.named_parameters import as_float32, chosen, digest, misfit
from jfed.tiers.entries import Path
from jfed.tiers.tier import Tiers, as_tiers


def start_from(tiers: Tiers | Model, params: Params, fresh: Sequence[str] = ()) -> Tiers:
    """The same tiers, whose global variables begin with given weights of the full network.

    An entry begins with the weights of its name. What each tier keeps for itself (norms of NeFL,
    say) begins with them in every tier, where it is narrower with their first channels. Entries
    that the weights lack begin as before: the exits of DepthFL, whose names no other network has,
    and the step sizes of NeFL, unless they are given. Learned step sizes of an ODENet always do, as
    their number is the tiers'.

    Batch norms need no statistics from elsewhere: a federation measures its own.

    Args:
      tiers: as a method makes them, or a model.
      params: of the network, a nested dictionary as its `init` gives; arrays of any library.
      fresh: shell patterns of names of entries that begin as before although there are weights of
        them, such as "classifier/*" where there are other classes.

    Returns:
      Tiers whose `init` gives the weights, and draws what begins as before from its key.

    Raises:
      ConfigError: weights of another shape than their entry, that are not finite floats, or of
        which nothing fits any entry; a pattern that matches nothing.
    """
    tiers = as_tiers(tiers)
    given = {title: as_float32(title, value) for title, value in by_name(params).items()}
    shapes = jax.eval_shape(tiers.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    entries = [_entry(path, leaf.shape, _has_names(shapes)) for path, leaf in leaves]
    left_out = chosen(fresh, [*given, *(entry.name for entry in entries)], title="fresh")
    begun: list[np.ndarray | None] = [
        None
        if entry.name in left_out or entry.name not in given or entry.name.startswith("steps/")
        else entry.begin(given[entry.name])
        for entry in entries
    ]
    if all(value is None for value in begun):
        raise ConfigError(
            f"the weights begin no entry of the network: they are called {_some(given)}, its "
            f"entries {_some([entry.name for entry in entries])}; fresh is {tuple(fresh)!r}."
        )

    def init(key: Array) -> Params:
        before, structure = jax.tree.flatten(tiers.init(key))
        return jax.tree.unflatten(
            structure,
            [
                old if new is None else jnp.asarray(new, old.dtype)
                for old, new in zip(before, begun, strict=True)
            ],
        )

    before = tiers.weights_digest or ""
    taken = {f"{before} {i}": value for i, value in enumerate(begun) if value is not None}
    return dataclasses.replace(tiers, init=init, weights_digest=digest(taken))


class _Entry(NamedTuple):
    """A global entry: what the network calls it, its shape, and what it holds.

    `holds` is "all" of the network's array, the "first" channels of it, or "rows", one for each
    tier.
    """

    name: str
    shape: tuple[int, ...]
    holds: str

    def begin(self, value: np.ndarray) -> np.ndarray:
        """What the entry begins with; ConfigError if the weights do not fit."""
        own = self.shape[1:] if self.holds == "rows" else self.shape
        fits = value.shape == own
        if self.holds == "first" and value.ndim == len(own):
            fits = all(there >= here for there, here in zip(value.shape, own, strict=True))
        if not fits:
            raise ConfigError(misfit(self.name, value.shape, own))
        if self.holds == "rows":
            return np.broadcast_to(value, self.shape)
        return value[tuple(slice(size) for size in own)]


def _has_names(variables: Any) -> bool:
    """Whether global variables are named entries, see `jfed.tiers.entries`."""
    if not isinstance(variables, dict) or set(variables) != {"shared", "own"}:
        return False
    shared, own = variables["shared"], variables["own"]
    flat = isinstance(shared, dict) and all(hasattr(leaf, "shape") for leaf in shared.values())
    return flat and isinstance(own, dict)


def _entry(path: Path, shape: tuple[int, ...], named: bool) -> _Entry:
    if not named:
        return _Entry(path_name(path), shape, "all")
    room, *_, title = (key.key for key in path)
    if room == "shared":
        return _Entry(title, shape, "all")
    return _Entry(title, shape, "first" if len(path) == 3 else "rows")


def _some(names: Any) -> str:
    return ", ".join(map(repr, list(names)[:3])) or "nothing"
