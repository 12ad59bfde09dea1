"""Local training's parts against closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed.algorithms import Client, ClientConfig, local_training, make_optimizer
from jfed.algorithms.clients import learning_rate
from jfed.algorithms.optimizers import rekeyed
from jfed.data.preprocessing import Augmentation, Images, augment, channel_moments, gather
from jfed.errors import ConfigError
from jfed.models.losses import Batch, Metrics, cross_entropy


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


def test_a_schedule_of_the_users_own_takes_the_place_of_the_learning_rate():
    own = ClientConfig(learning_rate=9.0, schedule=optax.linear_schedule(0.4, 0.0, 4))
    np.testing.assert_allclose(
        [learning_rate(own, r, 8) for r in range(5)], [0.4, 0.3, 0.2, 0.1, 0]
    )
    with pytest.raises(ConfigError, match=r"of round 3 must be a number, 0 or more, got -3"):
        learning_rate(ClientConfig(schedule=lambda round_: -round_), 3, 8)


NO_BATCH = Batch(jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, jnp.int32), jnp.ones(1))


def _client(sent, loss, rate):
    numbers = (jnp.int32(3), jnp.int32(8), jnp.int32(2), jnp.float32(8), jnp.int32(0))
    return Client(sent, loss, *numbers, jnp.float32(rate))


def test_local_training_equals_numpy_and_gives_the_optimizer_a_corrected_gradient():
    """Steps on 0.5 * |w - target|^2, with momentum and a proximal term to what was sent."""
    target = np.array([3.0, -1.0])

    def loss(params, batch, key):
        value = 0.5 * jnp.square(params - jnp.float32(target)).sum()
        return value, Metrics(value, jnp.float32(0), jnp.float32(1))

    training = local_training(
        make_optimizer(ClientConfig(momentum=0.5)),
        correct=lambda gradient, client, local: gradient + 0.3 * (local.params - client.sent),
        start=lambda client, memory: client.sent + memory,
    )
    sent = np.array([1.0, 1.0])
    client, key = _client(jnp.float32(sent), loss, 0.2), jax.random.key(0)
    local = training.client_init(client, jnp.float32([0.5, 0.0]), key)
    np.testing.assert_array_equal(local.memory, [0.5, 0.0])
    w, trace = np.asarray(sent) + np.float32([0.5, 0.0]), np.zeros(2)
    for _ in range(4):
        local, metrics = training.client_step(client, local, NO_BATCH, key)
        np.testing.assert_allclose(metrics.loss, 0.5 * ((w - target) ** 2).sum(), rtol=1e-5)
        trace = 0.5 * trace + (w - target) + 0.3 * (w - sent)
        w = w - 0.2 * trace
        np.testing.assert_allclose(local.params, w, rtol=1e-5)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_an_optimizers_state_gets_keys_of_its_own(raw):
    make = jax.random.PRNGKey if raw else jax.random.key
    state = {"a": make(0), "b": (make(0), jnp.arange(4.0)), "count": jnp.uint32(5)}

    def keys(key):
        found = rekeyed(state, key)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
        np.testing.assert_array_equal(found["b"][1], np.arange(4.0))
        assert found["count"] == 5
        return [tuple(np.asarray(jax.random.key_data(k))) for k in (found["a"], found["b"][0])]

    first, second = keys(jax.random.key(1)), keys(jax.random.key(2))
    own = tuple(np.asarray(jax.random.key_data(make(0))))
    assert len({*first, *second, own}) == 5
    assert keys(jax.random.key(1)) == first


def test_noise_of_an_optimizer_differs_between_the_keys_of_clients():
    def loss(params, batch, key):
        return 0 * params.sum(), Metrics(jnp.float32(0), jnp.float32(0), jnp.float32(1))

    with jax.numpy_dtype_promotion("standard"):
        training = local_training(make_optimizer(ClientConfig(optimizer="noisy_sgd")))
        client, steps = _client(jnp.zeros(500), loss, 0.1), []
        for seed in (0, 1):
            key = jax.random.key(seed)
            local = training.client_init(client, (), key)
            for _ in range(2):
                before = local.params
                local, _ = training.client_step(client, local, NO_BATCH, key)
                steps.append(np.asarray(local.params - before))
    assert min(np.std(step) for step in steps) > 1e-3
    assert np.abs(np.corrcoef(steps) - np.eye(4)).max() < 0.2  # 4.5 standard deviations


def test_images_are_gathered_and_standardised():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    mean, std = channel_moments(pixels)
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-6)
    images = Images(
        jnp.asarray(pixels), jnp.arange(5, dtype=jnp.int32), *map(jnp.asarray, (mean, std))
    )
    mask = jnp.float32([1, 1, 0])
    batch = gather(images, jnp.array([4, 1, 4]), mask, Augmentation(pad=2, flip=True))
    expected = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    np.testing.assert_allclose(batch.images, expected[[4, 1, 4]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(batch.labels, [4, 1, 4])
    np.testing.assert_array_equal(batch.mask, mask)
    assert batch.present is None


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(np.uint16, (7, 5, 3, 2)), (np.float32, (7, 5, 3, 2)), (np.float32, (9, 4))],
)
def test_moments_of_other_types_and_shapes(dtype, shape):
    values = np.random.default_rng(0).normal(3000, 40, shape).astype(dtype)
    mean, std = channel_moments(values)
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(mean, values.mean(axes, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, values.std(axes, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "least"), [(np.uint8, 1e-3), (np.float32, 9e-6)])
def test_a_channel_of_one_colour_is_not_divided_by_zero(dtype, least):
    mean, std = channel_moments(np.full((3, 2, 2, 1), 9, dtype))
    assert (mean, std) == (9, np.float32(least))


def test_augmentation_crops_and_flips_the_given_image():
    images = np.arange(1, 65, dtype=np.float32).reshape(1, 8, 8, 1).repeat(64, 0)
    x = jnp.asarray(images)
    out = np.asarray(augment(x, Augmentation(pad=2, flip=True), jax.random.key(0)))[..., 0]
    padded = np.pad(images[0, ..., 0], 2)
    possible = {
        window[:, ::direction].tobytes()
        for y in range(5)
        for x in range(5)
        for window in [padded[y : y + 8, x : x + 8]]
        for direction in (1, -1)
    }
    assert {image.tobytes() for image in out} <= possible
    assert len({image.tobytes() for image in out}) > 20
    np.testing.assert_array_equal(augment(x, Augmentation(), jax.random.key(0)), images)


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
