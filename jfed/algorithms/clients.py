"""How clients are configured: their work in a round, and their optimizer."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import optax

from jfed.algorithms.optimizers import (
    Argument,
    MakeOptimizer,
    check_arguments,
    optimizer_from,
    try_optimizer,
)
from jfed.errors import calling, check_integer, check_number, check_type, name_of, one_of

_MANY = 10**6  # more epochs, steps, or examples in a batch than anyone means
SCHEDULES = ("constant", "cosine", "step")
Schedule = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """How clients train.

    Attributes:
      epochs: passes over the client's examples in a round.
      steps: batches in a round instead of whole epochs; None goes by `epochs`.
      batch_size: examples in a batch. The last batch of an epoch holds what is left.
      optimizer: an Optax optimizer by name, such as "sgd" or "adamw", or a function from the
        learning rate to an `optax.GradientTransformation`. Its state starts anew each round.
      learning_rate: in the first round.
      schedule: the learning rate over rounds: "constant", "cosine" (to 0 after the last round), or
        "step" (a tenth of it after half of the rounds, a hundredth after three quarters); or a
        function from the round (from 0) to the learning rate, such as an Optax schedule, which
        takes the place of `learning_rate`.
      restart_schedule: the rounds after which a named schedule begins anew, for those that are
        left; 0: it never does. For a run that goes on after its last round.
      momentum: of optimizers that have one, from 0 to below 1; None leaves Optax's default.
      optimizer_args: further arguments of a named optimizer, by Optax's names: a mapping, kept as
        sorted pairs, in a command `b1=0.95 eps=0.001`.
      weight_decay: added to the gradient as weight_decay * params (an L2 penalty); 0 adds none to
        what the optimizer does by itself.
      clip_norm: gradients of a larger global norm are scaled down to it; None for no clipping.
      mask_absent_classes: set the logits of classes that a client has no example of to 0 in its
        loss, so that it does not unlearn them (the masked cross-entropy of HeteroFL, Diao et al.
        2021, section 3).
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    optimizer: str | MakeOptimizer = "sgd"
    learning_rate: float = 0.1
    schedule: str | Schedule = "constant"
    restart_schedule: int = 0
    momentum: float | None = None
    optimizer_args: tuple[Argument, ...] | Mapping[str, Any] = ()
    weight_decay: float = 0.0
    clip_norm: float | None = None
    mask_absent_classes: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size"):
            if name != "steps" or self.steps is not None:
                check_integer(name, getattr(self, name), least=1, most=_MANY)
        check_type("mask_absent_classes", self.mask_absent_classes, bool)
        numbers = {
            "learning_rate": check_number("learning_rate", self.learning_rate, above=0.0),
            "weight_decay": check_number("weight_decay", self.weight_decay, least=0.0),
        }
        if self.clip_norm is not None:
            numbers["clip_norm"] = check_number("clip_norm", self.clip_norm, above=0.0)
        for name, number in numbers.items():  # which may be given as arrays
            object.__setattr__(self, name, number)
        if not callable(self.schedule):
            one_of("schedule", self.schedule, SCHEDULES)
        check_integer("restart_schedule", self.restart_schedule, least=0)
        arguments = check_arguments("optimizer_args", self.optimizer_args)
        object.__setattr__(self, "optimizer_args", arguments)
        try_optimizer(make_optimizer(self), self.optimizer, arguments)
        if self.momentum is not None:
            object.__setattr__(self, "momentum", float(self.momentum))


# The settings that make the optimizer.
OPTIMIZER = ("optimizer", "momentum", "optimizer_args", "weight_decay", "clip_norm")


def make_optimizer(config: ClientConfig) -> MakeOptimizer:
    """The client's optimizer, clipping and weight decay included."""
    maker = optimizer_from(config.optimizer, config.momentum, config.optimizer_args)  # type: ignore[arg-type]

    def make(learning_rate: Any) -> optax.GradientTransformation:
        parts = [maker(learning_rate)]
        if config.weight_decay:
            parts.insert(0, optax.add_decayed_weights(config.weight_decay))
        if config.clip_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
        return optax.chain(*parts)

    return make


def sgd_momentum(config: ClientConfig) -> float | None:
    """The momentum of clients that do SGD, 0 for none; None if they do something else."""
    arguments = dict(config.optimizer_args)
    momentum = arguments.pop("momentum", config.momentum)
    if config.optimizer != "sgd" or arguments.get("nesterov"):
        return None
    return float(momentum or 0)


def learning_rate(config: ClientConfig, round_: int, rounds: int) -> float:
    """The learning rate of round `round_` (from 0) of `rounds`.

    Raises:
      ConfigError: a schedule of the user's own gives something else than a number, 0 or more.
    """
    if callable(config.schedule):
        with calling(f"schedule {name_of(config.schedule)}", round=round_):
            rate = config.schedule(round_)
        return check_number(
            f"schedule {name_of(config.schedule)} of round {round_}", rate, least=0.0
        )
    restart = config.restart_schedule
    done = round_ / (restart or rounds)
    if restart and round_ >= restart:
        done = (round_ - restart) / max(rounds - restart, 1)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "step":
        return config.learning_rate * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    return config.learning_rate
