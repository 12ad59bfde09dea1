"""What travels between server and clients, in bytes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jfed.models.model import Params, path_name
from jfed.tiers import Tier
from jfed.tiers.parts import map_parts


class Traffic(NamedTuple):
    """Bytes of one client in one round: `down` from the server, `up` to it."""

    down: int
    up: int


def tree_bytes(tree: Params) -> int:
    """Bytes of all arrays of a pytree (arrays, or their shapes and dtypes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_size(tree: Params) -> int:
    """How many numbers the arrays of a pytree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def traffic(
    tier: Tier,
    variables: Params,
    exchange: tuple[Any, Any] | None = None,
    personal: Callable[[str], bool] | None = None,
) -> Traffic:
    """Bytes of one client of the tier. Of trees like its variables, what it owns travels.

    Args:
      tier: of the client.
      variables: global ones; only shapes and dtypes matter.
      exchange: what the server sends, and the parts of the message that it gets, as shapes; by
        default the variables, and an update of them.
      personal: whether a leaf, by its path, does not travel.
    """
    shapes = tier.shapes(variables)
    arrays = zip(_owned(tier, shapes), jax.tree_util.tree_leaves_with_path(shapes), strict=True)
    own = sum(
        count * x.dtype.itemsize
        for count, (path, x) in arrays
        if personal is None or not personal(path_name(path))
    )

    def size(tree: Any) -> int:
        return sum(jax.tree.leaves(map_parts(lambda _: own, shapes, tree, otherwise=tree_bytes)))

    sent, message = (shapes, {"update": shapes}) if exchange is None else exchange
    return Traffic(down=size(sent), up=sum(map(size, message.values())))


def owned_size(tier: Tier, variables: Params) -> int:
    """How many numbers a tier owns."""
    return sum(_owned(tier, tier.shapes(variables)))


def _owned(tier: Tier, shapes: Params) -> list[int]:
    """Of each array of the tier's variables, how many entries it owns."""
    if tier.mask is None:
        return [x.size for x in jax.tree.leaves(shapes)]
    mask = tier.mask(shapes, tier.setting)
    return [int(jnp.count_nonzero(x)) for x in jax.tree.leaves(mask)]
