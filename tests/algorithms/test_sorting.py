"""Sorting against NumPy's."""

import jax
import numpy as np
import pytest

from jfed.algorithms.sorting import sort_clients


@pytest.mark.parametrize("clients", [1, 2, 3, 8, 13, 48])
@pytest.mark.parametrize("entry", [(), (3,), (130, 129), (2**14,), (2**14 + 1,)], ids=str)
def test_entries_are_sorted_over_clients(clients, entry):
    rng = np.random.default_rng(clients)
    values = rng.normal(size=(clients, *entry)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = np.inf
    values[rng.random(values.shape) < 0.2] = 0.5  # ties
    np.testing.assert_array_equal(jax.jit(sort_clients)(values), np.sort(values, axis=0))
