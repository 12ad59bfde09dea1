"""Global variables as named entries: what tiers share, and what each keeps for itself.

The variables are `{"shared": {name: array}, "own": {tier: {name: array}}}`. A name is the path of
an array in its model's parameters, such as "stages/0/1/layers/0/conv/kernel".
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from jfed.models.model import Model, Params
from jfed.tiers.tier import Round, Tier

Path = tuple[Any, ...]  # of an array in a pytree, as `jax.tree_util` gives it
Own = Callable[[Path], bool]  # whether each tier keeps the entry at that path for itself
Origin = Callable[[str], str]  # an entry of a tier's model -> the same entry of the full model


def name(path: Path) -> str:
    """The name of the entry at a path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def same(entry: str) -> str:
    """The origin of a tier whose entries are called as in the full model."""
    return entry


def init_of(full: Model, members: Sequence[tuple[str, Model]], own: Own) -> Callable[[Array], Any]:
    """The initial global variables of tiers that share the entries of `full`, by the tiers' names.

    What a tier keeps for itself starts as in its own model, from the same key.
    """

    def init(key: Array) -> Params:
        whole = jax.tree_util.tree_leaves_with_path(full.init(key))
        mine = {tier: jax.tree_util.tree_leaves_with_path(m.init(key)) for tier, m in members}
        return {
            "shared": {name(path): leaf for path, leaf in whole if not own(path)},
            "own": {
                tier: {name(path): leaf for path, leaf in leaves if own(path)}
                for tier, leaves in mine.items()
            },
        }

    return init


def select(
    title: str, model: Model, own: Own, *, origin: Origin = same, owner: str | None = None
) -> Tier:
    """A tier that selects the entries of its model by name.

    Args:
      title: the tier's name.
      model: works on the selected entries.
      own: which entries are the tier's own.
      origin: where the others are in the shared ones.
      owner: the tier whose own entries are used; this one by default.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    found, structure = jax.tree_util.tree_flatten_with_path(shapes)
    paths = [path for path, _ in found]

    def extract(variables: Params, round_: Round) -> Params:
        del round_
        mine = variables["own"].get(owner or title, {})
        chosen = [mine[name(p)] if own(p) else variables["shared"][origin(name(p))] for p in paths]
        return jax.tree.unflatten(structure, chosen)

    return Tier(title, model, extract)
