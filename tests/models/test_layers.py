"""Layers and blocks against XLA's own operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfed.errors import ConfigError
from jfed.models.blocks import ResidualBlock, Shape
from jfed.models.layers import SeparableTimeConv, Style, TimeConv, max_pool
from jfed.models.norms import shares_of

EQUAL = shares_of(None)


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
    got = layer(0.7, x, layer.prepare((6, 6)))
    np.testing.assert_allclose(got, _conv(with_time, layer.kernel[...]), atol=2e-4)


def test_separable_time_convolution_is_depthwise_then_pointwise():
    layer = SeparableTimeConv(5, Style(), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 5))
    with_time = jnp.concatenate([jnp.full((2, 6, 6, 1), 0.7), x], -1)
    expected = _conv(_conv(with_time, layer.depthwise[...], groups=6), layer.pointwise[...])
    np.testing.assert_allclose(layer(0.7, x, layer.prepare((6, 6))), expected, atol=2e-4)


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
    y, _ = jax.jit(lambda x: block(x, EQUAL, None))(x)
    if shortcut == "pad":
        expected = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 8)))
    else:
        conv = _conv(x, block.projection.conv.kernel[...], stride=2)
        expected, _ = block.projection.norm(conv, EQUAL, None)
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
