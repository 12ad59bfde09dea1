"""What models, optimizers and transforms must be: checked on shapes, before anything compiles."""

from typing import Any

import jax
import jax.numpy as jnp

from jfed.data import Dataset
from jfed.engine.client import ClientConfig, make_optimizer, make_step
from jfed.errors import ConfigError
from jfed.models.losses import Batch
from jfed.models.model import Params
from jfed.tiers import Tier


def check_model(tier: Tier, like: Params, data: Dataset) -> None:
    """Raises ConfigError unless the tier's model maps the data's images to logits.

    Args:
      tier: with the model.
      like: global variables; only shapes and dtypes matter.
      data: whose images are given to the model.
    """
    params = tier.shapes(like)
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        raise ConfigError(f"tier {tier.name!r} owns nothing of the global variables: {params!r}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:  # sums over clients need no less; compute in what you like
            raise ConfigError(
                f"parameters must be float32 arrays; that at {jax.tree_util.keystr(path)} "
                f"of tier {tier.name!r} is {leaf.dtype}."
            )
    batch = _batch(data)
    given = (batch.images,) if tier.model.measure is None else (batch.images, batch.mask)
    try:
        logits = jax.eval_shape(tier.model.apply, params, *given)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the model of tier {tier.name!r} cannot be applied to images of shape "
            f"{batch.images.shape}: {error}"
        ) from error
    expected = (2, data.num_classes)
    if getattr(logits, "shape", None) != expected or logits.dtype != jnp.float32:
        raise ConfigError(
            f"the model of tier {tier.name!r} maps images {batch.images.shape} to "
            f"{_shapes(logits)}; expected logits {expected} float32 and nothing else, for the "
            f"{data.num_classes} classes of {data.name!r}."
        )


def check_training(tier: Tier, like: Params, config: ClientConfig, data: Dataset) -> None:
    """Raises ConfigError if a step of local training, or the transform, changes the tree.

    Args:
      tier: with the model.
      like: global variables; only shapes and dtypes matter.
      config: of local training.
      data: that is trained on.
    """
    params = tier.shapes(like)
    step, optimizer = make_step(tier.model), make_optimizer(config)(0.1)

    def train(params: Params, batch: Batch) -> Params:
        return step(optimizer, params, optimizer.init(params), batch)[0]

    try:
        trained = jax.eval_shape(train, params, _batch(data))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the model of tier {tier.name!r} cannot be trained with optimizer "
            f"{config.optimizer!r}: {error}"
        ) from error
    _check_tree("a step of training", trained, params, tier)
    if config.transform is not None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        try:
            update = jax.eval_shape(config.transform, params, key)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"transform {config.transform!r} cannot be used on an update and a key: {error}"
            ) from error
        _check_tree(f"transform {config.transform!r}", update, params, tier)


def _check_tree(what: str, made: Any, params: Params, tier: Tier) -> None:
    if _shapes(made) != _shapes(params):
        raise ConfigError(
            f"{what} in tier {tier.name!r} makes {_shapes(made)} of {_shapes(params)}; the tree, "
            "the shapes and the dtypes must stay."
        )


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def _batch(data: Dataset) -> Any:
    images = jax.ShapeDtypeStruct((2, *data.image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    return Batch(images, labels, jax.ShapeDtypeStruct((2,), jnp.float32))  # type: ignore[arg-type]
