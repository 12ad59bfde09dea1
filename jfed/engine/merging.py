"""What clients deliver, and the heterogeneous merge: a mean over those that own an entry."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jfed.models.model import Params
from jfed.tiers.tier import Round, Tier


class TierUpdate(NamedTuple):
    """What the clients of one tier deliver together.

    Attributes:
      total: the sum of weight * update over the tier's clients, shaped as the tier's variables. An
        update is what local training added to the variables.
      weight: the sum of the weights (a client's weight is its number of examples).
    """

    total: Params
    weight: Float[Array, ""] | Float[np.ndarray, ""]


class StackedUpdates(NamedTuple):
    """What the clients of one tier deliver, each by itself: memory grows with the cohort.

    Attributes:
      updates: shaped as the tier's variables with an axis of slots before, `[slots, ...]`; zeros in
        a slot that nobody delivered to.
      weight: `[slots]`, 0 where nobody delivered.
    """

    updates: Params
    weight: Float[Array, " slots"] | Float[np.ndarray, " slots"]


Updates = TierUpdate | StackedUpdates


def nothing(like: Params, slots: int | None = None) -> Updates:
    """What a tier delivers before any of its clients has.

    Args:
      like: the tier's variables; only shapes and dtypes matter.
      slots: the most clients to stack the updates of; None for their sum.
    """
    shape = () if slots is None else (slots,)
    zeros = jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), x.dtype), like)
    weight = jnp.zeros(shape, jnp.float32)
    return TierUpdate(zeros, weight) if slots is None else StackedUpdates(zeros, weight)


def add(before: Updates, update: Params, weight: Float[Array, ""], slot: Int[Array, ""]) -> Updates:
    """Adds one client's update: to the sum, times its weight, or to its slot."""
    if isinstance(before, TierUpdate):
        total = jax.tree.map(lambda t, u: t + weight.astype(t.dtype) * u, before.total, update)
        return TierUpdate(total, before.weight + weight)
    updates = jax.tree.map(lambda b, u: b.at[slot].set(u), before.updates, update)
    return StackedUpdates(updates, jnp.asarray(before.weight).at[slot].set(weight))


def clip_update(update: Params, norm: float) -> Params:
    """The update, scaled down to that L2 norm if it is longer."""
    leaves = jax.tree.leaves(update)
    # Relative to the largest entry, whose square may not be representable.
    largest = jnp.stack([jnp.abs(u).max() for u in leaves]).max()
    unit = jnp.where(largest > 0, largest, 1)
    length = unit * jnp.sqrt(_sum([jnp.square(u / unit).sum() for u in leaves]))
    scale = jnp.where(length > norm, norm / length, 1)
    return jax.tree.map(lambda u: u * scale.astype(u.dtype), update)


def merge(
    variables: Params, tiers: Sequence[Tier], updates: Sequence[TierUpdate], round_: Round = 0
) -> tuple[Params, Params]:
    """The mean update of every global entry, and the weight that stands behind it.

    For each entry `sum_k w_k m_k u_k / sum_k w_k m_k`, where m_k tells whether client k's tier owns
    it, and 0 where no client does. Adding it to `variables` gives the weighted mean of the clients'
    values, and the old value where nobody owns the entry.

    Args:
      variables: global ones; only shapes and dtypes matter.
      tiers: of the clients that took part.
      updates: one for each of `tiers`.
      round_: from 0; it matters to tiers whose part of the variables moves over rounds.
    """
    totals = [
        tier.embed(u.total, variables, round_) for tier, u in zip(tiers, updates, strict=True)
    ]
    weights = [
        jax.tree.map(lambda owned, w=u.weight: owned * w, tier.owned(variables, round_))
        for tier, u in zip(tiers, updates, strict=True)
    ]

    def mean(total: Array, weight: Array) -> Array:
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)

    weight = _sum(weights)
    return jax.tree.map(mean, _sum(totals), weight), weight


def _sum(trees: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *trees)
