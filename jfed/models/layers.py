"""Layers shared by the networks: convolutions, norms, pooling, the head.

Norms are functional: a layer returns the moments that it used beside its output, and takes moments
to use instead of the batch's own. So training is a pure function, and any iteration count can get
statistics of its own.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jfed.errors import ConfigError, check_integer, check_number
from jfed.models.convolutions.convolution import constant_response, conv, time_conv
from jfed.models.model import Mask, Model, Moments, Params, Statistics, functional

NORMS = ("batch", "group")
DTYPES = ("float32", "bfloat16")

_KEPT = "kept"
# A policy for `jax.checkpoint`: keep what is expensive to compute again, which is what convolutions
# give and norms measure, and compute the rest again, which is what norms and relus give.
KEEP_CONVOLUTIONS = jax.checkpoint_policies.save_only_these_names(_KEPT)

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


class Style(NamedTuple):
    """What all layers of a network have in common; `gain` is what norms multiply by, see `Norm`."""

    norm: str = "batch"
    dtype: str = "float32"
    form: str = "auto"
    gain: float = 1.0


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
    """A 3x3 convolution that sees the time t as one more input channel; `[3, 3, 1 + C, O]`."""

    def __init__(self, channels: int, style: Style, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(_he_normal(rngs.params(), (3, 3, 1 + channels, channels)))
        self.dtype, self.form = style.dtype, style.form

    def __call__(self, t: Any, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        return _keep(time_conv(x, jnp.asarray(t, self.dtype), kernel, form=self.form))


class SeparableTimeConv(nnx.Module):
    """`TimeConv` as a depthwise 3x3 and a pointwise convolution (dsODENet, arXiv 2107.12824)."""

    def __init__(self, channels: int, style: Style, rngs: nnx.Rngs) -> None:
        # A depthwise kernel sees nine inputs; He's fan-in is that of the pair's second half.
        depthwise = nnx.initializers.normal(1 / 3)
        self.depthwise = nnx.Param(depthwise(rngs.params(), (3, 3, 1, 1 + channels)))
        self.pointwise = nnx.Param(_he_normal(rngs.params(), (1, 1, 1 + channels, channels)))
        self.dtype, self.form = style.dtype, style.form

    def __call__(self, t: Any, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x, t = x.astype(self.dtype), jnp.asarray(t, self.dtype)
        depthwise = self.depthwise[...].astype(self.dtype)
        pointwise = self.pointwise[...].astype(self.dtype)
        # The time's own channel is the same for every image, so it is added as a plane.
        plane = t * constant_response(x.shape[1:3], depthwise[..., :1])
        y = _keep(conv(x, depthwise[..., 1:], groups=x.shape[-1], form=self.form))
        y = conv(y, pointwise[:, :, 1:], form=self.form) + plane * pointwise[:, :, :1]
        return _keep(y)


class Norm(nnx.Module):
    """Batch or group norm with a learned scale and offset per channel, computed in float32.

    Its input is first multiplied by `gain` (the scaler of HeteroFL, Diao et al. 2021, section 3): a
    batch norm does so while it uses the batch's own moments, as in training, and not where it is
    given moments, as in evaluation; a group norm, which does not know one from the other, always.
    """

    EPSILON = 1e-5
    MAX_GROUPS = 8

    def __init__(self, channels: int, style: Style) -> None:
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.offset = nnx.Param(jnp.zeros((channels,)))
        self.kind, self.dtype, self.gain = style.norm, style.dtype, style.gain

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Mask | None, given: Moments | None
    ) -> tuple[Float[Array, "B H W C"], Moments | None]:
        if x.dtype == jnp.bfloat16:
            x = x.astype(jnp.float32)
        scale, offset = _channels(self.scale[...]), _channels(self.offset[...])
        if self.kind == "group":
            y = group_normalise(x * self.gain, _groups(x.shape[-1], self.MAX_GROUPS))
            return y * scale + offset, None
        used = batch_moments(x, mask) if given is None else given
        gain = self.gain if given is None else 1.0
        # All factors of a channel first: one pass over x, and one less back.
        factor = gain * jax.lax.rsqrt(gain**2 * used.var + self.EPSILON)
        return (x - _channels(used.mean)) * (_channels(factor) * scale) + offset, used


def batch_moments(x: Float[Array, "B H W C"], mask: Mask | None) -> Moments:
    """Mean and biased variance over the examples where `mask` is 1 (all, without a mask)."""
    if mask is None:
        mean = _keep(x.mean((0, 1, 2)))
        return Moments(mean, _keep(jnp.square(x - _channels(mean)).mean((0, 1, 2))))
    # A batch of padding alone (a lane without work, the end of an evaluation) counts in full: what
    # comes of it is thrown away, but a variance of zero would make it overflow, and 0 * inf is nan.
    weight = jnp.where(mask.any(), mask, 1).astype(x.dtype)[:, None, None, None]
    count = weight.sum() * (x.shape[1] * x.shape[2])
    mean = _keep((x * weight).sum((0, 1, 2)) / count)
    squares = jnp.square(x - _channels(mean)) * weight
    return Moments(mean, _keep(squares.sum((0, 1, 2)) / count))


def group_normalise(x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    """Normalises each example over space and each of `groups` groups of neighbouring channels."""
    grouped = x.reshape(*x.shape[:3], groups, -1)
    centred = grouped - _keep(grouped.mean((1, 2, 4), keepdims=True))
    var = _keep(jnp.square(centred).mean((1, 2, 4), keepdims=True))
    return (centred * jax.lax.rsqrt(var + Norm.EPSILON)).reshape(x.shape)


def _keep(value: Array) -> Array:
    return checkpoint_name(value, _KEPT)


def _channels(a: Float[Array, " C"]) -> Float[Array, "1 1 1 C"]:
    return a[None, None, None, :]


def _groups(channels: int, most: int) -> int:
    # A channel that is its own group loses its mean: on a 1x1 map, everything.
    return max(g for g in range(1, most + 1) if channels % g == 0 and (g == 1 or channels > g))


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
        self.norm = Norm(outputs, style)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Mask | None, given: Moments | None
    ) -> tuple[Float[Array, "B Ho Wo O"], Moments | None]:
        return self.norm(self.conv(x), mask, given)


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
        return self.linear(x.mean((1, 2)))


def network(
    create: Callable[[nnx.Rngs], nnx.Module],
    norm: str,
    call: Callable[..., Any] = lambda module, *args, record: module(*args),
) -> Model:
    """A `Model` of a module called as `module(images, mask, given) -> (logits, used)`.

    Of a network with several exits, `apply` gives the logits of each.

    Args:
      create: builds the module from its random streams.
      norm: "batch" or "group"; a group norm needs neither masks nor statistics.
      call: `call(module, images, mask, given, record=...)`, where it takes more to call the module;
        only if `record` is what it used of interest.
    """
    init, bind = functional(create)

    def apply(
        params: Params,
        images: Float[Array, "B H W C"],
        mask: Mask | None = None,
        statistics: Statistics | None = None,
    ) -> Float[Array, "*exits B classes"]:
        logits, _ = call(bind(params), images, mask, statistics, record=False)
        return logits.astype(jnp.float32)

    def measure(params: Params, images: Float[Array, "B H W C"], mask: Mask) -> Statistics:
        return call(bind(params), images, mask, None, record=True)[1]

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
