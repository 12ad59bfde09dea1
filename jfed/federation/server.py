"""The server's step: an Optax optimizer on the negative mean update (Reddi et al. 2021, FedOpt)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from jfed.federation.aggregation import TierUpdate, merge
from jfed.federation.client import MakeOptimizer, check_number, named_optimizer
from jfed.federation.tiers import Tier
from jfed.models.model import Params


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How the server uses the mean update.

    Attributes:
      optimizer: an Optax optimizer by name, or a function from the learning rate to an
        `optax.GradientTransformation`. "sgd" with learning rate 1 is FedAvg, "adam" is FedAdam.
      learning_rate: of the server.
      momentum: of optimizers that have one ("sgd" with momentum is FedAvgM).
    """

    optimizer: str | MakeOptimizer = "sgd"
    learning_rate: float = 1.0
    momentum: float | None = None

    def __post_init__(self) -> None:
        check_number("server learning_rate", self.learning_rate, above=0.0)
        check_number("server momentum", self.momentum, least=0.0)
        make_server_optimizer(self)


class ServerState(NamedTuple):
    """What the server keeps from round to round."""

    variables: Params
    optimizer: Any


def make_server_optimizer(config: ServerConfig) -> optax.GradientTransformation:
    """The server's optimizer."""
    maker = config.optimizer
    if isinstance(maker, str):
        maker = named_optimizer(maker, config.momentum)
    return maker(config.learning_rate)


def make_server_step(
    tiers: Sequence[Tier], optimizer: optax.GradientTransformation
) -> jax.stages.Wrapped:
    """The jitted end of a round: merge the tiers' updates and step the server's variables."""

    @jax.jit
    def step(state: ServerState, updates: Sequence[TierUpdate]) -> ServerState:
        mean = merge(state.variables, tiers, updates)
        gradient = jax.tree.map(lambda u: -u, mean)
        changes, optimizer_state = optimizer.update(gradient, state.optimizer, state.variables)
        return ServerState(optax.apply_updates(state.variables, changes), optimizer_state)

    return step
