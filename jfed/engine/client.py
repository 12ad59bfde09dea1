"""Local training: what one client does with one batch, and how it is configured."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jfed.errors import ConfigError, check_integer, check_number, check_type, one_of
from jfed.models.losses import Batch, Metrics, cross_entropy, training_logits
from jfed.models.model import Model, Params

_MANY = 10**6  # more epochs, steps, or examples in a batch than anyone means
SCHEDULES = ("constant", "cosine", "step")
# The learning rate is that of the round, a traced scalar.
MakeOptimizer = Callable[[Any], optax.GradientTransformation]
# From a client's update and a key to what it sends: the same tree.
Transform = Callable[[Params, Array], Params]


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
        "step" (a tenth of it after half of the rounds, a hundredth after three quarters).
      momentum: of optimizers that have one, from 0 to below 1; None leaves Optax's default.
      weight_decay: added to the gradient as weight_decay * params (an L2 penalty); 0 adds none to
        what the optimizer does by itself.
      clip_norm: gradients of a larger global norm are scaled down to it; None for no clipping.
      transform: what a client does to its update before it sends it, such as clipping or lossy
        compression: a function of the update (a tree like the parameters) and a key; None sends it
        as it is.
      mask_absent_classes: set the logits of classes that a client has no example of to 0 in its
        loss, so that it does not unlearn them (the masked cross-entropy of HeteroFL, Diao et al.
        2021, section 3).
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    optimizer: str | MakeOptimizer = "sgd"
    learning_rate: float = 0.1
    schedule: str = "constant"
    momentum: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = None
    transform: Transform | None = None
    mask_absent_classes: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size"):
            if name != "steps" or self.steps is not None:
                check_integer(name, getattr(self, name), least=1, most=_MANY)
        check_type("mask_absent_classes", self.mask_absent_classes, bool)
        check_number("learning_rate", self.learning_rate, above=0.0)
        check_number("weight_decay", self.weight_decay, least=0.0)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, above=0.0)
        one_of("schedule", self.schedule, SCHEDULES)
        try_optimizer(make_optimizer(self), self.optimizer)


def optimizer_from(optimizer: str | MakeOptimizer, momentum: float | None) -> MakeOptimizer:
    """An optimizer, given by Optax's name or as a function, as a function of the learning rate."""
    if callable(optimizer):
        if momentum is not None:
            raise ConfigError(
                f"momentum {momentum!r} goes with an optimizer's name; a function sets its own."
            )
        return optimizer
    if not isinstance(optimizer, str):
        raise ConfigError(
            "optimizer must be an Optax name such as 'sgd', or a function from the learning rate "
            f"to a transformation such as optax.sgd itself, got {optimizer!r}."
        )
    makers = _named_optimizers()
    maker = makers[one_of("optimizer", optimizer, tuple(makers))]
    if momentum is None:
        return maker
    if check_number("momentum", momentum, least=0.0) >= 1:
        raise ConfigError(f"momentum must be from 0 to below 1, got {momentum!r}.")
    if "momentum" not in inspect.signature(maker).parameters:
        raise ConfigError(f"optimizer {optimizer!r} has no momentum, got momentum={momentum!r}.")
    return functools.partial(maker, momentum=float(momentum))


def _named_optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """The functions of Optax that make an optimizer of a learning rate."""
    return {
        name: maker
        for name, maker in sorted(vars(optax).items())
        if inspect.isfunction(maker)
        and not name.startswith(("_", "scale_by"))
        and next(iter(inspect.signature(maker).parameters), "") == "learning_rate"
    }


def try_optimizer(make: MakeOptimizer, given: Any) -> None:
    """Raises ConfigError unless the optimizer steps on gradients alone; computes nothing."""
    params = {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32)}

    def step(params: Params) -> Params:
        optimizer = make(0.1)
        return optimizer.update(params, optimizer.init(params), params)[0]

    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(step, params)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"optimizer {given!r} cannot be used: {error}") from error


def make_optimizer(config: ClientConfig) -> MakeOptimizer:
    """The client's optimizer, clipping and weight decay included."""
    maker = optimizer_from(config.optimizer, config.momentum)

    def make(learning_rate: Any) -> optax.GradientTransformation:
        parts = [maker(learning_rate)]
        if config.weight_decay:
            parts.insert(0, optax.add_decayed_weights(config.weight_decay))
        if config.clip_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
        return optax.chain(*parts)

    return make


def learning_rate(config: ClientConfig, round_: int, rounds: int) -> float:
    """The learning rate of round `round_` (from 0) of `rounds`."""
    done = round_ / rounds
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "step":
        return config.learning_rate * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    return config.learning_rate


def make_step(model: Model) -> Callable:
    """One step of local training.

    Returns:
      `step(optimizer, params, state, batch) -> (params, state, metrics)`.
    """

    def of_logits(params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        return cross_entropy(training_logits(model, params, batch), batch)

    loss = model.loss or of_logits

    def step(
        optimizer: optax.GradientTransformation, params: Params, state: Any, batch: Batch
    ) -> tuple[Params, Any, Metrics]:
        gradient, metrics = jax.grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, metrics

    return step
