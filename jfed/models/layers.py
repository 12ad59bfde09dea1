"""Layers shared by the networks: convolutions, pooling, the head."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jfed.errors import ConfigError, check_integer, check_number
from jfed.models.convolutions.convolution import constant_response, conv
from jfed.models.model import Mask, Model, Moments, Params, Statistics, functional
from jfed.models.norms import Norm, Shares, keep, shares_of

DTYPES = ("float32", "bfloat16")

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


class Style(NamedTuple):
    """What all layers of a network have in common.

    Attributes:
      norm: "batch" or "group".
      dtype: of what layers give each other.
      form: of convolutions.
      gain: what norms multiply by, see `Norm`.
    """

    norm: str = "batch"
    dtype: str = "float32"
    form: str = "auto"
    gain: float = 1.0

    def make_norm(self, channels: int) -> Norm:
        """A norm over so many channels."""
        return Norm(channels, self.norm, self.dtype, self.gain)


class Conv(nnx.Module):
    """A convolution without bias, symmetric padding; kernel `[k, k, C, O]` float32."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: Style,
        rngs: nnx.Rngs,
        *,
        size: int = 3,
        stride: int = 1,
    ) -> None:
        self.kernel = nnx.Param(_he_normal(rngs.params(), (size, size, inputs, outputs)))
        self.stride, self.dtype, self.form = stride, style.dtype, style.form

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo O"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return conv(x, kernel, stride=self.stride, padding="SYMMETRIC", form=self.form)


class TimeConv(nnx.Module):
    """A 3x3 convolution that sees the time t as one more input channel; `[3, 3, 1 + C, O]`.

    A constant channel contributes t times a plane that depends on the position only, so it is added
    as that plane, once for the whole batch. What depends on neither t nor x is `prepare`d once for
    all times.
    """

    def __init__(self, channels: int, style: Style, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(_he_normal(rngs.params(), (3, 3, 1 + channels, channels)))
        self.dtype, self.form = style.dtype, style.form

    def prepare(self, size: tuple[int, ...]) -> tuple[Array, Array]:
        """The kernel of x, and what t is multiplied by, for images of `size` (H, W); float32.

        Gradients of all times are summed in that type.
        """
        kernel = self.kernel[...]
        return kernel[:, :, 1:], constant_response(size, kernel[:, :, :1])

    def __call__(
        self, t: Any, x: Float[Array, "B H W C"], prepared: tuple[Array, Array]
    ) -> Float[Array, "B H W C"]:
        kernel, plane = prepared
        y = conv(x, kernel.astype(self.dtype), form=self.form)
        return keep(y + (jnp.asarray(t, plane.dtype) * plane).astype(self.dtype))


class SeparableTimeConv(nnx.Module):
    """`TimeConv` as a depthwise 3x3 and a pointwise convolution (dsODENet, arXiv 2107.12824)."""

    def __init__(self, channels: int, style: Style, rngs: nnx.Rngs) -> None:
        # A depthwise kernel sees nine inputs; He's fan-in is that of the pair's second half.
        depthwise = nnx.initializers.normal(1 / 3)
        self.depthwise = nnx.Param(depthwise(rngs.params(), (3, 3, 1, 1 + channels)))
        self.pointwise = nnx.Param(_he_normal(rngs.params(), (1, 1, 1 + channels, channels)))
        self.dtype, self.form = style.dtype, style.form

    def prepare(self, size: tuple[int, ...]) -> tuple[Array, Array, Array]:
        """Both kernels of x, and what t is multiplied by; float32."""
        depthwise, pointwise = self.depthwise[...], self.pointwise[...]
        plane = constant_response(size, depthwise[..., :1]) * pointwise[:, :, :1]
        return depthwise[..., 1:], pointwise[:, :, 1:], plane

    def __call__(
        self, t: Any, x: Float[Array, "B H W C"], prepared: tuple[Array, Array, Array]
    ) -> Float[Array, "B H W C"]:
        depthwise, pointwise = (kernel.astype(self.dtype) for kernel in prepared[:2])
        plane = (jnp.asarray(t, prepared[2].dtype) * prepared[2]).astype(self.dtype)
        y = keep(conv(x, depthwise, groups=x.shape[-1], form=self.form))
        return keep(conv(y, pointwise, form=self.form) + plane)


class ConvNorm(nnx.Module):
    """Convolution, then norm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: Style,
        rngs: nnx.Rngs,
        *,
        size: int = 3,
        stride: int = 1,
    ) -> None:
        self.conv = Conv(inputs, outputs, style, rngs, size=size, stride=stride)
        self.norm = style.make_norm(outputs)

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Moments | None
    ) -> tuple[Float[Array, "B Ho Wo O"], Moments | None]:
        return self.norm(self.conv(x), shares, given)


def max_pool(
    x: Float[Array, "B H W C"], window: int, *, stride: int, padding: int = 0
) -> Float[Array, "B Ho Wo C"]:
    """The largest value of each window; what is padded is smaller than all."""
    if min(x.shape[1:3]) + 2 * padding < window:
        raise ConfigError(
            f"max-pooling of {window}x{window} does not fit into {x.shape[1]}x{x.shape[2]}: the "
            "images are too small for the network."
        )
    for axis in (1, 2):  # slices, as XLA's own gradient of a pooling is slow on a CPU
        pads = [(padding, padding) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, pads, constant_values=-jnp.inf)
        reach = (padded.shape[axis] - window) // stride * stride + 1
        parts = [jax.lax.slice_in_dim(padded, i, i + reach, stride, axis) for i in range(window)]
        x = functools.reduce(jnp.maximum, parts)
    return x


class Classifier(nnx.Module):
    """Mean over space, then a linear layer in float32."""

    def __init__(self, inputs: int, classes: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        return self.linear(x.astype(jnp.float32).mean((1, 2)))


def network(
    create: Callable[[nnx.Rngs], nnx.Module],
    norm: str,
    call: Callable[..., Any] = lambda module, *args, record: module(*args),
) -> Model:
    """A `Model` of a module called as `module(images, shares, given) -> (logits, used)`.

    Of a network with several exits, `apply` gives the logits of each.

    Args:
      create: builds the module from its random streams.
      norm: "batch" or "group"; a group norm needs neither masks nor statistics.
      call: `call(module, images, shares, given, record=...)`, where it takes more to call the
        module; only if `record` is what it used of interest.
    """
    init, bind = functional(create)

    def apply(
        params: Params,
        images: Float[Array, "B H W C"],
        mask: Mask | None = None,
        statistics: Statistics | None = None,
    ) -> Float[Array, "*exits B classes"]:
        shares = shares_of(mask)
        logits, _ = call(bind(params), images, shares, statistics, record=False)
        return logits.astype(jnp.float32)

    def measure(params: Params, images: Float[Array, "B H W C"], mask: Mask) -> Statistics:
        return call(bind(params), images, shares_of(mask), None, record=True)[1]

    return Model(init, apply, measure if norm == "batch" else None)


def check_widths(widths: Sequence[int], shortcut: str) -> tuple[int, ...]:
    """Widths as a tuple; ConfigError unless they are positive and fit the shortcut."""
    if not isinstance(widths, Sequence) or not len(widths):
        raise ConfigError(f"widths must name the channels of each stage, got {widths!r}.")
    checked = tuple(check_integer("widths", width, least=1) for width in widths)
    if shortcut == "pad" and any(a > b for a, b in itertools.pairwise(checked)):
        raise ConfigError(
            f'widths must not shrink with shortcut "pad", which adds channels, got {checked}; '
            'or use shortcut "projection".'
        )
    return checked


def check_gain(gain: float) -> float:
    """Returns the gain; ConfigError unless it is a number above 0."""
    return check_number("gain", gain, above=0.0)
