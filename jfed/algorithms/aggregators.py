"""Aggregators that a few faulty or hostile clients cannot take over, beside the weighted mean.

Each works on every global entry over the clients that own it. Those except the mean and clipping to
a fixed norm need the update of every client at once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jfed.algorithms.sorting import sort_clients
from jfed.errors import ConfigError, check_integer, check_number, name_of, one_of
from jfed.models.model import Params


class Stack(NamedTuple):
    """The updates of a round, each by itself.

    Attributes:
      updates: like the variables with an axis of clients before, `[clients, ...]`; zeros in what a
        client does not own or did not deliver.
      owned: True where it did, with axes that broadcast to those of `updates`.
      weight: `[clients]`, 0 where nobody delivered.
    """

    updates: Params
    owned: Params
    weight: Float[Array, " clients"]


# What the server makes of a stack: a tree like the variables. What nobody owned is left out later.
Aggregator = Callable[[Stack], Params]

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

    A client counts once, whatever its weight, except in "mean" and "norm-clipping": else it could
    claim a large one. With all except the mean, and clipping to a given norm, memory grows with the
    cohort: each device and the server hold an update for each client of a round.

    Attributes:
      aggregator: "mean": the mean weighted by `weights`. "median": of each entry (Yin et al. 2018,
        definition 1). "trimmed-mean": the mean of each entry without its largest and its smallest
        values (definition 2). "krum": the update of one client, whose nearest others are nearest
        (Blanchard et al. 2017, section 4). "multi-krum": the mean of several such. "norm-clipping":
        the weighted mean of updates that are scaled down to a norm if they are longer. Or an
        `Aggregator` of the user's own, a function of a `Stack`.
      trim: of "trimmed-mean": the share of the values left out at each end, rounded down to a
        number of clients; from 0 to below 0.5.
      krum_byzantine: of "krum" and "multi-krum": how many hostile clients they are to withstand, f.
        It takes 2 f + 3 clients in a round; with n, each is judged by its n - f - 2 nearest.
      krum_selected: of "multi-krum": how many updates its mean is over; n - f by default.
      clip_updates: of "norm-clipping": the L2 norm of what a client sends. By default the median of
        the round, of norms divided by the square root of the number of a client's entries, so that
        clients of small tiers are not taken for modest ones.
    """

    aggregator: str | Aggregator = "mean"
    trim: float | None = None
    krum_byzantine: int | None = None
    krum_selected: int | None = None
    clip_updates: float | None = None

    def __post_init__(self) -> None:
        own: tuple[str, ...] = ()
        if not callable(self.aggregator):
            own = _SETTINGS[one_of("aggregator", self.aggregator, AGGREGATORS)]
        for name in (field.name for field in dataclasses.fields(Aggregation)[1:]):
            value = getattr(self, name)
            if name not in own and value is not None:
                raise ConfigError(
                    f"aggregator {name_of(self.aggregator)} has no {name}, got {value!r}; leave it "
                    "out."
                )
            if name in own and name in _NEEDED and value is None:
                raise ConfigError(f"aggregator {self.aggregator!r} needs {name}, got none.")
        numbers: dict[str, float] = {}
        if self.trim is not None:
            numbers["trim"] = check_number("trim", self.trim, least=0.0)
            if numbers["trim"] >= 0.5:
                raise ConfigError(f"trim must be below 0.5, to leave somebody, got {self.trim!r}.")
        for name, least in (("krum_byzantine", 0), ("krum_selected", 1)):
            if (value := getattr(self, name)) is not None:
                numbers[name] = check_integer(name, value, least=least)
        if self.clip_updates is not None:
            numbers["clip_updates"] = check_number("clip_updates", self.clip_updates, above=0.0)
        for name, number in numbers.items():  # which may be given as arrays
            object.__setattr__(self, name, number)

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


def make_aggregator(config: Aggregation) -> Aggregator | None:
    """The aggregator; None where the weighted mean, which needs no stack, does.

    Equal settings give the same object, whose programs are compiled once in a process.
    """
    if callable(config.aggregator):
        return config.aggregator
    if not config.stacked:
        return None
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(Aggregation)}
    return _named(Aggregation(**own))


@functools.lru_cache(maxsize=64)
def _named(config: Aggregation) -> Aggregator:
    if config.aggregator in ("median", "trimmed-mean"):
        return lambda stack: _middle(config, stack)
    if config.aggregator == "norm-clipping":
        return lambda stack: weighted_mean(_clipped(stack))
    return lambda stack: weighted_mean(stack._replace(weight=_krum(config, stack)))


def weighted_mean(stack: Stack) -> Params:
    """The mean of each entry over its owners, 0 where it has none.

    Multiplied and added instead of a matrix product, which accelerators do in fewer bits.
    """

    def mean(update: Array, owned: Array) -> Array:
        weight = jnp.where(owned, _along(stack.weight, update), 0)
        whole = weight.sum(0)
        return (weight * update).sum(0) / jnp.where(whole > 0, whole, 1)

    return jax.tree.map(mean, stack.updates, stack.owned)


def _along(values: Array, stack: Array) -> Array:
    """`[clients]` -> `[clients, 1, ...]`, to go with a stack."""
    return values.astype(stack.dtype).reshape(-1, *(1,) * (stack.ndim - 1))


def _middle(config: Aggregation, stack: Stack) -> Params:
    """The mean of each entry's middle values: the median, or the trimmed mean.

    The values of clients that own the entry are sorted before those of others, and as many are cut
    off at each end as `_cut` tells for their number.
    """
    cut = jnp.asarray(_cut(config, len(stack.weight)))

    def entry(update: Array, owned: Array) -> Array:
        owned = jnp.broadcast_to(owned, update.shape)
        ordered = sort_clients(jnp.where(owned, update, jnp.inf))
        count = owned.sum(0)
        low, place = cut[count][None], _along(jnp.arange(len(update)), ordered).astype(jnp.int32)
        kept = (place >= low) & (place < count[None] - low)
        return jnp.where(kept, ordered, 0).sum(0) / jnp.maximum(kept.sum(0), 1).astype(update.dtype)

    return jax.tree.map(entry, stack.updates, stack.owned)


def _cut(config: Aggregation, most: int) -> Int[np.ndarray, " n"]:
    """How many of 0 to `most` values to leave out at each end."""
    counts = np.arange(most + 1)
    if config.trim is None:  # the median: all except the middle one, or the middle two
        return np.maximum(counts - 1, 0).astype(np.int32) // 2
    # And a bit more, so that 0.29 of 100, which is 28.999999999999996, is 29.
    return np.floor(config.trim * counts + 1e-9).astype(np.int32)


def _clipped(stack: Stack) -> Stack:
    """The stack with updates scaled down to the round's median root mean square."""

    def square(update: Array, owned: Array) -> tuple[Array, Array]:
        axes = tuple(range(1, update.ndim))
        owned = jnp.broadcast_to(owned, update.shape)
        return jnp.square(update).sum(axes), owned.sum(axes, dtype=jnp.float32)

    squares, sizes = _totals(square, stack.updates, stack.owned)
    size = jnp.sqrt(squares / jnp.maximum(sizes, 1))
    there = stack.weight > 0
    ordered, count = jnp.sort(jnp.where(there, size, jnp.inf)), there.sum()
    bound = (ordered[jnp.maximum(count - 1, 0) // 2] + ordered[count // 2]) / 2
    scale = jnp.where(size > bound, bound / size, 1)
    return stack._replace(updates=jax.tree.map(lambda u: _along(scale, u) * u, stack.updates))


def _krum(config: Aggregation, stack: Stack) -> Float[Array, " clients"]:
    """1 for each chosen client, else 0.

    A client's score is the sum of its squared distances to its n - f - 2 nearest others. Two
    clients are as far apart as the mean square over the entries that both own; with none in common,
    infinitely far. Of equal scores the first client is chosen.
    """
    byzantine = config.krum_byzantine or 0
    there = stack.weight > 0
    pairs = there[None] & there[:, None] & ~jnp.eye(len(there), dtype=bool)
    near = jnp.sort(jnp.where(pairs, _distances(stack), jnp.inf), axis=1)
    count = there.sum()
    neighbours = jnp.clip(count - byzantine - 2, 1, None)
    scores = jnp.where(jnp.arange(len(there))[None] < neighbours, near, 0).sum(1)
    # Clients that are infinitely far from all others still come before empty slots.
    scores = jnp.where(there, jnp.minimum(scores, jnp.finfo(scores.dtype).max), jnp.inf)
    several = jnp.maximum(config.krum_selected or count - byzantine, 1)
    selected = several if config.aggregator == "multi-krum" else 1
    rank = jnp.argsort(jnp.argsort(scores))
    return (there & (rank < selected)).astype(jnp.float32)


def _distances(stack: Stack) -> Float[Array, "clients clients"]:
    """Mean square difference over the entries that both own, inf where there are none.

    From the differences themselves: a Gram matrix would lose those that are small, and make what is
    not a number of those that are huge.
    """

    def from_one(i: Int[Array, ""]) -> Float[Array, " clients"]:
        def parts(value: Array, own: Bool[Array, "..."]) -> tuple[Array, Array]:
            both = jnp.broadcast_to(own[i][None] & own, value.shape)
            axes = tuple(range(1, value.ndim))
            squares = jnp.square(jnp.where(both, value - value[i][None], 0))
            return squares.sum(axes, dtype=jnp.float32), both.sum(axes, dtype=jnp.float32)

        square, count = _totals(parts, stack.updates, stack.owned)
        return jnp.where(count > 0, square / jnp.maximum(count, 1), jnp.inf)

    return jax.lax.map(from_one, jnp.arange(len(stack.weight)))


def _totals(parts: Callable[[Array, Array], tuple[Array, Array]], *trees: Params) -> list[Array]:
    """The two results of `parts` summed over the leaves of trees."""
    pairs = [parts(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
    return [sum(each[1:], start=each[0]) for each in zip(*pairs, strict=True)]
