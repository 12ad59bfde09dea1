"""ResNets written once more, in NumPy but for XLA's convolution, to check jfed's against."""

import jax
import jax.numpy as jnp
import numpy as np

from jfed.models import ResNetConfig
from jfed.models.losses import Batch

CONFIG = ResNetConfig(widths=(4, 6), blocks=(3, 2), channels=1, classes=5, conv="xla")


def conv(x, kernel, stride=1, groups=1):
    """A convolution padded by half the kernel's size."""
    pads = [(n // 2, n // 2) for n in kernel.shape[:2]]
    y = jax.lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel),
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return np.asarray(y, np.float64)


def norm(p, y, gain=1.0):
    """A batch norm in training, its input multiplied by `gain`."""
    y = gain * y
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    return y * np.asarray(p["scale"]) + np.asarray(p["offset"])


def conv_norm(p, x, stride=1):
    return norm(p["norm"], conv(x, p["conv"]["kernel"], stride))


def relu(x):
    return np.maximum(x, 0)


def stage(z, blocks, stride):
    """A plain stage: z <- relu(shortcut(z) + s f(z)) for each of `blocks`, a list of parameters."""
    for i, p in enumerate(blocks):
        by = stride if i == 0 else 1
        y = relu(conv_norm(p["layers"][0], z, by))
        y = conv_norm(p["layers"][1], y) * np.asarray(p.get("step", 1.0))
        short = z[:, ::by, ::by]
        short = np.pad(short, ((0, 0),) * 3 + ((0, y.shape[-1] - short.shape[-1]),))
        z = relu(short + y)
    return z


def classify(p, z):
    return z.mean((1, 2)) @ np.asarray(p["linear"]["kernel"]) + np.asarray(p["linear"]["bias"])


def random_like(like, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), like)


def batch_of(seed=1, size=6):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    labels = rng.integers(0, 5, size).astype(np.int32)
    return Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(size))
