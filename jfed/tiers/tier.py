"""What a tier is: one selection of entries of the global variables, from which all else follows.

The linear transpose of that selection embeds an update where it belongs, and the transpose of ones
tells which entries the tier owns.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jfed.errors import ConfigError, check_integer, check_number, check_sequence, one_of, shown
from jfed.models.model import Model, Params
from jfed.seeds import generator

WEIGHTS = ("examples", "count")  # how clients weigh in a mean
Round = Any  # a round's number, from 0: an int, or a traced int32 scalar


def everything(variables: Params, round_: Round) -> Params:
    """The selection of a tier that owns every entry."""
    del round_
    return variables


@dataclasses.dataclass(frozen=True)
class Tier:
    """A submodel and its place in the global variables.

    Attributes:
      name: a short label, a column of the metrics.
      model: works on the tier's own variables; or a function `(setting, largest) -> Model` of
        models that one program serves, since what tells them apart is data. `largest` is what no
        client's setting exceeds, number by number, among those that train at the same time under
        one `vmap`, or None.
      extract: `extract(variables, round) -> the tier's variables`. A selection: every entry of the
        result is one entry of the global variables, no entry is taken twice. Which ones may depend
        on the round (a traced int32 scalar, from 0), shapes may not.
      setting: the tier's own, a nested tuple of integers.
      mask: `mask(like, setting)`, which of the extracted entries the tier owns: 1 or 0 for each, a
        tree shaped like them; None for all.
      iterations: solver steps of each stage, where the tier is an iteration count.
      solver: that takes these steps, by diffrax's name.
    """

    name: str
    model: Model | Callable[[Any, Any], Model]
    extract: Callable[[Params, Round], Params] = everything
    setting: Any = ()
    mask: Callable[[Params, Any], Params] | None = None
    iterations: tuple[int, ...] | None = None
    solver: str | None = None

    @property
    def program(self) -> tuple[Any, ...]:
        """Tiers in which this is equal share compiled programs."""
        return self.model, self.extract, self.mask

    def bound(self, setting: Any = None, largest: Any = None) -> Model:
        """The model at a setting, traced or not; at the tier's own numbers by default."""
        if isinstance(self.model, Model):
            return self.model
        return self.model(self.setting if setting is None else setting, largest)

    def embed(self, variables: Params, like: Params, round_: Round = 0) -> Params:
        """Puts the tier's variables where they belong in the global ones, zeros elsewhere.

        Args:
          variables: the tier's, shaped as `extract(like, round_)`.
          like: global variables; only shapes and dtypes matter.
          round_: from 0.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        return jax.linear_transpose(lambda v: self.extract(v, round_), shapes)(variables)[0]

    def owned(self, like: Params, round_: Round = 0, setting: Any = None) -> Params:
        """1 for each entry of the global variables that the tier owns, else 0."""
        shapes = self.shapes(like)
        if self.mask is None:
            mine = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
        else:
            mine = self.mask(shapes, self.setting if setting is None else setting)
        return self.embed(mine, like, round_)

    def shapes(self, like: Params) -> Params:
        """Shapes and dtypes of the tier's variables, the same in every round."""
        return jax.eval_shape(lambda v: self.extract(v, 0), like)


def settings_of(tiers: Sequence[Tier]) -> Any:
    """The settings of tiers that share a program, `[tiers]` int32 for each number."""
    return jax.tree.map(
        lambda *values: np.asarray(values, np.int32), *(tier.setting for tier in tiers)
    )


@dataclasses.dataclass(frozen=True)
class Tiers:
    """All tiers of a federation.

    Attributes:
      init: `init(key) -> global variables`.
      members: the tiers that clients run.
      at: `at(counts, solver=None) -> tiers` of any iteration counts and solver, also of those that
        no client runs, to be tested, all by one program; by default with the solver that clients
        run. None where the tiers are not iteration counts.
      tested: tiers that no client runs, but that are evaluated beside the members.
      idle: the share of the clients that can run none of the members, from 0 to below 1. They are
        sampled like the others, train nothing and send nothing.
      kind: what the tiers' names tell, such as "iterations": a heading of tables and figures.
      weights: of clients in the mean where `ServerConfig.weights` is None, as the method's authors
        have them.
      algorithm: the settings of `AlgorithmConfig`, by name, that the method's authors train with,
        where no algorithm is given.
      weights_digest: of the weights that `init` gives, where it gives some, see `start_from`; by it
        a run folder knows them again.
    """

    init: Callable[[Array], Params]
    members: tuple[Tier, ...]
    at: Callable[..., tuple[Tier, ...]] | None = None
    tested: tuple[Tier, ...] = ()
    idle: float = 0.0
    kind: str = "tier"
    weights: str = "examples"
    algorithm: tuple[tuple[str, Any], ...] = (("name", "fedavg"),)
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(tier, Tier) for tier in (*self.members, *self.tested)):
            raise ConfigError(f"tiers must be of type Tier, got {self.members!r}, {self.tested!r}.")
        if not self.members:
            raise ConfigError("a federation needs at least one tier, got none.")
        if check_number("idle", self.idle, least=0.0) >= 1:
            raise ConfigError(f"idle must leave some clients to train, got {self.idle!r}.")
        one_of("weights", self.weights, WEIGHTS)
        names = [tier.name for tier in (*self.members, *self.tested)]
        if len(set(names)) < len(names):
            raise ConfigError(f"tiers must have different names, got {names}.")


def single(model: Model, name: str = "full") -> Tiers:
    """One tier: every client trains the whole model (FedAvg)."""
    return Tiers(model.init, (Tier(name, model),))


def as_tiers(tiers: Tiers | Model) -> Tiers:
    """The tiers, or the one tier of a model; ConfigError for anything else."""
    if isinstance(tiers, Model):
        return single(tiers)
    if not isinstance(tiers, Tiers):
        raise ConfigError(
            "tiers must be a Model, as jfed.models.from_nnx makes of an NNX module and "
            "jfed.models.Model of any two functions, or Tiers, as jfed.tiers.ode(config, ...) "
            f"makes them, got {shown(tiers)}."
        )
    return tiers


def check_ratio(ratio: float) -> float:
    """Returns the ratio as a float; ConfigError unless it is above 0 and at most 1."""
    number = check_number("ratio", ratio, above=0.0)
    if number > 1:
        raise ConfigError(f"ratio must be above 0 and at most 1, got {ratio!r}.")
    return number


def assign(
    clients: int, tiers: int, shares: Sequence[float] | None, *, seed: int, idle: float = 0.0
) -> np.ndarray:
    """Which tier each client belongs to, `[clients]` int, in the given shares (largest remainder).

    Args:
      clients: how many there are.
      tiers: how many there are.
      shares: the tiers' shares of the clients that train, summing to 1; equal by default.
      seed: of the shuffle.
      idle: the share of clients without a tier, which get the number `tiers`.
    """
    weights = with_idle(check_shares(shares, tiers), idle)
    exact = weights * check_integer("clients", clients, least=1, most=10**9)
    counts = np.floor(exact).astype(int)
    rest = np.argsort(counts - exact, kind="stable")[: clients - counts.sum()]
    counts[rest] += 1
    tier = np.repeat(np.arange(tiers + 1), counts)
    if not counts[:tiers].all():
        raise ConfigError(
            f"{clients} clients in shares {weights[:tiers].tolist()} leave tier "
            f"{int(np.argmin(counts[:tiers]))} "
            "without a client; leave that tier out, or raise its share or the number of clients."
        )
    return generator(seed, "tiers").permutation(tier)


def with_idle(shares: np.ndarray, idle: float) -> np.ndarray:
    """Shares of all clients, `[tiers + 1]`: of each tier, then of those without one."""
    return np.append(shares * (1 - idle), idle)


def check_shares(shares: Sequence[float] | None, tiers: int) -> np.ndarray:
    """Shares as an array; ConfigError unless there is one a tier, all above 0, summing to 1."""
    if shares is None or len(check_sequence("shares", shares)) == 0:
        return np.full(tiers, 1 / tiers)
    weights = np.asarray([check_number("share", share) for share in shares])
    if weights.shape != (tiers,):
        raise ConfigError(f"shares {list(shares)} must name one share for each of {tiers} tiers.")
    if not np.isfinite(weights).all() or (weights <= 0).any() or abs(weights.sum() - 1) > 1e-6:
        raise ConfigError(
            f"shares must be above 0 and sum to 1, got {list(shares)}, sum {weights.sum():g}."
        )
    return weights / weights.sum()


def check_extract(tier: Tier, like: Params) -> None:
    """Raises ConfigError unless `extract` is a selection: entries as they are, none taken twice.

    Args:
      tier: whose `extract` is tried on numbered entries, and on random ones, in two rounds.
      like: global variables; only shapes and dtypes matter.
    """
    if tier.extract is everything:
        return
    for round_ in (0, 1):
        _check_entries(tier, like, round_)
        taken = jax.tree.leaves(_times_taken(tier, like, round_))
        most = max(float(np.max(leaf, initial=0)) for leaf in taken)
        if most > 1:
            raise ConfigError(
                f"extract of tier {tier.name!r} takes an entry {most:g} times; once at most."
            )


def _check_entries(tier: Tier, like: Params, round_: int) -> None:
    """Raises ConfigError unless each extracted entry is one of the global entries."""
    leaves, structure = jax.tree.flatten(like)
    drawn = np.random.default_rng(0).standard_normal(
        min(_PLACES, max(leaf.size for leaf in leaves)), np.float32
    )

    def extracted(entries: Callable[[int, Int[np.ndarray, " N"]], np.ndarray]) -> np.ndarray:
        """What is made of entries that are given by the leaf and the place in it, each from 0."""
        given = [
            entries(i, np.arange(leaf.size) % _PLACES).reshape(leaf.shape).astype(leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        variables = jax.tree.unflatten(structure, list(map(jnp.asarray, given)))
        found = jax.tree.leaves(tier.extract(variables, round_))
        return np.concatenate([np.ravel(x) for x in found]) if found else np.zeros(0)

    def random(leaf: Any, place: Any) -> Any:
        return drawn[(place + 7919 * leaf) % len(drawn)]

    # Numbers that float32 keeps apart: which leaf, and where in it.
    leaf = extracted(lambda leaf, place: np.full(len(place), 1.0 + leaf))
    place = extracted(lambda leaf, place: place + 1.0)
    for values, most in ((leaf, len(leaves)), (place, _PLACES)):
        wrong = (values != np.round(values)) | (values < 1) | (values > most)
        if wrong.any():
            raise ConfigError(
                f"extract of tier {tier.name!r} must select entries as they are; from entries "
                f"numbered 1, 2, ... it makes {values[wrong][0]:g}."
            )
    named, found = random(leaf.astype(int) - 1, place.astype(int) - 1), extracted(random)
    if (found != named).any():
        first = int(np.argmax(found != named))
        raise ConfigError(
            f"extract of tier {tier.name!r} must select entries as they are; it makes "
            f"{found[first]:g} where an entry is {named[first]:g}."
        )


_PLACES = 2**23  # in a leaf that are told apart; float32 has numbers for twice as many


def _times_taken(tier: Tier, like: Params, round_: int) -> Params:
    """How often each global entry is in the tier's variables."""
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), tier.shapes(like))
    return tier.embed(ones, like, round_)
