"""Residual networks for small images (He et al. 2016, arXiv 1512.03385)."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jfed.errors import ConfigError, check_integer, check_sequence, check_type, one_of
from jfed.models.convolutions.convolution import FORMS
from jfed.models.layers import (
    DTYPES,
    NORMS,
    SHORTCUTS,
    Classifier,
    ConvNorm,
    ResidualBlock,
    Style,
    check_gain,
    check_widths,
    network,
)
from jfed.models.model import Mask, Model


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet.

    Attributes:
      widths: output channels of each stage; each stage but the first halves height and width.
      blocks: residual blocks in each stage.
      bottleneck: blocks of 1x1, 3x3, 1x1 convolutions instead of 3x3, 3x3.
      shortcut: "projection" or "pad", see `ResidualBlock`.
      stem: channels of the first convolution (3x3, stride 1); None: those of the first stage.
      norm: "batch" or "group".
      dtype: what convolutions compute in, "float32" or "bfloat16"; parameters stay float32.
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
    stem: int | None = None
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
        for name in ("bottleneck", "learn_steps"):
            check_type(name, getattr(self, name), bool)
        if self.bottleneck and any(width % 4 for width in self.widths):
            raise ConfigError(f"widths of bottlenecks must be multiples of 4, got {self.widths}.")
        one_of("norm", self.norm, NORMS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("convolution form", self.conv, FORMS)
        check_gain(self.gain)
        if len(self.widths) != len(self.blocks):
            raise ConfigError(
                f"widths {self.widths} and blocks {self.blocks} must name as many stages."
            )


class Trunk(nnx.Module):
    """Stem and stages of residual blocks."""

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs) -> None:
        style = Style(config.norm, config.dtype, config.conv, config.gain)
        channels = config.stem or config.widths[0]
        self.stem = ConvNorm(config.channels, channels, style, rngs)
        stages = []
        for k, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            blocks = []
            for i in range(count):
                stride = 2 if k > 0 and i == 0 else 1
                blocks.append(
                    ResidualBlock(
                        channels,
                        width,
                        style,
                        rngs,
                        stride=stride,
                        shortcut=config.shortcut,
                        bottleneck=config.bottleneck,
                        learn_step=config.learn_steps,
                    )
                )
                channels = width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)

    def features(
        self, x: Float[Array, "B H W C"], mask: Mask | None, given: Any
    ) -> tuple[list[Array], Any]:
        """The output of each stage, `[B, H, W, C]` each, and the moments used."""
        used: dict[str, Any] = {}
        outputs = []
        x, used["stem"] = self.stem(x, mask, given and given["stem"])
        x = nnx.relu(x)
        for k, stage in enumerate(self.stages):
            for i, block in enumerate(stage):
                name = f"stage{k}_block{i}"
                x, used[name] = block(x, mask, given and given[name])
            outputs.append(x)
        return outputs, used


class ResNet(Trunk):
    """Stem, stages of residual blocks, classifier."""

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.classifier = Classifier(config.widths[-1], config.classes, rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Mask | None, given: Any
    ) -> tuple[Float[Array, "B classes"], Any]:
        outputs, used = self.features(x, mask, given)
        return self.classifier(outputs[-1]), used


def resnet(config: ResNetConfig) -> Model:
    """The ResNet as pure functions."""
    return network(lambda rngs: ResNet(config, rngs), config.norm)
