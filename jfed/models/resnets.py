"""Residual networks for small images (He et al. 2016, arXiv 1512.03385 and 1603.05027)."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jfed.errors import ConfigError, check_integer, check_sequence, check_type, one_of
from jfed.models.blocks import SHORTCUTS, PreactivationBlock, ResidualBlock, Shape
from jfed.models.convolutions.convolution import FORMS
from jfed.models.layers import (
    DTYPES,
    Classifier,
    Conv,
    ConvNorm,
    Style,
    check_gain,
    check_widths,
    max_pool,
    network,
)
from jfed.models.model import Model
from jfed.models.norms import NORMS, Shares

ENTRIES = ("3x3", "3x3-pool", "7x7-pool")
Blocks = tuple[tuple[int, ...], ...]  # some blocks of each stage, by number


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet.

    Attributes:
      widths: output channels of each stage; each stage but the first halves height and width.
      blocks: residual blocks in each stage.
      bottleneck: blocks of 1x1, 3x3, 1x1 convolutions instead of 3x3, 3x3.
      shortcut: "projection" or "pad", see `ResidualBlock`.
      preactivation: norm and relu come before convolutions, see `PreactivationBlock`, and once more
        before the classifier; the first convolution has none. Shortcuts are projections.
      stem: channels of the first convolution; None: those of the first stage.
      entry: the first convolution: "3x3"; "3x3-pool", a 3x3 max-pooling with stride 2 after it
        (NeFL's ResNet-18 and 34); or "7x7-pool", with stride 2 in both (ImageNet's).
      kept: the blocks of each stage that there are, by number; None: all. Of a block that is left
        out but changes the shape, its shortcut stays (NeFL-D, arXiv 2308.07761).
      norm: "batch" or "group".
      dtype: of what layers give each other, "float32" or "bfloat16", see `ODENetConfig`.
      conv: the convolutions' form, see `jfed.models.convolutions.convolution.conv`.
      learn_steps: each block scales its residual branch by a learned number that starts at 1.
      gain: what norms multiply their input by, see `jfed.models.layers.Norm`.
      classes: how many logits.
      channels: of the images.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: tuple[int, ...] = (3, 3, 3)
    bottleneck: bool = False
    shortcut: str = "pad"
    preactivation: bool = False
    stem: int | None = None
    entry: str = "3x3"
    kept: Blocks | None = None
    norm: str = "batch"
    dtype: str = "float32"
    conv: str = "auto"
    learn_steps: bool = False
    gain: float = 1.0
    classes: int = 10
    channels: int = 3

    def __post_init__(self) -> None:
        one_of("shortcut", self.shortcut, SHORTCUTS)
        object.__setattr__(self, "widths", check_widths(self.widths, self.shortcut))
        given = check_sequence("blocks", self.blocks)
        blocks = tuple(check_integer("blocks", count, least=1) for count in given)
        object.__setattr__(self, "blocks", blocks)
        check_integer("classes", self.classes, least=2)
        check_integer("channels", self.channels, least=1)
        for name in ("bottleneck", "preactivation", "learn_steps"):
            check_type(name, getattr(self, name), bool)
        if self.bottleneck and any(width % 4 for width in self.widths):
            raise ConfigError(f"widths of bottlenecks must be multiples of 4, got {self.widths}.")
        one_of("entry", self.entry, ENTRIES)
        one_of("norm", self.norm, NORMS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("convolution form", self.conv, FORMS)
        check_gain(self.gain)
        if len(self.widths) != len(self.blocks):
            raise ConfigError(
                f"widths {self.widths} and blocks {self.blocks} must name as many stages."
            )
        if self.kept is not None:
            object.__setattr__(self, "kept", _check_kept(self.kept, self.blocks))
        if self.preactivation:
            self._check_preactivation()

    def _check_preactivation(self) -> None:
        for name, value in (("kept", self.kept), ("learn_steps", self.learn_steps or None)):
            if value is not None:
                raise ConfigError(f"blocks with preactivation have no {name}, got {value!r}.")
        if self.shortcut != "projection":
            raise ConfigError(
                f'blocks with preactivation need the shortcut "projection", got {self.shortcut!r}.'
            )

    def shapes(self) -> dict[tuple[int, int], Shape]:
        """The shape of every block, left out or not, by stage and number."""
        found, channels = {}, self.stem or self.widths[0]
        for k, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for i in range(count):
                found[k, i] = Shape(channels, width, 2 if k > 0 and i == 0 else 1)
                channels = width
        return found

    def keeps(self, stage: int, block: int) -> bool:
        """Whether a block is there, not left out."""
        return self.kept is None or block in self.kept[stage]


def _check_kept(kept: Any, blocks: tuple[int, ...]) -> Blocks:
    """Blocks as tuples; ConfigError unless the network has them."""
    if not isinstance(kept, tuple | list) or len(kept) != len(blocks):
        raise ConfigError(
            f"kept must list blocks of each of the {len(blocks)} stages, got {kept!r}."
        )
    for stage, (some, count) in enumerate(zip(kept, blocks, strict=True)):
        for block in check_sequence(f"kept blocks of stage {stage}", some):
            check_integer(f"kept blocks of stage {stage}", block, least=0, most=count - 1)
        if any(a >= b for a, b in itertools.pairwise(some)):
            raise ConfigError(
                f"kept blocks of stage {stage} must be in ascending order, got {some!r}."
            )
    return tuple(map(tuple, kept))


class Trunk(nnx.Module):
    """Stem and stages of residual blocks, called `stages/STAGE/blockNUMBER`."""

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs) -> None:
        style = Style(config.norm, config.dtype, config.conv, config.gain)
        self.config = config
        kind = Conv if config.preactivation else ConvNorm
        size, stride = (7, 2) if config.entry.startswith("7x7") else (3, 1)
        stem = config.stem or config.widths[0]
        self.stem = kind(config.channels, stem, style, rngs, size=size, stride=stride)
        make = _maker(config, style, rngs)
        stages: list[dict[str, nnx.Module]] = [{} for _ in config.widths]
        for (k, i), shape in config.shapes().items():
            if shape.changes or config.keeps(k, i):
                stages[k][f"block{i}"] = make(shape, config.keeps(k, i))
        self.stages = nnx.List([nnx.Dict(stage) for stage in stages])
        self.norm = style.make_norm(config.widths[-1]) if config.preactivation else None

    def features(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Any
    ) -> tuple[list[Array], Any]:
        """The output of each stage, `[B, H, W, C]` each, and the moments used."""
        used: dict[str, Any] = {}
        if isinstance(self.stem, Conv):
            x = self.stem(x)
        else:
            x, used["stem"] = self.stem(x, shares, given and given["stem"])
            x = nnx.relu(x)
        if self.config.entry.endswith("pool"):
            x = max_pool(x, 3, stride=2, padding=1)
        outputs: list[Array] = []
        for k, stage in enumerate(self.stages):
            for i in range(self.config.blocks[k]):
                if f"block{i}" in stage:
                    name = f"stage{k}_block{i}"
                    x, used[name] = stage[f"block{i}"](x, shares, given and given[name])
            outputs.append(x)
        if self.norm is not None:
            x, used["norm"] = self.norm(x, shares, given and given["norm"])
            outputs[-1] = nnx.relu(x)
        return outputs, used


def _maker(
    config: ResNetConfig, style: Style, rngs: nnx.Rngs
) -> Callable[[Shape, bool], nnx.Module]:
    """Makes a block of a shape, with its residual branch or without."""

    def make(shape: Shape, branch: bool) -> nnx.Module:
        if config.preactivation:
            return PreactivationBlock(shape, style, rngs, bottleneck=config.bottleneck)
        return ResidualBlock(
            shape,
            style,
            rngs,
            shortcut=config.shortcut,
            bottleneck=config.bottleneck,
            learn_step=config.learn_steps,
            branch=branch,
        )

    return make


class ResNet(Trunk):
    """Stem, stages of residual blocks, classifier."""

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.classifier = Classifier(config.widths[-1], config.classes, rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Any
    ) -> tuple[Float[Array, "B classes"], Any]:
        outputs, used = self.features(x, shares, given)
        return self.classifier(outputs[-1]), used


def resnet(config: ResNetConfig) -> Model:
    """The ResNet as pure functions."""
    return network(lambda rngs: ResNet(config, rngs), config.norm)
