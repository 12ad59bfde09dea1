"""What a prediction needs beside the variables, kept in a run's folder: `norms.safetensors`.

It holds the mean and the deviation that images are normalised with, `images/mean` and `images/std`,
and the statistics of batch norms that each evaluated tier was tested with, `TIER/PATH/mean` and
`TIER/PATH/var`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError

from jfed import files
from jfed.data.preprocessing import ModelInputs
from jfed.errors import RunFolderError
from jfed.models.model import Params, Statistics, path_name
from jfed.tiers import Tier

FILE = "norms.safetensors"


def write(path: epath.Path, inputs: ModelInputs, norms: Mapping[str, Statistics | None]) -> None:
    """Writes the file into a run's folder, at once."""
    arrays = {"images/mean": inputs.mean, "images/std": inputs.std}
    for tier, statistics in norms.items():
        for at, leaf in jax.tree_util.tree_leaves_with_path(statistics):
            arrays[f"{tier}/{path_name(at)}"] = np.ascontiguousarray(leaf)
    files.write_bytes(path / FILE, safetensors.numpy.save(arrays))


def read(
    path: epath.Path, data: Mapping[str, Any], tested: Sequence[Tier], like: Params
) -> tuple[ModelInputs, dict[str, Statistics | None]]:
    """Reads it back.

    Args:
      path: the run's folder.
      data: what its `config.json` says of the data.
      tested: the evaluated tiers.
      like: global variables; only shapes and dtypes matter.

    Raises:
      RunFolderError: the file is damaged, or of other tiers.
    """
    shape, names, pixels = tuple(data["image_shape"]), tuple(data["class_names"]), data["pixels"]
    try:
        arrays = safetensors.numpy.load((path / FILE).read_bytes())
        inputs = ModelInputs(shape, arrays["images/mean"], arrays["images/std"], names, pixels)
        found = {tier.name: _statistics(tier, like, inputs, arrays) for tier in tested}
    except (KeyError, SafetensorError) as error:
        raise RunFolderError(f"{str(path / FILE)!r} is damaged: {error!r}.") from error
    return inputs, found


def _statistics(
    tier: Tier, like: Params, inputs: ModelInputs, arrays: Mapping[str, np.ndarray]
) -> Statistics | None:
    """A tier's statistics, in the tree that its model measures."""
    measure = tier.bound().measure
    if measure is None:
        return None
    images = jax.ShapeDtypeStruct((2, *inputs.shape), jnp.float32)
    mask = jax.ShapeDtypeStruct((2,), jnp.float32)
    shapes = jax.eval_shape(measure, tier.shapes(like), images, mask)
    return jax.tree_util.tree_map_with_path(
        lambda at, _: arrays[f"{tier.name}/{path_name(at)}"], shapes
    )
