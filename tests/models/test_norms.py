"""Norms against NumPy, Flax and JAX's own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfed.models.layers import Style
from jfed.models.model import Moments
from jfed.models.norms import batch_moments, batch_normalise, shares_of


def _numpy_batch_norm(x, mean, var):
    return (x - mean) / np.sqrt(var + 1e-5)


def test_batch_norm_uses_the_real_examples_only():
    x = np.random.default_rng(0).normal(3.0, 2.0, (5, 4, 4, 6)).astype(np.float32)
    mask = jnp.asarray([1.0, 0.0, 1.0, 1.0, 0.0])
    y, used = Style().make_norm(6)(jnp.asarray(x), shares_of(mask), None)
    real = x[[0, 2, 3]].astype(np.float64)
    mean, var = real.mean((0, 1, 2)), real.var((0, 1, 2))
    np.testing.assert_allclose(used.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(used.var, var, rtol=1e-5)
    np.testing.assert_allclose(
        y[np.array([0, 2, 3])], _numpy_batch_norm(real, mean, var), atol=1e-5
    )


def test_the_scaler_multiplies_in_training_and_not_in_evaluation():
    """HeteroFL's scaler: x / ratio before the norm. It shows beside a variance near epsilon."""
    x = np.random.default_rng(0).normal(0.1, 0.004, (5, 4, 4, 6)).astype(np.float32)
    norm = Style(gain=1 / 0.25).make_norm(6)
    y, used = norm(jnp.asarray(x), shares_of(None), None)
    wide = 4 * x.astype(np.float64)
    expected = _numpy_batch_norm(wide, wide.mean((0, 1, 2)), wide.var((0, 1, 2)))
    np.testing.assert_allclose(y, expected, rtol=5e-4, atol=5e-4)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(used.mean, mean, rtol=1e-5)
    tested, _ = norm(jnp.asarray(x), shares_of(None), used)
    np.testing.assert_allclose(tested, _numpy_batch_norm(x, mean, var), atol=1e-3)
    assert np.abs(np.asarray(tested) - expected).max() > 0.1


def test_batch_norm_of_an_empty_batch_is_finite():
    y, used = Style().make_norm(2)(jnp.ones((3, 2, 2, 2)), shares_of(jnp.zeros(3)), None)
    assert np.isfinite(y).all()
    assert np.isfinite(used.var).all()


def test_batch_norm_takes_given_moments_scale_and_offset():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    norm = Style().make_norm(4)
    norm.scale[...] = jnp.arange(4.0)
    norm.offset[...] = jnp.ones(4)
    given = Moments(jnp.full(4, 0.5), jnp.full(4, 4.0))
    y, used = norm(jnp.asarray(x), shares_of(None), given)
    assert used is given
    np.testing.assert_allclose(
        y, _numpy_batch_norm(x, 0.5, 4.0) * np.arange(4.0) + 1.0, rtol=1e-5, atol=1e-5
    )


def test_group_norm_equals_flax():
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 16))
    y, used = Style(norm="group").make_norm(16)(x, shares_of(None), None)
    assert used is None
    flax = nnx.GroupNorm(16, num_groups=8, epsilon=1e-5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(y, flax(x), atol=2e-5)


def test_moments_of_values_far_from_zero():
    x = np.random.default_rng(0).normal(10.0, 0.5, (5, 4, 4, 3)).astype(np.float32)
    used = batch_moments(jnp.asarray(x), shares_of(None))
    np.testing.assert_allclose(used.mean, x.mean((0, 1, 2), np.float64), rtol=1e-6)
    np.testing.assert_allclose(used.var, x.astype(np.float64).var((0, 1, 2)), rtol=5e-4)


@pytest.mark.parametrize("gain", [1.0, 4.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, (1.0, 0.0, 1.0, 1.0, 0.0)])
def test_the_gradient_of_batch_norm_is_that_of_its_formula(gain, dtype, mask):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.3, 0.02, (5, 3, 4, 6)), dtype)
    scale, offset = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    toward = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    shares = shares_of(None if mask is None else jnp.asarray(mask))
    weight = (jnp.full(5, 1 / 5) if shares is None else shares)[:, None, None, None] / 12

    def plain(x, scale, offset):
        wide = gain * x.astype(jnp.float32)
        mean = (weight * wide).sum((0, 1, 2), keepdims=True)
        var = (weight * jnp.square(wide - mean)).sum((0, 1, 2), keepdims=True)
        unit = (wide - mean) / jnp.sqrt(var + 1e-5)
        return (toward * (unit * scale[None, None, None] + offset[None, None, None])).sum()

    def own(x, scale, offset):
        return (toward * batch_normalise(gain, x, shares, scale, offset)[0]).sum()

    expected = jax.grad(plain, (0, 1, 2))(x, scale, offset)
    for got, want in zip(jax.grad(own, (0, 1, 2))(x, scale, offset), expected, strict=True):
        assert got.dtype == want.dtype
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        rtol = 1e-2 if dtype == "bfloat16" and got.ndim > 1 else 1e-4
        np.testing.assert_allclose(got, want, rtol=rtol, atol=2e-3 * np.abs(want).max())
