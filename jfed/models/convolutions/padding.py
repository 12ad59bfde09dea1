"""Padding and output sizes of convolutions."""

import jax.numpy as jnp
from jaxtyping import Array

PADDINGS = ("SAME", "SYMMETRIC", "VALID")

Pads = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))


def pads_of(size: tuple[int, ...], window: tuple[int, ...], stride: int, padding: str) -> Pads:
    """XLA's padding: for SAME as even as possible, the odd row at the end."""
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding == "SYMMETRIC":
        down, right = ((k - 1) // 2 for k in window)
        return (down, down), (right, right)
    totals = [
        max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(size, window, strict=True)
    ]
    top, left = (total // 2 for total in totals)
    return (top, totals[0] - top), (left, totals[1] - left)


def pad(x: Array, pads: Pads) -> Array:
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def output_size(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[int, int]:
    ho, wo = (
        (n + sum(pad) - k) // stride + 1
        for n, pad, k in zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)
    )
    return ho, wo
