"""Parts of a pytree that are like the variables: what is cut to a tier, merged and counted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jfed.models.model import Params


def is_like(tree: Any, variables: Params) -> bool:
    """Whether a tree has the structure, the shapes and the dtypes of the variables."""
    structures: list[Any] = [jax.tree.structure(t) for t in (tree, variables)]
    if structures[0] != structures[1]:
        return False
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(variables), strict=True)
    return all(jnp.shape(a) == jnp.shape(b) and a.dtype == b.dtype for a, b in pairs)


def _same(found: Any, *others: Any) -> Any:
    del others
    return found


def map_parts(
    f: Callable[..., Any],
    like: Params,
    tree: Any,
    *others: Any,
    otherwise: Callable[..., Any] = _same,
) -> Any:
    """Maps `f` over the subtrees that are like the variables, `otherwise` over all other leaves.

    Args:
      f: called with such a subtree, and those at the same place of `others`.
      like: the variables, or their shapes.
      tree: any pytree.
      others: pytrees with the structure of `tree` above such subtrees.
      otherwise: called likewise with other leaves; by default gives back that of `tree`.
    """

    def part(found: Any, *rest: Any) -> Any:
        return (f if is_like(found, like) else otherwise)(found, *rest)

    return jax.tree.map(part, tree, *others, is_leaf=lambda t: is_like(t, like))
