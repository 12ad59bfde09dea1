"""Local training: what one client does with one batch, and how it is configured."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jfed.errors import ConfigError, check_integer, check_number, check_type, one_of
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


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, on the device.

    Attributes:
      pad: zeros (the mean colour) around an image before a random crop of its old size; 0 for no
        crop.
      flip: mirror half of the images left to right.
    """

    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        check_integer("augmentation pad", self.pad, least=0)


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


class Batch(NamedTuple):
    """One batch; `mask` is 1 for real examples, 0 for padding.

    With `present`, the logits of the classes where it is False are masked in the loss.
    """

    images: Float[Array, "B H W C"]
    labels: Int[Array, " B"]
    mask: Float[Array, " B"]
    present: Bool[Array, " classes"] | None = None


class Metrics(NamedTuple):
    """Sums over examples, float32 scalars; divide by `examples` for means."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    examples: Float[Array, ""]


def cross_entropy(
    logits: Float[Array, "B classes"], batch: Batch
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy of the real examples, and the sums that metrics are made of."""
    if batch.present is not None:
        logits = jnp.where(batch.present[None], logits, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    right = (jnp.argmax(logits, -1) == batch.labels).astype(jnp.float32)
    count = batch.mask.sum()
    total = (losses * batch.mask).sum()
    metrics = Metrics(total, (right * batch.mask).sum(), count)
    return total / jnp.maximum(count, 1), metrics


def training_logits(model: Model, params: Params, batch: Batch) -> Float[Array, "B classes"]:
    """Logits in training: batch norms use what they measure on the real examples of the batch."""
    if model.measure is None:
        return model.apply(params, batch.images)
    return model.apply(params, batch.images, batch.mask)


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


Preprocess = Callable[[Array, Array | None], Float[Array, "B H W C"]]


def make_preprocess(
    mean: tuple[float, ...], std: tuple[float, ...], *, pad: int, flip: bool
) -> Preprocess:
    """uint8 images -> standardised float32 images, augmented if a key is given.

    Args:
      mean: of each channel, in units of 0 to 255.
      std: of each channel, likewise.
      pad: zeros (the mean colour) around a standardised image before a random crop of its old
        size; 0 for no crop.
      flip: mirror half of the images left to right.

    Returns:
      `preprocess(images, key)`; the key is consumed; without one nothing is augmented.
    """
    centre, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def preprocess(images: Array, key: Array | None) -> Float[Array, "B H W C"]:
        x = (images.astype(jnp.float32) - centre[None, None, None]) / scale[None, None, None]
        if key is None:
            return x
        crop_key, flip_key = jax.random.split(key)
        if pad:
            x = _random_crop(x, pad, crop_key)
        if flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(x.shape[0], 1, 1, 1))
            x = jnp.where(mirrored, x[:, :, ::-1], x)
        return x

    return preprocess


def _random_crop(x: Float[Array, "B H W C"], pad: int, key: Array) -> Float[Array, "B H W C"]:
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.random.randint(key, (x.shape[0], 2), 0, 2 * pad + 1)
    return jax.vmap(lambda image, o: jax.lax.dynamic_slice(image, (o[0], o[1], 0), x.shape[1:]))(
        padded, offsets
    )
