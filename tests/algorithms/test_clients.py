"""Local training's parts against closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed.algorithms.clients import ClientConfig, learning_rate, make_optimizer
from jfed.data.preprocessing import make_preprocess
from jfed.errors import ConfigError
from jfed.models.losses import Batch, cross_entropy


def test_cross_entropy_counts_real_examples_only():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    labels, mask = np.array([0, 2, 1, 1], np.int32), np.array([1, 1, 0, 1], np.float32)
    batch = Batch(jnp.zeros((4, 1, 1, 1)), jnp.asarray(labels), jnp.asarray(mask))
    mean, metrics = cross_entropy(jnp.asarray(logits), batch)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    losses = -log_p[np.arange(4), labels]
    np.testing.assert_allclose(mean, losses[[0, 1, 3]].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics.loss, losses[[0, 1, 3]].sum(), rtol=1e-6)
    assert float(metrics.correct) == (logits.argmax(1) == labels)[[0, 1, 3]].sum()
    assert metrics.examples == 3


def test_absent_classes_are_masked_with_logit_zero():
    logits = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    labels, present = np.array([0, 2], np.int32), np.array([True, False, True, False])
    images, ones = jnp.zeros((2, 1, 1, 1)), jnp.ones(2)
    batch = Batch(images, jnp.asarray(labels), ones, jnp.asarray(present))

    def loss(x):
        return cross_entropy(x, batch)[0]

    masked = np.where(present, logits, 0)
    expected = np.log(np.exp(masked).sum(1)) - masked[np.arange(2), labels]
    np.testing.assert_allclose(loss(jnp.asarray(logits)), expected.mean(), rtol=1e-6)
    p = np.exp(masked) / np.exp(masked).sum(1, keepdims=True)
    gradient = np.where(present, p - np.eye(4)[labels], 0) / 2
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logits)), gradient, atol=1e-6)


def test_optimizer_clips_then_decays_then_steps():
    config = ClientConfig(momentum=0.9, weight_decay=0.1, clip_norm=1.0)
    optimizer = make_optimizer(config)(0.5)
    params, gradient = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    state = optimizer.init(params)
    update, state = optimizer.update(gradient, state, params)
    step = np.array([0.6, 0.8]) + 0.1 * np.array([1.0, 2.0])
    np.testing.assert_allclose(update, -0.5 * step, rtol=1e-6)
    update, _ = optimizer.update(jnp.zeros(2), state, params)
    np.testing.assert_allclose(update, -0.5 * (0.9 * step + [0.1, 0.2]), rtol=1e-6)


def test_learning_rate_schedules():
    def rates(schedule):
        config = ClientConfig(learning_rate=0.4, schedule=schedule)
        return [learning_rate(config, r, 8) for r in range(8)]

    assert rates("constant") == [0.4] * 8
    np.testing.assert_allclose(rates("step"), [0.4] * 4 + [0.04] * 2 + [0.004] * 2)
    np.testing.assert_allclose(
        rates("cosine"),
        [float(optax.cosine_decay_schedule(0.4, 8)(r)) for r in range(8)],
        rtol=1e-5,
    )


def test_images_are_standardised():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    preprocess = make_preprocess(tuple(mean.tolist()), tuple(std.tolist()), pad=2, flip=True)
    x = preprocess(jnp.asarray(images), None)
    np.testing.assert_allclose(x, (images - mean) / std, rtol=1e-4, atol=1e-5)


def test_augmentation_crops_and_flips_the_given_image():
    images = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(64, 0)
    preprocess = make_preprocess((0.0,), (1.0,), pad=2, flip=True)
    out = np.asarray(preprocess(jnp.asarray(images), jax.random.key(0)))[..., 0]
    padded = np.pad(images[0, ..., 0], 2).astype(np.float32)
    possible = {
        window[:, ::direction].tobytes()
        for y in range(5)
        for x in range(5)
        for window in [padded[y : y + 8, x : x + 8]]
        for direction in (1, -1)
    }
    assert {image.tobytes() for image in out} <= possible
    assert len({image.tobytes() for image in out}) > 20
    plain = make_preprocess((0.0,), (1.0,), pad=0, flip=False)
    np.testing.assert_array_equal(plain(jnp.asarray(images), jax.random.key(0)), images)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"steps": 0},
        {"batch_size": -3},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"clip_norm": 0.0},
        {"schedule": "linear"},
        {"optimizer": "sgdd"},
        {"optimizer": "adam", "momentum": 0.9},
        {"momentum": 1.0},
        {"momentum": 1.5},
        {"momentum": -0.25},
        {"optimizer": "lbfgs"},
        {"batch_size": True},
    ],
    ids=str,
)
def test_bad_settings_are_quoted(changes):
    with pytest.raises(ConfigError, match=str(next(iter(changes.values())))):
        ClientConfig(**changes)


def test_optimizers_go_by_optax_name_or_function():
    assert ClientConfig(optimizer="adamw").optimizer == "adamw"
    made = make_optimizer(ClientConfig(optimizer=lambda rate: optax.lion(rate, b1=0.8)))(0.1)
    assert made.init(jnp.zeros(2)) is not None
    with pytest.raises(ConfigError, match="a function sets its own"):
        ClientConfig(optimizer=optax.sgd, momentum=0.9)
    with pytest.raises(ConfigError, match=r"Did you mean 'adam'"):
        ClientConfig(optimizer="adm")
