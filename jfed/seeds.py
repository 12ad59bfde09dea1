"""Independent streams of random numbers from one seed."""

import zlib
from typing import Any

import jax
import numpy as np

from jfed.errors import check_integer

LARGEST = 2**32 - 1  # JAX's keys keep 32 bits of a seed


def check_seed(seed: int) -> int:
    """Returns the seed; ConfigError unless it is an integer from 0 to 2**32 - 1."""
    return check_integer("seed", seed, least=0, most=LARGEST)


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A stream of its own for each purpose, and for each tuple of numbers (round, client, ...)."""
    return np.random.default_rng([check_seed(seed), zlib.crc32(purpose.encode()), *numbers])


def is_key(x: Any) -> bool:
    """Whether an array, or its shape and dtype, is of typed random keys."""
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
