"""The heterogeneous merge: what clients delivered, as a mean over those that own an entry."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jfed.algorithms.aggregators import Aggregator, Stack
from jfed.algorithms.lengths import length
from jfed.models.model import Params
from jfed.tiers.parts import is_like
from jfed.tiers.tier import Round, Tier


class Report(NamedTuple):
    """What the clients of a round tell, by slots.

    Attributes:
      metrics: `jfed.models.losses.Metrics`, sums over the examples that each client trained on;
        zeros where it delivered nothing.
      delivered: whether its message counts.
      rejected: whether it had one that does not, since it or its loss is not finite.
    """

    metrics: Any
    delivered: Bool[Array, " slots"]
    rejected: Bool[Array, " slots"]


class Delivered(NamedTuple):
    """What the clients that share a program delivered.

    Attributes:
      parts: of their messages by name: the sum of weight * part; or each by itself, with an axis of
        slots before, where the aggregator needs a stack and the part is like the tier's variables.
      weights: `[slots]` of each part, by name; 0 where nobody delivered.
      report: on the clients.
    """

    parts: dict[str, Any]
    weights: dict[str, Float[Array, " slots"]]
    report: Report

    def of_one(self, shapes: Params) -> dict[str, Any]:
        """The message, where one client alone delivered, of weight 1; `shapes` are of its tier."""

        def first(part: Any) -> Any:
            structures: list[Any] = [jax.tree.structure(tree) for tree in (part, shapes)]
            pairs = zip(jax.tree.leaves(part), jax.tree.leaves(shapes), strict=False)
            is_stacked = structures[0] == structures[1] and all(
                one.ndim == other.ndim + 1 for one, other in pairs
            )
            return jax.tree.map(lambda x: x[0], part) if is_stacked else part

        return {name: first(part) for name, part in self.parts.items()}


class Group(NamedTuple):
    """Tiers that share a program, and what their clients delivered.

    Attributes:
      tiers: which differ in their settings only.
      delivered: by their clients.
      tier: `[slots]` the tier of each, by place among `tiers`.
    """

    tiers: Sequence[Tier]
    delivered: Delivered
    tier: Int[Array, " slots"]


def clip(update: Params, norm: float) -> Params:
    """The update, scaled down to that L2 norm if it is longer."""
    size = length(update)
    scale = jnp.where(size > norm, norm / size, 1)
    return jax.tree.map(lambda u: u * scale.astype(u.dtype), update)


def merge(
    variables: Params,
    groups: Sequence[Group],
    aggregator: Aggregator | None = None,
    round_: Round = 0,
) -> tuple[dict[str, Any], Params]:
    """The parts of all messages merged, and how many clients own and delivered each entry.

    A part like the variables is merged entry by entry: sum_k w_k m_k u_k / sum_k w_k m_k, where m_k
    tells whether client k's tier owns the entry, and 0 where no client does. Of any other part the
    weighted mean over all clients is taken.

    Args:
      variables: global ones; only shapes and dtypes matter.
      groups: of the clients that took part.
      aggregator: in place of the weighted mean, for parts like the variables.
      round_: from 0; it matters to tiers whose part of the variables moves over rounds.
    """
    there = [group.delivered.report.delivered.astype(jnp.float32) for group in groups]
    owners = _owned(variables, groups, there, round_)
    merged = {}
    for name, part in groups[0].delivered.parts.items():
        weights = [group.delivered.weights[name] for group in groups]
        if not _is_cut(groups[0], part, variables):
            whole = _sum([w.sum() for w in weights])
            total = _sum([group.delivered.parts[name] for group in groups])
            merged[name] = jax.tree.map(lambda t, w=whole: t / jnp.where(w > 0, w, 1), total)
        elif aggregator is None:
            total = _sum(
                [
                    group.tiers[0].embed(group.delivered.parts[name], variables, round_)
                    for group in groups
                ]
            )
            merged[name] = jax.tree.map(_mean, total, _owned(variables, groups, weights, round_))
        else:
            update = aggregator(_stack(variables, groups, name, round_))
            merged[name] = jax.tree.map(lambda u, n: jnp.where(n > 0, u, 0), update, owners)
    return merged, owners


def _is_cut(group: Group, part: Any, variables: Params) -> bool:
    """Whether a part is like the variables of the tier, stacked or not."""
    shapes = group.tiers[0].shapes(variables)
    slots = len(group.tier)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype), shapes)
    return is_like(part, shapes) or is_like(part, stacked)


def _mean(total: Array, weight: Array) -> Array:
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def _owned(
    variables: Params,
    groups: Sequence[Group],
    weights: Sequence[Float[Array, " _"]],
    round_: Round,
) -> Params:
    """For each entry the sum of the weights, by slots, of the clients that own it."""
    by_tier = [
        jnp.zeros(len(group.tiers)).at[group.tier].add(weight)
        for group, weight in zip(groups, weights, strict=True)
    ]
    return owned(variables, [group.tiers for group in groups], by_tier, round_)


def owned(
    variables: Params,
    programs: Sequence[Sequence[Tier]],
    weights: Sequence[Float[Array, " _"]],
    round_: Round,
) -> Params:
    """For each global entry the sum of the weights of the tiers that own it.

    Args:
      variables: global ones; only shapes and dtypes matter.
      programs: the tiers, by the program that they share.
      weights: of the tiers of each program.
      round_: from 0.
    """
    found = []
    for tiers, weight in zip(programs, weights, strict=True):
        if tiers[0].mask is None:  # all tiers of the program own the same
            found.append((tiers[0], weight.sum()))
        else:
            found += [(tier, weight[i]) for i, tier in enumerate(tiers)]
    return _sum(
        [jax.tree.map(lambda o, w=w: o * w, tier.owned(variables, round_)) for tier, w in found]
    )


def _stack(variables: Params, groups: Sequence[Group], name: str, round_: Round) -> Stack:
    """Every client's part in its place among the global variables."""
    updates, owned = [], []
    for group in groups:
        first, there = group.tiers[0], group.delivered.report.delivered
        updates.append(
            jax.vmap(lambda u, tier=first: tier.embed(u, variables, round_))(
                group.delivered.parts[name]
            )
        )
        each = [tier.owned(variables, round_) for tier in group.tiers]
        by_tier = jax.tree.map(lambda *o: jnp.stack(o) > 0, *each)
        owned.append(
            jax.tree.map(
                lambda o, tier=group.tier, there=there: (
                    o[tier] & there.reshape(-1, *(1,) * (o.ndim - 1))
                ),
                by_tier,
            )
        )
    weight = jnp.concatenate([group.delivered.weights[name] for group in groups])
    join = lambda trees: jax.tree.map(lambda *x: jnp.concatenate(x), *trees)  # noqa: E731
    return Stack(join(updates), join(owned), weight)


def _sum(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *trees)
