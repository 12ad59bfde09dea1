"""What a loss gets and gives: batches, sums of metrics, and the cross-entropy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jfed.models.model import Model, Params, Statistics


class Batch(NamedTuple):
    """One batch; `mask` is 1 for real examples, 0 for padding.

    With `present`, the logits of the classes where it is False are masked in the loss. `round`
    (from 0) is that which clients train in, and None in a test.
    """

    images: Float[Array, "B H W C"]
    labels: Int[Array, " B"]
    mask: Float[Array, " B"]
    present: Bool[Array, " classes"] | None = None
    round: Int[Array, ""] | None = None


def batch_shapes(size: int, image_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of a batch that clients train on, a `Batch`; images as `(H, W, C)`."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    images, labels = array(jnp.float32, size, *image_shape), array(jnp.int32, size)
    mask: Any = array(jnp.float32, size)
    return Batch(images, labels, mask, round=array(jnp.int32))  # type: ignore[arg-type]


class Metrics(NamedTuple):
    """Sums over examples, float32 scalars; divide by `examples` for means.

    Attributes:
      loss: in nats.
      correct: how many were classified right.
      examples: how many they are.
      others: further sums by name, of a loss of the user's own.
    """

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    examples: Float[Array, ""]
    others: Any = {}  # noqa: RUF012 (never written to)


# Of local training: `(params, batch, key) -> (loss, metrics)`.
Loss = Callable[[Params, Batch, Array], tuple[Float[Array, ""], Metrics]]


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


def tested_logits(
    model: Model, params: Params, images: Float[Array, "B ..."], statistics: Statistics | None
) -> Float[Array, "B classes"]:
    """Logits in a test: batch norms use these statistics; None for a model without."""
    given = (images,) if statistics is None else (images, None, statistics)
    return model.apply(params, *given)


def training_loss(model: Model) -> Loss:
    """The loss of local training: the model's own, or the cross-entropy of its logits."""
    if model.loss is not None:
        return model.loss

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        del key
        return cross_entropy(training_logits(model, params, batch), batch)

    return loss
