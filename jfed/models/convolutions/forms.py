"""The forms of a convolution: ways to compute it and its gradients that give the same numbers.

Local training is a loop (`lax.scan` over batches) around a model that may loop again (ODE steps),
mapped over clients that each own their kernels. XLA's convolution suits neither: on the CPU its
weight gradient inside any loop runs about a hundred times too slow (jax issue 12868), and `vmap`
over kernels makes it a grouped convolution (jax issues 13800, 26568). The other forms do without
it; `jfed.models.convolution` picks one.

Layouts are NHWC for images and HWIO for kernels. Nothing is checked here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jfed.models.convolutions import winograd
from jfed.models.convolutions.padding import Pads, output_size, pad


class Form(NamedTuple):
    """One way to convolve: `forward(x, kernel, stride, pads)` and its two gradients.

    `backward(x, kernel, g, stride, pads)` returns the gradients of x and of the kernel. Whichever
    the caller does not use costs nothing under `jit`.
    """

    forward: Callable[..., Array]
    backward: Callable[..., tuple[Array, Array]]


# ------------------------------------------------------------------------------------- "xla"


def xla(x: Array, kernel: Array, stride: int, pads: Pads, groups: int = 1) -> Array:
    """XLA's convolution, whose gradients are XLA's too."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


# -------------------------------------------------------------------------------- "transposed"


def _transposed_backward(
    x: Array, kernel: Array, g: Array, stride: int, pads: Pads
) -> tuple[Array, Array]:
    """XLA's input gradient, and the weight gradient as a convolution of transposed operands.

    Channels of x act as the batch and the batch acts as the channels: [C, H, W, B] convolved with
    [Ho, Wo, B, O] gives [C, kh, kw, O]. XLA's own weight gradient expresses the same by dimension
    numbers, which its CPU loops only know a naive kernel for.
    """
    (dx,) = jax.linear_transpose(lambda x: xla(x, kernel, stride, pads), x)(g)
    kh, kw = kernel.shape[:2]
    dk = lax.conv_general_dilated(
        pad(x, pads).transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        "VALID",
        rhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # With a stride, rows that no output reached may be left over at the end.
    return dx, dk[:, :kh, :kw].transpose(1, 2, 0, 3)


# ------------------------------------------------------------------------------------ "im2col"


def _shifted(
    padded: Array, i: int, j: int, strides: tuple[int, int], size: tuple[int, int]
) -> Array:
    """What kernel tap (i, j) sees at every output position: [B, Ho, Wo, C]."""
    (b, _, _, c), (ho, wo), (down, right) = padded.shape, size, strides
    end = (b, i + (ho - 1) * down + 1, j + (wo - 1) * right + 1, c)
    return lax.slice(padded, (0, i, j, 0), end, (1, down, right, 1))


def _unshifted(g: Array, i: int, j: int, stride: int, shape: tuple[int, ...], pads: Pads) -> Array:
    """The transpose of `_shifted` after `pad`: [B, Ho, Wo, C] -> [B, H, W, C]."""
    edges = []
    for n, size, (low, _), start in zip(g.shape[1:3], shape[1:3], pads, (i, j), strict=True):
        low_edge = start - low
        edges.append((low_edge, size - low_edge - ((n - 1) * stride + 1), stride - 1))
    return lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def _taps(kernel: Array) -> list[tuple[int, int]]:
    return [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]


def _patches(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """[B * Ho * Wo, kh * kw * C]: one row per output position, in the order of the kernel."""
    size = output_size(x, kernel, stride, pads)
    padded = pad(x, pads)
    columns = [_shifted(padded, i, j, (stride, stride), size) for i, j in _taps(kernel)]
    return jnp.concatenate(columns, axis=-1).reshape(x.shape[0] * size[0] * size[1], -1)


def _im2col_forward(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    y = _patches(x, kernel, stride, pads) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(x.shape[0], *output_size(x, kernel, stride, pads), -1)


def _im2col_backward(
    x: Array, kernel: Array, g: Array, stride: int, pads: Pads
) -> tuple[Array, Array]:
    g_rows = g.reshape(-1, g.shape[-1])
    dk = (_patches(x, kernel, stride, pads).T @ g_rows).reshape(kernel.shape)
    columns = (g_rows @ kernel.reshape(-1, kernel.shape[-1]).T).reshape(*g.shape[:3], -1)
    dx = sum(
        _unshifted(part.astype(_sum_dtype(x)), i, j, stride, x.shape, pads)
        for part, (i, j) in zip(
            jnp.split(columns, len(_taps(kernel)), axis=-1), _taps(kernel), strict=True
        )
    )
    return jnp.asarray(dx).astype(x.dtype), dk


def _sum_dtype(x: Array) -> jnp.dtype:
    """Sums of many terms are formed in float32 at least."""
    return jnp.dtype(jnp.float32) if x.dtype.itemsize < 4 else x.dtype


# --------------------------------------------------------------------------------- "depthwise"


def _depthwise_forward(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Computes kh * kw shifted multiplications, in place of a grouped convolution."""
    size, padded = output_size(x, kernel, stride, pads), pad(x, pads)
    wide = _sum_dtype(x)
    y = sum(
        _shifted(padded, i, j, (stride, stride), size).astype(wide)
        * _tap(kernel, i, j).astype(wide)
        for i, j in _taps(kernel)
    )
    return jnp.asarray(y).astype(x.dtype)


def _depthwise_backward(
    x: Array, kernel: Array, g: Array, stride: int, pads: Pads
) -> tuple[Array, Array]:
    dx = _depthwise_forward(_spread(g, kernel, stride, x.shape, pads), kernel[::-1, ::-1], 1, _NONE)
    wide = _sum_dtype(x)
    # For each tap the products of a block of rows, added up row by row: one fused pass over the
    # images, for all taps while they are in the cache. Only what is left of that, an eighth, is
    # reduced. A reduction for each tap took 1.5 to 3 times as long (16 to 64 channels, AMD EPYC).
    (ho, wo), block = g.shape[1:3], min(8, g.shape[1])
    blocks = -(-ho // block)
    missing = blocks * block - ho
    (top, bottom), sides = pads
    padded = pad(x, ((top, bottom + missing * stride), sides)).astype(wide)
    g = pad(g, ((0, missing), (0, 0))).astype(wide)
    size = (blocks, wo)
    sums = [
        sum(
            _shifted(padded, i + r * stride, j, (block * stride, stride), size)
            * _shifted(g, r, 0, (block, 1), size)
            for r in range(block)
        )
        for i, j in _taps(kernel)
    ]
    dk = jnp.stack(sums).sum((1, 2, 3))
    return dx, dk.reshape(kernel.shape).astype(kernel.dtype)


_NONE: Pads = ((0, 0), (0, 0))


def _spread(g: Array, kernel: Array, stride: int, shape: tuple[int, ...], pads: Pads) -> Array:
    """Output gradients, `stride` apart in zeros: VALID with the flipped kernel they give x's.

    That reads each of them once for all taps, where adding up shifted copies would write x's
    gradient once for each tap.
    """
    edges = []
    for n, size, k, (low, _) in zip(g.shape[1:3], shape[1:3], kernel.shape[:2], pads, strict=True):
        first, spread = k - 1 - low, (n - 1) * stride + 1
        edges.append((first, size + k - 1 - spread - first, stride - 1))
    return lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def _tap(kernel: Array, i: int, j: int) -> Array:
    """One tap of a depthwise kernel, [1, 1, 1, C]."""
    return kernel[i, j].reshape(1, 1, 1, -1)


# -------------------------------------------------------------------------------- all of them

BY_NAME = {
    "transposed": Form(xla, _transposed_backward),
    "im2col": Form(_im2col_forward, _im2col_backward),
    **{
        f"winograd{m}": Form(
            functools.partial(winograd.forward, m), functools.partial(winograd.backward, m)
        )
        for m in (2, 4)
    },
    "depthwise": Form(_depthwise_forward, _depthwise_backward),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def convolve(form: Form, stride: int, pads: Pads, x: Array, kernel: Array) -> Array:
    """The convolution by `form.forward`, its gradients by `form.backward`."""
    # Only what is never differentiated comes here, evaluation above all. XLA's forward pass is fast
    # everywhere, and compiles several times faster than the forms do.
    return xla(x, kernel, stride, pads, groups=x.shape[-1] // kernel.shape[2])


def _forward(
    form: Form, stride: int, pads: Pads, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    # The residuals are the operands themselves: tiles and patches are recomputed, because storing
    # them would multiply the memory of every ODE step.
    return form.forward(x, kernel, stride, pads), (x, kernel)


def _backward(
    form: Form, stride: int, pads: Pads, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    return form.backward(x, kernel, g, stride, pads)


convolve.defvjp(_forward, _backward)
