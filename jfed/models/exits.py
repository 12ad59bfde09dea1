"""A ResNet with a classifier after every stage (DepthFL, Kim et al., ICLR 2023)."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jfed.models.convolutions.convolution import conv
from jfed.models.layers import Classifier, Conv, Style, network
from jfed.models.model import Mask, Model, Params, Statistics
from jfed.models.norms import Shares
from jfed.models.resnets import ResNetConfig, Trunk

EXITS = ("bottleneck", "linear")


class Exits(NamedTuple):
    """A network with several classifiers.

    Attributes:
      model: its `apply` returns the logits that the network is tested by.
      logits: as the model's `apply`, but the logits of every exit, `[exits, B, classes]` float32,
        the shallowest first.
    """

    model: Model
    logits: Callable[..., Float[Array, "exits B classes"]]


class DepthwiseConv(nnx.Module):
    """A 3x3 convolution of each channel by itself; kernel `[3, 3, 1, C]` float32."""

    def __init__(self, channels: int, style: Style, rngs: nnx.Rngs, *, stride: int = 1) -> None:
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 1, channels)))
        self.stride, self.dtype, self.form = stride, style.dtype, style.form

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo C"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        form = self.form if self.form == "xla" else "auto"  # the others are of dense ones
        groups = x.shape[-1]
        return conv(x, kernel, stride=self.stride, padding="SYMMETRIC", groups=groups, form=form)


class Halving(nnx.Module):
    """Halves height and width by two separable convolutions, each with norm and relu."""

    def __init__(self, inputs: int, outputs: int, style: Style, rngs: nnx.Rngs) -> None:
        plan = ((inputs, 2), (outputs, 1))
        self.depthwise = nnx.List([DepthwiseConv(inputs, style, rngs, stride=s) for _, s in plan])
        self.pointwise = nnx.List([Conv(inputs, o, style, rngs, size=1) for o, _ in plan])
        self.norms = nnx.List([style.make_norm(o) for o, _ in plan])

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Any
    ) -> tuple[Float[Array, "B Ho Wo O"], Any]:
        used = {}
        layers = zip(self.depthwise, self.pointwise, self.norms, strict=True)
        for i, (depthwise, pointwise, norm) in enumerate(layers):
            x, used[f"norm{i}"] = norm(pointwise(depthwise(x)), shares, given and given[f"norm{i}"])
            x = nnx.relu(x)
        return x, used


class BottleneckExit(nnx.Module):
    """An exit with attention, and a `Halving` to the width of each later stage."""

    def __init__(self, widths: tuple[int, ...], classes: int, style: Style, rngs: nnx.Rngs) -> None:
        self.attention = Halving(widths[0], widths[0], style, rngs)
        self.norm = style.make_norm(widths[0])
        steps = itertools.pairwise(widths)
        self.halvings = nnx.List([Halving(i, o, style, rngs) for i, o in steps])
        self.classifier = Classifier(widths[-1], classes, rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Any
    ) -> tuple[Float[Array, "B classes"], Any]:
        used = {}
        y, used["attention"] = self.attention(x, shares, given and given["attention"])
        y, used["norm"] = self.norm(y, shares, given and given["norm"])
        x = x * nnx.sigmoid(_enlarge(nnx.relu(y), x))
        for i, halve in enumerate(self.halvings):
            x, used[f"halving{i}"] = halve(x, shares, given and given[f"halving{i}"])
        return self.classifier(x), used


def _enlarge(y: Float[Array, "B h w C"], like: Float[Array, "B H W C"]) -> Array:
    """Bilinear interpolation: `jax.image.resize`, in the form that takes any number of images."""
    scale = jnp.asarray([like.shape[i] / y.shape[i] for i in (1, 2)], jnp.float32)
    still = jnp.zeros(2)
    return jax.image.scale_and_translate(y, like.shape, (1, 2), scale, still, "bilinear")


class LinearExit(nnx.Module):
    """A classifier alone."""

    def __init__(self, width: int, classes: int, rngs: nnx.Rngs) -> None:
        self.classifier = Classifier(width, classes, rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Any
    ) -> tuple[Float[Array, "B classes"], Any]:
        del shares, given
        return self.classifier(x), {}


class ExitResNet(Trunk):
    """The first stages of a ResNet, and after each of them a classifier."""

    def __init__(self, config: ResNetConfig, depth: int, exits: str, rngs: nnx.Rngs) -> None:
        cut = dataclasses.replace(
            config, widths=config.widths[:depth], blocks=config.blocks[:depth]
        )
        super().__init__(cut, rngs)
        style = Style(config.norm, config.dtype, config.conv, config.gain)
        made: list[nnx.Module] = []
        for k, width in enumerate(cut.widths):
            if exits == "linear" or k == len(config.widths) - 1:
                made.append(LinearExit(width, config.classes, rngs))
            else:
                made.append(BottleneckExit(config.widths[k:], config.classes, style, rngs))
        self.exits = nnx.List(made)

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        shares: Shares,
        given: Any,
        *,
        every: bool = True,
    ) -> tuple[Float[Array, "exits B classes"], Any]:
        """The logits of every exit, or of the deepest alone."""
        outputs, used = self.features(x, shares, given)
        logits = []
        for k, (leave, z) in enumerate(zip(self.exits, outputs, strict=True)):
            if every or k == len(outputs) - 1:
                found, used[f"exit{k}"] = leave(z, shares, given and given[f"exit{k}"])
                logits.append(found)
        return jnp.stack(logits), used


def exit_resnet(
    config: ResNetConfig,
    depth: int | None = None,
    *,
    exits: str = "bottleneck",
    ensemble: bool = False,
) -> Exits:
    """The first stages of a ResNet with exits, as pure functions.

    Args:
      config: of the whole network; an exit follows each of its stages.
      depth: how many stages there are; all by default.
      exits: "bottleneck", as in the code of DepthFL's authors: attention over space, then separable
        convolutions to the size and the width of the last stage, then the classifier; after the
        last stage the classifier alone. "linear": a classifier alone after every stage.
      ensemble: test by the mean of all exits' logits, not by the deepest exit.
    """
    depth = len(config.widths) if depth is None else depth

    def create(rngs: nnx.Rngs) -> ExitResNet:
        return ExitResNet(config, depth, exits, rngs)

    def deepest(module: ExitResNet, *given: Any, record: bool) -> Any:
        del record
        return module(*given, every=False)

    every = network(create, config.norm)
    tested = every if ensemble else network(create, config.norm, deepest)

    def apply(
        params: Params,
        images: Float[Array, "B H W C"],
        mask: Mask | None = None,
        statistics: Statistics | None = None,
    ) -> Float[Array, "B classes"]:
        return tested.apply(params, images, mask, statistics).mean(0)

    return Exits(dataclasses.replace(tested, apply=apply), every.apply)
