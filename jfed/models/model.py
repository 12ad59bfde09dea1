"""What jfed asks of a model: pure functions over a pytree of parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Params = Any  # a pytree of floating-point arrays
Statistics = Any  # a pytree of `Moments`, one for each batch norm
Mask = Float[Array, " B"]  # 1 for the examples of a batch that count, 0 for padding


def path_name(path: Any) -> str:
    """A leaf's path in a pytree as text, such as "classifier/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, such as "classifier/kernel"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class Moments(NamedTuple):
    """Mean and biased variance, what a batch norm normalises with (float32)."""

    mean: Float[Array, "*steps C"]
    var: Float[Array, "*steps C"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A classifier.

    A user's own model needs `init` and `apply` only. A model with batch norm brings `measure` too,
    and its `apply` takes two more arguments.

    Attributes:
      init: `init(key) -> params`.
      apply: `apply(params, images) -> logits`, with images `[B, H, W, C]` float32 and logits
        `[B, classes]` float32. With `measure`, `apply(params, images, mask=None, statistics=None)`:
        batch norms use `statistics` if given, else those of the batch's examples where `mask` is 1.
      measure: `measure(params, images, mask) -> statistics` of this one batch, or None for a model
        without batch norm. Statistics of several batches are pooled by
        `jfed.simulation.evaluation.recalibrate`.
      loss: `loss(params, batch, key) -> (loss, metrics)` of local training, or None for the mean
        cross-entropy of `apply`'s logits; `batch` and `metrics` are the `Batch` and `Metrics` of
        `jfed.models.losses`, and the key is the client's own of this step, for dropout and such.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., Float[Array, "B classes"]]
    measure: Callable[[Params, Float[Array, "B H W C"], Mask], Statistics] | None = None
    loss: Callable[[Params, Any, Array], tuple[Float[Array, ""], Any]] | None = None


def widened(dtype: Any) -> Any:
    """The type that sums of numbers of a type are taken in: float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def functional(
    create: Callable[[nnx.Rngs], nnx.Module],
) -> tuple[Callable[[Array], Params], Callable[[Params], Any]]:
    """Splits a module into `init(key) -> params` and `bind(params) -> module`."""
    graph, empty = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))), nnx.Param)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(create(nnx.Rngs(key)), nnx.Param))

    def bind(params: Params) -> Any:
        state = jax.tree.map(lambda leaf: leaf, empty)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    return init, bind


def initialise(init: Callable[[Array], Params], key: Array) -> Params:
    """Runs `init(key)` as one program, compiled without optimisation where that saves time.

    It runs once, and XLA's CPU compiler takes seconds to optimise the random numbers of a network.
    """
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=quick)(key)
