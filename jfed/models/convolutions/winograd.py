"""Winograd's minimal filtering: stride-1 convolutions as batched matrix products over tiles.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jfed.models.convolutions.padding import Pads, output_size, pad

Matrix = tuple[tuple[float, ...], ...]


class Transform(NamedTuple):
    """F(m x m, r x r): m x m outputs from a tile of n x n inputs, n = m + r - 1, by n * n products.

    In one direction y = outputs @ ((kernels @ k) * (inputs @ d)) for a tile d and kernel row k:
    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4
    (their A^T, G and B^T).
    """

    inputs: Matrix  # [n, n]
    kernels: Matrix  # [n, r]
    outputs: Matrix  # [m, n]


_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)


@functools.cache
def transform(m: int, r: int) -> Transform:
    """The Cook-Toom matrices: polynomials multiplied by their values at n - 1 points and infinity.

    Small points keep rounding low: relative errors near 1e-6 with 4, 1e-5 with 6.
    """
    n = m + r - 1
    points = np.array(_POINTS[: n - 1])
    others = [np.delete(points, j) for j in range(n - 1)]
    # Row j: coefficients, constant first, of the product of (x - p) over the other points.
    inputs = np.zeros((n, n))
    inputs[:-1, :-1] = [np.poly(rest)[::-1] for rest in others]
    inputs[-1] = np.poly(points)[::-1]
    scales = np.array([np.prod(p - rest) for p, rest in zip(points, others, strict=True)])
    kernels = np.zeros((n, r))
    kernels[:-1] = np.vander(points, r, increasing=True) / scales[:, None]
    kernels[-1, -1] = 1
    outputs = np.zeros((m, n))
    outputs[:, :-1] = np.vander(points, m, increasing=True).T
    outputs[-1, -1] = 1
    return Transform(*(tuple(map(tuple, matrix.tolist())) for matrix in (inputs, kernels, outputs)))


def _combine(row: tuple[float, ...], terms: list[Array]) -> Array:
    """The linear combination of equally shaped arrays, without multiplying by 0 and 1."""
    total = None
    for factor, term in zip(row, terms, strict=True):
        if factor == 0:
            continue
        part = term if abs(factor) == 1 else abs(factor) * term
        if total is None:
            total = part if factor > 0 else -part
        else:
            total = total + part if factor > 0 else total - part
    return jnp.asarray(total)


def _mix(matrix: Matrix, terms: list[Array], axis: int) -> Array:
    """The rows of matrix @ terms, stacked along a new axis."""
    return jnp.stack([_combine(row, terms) for row in matrix], axis=axis)


def _tile(matrix: Matrix, padded: Array, step: int, counts: tuple[int, int]) -> Array:
    """The product matrix @ tile @ matrix^T of every tile: [rows * rows, B * Th * Tw, C].

    The tiles start `step` apart and are as wide as the matrix. Rows first, for whole image rows at
    a time; the barrier keeps XLA from fusing both directions, which recomputes the first for every
    output of the second (twice the time).
    """
    (b, _, w, c), (th, tw), q = padded.shape, counts, len(matrix)
    window = range(len(matrix[0]))
    rows = [
        lax.slice(padded, (0, i, 0, 0), (b, i + (th - 1) * step + 1, w, c), (1, step, 1, 1))
        for i in window
    ]
    mixed = lax.optimization_barrier(_mix(matrix, rows, 0))  # [q, B, Th, W, C]
    columns = [
        lax.slice(
            mixed, (0, 0, 0, j, 0), (q, b, th, j + (tw - 1) * step + 1, c), (1, 1, 1, step, 1)
        )
        for j in window
    ]
    return _mix(matrix, columns, 1).reshape(q * q, b * th * tw, c)


def _untile(matrix: Matrix, tiles: Array, shape: tuple[int, int, int]) -> Array:
    """The product matrix @ tile @ matrix^T of every tile, side by side: [B, Th * m, Tw * m, O]."""
    (b, th, tw), o, (m, n) = shape, tiles.shape[-1], (len(matrix), len(matrix[0]))
    grid = tiles.reshape(n, n, b, th, tw, o)
    mixed = _mix(matrix, [grid[:, j] for j in range(n)], 4).reshape(n, b, th, tw * m, o)
    mixed = lax.optimization_barrier(mixed)
    return _mix(matrix, list(mixed), 2).reshape(b, th * m, tw * m, o)


def _taps_transform(matrix: Matrix, taps: Array) -> Array:
    """The product matrix @ taps @ matrix^T of a kernel [a, a, C, O] or its transform."""
    mixed = _mix(matrix, list(taps), 0)
    return _mix(matrix, [mixed[:, j] for j in range(taps.shape[1])], 1)


def _swap(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _tile_counts(f: Transform, size: tuple[int, ...]) -> tuple[int, int]:
    m = len(f.outputs)
    return -(-size[0] // m), -(-size[1] // m)


def _input_tiles(f: Transform, x: Array, pads: Pads, size: tuple[int, int]) -> Array:
    """The transformed tiles from which `size` outputs are computed, padded to whole tiles."""
    m, counts = len(f.outputs), _tile_counts(f, size)
    halo = len(f.inputs) - m
    top, left = (
        (low, count * m + halo - n - low)
        for count, n, (low, _) in zip(counts, x.shape[1:3], pads, strict=True)
    )
    return _tile(f.inputs, pad(x, (top, left)), m, counts)


# Bytes of transformed tiles, inputs and outputs, that are worked on at a time. They are 2.25 to 4
# times the images; where they outgrow the caches, working through the batch in parts trains 3x3
# layers up to 1.5 times faster (AMD EPYC, 1 MiB of L2 a core, 32 MiB of L3).
_AT_A_TIME = 5e6


def _parts(f: Transform, x: Array, kernel: Array, pads: Pads) -> int:
    """Into how many equal parts the batch is cut: as few as keep within `_AT_A_TIME`."""
    counts = _tile_counts(f, output_size(x, kernel, 1, pads))
    size = len(f.inputs) ** 2 * np.prod(counts) * sum(kernel.shape[2:]) * x.dtype.itemsize
    batch = x.shape[0]
    fitting = (n for n in range(1, batch) if batch % n == 0 and size * batch / n <= _AT_A_TIME)
    return next(fitting, batch)


def _cut(x: Array, parts: int) -> Array:
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _joined(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def forward(m: int, x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """The convolution of the whole batch, see `jfed.models.convolution`; `stride` is 1."""
    del stride
    if _pairs_pay(x, kernel, pads):
        y = _forward_in_parts(m, _pair(x), _paired(kernel), pads)
        return y.reshape(*x.shape[:3], kernel.shape[-1])
    return _forward_in_parts(m, x, kernel, pads)


def backward(
    m: int, x: Array, kernel: Array, g: Array, stride: int, pads: Pads
) -> tuple[Array, Array]:
    """Gradients of the images and of the kernel for the whole batch."""
    del stride
    if _pairs_pay(x, kernel, pads):
        paired, unpair = jax.vjp(_paired, kernel)
        dx, dk = _backward_in_parts(m, _pair(x), paired, _pair(g), pads)
        return dx.reshape(x.shape), unpair(dk)[0]
    return _backward_in_parts(m, x, kernel, g, pads)


# Two neighbouring pixels as one of twice the channels: entry [d, p, q, j] tells whether column j of
# a 3x3 kernel leads from pixel p of a pair to pixel q of the output's pair, where the former is the
# one before (d = 0), the same (1) or the one after (2).
_PAIR = np.array(
    [
        [[[2 * (d - 1) + p - q + 1 == j for j in range(3)] for q in range(2)] for p in range(2)]
        for d in range(3)
    ]
)


def _pairs_pay(x: Array, kernel: Array, pads: Pads) -> bool:
    """Whether it is faster in pairs of pixels, though these take twice the multiplications.

    XLA's loops over 16 channels are as slow as over 32, and products of such narrow matrices are
    slow. Forward and back in a scan, batch 32, one core of an AMD EPYC, JAX 0.10.2, it takes 0.75
    of the time for 32x32x16 and 0.87 for 16x16x16; less gain, or none, with smaller images and more
    channels.
    """
    kw, *channels = kernel.shape[1:]
    fits = kw == 3 and pads[1] == (1, 1) and x.shape[2] % 2 == 0
    return fits and x.shape[2] >= 16 and min(channels) >= 16 and max(channels) <= 24


def _pair(x: Array) -> Array:
    """Images of half the width and twice the channels, which are the same numbers in order."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w // 2, 2 * c)


def _paired(kernel: Array) -> Array:
    """The kernel between pairs of pixels: [kh, 3, 2 C, 2 O]."""
    kh, _, c, o = kernel.shape
    pairs = _PAIR.astype(kernel.dtype)
    taps = jnp.einsum("dpqj,ijco->idpcqo", pairs, kernel, precision=lax.Precision.HIGHEST)
    return taps.reshape(kh, 3, 2 * c, 2 * o)


def _forward_in_parts(m: int, x: Array, kernel: Array, pads: Pads) -> Array:
    f = transform(m, kernel.shape[0])
    parts = _parts(f, x, kernel, pads)
    if parts == 1:
        return _forward(f, x, kernel, pads)
    return _joined(lax.map(lambda part: _forward(f, part, kernel, pads), _cut(x, parts)))


def _backward_in_parts(
    m: int, x: Array, kernel: Array, g: Array, pads: Pads
) -> tuple[Array, Array]:
    f = transform(m, kernel.shape[0])
    parts = _parts(f, x, kernel, pads)
    if parts == 1:
        return _backward(f, x, kernel, g, pads)

    def add(dk: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, own = _backward(f, part[0], kernel, part[1], pads)
        return dk + own, dx

    dk, dx = lax.scan(add, jnp.zeros_like(kernel), (_cut(x, parts), _cut(g, parts)))
    return _joined(dx), dk


def _forward(f: Transform, x: Array, kernel: Array, pads: Pads) -> Array:
    size = output_size(x, kernel, 1, pads)
    taps = _taps_transform(f.kernels, kernel)
    products = jnp.matmul(
        _input_tiles(f, x, pads, size),
        taps.reshape(-1, *kernel.shape[2:]),
        precision=lax.Precision.HIGHEST,  # transforms amplify rounding
    )
    y = _untile(f.outputs, products, (x.shape[0], *_tile_counts(f, size)))
    return y[:, : size[0], : size[1]]


def _backward(f: Transform, x: Array, kernel: Array, g: Array, pads: Pads) -> tuple[Array, Array]:
    m, edge, size = len(f.outputs), kernel.shape[0] - 1, (g.shape[1], g.shape[2])
    (top, bottom), (left, right) = pads
    # The input gradient is the full correlation of g with the flipped, transposed kernel.
    full = ((edge - top, edge - bottom), (edge - left, edge - right))
    dx = _forward(f, g, kernel[::-1, ::-1].swapaxes(2, 3), full)
    th, tw = _tile_counts(f, size)
    whole = pad(g, ((0, th * m - size[0]), (0, tw * m - size[1])))
    taps = jnp.einsum(
        "npc,npo->nco",
        _input_tiles(f, x, pads, size),
        _tile(_swap(f.outputs), whole, m, (th, tw)),
        precision=lax.Precision.HIGHEST,
    )
    n = len(f.inputs)
    return dx, _taps_transform(_swap(f.kernels), taps.reshape(n, n, *kernel.shape[2:]))
