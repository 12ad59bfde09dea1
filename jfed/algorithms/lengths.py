"""The L2 norm of a pytree."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def length(tree: Any) -> Float[Array, ""]:
    """The L2 norm of all arrays together.

    Relative to the largest entry, whose square may not be representable.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    if not leaves:
        return jnp.zeros(())
    largest = jnp.stack([jnp.abs(u).max() for u in leaves]).max()
    unit = jnp.where(largest > 0, largest, 1)
    squares = [jnp.square(u / unit).sum() for u in leaves]
    return unit * jnp.sqrt(functools.reduce(jnp.add, squares))
