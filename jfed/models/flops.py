"""Floating-point operations of a model, counted from its traced program."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jfed.models.losses import batch_shapes, training_loss
from jfed.models.model import Model, Params

TRAINING = 3  # a gradient costs the forward pass, and twice as much on the way back


def forward_flops(model: Model, params: Params, image_shape: tuple[int, ...]) -> int:
    """FLOPs of classifying one image: two for each multiply-add of convolutions and products.

    Element-wise work is not counted, as is usual. A loop of unknown length counts once; of branches
    the most expensive counts.

    Args:
      model: any model.
      params: its parameters, or their shapes and dtypes.
      image_shape: `(H, W, C)`.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return _count(jax.make_jaxpr(model.apply)(params, image).jaxpr)


def training_flops(model: Model, params: Params, image_shape: tuple[int, ...]) -> int:
    """FLOPs of the gradient of one example: three times those of the loss.

    The way back multiplies as much for the gradient of each layer's input as for that of its
    weights, hence `TRAINING` (exact but for the first layer, whose input needs none). All that the
    loss computes counts, also the students of a self-distillation; what a model with little memory
    computes again on the way back does not.

    Args:
      model: as clients train it.
      params: its parameters, or their shapes and dtypes.
      image_shape: `(H, W, C)`.
    """
    shapes = batch_shapes(1, image_shape), jax.eval_shape(lambda: jax.random.key(0))
    return TRAINING * _count(jax.make_jaxpr(training_loss(model))(params, *shapes).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    shapes: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    if name == "conv_general_dilated":
        kernel = shapes[1].shape
        outputs = params["dimension_numbers"].rhs_spec[0]
        each = math.prod(kernel) // kernel[outputs]
        return 2 * shapes[-1].size * each
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = shapes[0].shape
        return 2 * shapes[-1].size * math.prod(left[d] for d in contracted)
    counts = [_count(inner) for value in params.values() for inner in _jaxprs(value)]
    if name == "cond":
        return max(counts, default=0)
    return (params["length"] if name == "scan" else 1) * sum(counts)


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, tuple | list):
        return [inner for part in value for inner in _jaxprs(part)]
    return [value] if isinstance(value, Jaxpr) else []
