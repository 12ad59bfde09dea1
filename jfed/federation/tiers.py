"""Tiers: the submodels that clients can afford, and which part of the global variables each holds.

A tier names one thing about its variables: `extract`, a selection of entries of the global
variables. All else follows. Its linear transpose embeds an update where it belongs, and the
transpose of ones tells which entries the tier owns.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jfed.errors import ConfigError, one_of
from jfed.models.model import Model, Params
from jfed.models.odenet import Iterations, ODENetConfig, is_norm, odenet, per_stage
from jfed.seeds import generator

SHARING = ("all", "norms-per-depth")


def _everything(variables: Params) -> Params:
    return variables


@dataclasses.dataclass(frozen=True)
class Tier:
    """A submodel and its place in the global variables.

    Attributes:
      name: a short label, a column of the metrics.
      model: works on the tier's own variables.
      extract: global variables -> the tier's variables. A selection: every entry of the result is
        one entry of the argument, no entry is taken twice.
    """

    name: str
    model: Model
    extract: Callable[[Params], Params] = _everything

    def embed(self, variables: Params, like: Params) -> Params:
        """Puts the tier's variables where they belong in the global ones, zeros elsewhere.

        Args:
          variables: the tier's, shaped as `extract(like)`.
          like: global variables; only shapes and dtypes matter.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        return jax.linear_transpose(self.extract, shapes)(variables)[0]

    def owned(self, like: Params) -> Params:
        """1 for each entry of the global variables that the tier owns, else 0."""
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), self.shapes(like))
        return self.embed(ones, like)

    def shapes(self, like: Params) -> Params:
        """Shapes and dtypes of the tier's variables."""
        return jax.eval_shape(self.extract, like)


@dataclasses.dataclass(frozen=True)
class Tiers:
    """All tiers of a federation.

    Attributes:
      init: `init(key) -> global variables`.
      members: the tiers that clients run.
      at: the tier of any iteration count, also one that no client runs; None where the tiers are
        not iteration counts.
    """

    init: Callable[[Array], Params]
    members: tuple[Tier, ...]
    at: Callable[[Iterations], Tier] | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(tier, Tier) for tier in self.members):
            raise ConfigError(f"tiers must be of type Tier, got {self.members!r}.")
        names = [tier.name for tier in self.members]
        if not names:
            raise ConfigError("a federation needs at least one tier, got none.")
        if len(set(names)) < len(names):
            raise ConfigError(f"tiers must have different names, got {names}.")


def single(model: Model, name: str = "full") -> Tiers:
    """One tier: every client trains the whole model (FedAvg)."""
    return Tiers(model.init, (Tier(name, model),))


def ode(config: ODENetConfig, iterations: Sequence[Iterations], *, sharing: str = "all") -> Tiers:
    """Tiers of an ODENet that differ in how many iterations their ODE blocks run.

    Args:
      config: the network; its own `iterations` are not used.
      iterations: one entry a tier: solver steps of each stage, or one number for all stages.
      sharing: "all": every weight is everybody's. "norms-per-depth": each tier keeps norm scales
        and offsets of its own, all else is shared. An iteration count that no client runs then
        takes the norms of the nearest tier (in total iterations, the shallower of two).

    Raises:
      ConfigError: no or repeated iteration counts, or ones that do not fit the network.
    """
    one_of("sharing", sharing, SHARING)
    if not isinstance(iterations, Sequence) or isinstance(iterations, str):
        raise ConfigError(
            f"iterations must be a sequence with an entry for each tier, got {iterations!r}."
        )
    totals = [sum(per_stage(c, len(config.widths))) for c in iterations]
    if not iterations:
        raise ConfigError("iterations must name at least one tier, got none.")
    base = odenet(dataclasses.replace(config, iterations=iterations[0]))

    def at(count: Iterations) -> Tier:
        model = odenet(dataclasses.replace(config, iterations=count))
        if sharing == "all":
            return Tier(tier_name(count), model)
        total = sum(per_stage(count, len(config.widths)))
        nearest = min(range(len(totals)), key=lambda i: (abs(total - totals[i]), totals[i]))
        return Tier(tier_name(count), model, _row_of_norms(nearest))

    members = tuple(at(count) for count in iterations)
    if sharing == "all":
        return Tiers(base.init, members, at)
    return Tiers(_stack_norms(base.init, len(iterations)), members, at)


def tier_name(iterations: Iterations) -> str:
    """Writes 4 iterations in every stage as 4, counts per stage as 3-2-2."""
    return "-".join(map(str, iterations)) if isinstance(iterations, tuple) else str(iterations)


def _stack_norms(init: Callable[[Array], Params], tiers: int) -> Callable[[Array], Params]:
    """Gives the norms' leaves a leading axis over tiers."""

    def stacked(key: Array) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.stack([x] * tiers) if is_norm(path) else x, init(key)
        )

    return stacked


def _row_of_norms(row: int) -> Callable[[Params], Params]:
    def extract(variables: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x[row] if is_norm(path) else x, variables
        )

    return extract


def assign(clients: int, tiers: int, shares: Sequence[float] | None, *, seed: int) -> np.ndarray:
    """Which tier each client belongs to, `[clients]` int, in the given shares (largest remainder).

    Args:
      clients: how many there are.
      tiers: how many there are.
      shares: the tiers' shares of the clients, summing to 1; equal by default.
      seed: of the shuffle.
    """
    weights = check_shares(shares, tiers)
    exact = weights * clients
    counts = np.floor(exact).astype(int)
    rest = np.argsort(counts - exact, kind="stable")[: clients - counts.sum()]
    counts[rest] += 1
    tier = np.repeat(np.arange(tiers), counts)
    if not counts.all():
        raise ConfigError(
            f"{clients} clients in shares {weights.tolist()} leave tier {int(np.argmin(counts))} "
            "without a client; leave that tier out, or raise its share or the number of clients."
        )
    return generator(seed, "tiers").permutation(tier)


def check_shares(shares: Sequence[float] | None, tiers: int) -> np.ndarray:
    """Shares as an array; ConfigError unless there is one a tier, all above 0, summing to 1."""
    if shares is None or len(shares) == 0:
        return np.full(tiers, 1 / tiers)
    weights = np.asarray(shares, dtype=float)
    if weights.shape != (tiers,):
        raise ConfigError(f"shares {list(shares)} must name one share for each of {tiers} tiers.")
    if not np.isfinite(weights).all() or (weights <= 0).any() or abs(weights.sum() - 1) > 1e-6:
        raise ConfigError(
            f"shares must be above 0 and sum to 1, got {list(shares)}, sum {weights.sum():g}."
        )
    return weights / weights.sum()
