"""Self-distillation: a loss by which some predictions of a network learn from others of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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


def teaching(
    model: Model, students: Sequence[tuple[bool | Bool[Array, ""], Model]], weight: float
) -> Model:
    """The model, trained so that other models of the same parameters learn from it.

    Its loss is the mean cross-entropy of its own p, and `weight` times the mean over the students'
    p' of KL(p || p'), in which p is taken as given. Each student sees the same batch, and
    normalises it by what its own norms measure. (The in-place distillation of universally slimmable
    networks, Yu and Huang, arXiv 1903.05134, whose students, too, are parts of the teacher.) The
    loss that a run records is this one.

    Args:
      model: the teacher.
      students: models on the same parameters, and whether each learns from this teacher, which may
        be data; those that do not cost nothing, except where clients train under one `vmap`.
      weight: above 0.
    """

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        del key
        logits = training_logits(model, params, batch)
        total, metrics = cross_entropy(logits, batch)
        teacher = mask_absent(logits[None], batch)

        def lesson(student: Model) -> Float[Array, ""]:
            others = mask_absent(training_logits(student, params, batch)[None], batch)
            return batch_mean(divergence(teacher, others), batch)[0]

        def taught(learns: Any, student: Model) -> Array:
            if isinstance(learns, bool):
                return lesson(student) if learns else jnp.zeros(())
            return jax.lax.cond(learns, lambda: lesson(student), lambda: jnp.zeros(()))

        distilled = sum((taught(*one) for one in students), start=jnp.zeros(()))
        count = sum(
            (jnp.asarray(learns, jnp.float32) for learns, _ in students), start=jnp.zeros(())
        )
        total += weight * distilled / jnp.maximum(count, 1)
        return total, metrics._replace(loss=total * metrics.examples)

    return dataclasses.replace(model, loss=loss)
