"""The weights that a run starts from, read from a file or from another run's folder."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from jfed.errors import ConfigError, check_sequence, check_type
from jfed.files import absolute
from jfed.models.model import by_name
from jfed.models.named_parameters import as_float32, chosen, misfit
from jfed.models.presets import ModelConfig, build
from jfed.models.resnets import ResNetConfig
from jfed.models.torch_weights import entries_of
from jfed.runs.checkpoints import stored


@dataclasses.dataclass(frozen=True)
class InitialConfig:
    """What the global model begins with.

    Attributes:
      weights: a run folder, whose latest weights they are (a run that began with them can go on
        only while they are the latest); or a safetensors file of weights of the network, in
        PyTorch's names (a ResNet's, see `jfed.models.load_torch`) or in jfed's; None: random ones.
        Statistics of batch norms are not used, as a federation measures its own.
      fresh: shell patterns of jfed's names of entries that begin at random all the same and that
        the file may lack, such as classifier/* for other classes.
    """

    weights: str | os.PathLike[str] | None = None
    fresh: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_type("init", self.weights, str, os.PathLike, type(None))
        for pattern in check_sequence("init_fresh", self.fresh):
            check_type("init_fresh", pattern, str)
        if self.fresh and self.weights is None:
            raise ConfigError(f"init_fresh needs weights to start from, got {self.fresh!r} alone.")


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file or of a run's latest checkpoint, by name.

    Raises:
      ConfigError: the file cannot be read, or has none.
      RunFolderError: the folder is no run's, or it has no checkpoint.
    """
    if absolute(path).is_dir():
        return by_name(stored(absolute(path)).state["server"]["variables"])
    try:
        found = safetensors.numpy.load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"init must be a safetensors file that can be read, got {os.fspath(path)!r}: {error}."
        ) from error
    if not found:
        raise ConfigError(f"init {os.fspath(path)!r} holds no weights.")
    return found


def fitting(
    config: ModelConfig, weights: Mapping[str, np.ndarray], fresh: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """The weights of a file as parameters of a network by name, without what begins anew.

    Learned step sizes of an ODENet, whose number is the tiers', are neither needed nor used.

    Raises:
      ConfigError: the first weights that are missing, do not fit, or are left over.
    """
    if not any("/" in name for name in weights):
        if not isinstance(config, ResNetConfig):
            kind = type(config).__name__.removesuffix("Config")
            raise ConfigError(
                f"init has weights in PyTorch's names, such as {next(iter(weights))!r}, which are "
                f"read into ResNets, not into the {kind} of this run."
            )
        return entries_of(config, weights, fresh)[0]
    shapes: dict[str, Any] = by_name(jax.eval_shape(build(config).init, jax.random.key(0)))
    needed = {name: leaf.shape for name, leaf in shapes.items() if not _is_step(name)}
    left_out = chosen(fresh, list(needed), title="fresh")
    found: dict[str, np.ndarray] = {}
    for name, shape in needed.items():
        if name in left_out:
            continue
        if name not in weights:
            raise ConfigError(
                f"init has no weights {name!r} of shape {shape}, which the network needs; "
                f"--init-fresh {name!r} lets them begin anew."
            )
        if weights[name].shape != shape:
            raise ConfigError(misfit(name, weights[name].shape, shape))
        found[name] = as_float32(name, weights[name])
    for name in weights:
        if name not in needed and not _is_step(name):
            raise ConfigError(f"the network has no place for weights {name!r} of init.")
    return found


def _is_step(name: str) -> bool:
    return name.startswith("steps/")
