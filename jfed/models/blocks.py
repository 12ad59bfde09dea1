"""Residual blocks: as in ResNet v1 (arXiv 1512.03385), and pre-activated (v2, arXiv 1603.05027)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jfed.models.layers import Conv, ConvNorm, Style
from jfed.models.norms import Shares

SHORTCUTS = ("pad", "projection")


class Shape(NamedTuple):
    """What a residual block does to its input: channels in and out, and by what it strides."""

    inputs: int
    outputs: int
    stride: int = 1

    @property
    def changes(self) -> bool:
        """Whether the shortcut has to change the shape too."""
        return self.stride != 1 or self.inputs != self.outputs

    def convolutions(self, bottleneck: bool) -> list[tuple[int, int, int, int]]:
        """Inputs, outputs, size and stride of each convolution of the branch.

        They are 3x3 and 3x3, or of a bottleneck 1x1, 3x3 and 1x1 with a fourth of the outputs
        inside.
        """
        if not bottleneck:
            return [(self.inputs, self.outputs, 3, self.stride), (self.outputs, self.outputs, 3, 1)]
        inner = self.outputs // 4
        return [
            (self.inputs, inner, 1, 1),
            (inner, inner, 3, self.stride),
            (inner, self.outputs, 1, 1),
        ]


class ResidualBlock(nnx.Module):
    """relu(shortcut(z) + s f(z)) with f a chain of convolutions and norms (He et al. 2016).

    Where the shape changes, the shortcut is a strided 1x1 convolution with norm ("projection"), or
    strided slicing with zeros for the new channels ("pad", option A, no parameters). s is 1, or
    with `learn_step` a learned number that starts at 1; without `branch` the shortcut is all there
    is (both NeFL, arXiv 2308.07761).
    """

    def __init__(
        self,
        shape: Shape,
        style: Style,
        rngs: nnx.Rngs,
        *,
        shortcut: str = "projection",
        bottleneck: bool = False,
        learn_step: bool = False,
        branch: bool = True,
    ) -> None:
        self.step = nnx.Param(jnp.ones(())) if learn_step and branch else None
        self.outputs, self.stride = shape.outputs, shape.stride
        plan = shape.convolutions(bottleneck) if branch else []
        self.layers = nnx.List(
            [ConvNorm(i, o, style, rngs, size=k, stride=s) for i, o, k, s in plan]
        )
        self.projection = (
            ConvNorm(shape.inputs, shape.outputs, style, rngs, size=1, stride=shape.stride)
            if shape.changes and shortcut == "projection"
            else None
        )

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Any
    ) -> tuple[Float[Array, "B Ho Wo O"], Any]:
        used, y = {}, x
        for i, layer in enumerate(self.layers):
            y, used[f"layer{i}"] = layer(
                nnx.relu(y) if i else y, shares, given and given[f"layer{i}"]
            )
        if self.projection is None:
            x = _pad_shortcut(x, self.outputs, self.stride)
        else:
            x, used["projection"] = self.projection(x, shares, given and given["projection"])
        if not len(self.layers):
            return nnx.relu(x), used
        if self.step is not None:
            y = self.step[...].astype(y.dtype) * y
        return nnx.relu(x + y), used


class PreactivationBlock(nnx.Module):
    """shortcut(z) + f(z), with f norm, relu, convolution, twice or (a bottleneck) three times.

    Where the shape changes, the shortcut is a strided 1x1 convolution, without norm, of what the
    first norm and relu give.
    """

    def __init__(
        self, shape: Shape, style: Style, rngs: nnx.Rngs, *, bottleneck: bool = False
    ) -> None:
        plan = shape.convolutions(bottleneck)
        self.norms = nnx.List([style.make_norm(i) for i, *_ in plan])
        self.convs = nnx.List([Conv(i, o, style, rngs, size=k, stride=s) for i, o, k, s in plan])
        inputs, outputs, stride = shape
        self.projection = (
            Conv(inputs, outputs, style, rngs, size=1, stride=stride) if shape.changes else None
        )

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Any
    ) -> tuple[Float[Array, "B Ho Wo O"], Any]:
        used, y = {}, x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            y, used[f"norm{i}"] = norm(y, shares, given and given[f"norm{i}"])
            y = nnx.relu(y)
            if i == 0 and self.projection is not None:
                x = self.projection(y)
            y = conv(y)
        return x + y, used


def _pad_shortcut(x: Array, outputs: int, stride: int) -> Array:
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((0, outputs - x.shape[-1]),))
