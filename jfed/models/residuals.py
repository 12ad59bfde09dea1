"""What a model keeps of a forward pass for the way back, in bytes, without compiling anything."""

from typing import Any

import jax

from jfed.models.losses import batch_shapes, training_loss
from jfed.models.model import Model, Params


def residual_bytes(
    model: Model, params: Params, image_shape: tuple[int, ...], batch_size: int
) -> int:
    """Bytes of the residuals of `jax.vjp` of a model's loss on one batch.

    Each array counts once, parameters and the batch itself not at all. What the way back computes
    again (`jax.checkpoint`) is not kept, and so not counted. It is what JAX traces: XLA may keep
    less, computing cheap things twice. Deep networks take a second or two to trace.

    Args:
      model: as clients train it; numbers of solver steps must be static.
      params: its parameters, or their shapes and dtypes.
      image_shape: `(H, W, C)`.
      batch_size: examples in the batch.
    """
    loss = training_loss(model)

    def residuals(params: Params, batch: Any, key: Any) -> Any:
        return jax.vjp(lambda p: loss(p, batch, key)[0], params)[1]  # a pytree of what is kept

    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(residuals)(params, batch_shapes(batch_size, image_shape), key).jaxpr
    kept: dict[int, Any] = {id(v): v.aval for v in jaxpr.outvars}
    for given in (*jaxpr.invars, *jaxpr.constvars):
        kept.pop(id(given), None)
    return sum(x.size * x.dtype.itemsize for x in kept.values())
