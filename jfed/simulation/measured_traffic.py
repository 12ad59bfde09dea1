"""Bytes of messages of a run, as they would travel: what codecs come to."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jfed.algorithms.algorithm import Algorithm
from jfed.algorithms.messages import to_bytes
from jfed.models.model import Params, path_name
from jfed.tiers import Tier
from jfed.tiers.communication import Traffic
from jfed.tiers.parts import map_parts

# `[tiers, 2]` bytes of one client of each tier: from the server, and to it.
Sizes = Int[np.ndarray, "tiers 2"]


def as_sizes(each: list[Traffic]) -> Sizes:
    """Traffic of every tier as an array, which a checkpoint can hold."""
    return np.asarray(each, np.int64).reshape(-1, 2)


def wire_bytes(tier: Tier, algorithm: Algorithm, like: Params, tree: Any) -> int:
    """Bytes of what goes between the server and a client of a tier, in one message.

    Args:
      tier: of the client. Of trees like its variables, what it owns travels.
      algorithm: whose personal leaves do not travel.
      like: the tier's variables; only shapes and dtypes matter.
      tree: what is sent, arrays on the host.
    """
    arrays: list[np.ndarray] = []

    def owned(part: Params) -> Params:
        arrays.extend(_travelling(tier, algorithm, part))
        return part

    def other(leaf: Any) -> Any:
        arrays.append(np.asarray(leaf))
        return leaf

    map_parts(owned, like, tree, otherwise=other)
    return len(to_bytes(arrays))


def _travelling(tier: Tier, algorithm: Algorithm, part: Params) -> list[np.ndarray]:
    """Of a tree like the tier's variables, the arrays that travel; of some, a few entries."""
    found = []
    own = None if tier.mask is None else jax.tree.leaves(tier.mask(part, tier.setting))
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(part)):
        if algorithm.personal is not None and algorithm.personal(path_name(path)):
            continue
        array = np.asarray(leaf)
        if own is not None and not np.all(mine := np.asarray(own[i]) > 0):
            mine = np.broadcast_to(mine, array.shape).reshape(len(array), -1)
            rows = mine[:, 0]  # of tiers that have a row of their own, which keeps its shape
            is_rows = (mine == rows[:, None]).all()
            array = array[rows] if is_rows else array.reshape(mine.shape)[mine]
        found.append(array)
    return found
