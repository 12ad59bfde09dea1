"""Batch and group norm, as functions of what they normalise.

A norm returns the moments that it used beside its output, and takes moments to use instead of the
batch's own. So training is a pure function, and any iteration count can get statistics of its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jfed.models.model import Mask, Moments, widened

NORMS = ("batch", "group")
_EPSILON = 1e-5
_MAX_GROUPS = 8

# How much each example of a batch counts in a mean over it, together 1; None where all are alike.
Shares = Float[Array, " B"] | None

_KEPT = "kept"
# A policy for `jax.checkpoint`: keep what is expensive to compute again, which is what convolutions
# give and norms measure, and compute the rest again, which is what norms and relus give.
KEEP_CONVOLUTIONS = jax.checkpoint_policies.save_only_these_names(_KEPT)


def keep(value: Array) -> Array:
    """Marks what `KEEP_CONVOLUTIONS` keeps."""
    return checkpoint_name(value, _KEPT)


def shares_of(mask: Mask | None) -> Shares:
    """Equal shares of the examples where `mask` is 1, or of all.

    In a batch of padding alone (a lane without work, the end of an evaluation) all count: what
    comes of it is thrown away, but a variance of zero would make it overflow, and 0 * inf is nan.
    """
    if mask is None:
        return None
    counts = jnp.where(mask.any(), mask, 1)
    return counts / counts.sum()


class Norm(nnx.Module):
    """Batch or group norm with a learned scale and offset per channel, computed in float32.

    Its input is first multiplied by `gain` (the scaler of HeteroFL, Diao et al. 2021, section 3): a
    batch norm does so while it uses the batch's own moments, as in training, and not where it is
    given moments, as in evaluation; a group norm, which does not know one from the other, always.
    """

    def __init__(self, channels: int, kind: str, dtype: str, gain: float) -> None:
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.offset = nnx.Param(jnp.zeros((channels,)))
        self.kind, self.dtype, self.gain = kind, dtype, gain

    def __call__(
        self, x: Float[Array, "B H W C"], shares: Shares, given: Moments | None
    ) -> tuple[Float[Array, "B H W C"], Moments | None]:
        scale, offset, used = self.scale[...], self.offset[...], given
        if self.kind == "group":
            wide = _wide(x) * self.gain
            y = group_normalise(wide, _groups(x.shape[-1]))
            y = y * _channels(scale) + _channels(offset)
        elif given is None:
            y, used = batch_normalise(self.gain, x, shares, scale, offset)
        else:
            y = _normalise(x, given, scale, offset, 1.0)
        return y.astype(self.dtype), used


def batch_moments(x: Float[Array, "B H W C"], shares: Shares) -> Moments:
    """Mean and biased variance of each channel, each example counting by its share.

    In one pass over x, the variance as E[x^2] - E[x]^2 in float32, as Flax has it: a mean of more
    than a hundred deviations would cost it digits.
    """
    x = _wide(x)
    part, size = x * _examples(shares, x), x.shape[1] * x.shape[2]
    mean, square = part.sum((0, 1, 2)) / size, (part * x).sum((0, 1, 2)) / size
    return Moments(keep(mean), keep(jnp.maximum(square - jnp.square(mean), 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def batch_normalise(
    gain: float,
    x: Float[Array, "B H W C"],
    shares: Shares,
    scale: Float[Array, " C"],
    offset: Float[Array, " C"],
) -> tuple[Float[Array, "B H W C"], Moments]:
    """Batch norm of `gain * x` by its own moments (Ioffe and Szegedy 2015, arXiv 1502.03167).

    Its gradient takes two sums over the batch in one pass, and one more pass; JAX's own takes more
    of both. Nothing is learned through the moments that are returned (those of x), nor through
    shares.
    """
    return _batch_forward(gain, x, shares, scale, offset)[0]


def _batch_forward(
    gain: float, x: Array, shares: Shares, scale: Array, offset: Array
) -> tuple[tuple[Array, Moments], Any]:
    used = batch_moments(x, shares)
    return (_normalise(x, used, scale, offset, gain), used), (x, shares, scale, used)


def _batch_backward(gain: float, residuals: Any, gradients: tuple[Array, Moments]) -> Any:
    x, shares, scale, used = residuals
    dy, factor = _wide(gradients[0]), _factor(used, gain)
    unit = (_wide(x) - _channels(used.mean)) * _channels(factor)
    d_offset, d_scale = dy.sum((0, 1, 2)), (dy * unit).sum((0, 1, 2))
    along, across = (_channels(d / (x.shape[1] * x.shape[2])) for d in (d_offset, d_scale))
    common = _examples(shares, x) * (along + unit * across)
    dx = _channels(scale * factor) * (dy - common)
    d_shares = jax.tree.map(jnp.zeros_like, shares)
    return dx.astype(x.dtype), d_shares, d_scale, d_offset


batch_normalise.defvjp(_batch_forward, _batch_backward)


def _normalise(x: Array, used: Moments, scale: Array, offset: Array, gain: float) -> Array:
    factor = _channels(_factor(used, gain) * scale)  # all of a channel's at once
    return (_wide(x) - _channels(used.mean)) * factor + _channels(offset)


def _factor(used: Moments, gain: float) -> Array:
    return gain * jax.lax.rsqrt(gain**2 * used.var + _EPSILON)


def group_normalise(x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    """Normalises each example over space and each of `groups` groups of neighbouring channels."""
    grouped = x.reshape(*x.shape[:3], groups, -1)
    centred = grouped - keep(grouped.mean((1, 2, 4), keepdims=True))
    var = keep(jnp.square(centred).mean((1, 2, 4), keepdims=True))
    return (centred * jax.lax.rsqrt(var + _EPSILON)).reshape(x.shape)


def _wide(x: Array) -> Array:
    return x.astype(widened(x.dtype))


def _channels(a: Float[Array, " C"]) -> Float[Array, "1 1 1 C"]:
    return a[None, None, None, :]


def _examples(shares: Shares, x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 1"] | float:
    return 1 / x.shape[0] if shares is None else shares[:, None, None, None]


def _groups(channels: int) -> int:
    # A channel that is its own group loses its mean: on a 1x1 map, everything.
    most = range(1, _MAX_GROUPS + 1)
    return max(g for g in most if channels % g == 0 and (g == 1 or channels > g))
