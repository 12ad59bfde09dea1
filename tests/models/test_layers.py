"""Norms and blocks against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfed.errors import ConfigError
from jfed.models.blocks import ResidualBlock, Shape
from jfed.models.layers import Norm, SeparableTimeConv, Style, TimeConv, max_pool
from jfed.models.model import Moments


def _numpy_batch_norm(x, mean, var):
    return (x - mean) / np.sqrt(var + 1e-5)


def test_batch_norm_uses_the_real_examples_only():
    x = np.random.default_rng(0).normal(3.0, 2.0, (5, 4, 4, 6)).astype(np.float32)
    mask = jnp.asarray([1.0, 0.0, 1.0, 1.0, 0.0])
    y, used = Norm(6, Style())(jnp.asarray(x), mask, None)
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
    norm = Norm(6, Style(gain=1 / 0.25))
    y, used = norm(jnp.asarray(x), jnp.ones(5), None)
    wide = 4 * x.astype(np.float64)
    expected = _numpy_batch_norm(wide, wide.mean((0, 1, 2)), wide.var((0, 1, 2)))
    np.testing.assert_allclose(y, expected, atol=1e-4)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(used.mean, mean, rtol=1e-5)
    tested, _ = norm(jnp.asarray(x), None, used)
    np.testing.assert_allclose(tested, _numpy_batch_norm(x, mean, var), atol=1e-3)
    assert np.abs(np.asarray(tested) - expected).max() > 0.1


def test_batch_norm_of_an_empty_batch_is_finite():
    y, used = Norm(2, Style())(jnp.ones((3, 2, 2, 2)), jnp.zeros(3), None)
    assert np.isfinite(y).all()
    assert np.isfinite(used.var).all()


def test_batch_norm_takes_given_moments_scale_and_offset():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    norm = Norm(4, Style())
    norm.scale[...] = jnp.arange(4.0)
    norm.offset[...] = jnp.ones(4)
    given = Moments(jnp.full(4, 0.5), jnp.full(4, 4.0))
    y, used = norm(jnp.asarray(x), None, given)
    assert used is given
    np.testing.assert_allclose(
        y, _numpy_batch_norm(x, 0.5, 4.0) * np.arange(4.0) + 1.0, rtol=1e-5, atol=1e-5
    )


def test_group_norm_equals_flax():
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 16))
    y, used = Norm(16, Style(norm="group"))(x, None, None)
    assert used is None
    flax = nnx.GroupNorm(16, num_groups=8, epsilon=1e-5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(y, flax(x), atol=2e-5)


def _conv(x, kernel, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(n // 2, n // 2) for n in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_time_convolution_sees_t_as_the_first_channel():
    layer = TimeConv(5, Style(), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 5))
    with_time = jnp.concatenate([jnp.full((2, 6, 6, 1), 0.7), x], -1)
    np.testing.assert_allclose(layer(0.7, x), _conv(with_time, layer.kernel[...]), atol=2e-4)


def test_separable_time_convolution_is_depthwise_then_pointwise():
    layer = SeparableTimeConv(5, Style(), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 5))
    with_time = jnp.concatenate([jnp.full((2, 6, 6, 1), 0.7), x], -1)
    expected = _conv(_conv(with_time, layer.depthwise[...], groups=6), layer.pointwise[...])
    np.testing.assert_allclose(layer(0.7, x), expected, atol=2e-4)


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_residual_block_adds_its_shortcut(shortcut, bottleneck):
    """With the last norm's scale at zero only the shortcut is left."""
    block = ResidualBlock(
        Shape(8, 16, 2),
        Style(norm="group"),
        nnx.Rngs(0),
        shortcut=shortcut,
        bottleneck=bottleneck,
    )
    block.layers[-1].norm.scale[...] = jnp.zeros(16)
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))
    y, _ = jax.jit(lambda x: block(x, None, None))(x)
    if shortcut == "pad":
        expected = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 8)))
    else:
        conv = _conv(x, block.projection.conv.kernel[...], stride=2)
        expected, _ = block.projection.norm(conv, None, None)
    np.testing.assert_allclose(y, jnp.maximum(expected, 0), atol=1e-4)


@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 0)])
@pytest.mark.parametrize("size", [7, 8])
def test_max_pooling_equals_xla(window, stride, padding, size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, size, size + 2, 3)), jnp.float32)
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    shape = (1, window, window, 1), (1, stride, stride, 1)
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *shape, pads)
    np.testing.assert_array_equal(max_pool(x, window, stride=stride, padding=padding), expected)


def test_images_too_small_for_a_pooling_are_named():
    with pytest.raises(ConfigError, match="2x2 does not fit into 1x4"):
        max_pool(jnp.zeros((1, 1, 4, 2)), 2, stride=2)
