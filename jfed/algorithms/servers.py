"""How the server is configured: how clients weigh, the aggregator, the optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax

from jfed.algorithms.aggregators import Aggregation
from jfed.algorithms.optimizers import (
    Argument,
    MakeOptimizer,
    check_arguments,
    optimizer_from,
    try_optimizer,
)
from jfed.errors import ConfigError, calling, check_number, name_of, one_of, shown
from jfed.tiers.tier import WEIGHTS


@dataclasses.dataclass(frozen=True)
class ServerConfig(Aggregation):
    """How the server makes one update of those of the clients, and uses it.

    Attributes:
      weights: of a client in the mean: "examples" that it holds, "count" (one each), or a function
        `(client, examples) -> weight` of its number and its examples, 0 or more; None: as the
        method's authors have it, see `jfed.tiers`.
      optimizer: an Optax optimizer by name, or a function from the learning rate to an
        `optax.GradientTransformation`. "sgd" with learning rate 1 is FedAvg, "adam" is FedAdam.
      learning_rate: of the server.
      momentum: of optimizers that have one, from 0 to below 1 ("sgd" with momentum is FedAvgM).
      optimizer_args: further arguments of a named optimizer, by Optax's names: a mapping, kept as
        sorted pairs, in a command `eps=0.001 b1=0.9`.
    """

    weights: str | Callable[[int, int], Any] | None = None
    optimizer: str | MakeOptimizer = "sgd"
    learning_rate: float = 1.0
    momentum: float | None = None
    optimizer_args: tuple[Argument, ...] | Mapping[str, Any] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and not callable(self.weights):
            if not isinstance(self.weights, str):
                raise ConfigError(
                    f"weights must be a function of client and examples, or one of "
                    f"{', '.join(map(repr, WEIGHTS))}, got {shown(self.weights)}."
                )
            one_of("weights", self.weights, WEIGHTS)
        rate = check_number("server learning_rate", self.learning_rate, above=0.0)
        object.__setattr__(self, "learning_rate", rate)  # which may be given as an array
        arguments = check_arguments("server optimizer_args", self.optimizer_args)
        object.__setattr__(self, "optimizer_args", arguments)
        try_optimizer(
            lambda _: make_server_optimizer(self),
            self.optimizer,
            arguments,
            title="server optimizer",
        )
        if self.momentum is not None:
            object.__setattr__(self, "momentum", float(self.momentum))


def client_weights(config: ServerConfig, examples: list[int]) -> list[float]:
    """The weight of every client, by number.

    Args:
      config: of the server.
      examples: that each client holds.

    Raises:
      ConfigError: a function of the user's own gives a weight below 0, or 0 for all.
    """
    if config.weights in ("examples", None):
        return [float(n) for n in examples]
    if config.weights == "count":
        return [1.0] * len(examples)
    assert callable(config.weights)
    title, weights = f"weights {name_of(config.weights)}", []
    for client, count in enumerate(examples):
        with calling(title, client=client, examples=count):
            weight = config.weights(client, count)
        weights.append(check_number(f"{title} of client {client}", weight, least=0.0))
    if not any(weights):
        raise ConfigError(f"{title} are 0 for all {len(examples)} clients.")
    return weights


# The settings that make the optimizer.
SERVER_OPTIMIZER = ("optimizer", "learning_rate", "momentum", "optimizer_args")


def make_server_optimizer(config: ServerConfig) -> optax.GradientTransformation:
    """The server's optimizer, whose step along the clients' mean is `step_owned`."""
    arguments: tuple[Argument, ...] = config.optimizer_args  # type: ignore[assignment]
    maker = optimizer_from(config.optimizer, config.momentum, arguments, title="server optimizer")
    return maker(config.learning_rate)


def check_plain(algorithm: str, config: ServerConfig) -> None:
    """Raises ConfigError if a server has an optimizer, in an algorithm that has no use for it."""
    plain = ServerConfig()
    for name in SERVER_OPTIMIZER:
        if (value := getattr(config, name)) != getattr(plain, name):
            raise ConfigError(f"{algorithm} has no server optimizer, got {name} {value!r}.")
