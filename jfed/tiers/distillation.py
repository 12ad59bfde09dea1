"""Self-distillation: a loss by which some predictions of a network learn from others of its own."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jfed.models.losses import Batch, Metrics, cross_entropy, training_logits
from jfed.models.model import Model, Params


def divergence(
    teacher: Float[Array, "*#n classes"],
    student: Float[Array, "*#n classes"],
    temperature: float = 1.0,
) -> Float[Array, "*#n"]:
    """KL(p_teacher || p_student) of logits, in nats; nothing is learned through the teacher.

    Leading axes may be 1 in one of the two. Both are softened by the temperature T, and the
    divergence is scaled by T^2 (Hinton et al. 2015, arXiv 1503.02531).
    """
    log_p = jax.nn.log_softmax(student / temperature)
    target = jax.lax.stop_gradient(jax.nn.log_softmax(teacher / temperature))
    return temperature**2 * (jnp.exp(target) * (target - log_p)).sum(-1)


def mask_absent(logits: Float[Array, "n B classes"], batch: Batch) -> Float[Array, "n B classes"]:
    """Logits with those of the classes that the batch's client lacks set to 0, if it masks them."""
    return logits if batch.present is None else jnp.where(batch.present[None, None], logits, 0)


def batch_mean(values: Float[Array, "n B"], batch: Batch) -> Float[Array, " n"]:
    """The mean over the real examples of a batch."""
    return (values * batch.mask[None]).sum(1) / jnp.maximum(batch.mask.sum(), 1)


def teaching(model: Model, students: Sequence[Model], weight: float) -> Model:
    """The model, trained so that other models of the same parameters learn from it.

    Its loss is the mean cross-entropy of its own p, and `weight` times the mean over the students'
    p' of KL(p || p'), in which p is taken as given. Each student sees the same batch, and
    normalises it by what its own norms measure. (The in-place distillation of universally slimmable
    networks, Yu and Huang, arXiv 1903.05134, whose students, too, are parts of the teacher.) The
    loss that a run records is this one.

    Args:
      model: the teacher; returned as it is with a weight of 0 or without students.
      students: work on the same parameters.
      weight: 0 or more.
    """
    if not weight or not students:
        return model

    def loss(params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        logits = training_logits(model, params, batch)
        total, metrics = cross_entropy(logits, batch)
        teacher = mask_absent(logits[None], batch)
        others = jnp.stack([training_logits(student, params, batch) for student in students])
        distilled = divergence(teacher, mask_absent(others, batch))
        total += weight * batch_mean(distilled, batch).mean()
        return total, metrics._replace(loss=total * metrics.examples)

    return dataclasses.replace(model, loss=loss)
