"""What travels between server and clients, in bytes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jfed.models.model import Params
from jfed.tiers import Tier


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


def traffic(tier: Tier, variables: Params, encode: Any = None) -> Traffic:
    """Bytes of one client of the tier: it gets the entries that it owns and returns its update.

    Args:
      tier: of the client.
      variables: global ones; only shapes and dtypes matter.
      encode: of a `jfed.algorithms.clients.Codec`, what an update is sent as; as it is by default.
    """
    shapes = tier.shapes(variables)
    size = tree_bytes(shapes)
    if tier.mask is not None:
        mask = tier.mask(shapes, tier.setting)
        size = sum(int(jnp.count_nonzero(x)) * x.dtype.itemsize for x in jax.tree.leaves(mask))
    if encode is None:
        return Traffic(down=size, up=size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Traffic(down=size, up=tree_bytes(jax.eval_shape(encode, shapes, key)))
