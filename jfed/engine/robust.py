"""Aggregators that a few faulty or hostile clients cannot take over, beside the weighted mean.

Each works on every global entry over the clients that own it; an entry that nobody owns keeps its
value. All except the mean and clipping to a fixed norm need the update of every client at once: the
server and every lane then hold as many updates as a tier has clients in a round.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jfed.engine.merging import StackedUpdates, TierUpdate, Updates, merge
from jfed.errors import ConfigError, check_integer, check_number, one_of
from jfed.models.model import Params
from jfed.tiers.tier import Round, Tier

# The settings that each aggregator has, and those of them that it cannot do without.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "mean": (),
    "median": (),
    "trimmed-mean": ("trim",),
    "krum": ("krum_byzantine",),
    "multi-krum": ("krum_byzantine", "krum_selected"),
    "norm-clipping": ("clip_updates",),
}
_NEEDED = ("trim", "krum_byzantine")
AGGREGATORS = tuple(_SETTINGS)


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """How the updates of a round become one. None: not given.

    A client counts once, whatever its number of examples, except in "mean" and "norm-clipping":
    else it could claim many.

    Attributes:
      aggregator: "mean": the mean weighted by examples. "median": of each entry (Yin et al. 2018,
        definition 1). "trimmed-mean": the mean of each entry without its largest and its smallest
        values (definition 2). "krum": the update of one client, whose nearest others are nearest
        (Blanchard et al. 2017, section 4). "multi-krum": the mean of several such. "norm-clipping":
        the weighted mean of updates that are scaled down to a norm if they are longer.
      trim: of "trimmed-mean": the share of the values left out at each end, rounded down to a
        number of clients; from 0 to below 0.5.
      krum_byzantine: of "krum" and "multi-krum": how many hostile clients they are to withstand, f.
        It takes 2 f + 3 clients in a round; with n, each is judged by its n - f - 2 nearest.
      krum_selected: of "multi-krum": how many updates its mean is over; n - f by default.
      clip_updates: of "norm-clipping": the L2 norm of what a client sends. By default the median of
        the round, of norms divided by the square root of the number of a client's entries, so that
        clients of small tiers are not taken for modest ones.
    """

    aggregator: str = "mean"
    trim: float | None = None
    krum_byzantine: int | None = None
    krum_selected: int | None = None
    clip_updates: float | None = None

    def __post_init__(self) -> None:
        own = _SETTINGS[one_of("aggregator", self.aggregator, AGGREGATORS)]
        for name in (field.name for field in dataclasses.fields(self)[1:]):
            value = getattr(self, name)
            if name not in own and value is not None:
                raise ConfigError(
                    f"aggregator {self.aggregator!r} has no {name}, got {value!r}; leave it out."
                )
            if name in own and name in _NEEDED and value is None:
                raise ConfigError(f"aggregator {self.aggregator!r} needs {name}, got none.")
        if self.trim is not None and check_number("trim", self.trim, least=0.0) >= 0.5:
            raise ConfigError(f"trim must be below 0.5, to leave somebody, got {self.trim!r}.")
        if self.krum_byzantine is not None:
            check_integer("krum_byzantine", self.krum_byzantine, least=0)
        if self.krum_selected is not None:
            check_integer("krum_selected", self.krum_selected, least=1)
        if self.clip_updates is not None:
            check_number("clip_updates", self.clip_updates, above=0.0)

    @property
    def stacked(self) -> bool:
        """Whether it needs every update by itself."""
        return self.aggregator != "mean" and self.clip_updates is None

    def check_cohort(self, clients: int) -> None:
        """Raises ConfigError if it cannot work on the updates of so many clients.

        In a round in which fewer deliver, Krum does what it can, and withstands fewer.
        """
        if self.krum_byzantine is None:
            return
        if clients < 2 * self.krum_byzantine + 3:
            raise ConfigError(
                f"krum_byzantine {self.krum_byzantine} needs {2 * self.krum_byzantine + 3} clients "
                f"in a round, got {clients}."
            )
        if (self.krum_selected or 1) > clients - self.krum_byzantine:
            raise ConfigError(
                f"krum_selected must be at most the {clients - self.krum_byzantine} clients of a "
                f"round that may be honest, got {self.krum_selected}."
            )


def aggregate(
    config: Aggregation,
    variables: Params,
    tiers: Sequence[Tier],
    updates: Sequence[Updates],
    round_: Round = 0,
) -> tuple[Params, Params]:
    """The update of every global entry, and what stands behind it: 0 where nothing does.

    Args:
      config: which aggregator.
      variables: global ones; only shapes and dtypes matter.
      tiers: of the clients that took part.
      updates: one for each of `tiers`, stacked if the aggregator needs them so.
      round_: from 0; it matters to tiers whose part of the variables moves over rounds.
    """
    sums = [u for u in updates if isinstance(u, TierUpdate)]
    if len(sums) == len(updates):
        return merge(variables, tiers, sums, round_)
    stacks = [u for u in updates if isinstance(u, StackedUpdates)]
    if config.aggregator in ("median", "trimmed-mean"):
        return _middle(config, variables, tiers, stacks, round_)
    if config.aggregator == "norm-clipping":
        return merge(variables, tiers, _clipped(stacks), round_)
    chosen = _krum(config, variables, tiers, stacks, round_)
    parts = np.cumsum([len(u.weight) for u in stacks])[:-1].tolist()
    return merge(variables, tiers, _summed(stacks, jnp.split(chosen, parts)), round_)


def _summed(
    stacks: Sequence[StackedUpdates], weights: Sequence[Float[Array, " _"]]
) -> list[TierUpdate]:
    """The weighted sums of each tier's updates.

    Multiplied and added instead of a matrix product, which accelerators do in fewer bits.
    """
    return [
        TierUpdate(jax.tree.map(lambda u, w=w: (_along(w, u) * u).sum(0), stack.updates), w.sum())
        for stack, w in zip(stacks, weights, strict=True)
    ]


def _along(values: Array, stack: Array) -> Array:
    """`[slots]` -> `[slots, 1, ...]`, to go with a stack."""
    return values.astype(stack.dtype).reshape(-1, *(1,) * (stack.ndim - 1))


def _embedded(
    variables: Params, tiers: Sequence[Tier], stacks: Sequence[StackedUpdates], round_: Round
) -> list[Params]:
    """Each tier's updates as global ones, `[slots, ...]`, zeros in what it does not own."""
    return [
        jax.vmap(lambda u, tier=tier: tier.embed(u, variables, round_))(stack.updates)
        for tier, stack in zip(tiers, stacks, strict=True)
    ]


def _middle(
    config: Aggregation,
    variables: Params,
    tiers: Sequence[Tier],
    stacks: Sequence[StackedUpdates],
    round_: Round,
) -> tuple[Params, Params]:
    """The mean of each entry's middle values: the median, or the trimmed mean.

    The values of clients that own the entry are sorted before those of others, and as many are cut
    off at each end as `_cut` tells for their number.
    """
    slots = sum(len(stack.weight) for stack in stacks)
    cut = jnp.asarray(_cut(config, slots))
    there = [jnp.asarray(stack.weight) > 0 for stack in stacks]

    def entry(updates: Sequence[Array], owned: Sequence[Array]) -> tuple[Array, Array]:
        values = [
            jnp.where((o[None] > 0) & (_along(t, u) > 0), u, jnp.inf)
            for u, o, t in zip(updates, owned, there, strict=True)
        ]
        ordered = jnp.sort(jnp.concatenate(values), axis=0)
        counts = [o * t.sum().astype(o.dtype) for o, t in zip(owned, there, strict=True)]
        count = sum(counts[1:], start=counts[0]).astype(jnp.int32)
        low, place = cut[count][None], _along(jnp.arange(slots), ordered).astype(jnp.int32)
        kept = (place >= low) & (place < count[None] - low)
        total = jnp.where(kept, ordered, 0).sum(0)
        return total / jnp.maximum(kept.sum(0), 1).astype(total.dtype), count

    stacked = _embedded(variables, tiers, stacks, round_)
    owned = [tier.owned(variables, round_) for tier in tiers]
    structure = jax.tree.structure(variables)
    leaves = zip(
        zip(*map(jax.tree.leaves, stacked), strict=True),
        zip(*map(jax.tree.leaves, owned), strict=True),
        strict=True,
    )
    middles, counts = zip(*(entry(u, o) for u, o in leaves), strict=True)
    return jax.tree.unflatten(structure, middles), jax.tree.unflatten(structure, counts)


def _cut(config: Aggregation, most: int) -> Int[np.ndarray, " n"]:
    """How many of 0 to `most` values to leave out at each end."""
    counts = np.arange(most + 1)
    if config.trim is None:  # the median: all but the middle one, or the middle two
        return np.maximum(counts - 1, 0).astype(np.int32) // 2
    # And a bit more, so that 0.29 of 100, which is 28.999999999999996, is 29.
    return np.floor(config.trim * counts + 1e-9).astype(np.int32)


def _clipped(stacks: Sequence[StackedUpdates]) -> list[TierUpdate]:
    """The weighted sums of updates scaled down to the round's median root mean square."""

    def sizes(stack: StackedUpdates) -> Float[Array, " _"]:
        leaves = [u.reshape(len(u), -1) for u in jax.tree.leaves(stack.updates)]
        squares = [jnp.square(u).sum(1).astype(jnp.float32) for u in leaves]
        count = sum(u.shape[1] for u in leaves)
        return jnp.sqrt(sum(squares[1:], start=squares[0]) / count)

    found = [sizes(stack) for stack in stacks]
    there = jnp.concatenate([stack.weight > 0 for stack in stacks])
    ordered, count = jnp.sort(jnp.where(there, jnp.concatenate(found), jnp.inf)), there.sum()
    bound = (ordered[jnp.maximum(count - 1, 0) // 2] + ordered[count // 2]) / 2
    scales = [jnp.where(size > bound, bound / size, 1) for size in found]
    clipped = [
        stack._replace(updates=jax.tree.map(lambda u, s=s: _along(s, u) * u, stack.updates))
        for stack, s in zip(stacks, scales, strict=True)
    ]
    return _summed(clipped, [jnp.asarray(stack.weight) for stack in stacks])


def _krum(
    config: Aggregation,
    variables: Params,
    tiers: Sequence[Tier],
    stacks: Sequence[StackedUpdates],
    round_: Round,
) -> Float[Array, " clients"]:
    """1 for each chosen client, else 0; the slots of all tiers one after another.

    A client's score is the sum of its squared distances to its n - f - 2 nearest others. Two
    clients are as far apart as the mean square over the entries that both own; with none in common,
    infinitely far. Of equal scores the first in order of tiers and clients is chosen.
    """
    byzantine = config.krum_byzantine or 0
    there = jnp.concatenate([stack.weight > 0 for stack in stacks])
    distances = _distances(variables, tiers, stacks, round_)
    pairs = there[None] & there[:, None] & ~jnp.eye(len(there), dtype=bool)
    near = jnp.sort(jnp.where(pairs, distances, jnp.inf), axis=1)
    count = there.sum()
    neighbours = jnp.clip(count - byzantine - 2, 1, None)
    scores = jnp.where(jnp.arange(len(there))[None] < neighbours, near, 0).sum(1)
    # Clients that are infinitely far from all others still come before empty slots.
    scores = jnp.where(there, jnp.minimum(scores, jnp.finfo(scores.dtype).max), jnp.inf)
    several = jnp.maximum(config.krum_selected or count - byzantine, 1)
    selected = several if config.aggregator == "multi-krum" else 1
    rank = jnp.argsort(jnp.argsort(scores))
    return (there & (rank < selected)).astype(jnp.float32)


def _distances(
    variables: Params, tiers: Sequence[Tier], stacks: Sequence[StackedUpdates], round_: Round
) -> Float[Array, "clients clients"]:
    """Mean square difference over the entries that both own, inf where there are none.

    From the differences themselves: a Gram matrix would lose those that are small, and make what is
    not a number of those that are huge.
    """
    tier_of = np.repeat(np.arange(len(tiers)), [len(stack.weight) for stack in stacks])
    embedded = _embedded(variables, tiers, stacks, round_)
    values = jax.tree.map(lambda *u: jnp.concatenate(u), *embedded)
    owned = jax.tree.map(
        lambda *o: jnp.stack(o) > 0, *(tier.owned(variables, round_) for tier in tiers)
    )

    def from_one(i: Int[Array, ""]) -> Float[Array, " clients"]:
        def parts(value: Array, own: Bool[Array, "..."]) -> tuple[Array, Array]:
            both = own[jnp.asarray(tier_of)[i]][None] & own[tier_of]
            axes = tuple(range(1, value.ndim))
            squares = jnp.square(jnp.where(both, value - value[i][None], 0))
            return squares.sum(axes, dtype=jnp.float32), both.sum(axes, dtype=jnp.float32)

        pieces = [parts(*pair) for pair in zip(*map(jax.tree.leaves, (values, owned)), strict=True)]
        square, count = (sum(p[1:], start=p[0]) for p in zip(*pieces, strict=True))
        return jnp.where(count > 0, square / jnp.maximum(count, 1), jnp.inf)

    return jax.lax.map(from_one, jnp.arange(len(tier_of)))
