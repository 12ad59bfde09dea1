"""Sorting the values of many clients, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jfed.platforms import platform

_CHUNK = 2**14  # entries at a time, so that they stay in a processor's cache


def sort_clients(values: Float[Array, "clients *entry"]) -> Float[Array, "clients *entry"]:
    """As `jnp.sort(values, axis=0)`, of values that are not nan.

    XLA's own sort compares one value after another on a CPU: 48 clients of 1.6 M entries take it
    5.7 s on 2 cores. There Batcher's bitonic network (1968), whose every stage compares whole rows,
    takes 0.8 s.
    """
    if platform() != "cpu" or len(values) == 1 or values.size < _CHUNK:
        return jnp.sort(values, axis=0)
    clients, entries = len(values), values[0].size
    rows, chunks = 1 << (clients - 1).bit_length(), -(-entries // _CHUNK)
    flat, row = values.reshape(clients, entries), jnp.arange(rows, dtype=jnp.int32)
    fill = ((0, rows - clients), (0, chunks * _CHUNK - entries))
    padded = jnp.pad(flat, fill, constant_values=jnp.inf)
    stages = jnp.asarray(_stages(rows))

    def stage(i: Int[Array, ""], x: Float[Array, "rows chunk"]) -> Float[Array, "rows chunk"]:
        run, distance = stages[i]
        other = row ^ distance
        is_low = ((row & run) == 0) == (row < other)
        low, high = jnp.minimum(x, x[other]), jnp.maximum(x, x[other])
        return jnp.where(is_low[:, None], low, high)

    def chunk(i: Int[Array, ""]) -> Float[Array, "rows chunk"]:
        part = jax.lax.dynamic_slice_in_dim(padded, i * _CHUNK, _CHUNK, axis=1)
        return jax.lax.fori_loop(0, len(stages), stage, part)

    found = jax.lax.map(chunk, jnp.arange(chunks, dtype=jnp.int32)).swapaxes(0, 1)
    return found.reshape(rows, -1)[:clients, :entries].reshape(values.shape)


def _stages(rows: int) -> Int[np.ndarray, "stages 2"]:
    """Of each stage the length of the runs that it merges, and how far apart it compares."""
    runs = [1 << i for i in range(1, rows.bit_length())]
    found = [(run, run >> i) for run in runs for i in range(1, run.bit_length())]
    return np.asarray(found, np.int32).reshape(-1, 2)
