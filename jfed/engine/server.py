"""The server's step: an Optax optimizer on the negative update of a round (Reddi et al. 2021)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jfed.engine.client import MakeOptimizer, optimizer_from, try_optimizer
from jfed.engine.merging import Updates
from jfed.engine.robust import Aggregation, aggregate
from jfed.errors import check_number
from jfed.models.model import Params
from jfed.tiers.tier import Round, Tier


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How the server makes one update of those of the clients, and uses it.

    Attributes:
      optimizer: an Optax optimizer by name, or a function from the learning rate to an
        `optax.GradientTransformation`. "sgd" with learning rate 1 is FedAvg, "adam" is FedAdam.
      learning_rate: of the server.
      momentum: of optimizers that have one, from 0 to below 1 ("sgd" with momentum is FedAvgM).
      aggregator: "mean", "median", "trimmed-mean", "krum", "multi-krum" or "norm-clipping"; see
        `jfed.engine.robust.Aggregation`, also for what follows. With all but the mean, and
        clipping to a given norm, memory grows with the cohort: each lane of a device, and the
        server, hold an update for each client of a round.
      trim: of "trimmed-mean": the share left out at each end, from 0 to below 0.5.
      krum_byzantine: of "krum" and "multi-krum": hostile clients in a round to withstand.
      krum_selected: of "multi-krum": updates to average; those of all others by default.
      clip_updates: of "norm-clipping": an L2 norm; the median of the round by default.
    """

    optimizer: str | MakeOptimizer = "sgd"
    learning_rate: float = 1.0
    momentum: float | None = None
    aggregator: str = "mean"
    trim: float | None = None
    krum_byzantine: int | None = None
    krum_selected: int | None = None
    clip_updates: float | None = None

    def __post_init__(self) -> None:
        check_number("server learning_rate", self.learning_rate, above=0.0)
        maker = optimizer_from(self.optimizer, self.momentum)
        try_optimizer(lambda _: maker(self.learning_rate), self.optimizer)
        self.aggregation  # noqa: B018  (checks its settings)

    @property
    def aggregation(self) -> Aggregation:
        """How the updates of a round become one."""
        names = [field.name for field in dataclasses.fields(Aggregation)]
        return Aggregation(**{name: getattr(self, name) for name in names})


class ServerState(NamedTuple):
    """What the server keeps from round to round."""

    variables: Params
    optimizer: Any


def make_server_optimizer(config: ServerConfig) -> optax.GradientTransformation:
    """The server's optimizer."""
    return optimizer_from(config.optimizer, config.momentum)(config.learning_rate)


def make_server_step(
    tiers: Sequence[Tier],
    optimizer: optax.GradientTransformation,
    aggregation: Aggregation | None = None,
) -> jax.stages.Wrapped:
    """The jitted end of a round: merge the tiers' updates and step the server's variables.

    Args:
      tiers: of the clients.
      optimizer: of the server.
      aggregation: how updates become one; None for their weighted mean.

    Returns:
      `step(state, updates, round) -> (state, finite)`, where `finite` tells whether all variables
      are; `round` (from 0) is that of the updates. If nobody delivered, the state stays as it was,
      the optimizer's memory included.
    """
    aggregation = aggregation or Aggregation()

    @jax.jit
    def step(
        state: ServerState, updates: Sequence[Updates], round_: Round = 0
    ) -> tuple[ServerState, Array]:
        update, owned = aggregate(aggregation, state.variables, tiers, updates, round_)
        gradient = jax.tree.map(lambda u: -u, update)
        changes, memory = optimizer.update(gradient, state.optimizer, state.variables)
        # What nobody owned this round keeps its value, whatever the optimizer remembers.
        changes = jax.tree.map(lambda c, w: jnp.where(w > 0, c, 0), changes, owned)
        variables = optax.apply_updates(state.variables, changes)
        anybody = jnp.stack([u.weight.sum() > 0 for u in updates]).any()
        state = jax.tree.map(
            lambda new, old: jnp.where(anybody, new, old), ServerState(variables, memory), state
        )
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables)]
        return state, jnp.stack(finite).all()

    return step
