"""The plain convolutional network of HeteroFL's authors (Diao et al., ICLR 2021)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jfed.errors import check_integer, one_of
from jfed.models.convolutions.convolution import FORMS
from jfed.models.layers import (
    DTYPES,
    Classifier,
    Conv,
    Style,
    check_gain,
    check_widths,
    max_pool,
    network,
)
from jfed.models.model import Model
from jfed.models.norms import NORMS, Shares


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """3x3 convolutions with bias, norm and relu, with a 2x2 max-pooling between them.

    Attributes:
      widths: output channels of each convolution.
      norm: "batch" or "group".
      dtype: of what layers give each other, "float32" or "bfloat16", see `ODENetConfig`.
      conv: the convolutions' form, see `jfed.models.convolutions.convolution.conv`.
      gain: what norms multiply their input by, see `jfed.models.layers.Norm`.
      classes: how many logits.
      channels: of the images.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    norm: str = "batch"
    dtype: str = "float32"
    conv: str = "auto"
    gain: float = 1.0
    classes: int = 10
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", check_widths(self.widths, "projection"))
        check_integer("classes", self.classes, least=2)
        check_integer("channels", self.channels, least=1)
        one_of("norm", self.norm, NORMS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("convolution form", self.conv, FORMS)
        check_gain(self.gain)


class ConvNet(nnx.Module):
    """Convolutions, then a classifier."""

    def __init__(self, config: ConvNetConfig, rngs: nnx.Rngs) -> None:
        style = Style(config.norm, config.dtype, config.conv, config.gain)
        inputs = (config.channels, *config.widths[:-1])
        pairs = list(zip(inputs, config.widths, strict=True))
        self.convs = nnx.List([Conv(i, o, style, rngs) for i, o in pairs])
        self.biases = nnx.List([nnx.Param(jnp.zeros(o)) for _, o in pairs])
        self.norms = nnx.List([style.make_norm(o) for _, o in pairs])
        self.classifier = Classifier(config.widths[-1], config.classes, rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Any
    ) -> tuple[Float[Array, "B classes"], Any]:
        used = {}
        for i, (conv, bias, norm) in enumerate(
            zip(self.convs, self.biases, self.norms, strict=True)
        ):
            if i:
                x = max_pool(x, 2, stride=2)
            y = conv(x)
            y = y + bias[...].astype(y.dtype)[None, None, None]
            y, used[f"norm{i}"] = norm(y, shares, given and given[f"norm{i}"])
            x = nnx.relu(y)
        return self.classifier(x), used


def conv_net(config: ConvNetConfig) -> Model:
    """The network as pure functions."""
    return network(lambda rngs: ConvNet(config, rngs), config.norm)
