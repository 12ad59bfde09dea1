"""Models made of Flax NNX modules, with dropout and other layers that draw random numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jfed.errors import ConfigError, calling, name_of
from jfed.models.losses import Batch, Metrics, cross_entropy
from jfed.models.model import Model, Params
from jfed.seeds import is_key


def from_nnx(create: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Makes a `Model` of a Flax NNX module.

    In local training the module is in training mode (`module.train()`), and its random streams, as
    of dropout, start from the client's own key of the step. In evaluation it is in evaluation mode
    (`module.eval()`).

    Args:
      create: builds the module from its random streams. The module is called as `module(images)`
        and returns logits. Its `nnx.Param`s are what is trained; beside them it may hold random
        streams, and no other state.

    Raises:
      ConfigError: `create` raises, or the module holds other state, such as the running statistics
        of a batch norm.
    """
    if isinstance(create, nnx.Module):
        raise ConfigError(
            "from_nnx takes a function that builds a module from its random streams, got "
            f"{type(create).__name__}, a module."
        )
    with calling(name_of(create), rngs="nnx.Rngs(0)"):
        module = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
    graph, empty, streams, other = nnx.split(module, nnx.Param, nnx.RngState, ...)  # type: ignore[misc]
    _check_no_other(module, other)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(create(nnx.Rngs(key)), nnx.Param))

    def bind(params: Params, key: Array) -> Any:
        state = jax.tree.map(lambda leaf: leaf, empty)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state, _rekeyed(streams, key))

    def apply(params: Params, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        module = bind(params, jax.random.key(0))
        module.eval()
        return module(images).astype(jnp.float32)

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        module = bind(params, key)
        module.train()
        return cross_entropy(module(batch.images).astype(jnp.float32), batch)

    return Model(init, apply, loss=loss)


def _rekeyed(streams: Any, key: Array) -> Any:
    """The random streams of a module, each at its beginning, with keys that are made of one."""
    leaves, structure = jax.tree.flatten(streams)
    return jax.tree.unflatten(
        structure,
        [
            jax.random.split(jax.random.fold_in(key, i), leaf.shape)
            if is_key(leaf)
            else jnp.zeros(leaf.shape, leaf.dtype)  # how many numbers were drawn
            for i, leaf in enumerate(leaves)
        ],
    )


def _check_no_other(module: Any, state: Any) -> None:
    """Raises ConfigError if a module holds what is neither trained nor a random stream.

    Args:
      module: with shapes in place of what it holds.
      state: of the module, without parameters and random streams.
    """
    # Of an array that is no Variable, Flax makes no shape: it stays the array of the tracing.
    arrays = [
        ((*path, name), "array")
        for path, part in nnx.iter_modules(module)
        for name, value in vars(part).items()
        if isinstance(value, jax.Array)
    ]
    others = [
        (path, type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "array")
        for path, leaf in nnx.to_flat_state(state)
    ]
    for path, kind in (*others, *arrays):
        if kind == "BatchStat":
            instead = (
                "use a norm without running statistics, such as nnx.GroupNorm or nnx.LayerNorm, or "
                "a `Model` with `measure`, as jfed's own networks are"
            )
        else:
            instead = "make it an nnx.Param if it is trained, else compute it where it is used"
        raise ConfigError(
            f"a module may hold nnx.Params and random streams only, got {kind} "
            f"{'.'.join(map(str, path))!r}; {instead}."
        )
