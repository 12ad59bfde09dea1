"""What travels between server and clients, in bytes."""

from typing import NamedTuple

import jax

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


def traffic(tier: Tier, variables: Params) -> Traffic:
    """Bytes of one client of the tier: it gets the tier's variables and returns its update."""
    size = tree_bytes(tier.shapes(variables))
    return Traffic(down=size, up=size)
