"""Global variables as named entries: what tiers share, and what each keeps for itself.

The variables are `{"shared": {name: array}, "own": {tier: {name: array}}}`. A name is the path of
an array in its model's parameters, such as "stages/0/block1/layers/0/conv/kernel".
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from jfed.errors import ConfigError
from jfed.models.model import Model, Params, path_name
from jfed.models.resnets import ResNetConfig
from jfed.tiers.tier import Round, Tier

Path = tuple[Any, ...]  # of an array in a pytree, as `jax.tree_util` gives it
Own = Callable[[Path], bool]  # whether each tier keeps the entry at that path for itself


def first(leaf: Array, shape: tuple[int, ...]) -> Array:
    """The first entries of an array along each axis, as many as `shape` has."""
    return jax.lax.slice(leaf, (0,) * leaf.ndim, shape)


def init_of(full: Model, members: Sequence[tuple[str, Model]], own: Own) -> Callable[[Array], Any]:
    """The initial global variables of tiers that share the entries of `full`, by the tiers' names.

    What a tier keeps for itself starts as in its own model, from the same key.
    """

    def init(key: Array) -> Params:
        whole = jax.tree_util.tree_leaves_with_path(full.init(key))
        mine = {tier: jax.tree_util.tree_leaves_with_path(m.init(key)) for tier, m in members}
        return {
            "shared": {path_name(path): leaf for path, leaf in whole if not own(path)},
            "own": {
                tier: {path_name(path): leaf for path, leaf in leaves if own(path)}
                for tier, leaves in mine.items()
            },
        }

    return init


def select(title: str, model: Model, own: Own) -> Tier:
    """A tier that selects the entries of its model by name.

    Of shared arrays that are larger than the model's, the first entries along each axis are taken.

    Args:
      title: the tier's name.
      model: works on the selected entries.
      own: which entries are the tier's own.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    found, structure = jax.tree_util.tree_flatten_with_path(shapes)

    def extract(variables: Params, round_: Round) -> Params:
        del round_
        chosen = [
            variables["own"][title][path_name(path)]
            if own(path)
            else first(variables["shared"][path_name(path)], leaf.shape)
            for path, leaf in found
        ]
        return jax.tree.unflatten(structure, chosen)

    return Tier(title, model, extract)


def check_resnet(method: str, config: Any) -> ResNetConfig:
    """Returns the config; ConfigError unless the network is a ResNet."""
    if not isinstance(config, ResNetConfig):
        raise ConfigError(f"{method} needs a ResNet, got {type(config).__name__}.")
    return config
