"""A ResNet with a classifier after every stage (DepthFL, Kim et al., ICLR 2023)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jfed.models.layers import Classifier, network
from jfed.models.model import Mask, Model, Params, Statistics
from jfed.models.resnets import ResNetConfig, Trunk


class Exits(NamedTuple):
    """A network with several classifiers.

    Attributes:
      model: its `apply` returns the logits that the network is tested by.
      logits: as the model's `apply`, but the logits of every exit, `[exits, B, classes]` float32,
        the shallowest first.
    """

    model: Model
    logits: Callable[..., Float[Array, "exits B classes"]]


class ExitResNet(Trunk):
    """Stem, stages of residual blocks, and after each stage a classifier."""

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.exits = nnx.List([Classifier(width, config.classes, rngs) for width in config.widths])

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Mask | None, given: Any
    ) -> tuple[Float[Array, "exits B classes"], Any]:
        outputs, used = self.features(x, mask, given)
        logits = [classify(z) for classify, z in zip(self.exits, outputs, strict=True)]
        return jnp.stack(logits), used


def exit_resnet(config: ResNetConfig, *, ensemble: bool = False) -> Exits:
    """The ResNet with exits as pure functions.

    An exit is the mean over space and a linear layer, like a ResNet's own head. (The authors' code
    of DepthFL puts attention and separable convolutions before the exits; jfed does not.)

    Args:
      config: of the network; an exit follows each of its stages.
      ensemble: test by the mean of all exits' logits, not by the deepest exit.
    """
    every = network(lambda rngs: ExitResNet(config, rngs), config.norm)

    def apply(
        params: Params,
        images: Float[Array, "B H W C"],
        mask: Mask | None = None,
        statistics: Statistics | None = None,
    ) -> Float[Array, "B classes"]:
        logits = every.apply(params, images, mask, statistics)
        return logits.mean(0) if ensemble else logits[-1]

    return Exits(dataclasses.replace(every, apply=apply), every.apply)
