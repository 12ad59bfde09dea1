"""Recalibrated statistics and test metrics against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfed.data.preprocessing import Images
from jfed.engine.devices import make_mesh
from jfed.errors import ConfigError
from jfed.models import Model, Moments, ODENetConfig, odenet
from jfed.models.layers import ConvNorm, Style
from jfed.models.model import initialise
from jfed.simulation.evaluation import (
    EvaluationConfig,
    Examples,
    in_batches,
    make_evaluator,
    pool,
    recalibrate,
)
from jfed.tiers import Tier, ode


def _examples(count, size, seed=0, multiple=1):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    moments = (jnp.full(1, 100.0), jnp.full(1, 50.0))
    batches = map(jnp.asarray, in_batches(np.arange(count), size, multiple))
    return Examples(Images(jnp.asarray(images), jnp.asarray(labels), *moments), *batches)


def test_in_batches_pads_the_last():
    """By the last example, which does not count again."""
    batches, real = in_batches(np.arange(3), 2)
    np.testing.assert_array_equal(batches, [[0, 1], [2, 2]])
    np.testing.assert_array_equal(real, [2, 1])
    batches, real = in_batches(np.arange(2), 1, 3)
    np.testing.assert_array_equal(batches, [[0], [1], [1]])
    np.testing.assert_array_equal(real, [1, 1, 0])


def _evaluate(tier, params, calibration, test, devices=1):
    setting = jax.tree.map(jnp.int32, tier.setting)
    return make_evaluator(tier, make_mesh(devices))(params, setting, calibration, test)[0]


def test_pooled_moments_are_those_of_all_examples():
    x = np.random.default_rng(0).normal(1.0, 3.0, (10, 4))
    parts = np.split(x, [3, 4])
    measured = Moments(
        jnp.asarray([p.mean(0) for p in parts], jnp.float32),
        jnp.asarray([p.var(0) for p in parts], jnp.float32),
    )
    pooled = pool({"norm": measured}, jnp.asarray([3.0, 1.0, 6.0]))["norm"]
    np.testing.assert_allclose(pooled.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(pooled.var, x.var(0), rtol=1e-5)


def _numpy_convolution(x, kernel):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def _numpy_norm(x):
    """Two passes: first the mean, then the mean squared distance from it."""
    mean = x.mean((0, 1, 2))
    var = np.square(x - mean).mean((0, 1, 2))
    return (x - mean) / np.sqrt(var + 1e-5), mean, var


def _check(moments, mean, var):
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moments.var, var, rtol=1e-3)


@pytest.fixture(scope="module")
def network():
    config = ODENetConfig(widths=(4,), iterations=2, channels=1, unroll=False)
    model = odenet(config)
    return model, initialise(model.init, jax.random.key(0))


def test_recalibrated_statistics_of_the_stem_equal_a_two_pass_mean_and_variance(network):
    """Over several batches: what enters the first norm depends on no other norm."""
    model, params = network
    calibration = _examples(25, 8)
    statistics = jax.jit(lambda p: recalibrate(model, p, calibration))(params)
    x = (np.asarray(calibration.images.pixels, np.float64) - 100.0) / 50.0
    _, mean, var = _numpy_norm(_numpy_convolution(x, np.asarray(params["stem"]["conv"]["kernel"])))
    _check(statistics["stem"], mean, var)


def test_recalibrated_statistics_of_each_iteration_equal_numpy(network):
    """The ODE block's norms along two Euler steps of 1/2, all written out; one batch."""
    model, params = network
    calibration = _examples(25, 25)
    statistics = jax.jit(lambda p: recalibrate(model, p, calibration))(params)
    x = (np.asarray(calibration.images.pixels, np.float64) - 100.0) / 50.0
    z = _numpy_stem(params, x)
    for step in range(2):
        dz, moments = _numpy_function(params, step / 2, z)
        _check_function(statistics, step, 0, moments)
        z = z + dz / 2
    _check(statistics["norm"], *_numpy_norm(z)[1:])


def _numpy_stem(params, x):
    kernel = np.asarray(params["stem"]["conv"]["kernel"])
    return np.maximum(_numpy_norm(_numpy_convolution(x, kernel))[0], 0)


def _numpy_function(params, t, z):
    """f(t, z) of the first ODE block, and what its norms measured."""
    moments = []
    for conv in ("conv1", "conv2"):
        z, *measured = _numpy_norm(z)
        moments.append(measured)
        with_time = np.concatenate([np.full((*z.shape[:3], 1), t), np.maximum(z, 0)], -1)
        z = _numpy_convolution(with_time, np.asarray(params["functions"][0][conv]["kernel"]))
    return z, moments


def _check_function(statistics, step, stage, moments):
    for name, measured in zip(("norm1", "norm2"), moments, strict=True):
        _check(jax.tree.map(lambda m: m[step, stage], statistics["ode0"][name]), *measured)


def test_a_tier_trained_with_euler_is_measured_and_tested_with_midpoint():
    """z + h f(t + h/2, z + h/2 f(t, z)), written out; one batch for calibration and test."""
    config = ODENetConfig(widths=(4,), channels=1, unroll=False)
    tiers = ode(config, (1,))
    params = initialise(tiers.init, jax.random.key(0))
    tier, examples = tiers.at([2], "Midpoint")[0], _examples(25, 25)
    statistics = jax.jit(lambda p: recalibrate(tier.bound(), p, examples))(params)
    z = _numpy_stem(params, (np.asarray(examples.images.pixels, np.float64) - 100.0) / 50.0)
    for step in range(2):
        first, moments = _numpy_function(params, step / 2, z)
        _check_function(statistics, step, 0, moments)
        dz, moments = _numpy_function(params, step / 2 + 1 / 4, z + first / 4)
        _check_function(statistics, step, 1, moments)
        z = z + dz / 2
    normed, mean, var = _numpy_norm(z)
    _check(statistics["norm"], mean, var)
    linear = jax.tree.map(np.asarray, params["classifier"]["linear"])
    logits = np.maximum(normed, 0).mean((1, 2)) @ linear["kernel"] + linear["bias"]
    losses = (
        np.log(np.exp(logits).sum(1)) - logits[np.arange(25), np.asarray(examples.images.labels)]
    )
    metrics = _evaluate(tier, params, examples, examples)
    assert float(metrics.loss) == pytest.approx(losses.sum(), rel=1e-3)


def test_solvers_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"unknown solver 'Midpiont'.* mean 'Midpoint'"):
        EvaluationConfig(solvers=("Midpiont",))
    with pytest.raises(ConfigError, match="'Dopri5' of diffrax cannot be stepped"):
        EvaluationConfig(solvers=("Dopri5",))


def test_evaluation_on_the_calibration_batch_reproduces_training_mode(network):
    """With one batch for both, given statistics and batch statistics are the same numbers."""
    model, params = network
    x, mask = jax.random.normal(jax.random.key(1), (6, 8, 8, 1)), jnp.ones(6)

    @jax.jit
    def both(params):
        statistics = model.measure(params, x, mask)
        return model.apply(params, x, mask), model.apply(params, x, None, statistics)

    np.testing.assert_allclose(*both(params), rtol=1e-4, atol=1e-5)


def test_metrics_of_a_plain_model_are_exact():
    def init(key):
        return jax.random.normal(key, (64, 10))

    def apply(params, images):
        return images.reshape(images.shape[0], -1) @ params

    test = _examples(23, 10, seed=1)
    params = init(jax.random.key(0))
    tier = Tier("full", Model(init, apply))
    metrics = _evaluate(tier, params, _examples(4, 4), test)
    logits = (
        (np.asarray(test.images.pixels, np.float64).reshape(23, 64) - 100) / 50 @ np.asarray(params)
    )
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_p -= logits.max(1, keepdims=True)
    labels = np.asarray(test.images.labels)
    assert metrics.examples == 23
    assert float(metrics.correct) == (logits.argmax(1) == labels).sum()
    assert float(metrics.loss) == pytest.approx(-log_p[np.arange(23), labels].sum(), rel=1e-4)


def test_evaluation_spread_over_devices_equals_one_device():
    """Over ragged batches, some of padding alone, which a deep network must not overflow on."""
    config = ODENetConfig(
        widths=(4, 4), iterations=12, channels=1, horizon="proportional", unroll=False
    )
    model = odenet(config)
    params = initialise(model.init, jax.random.key(0))
    tier = Tier("12", model)

    def metrics(devices):
        calibration, test = _examples(22, 5, multiple=devices), _examples(23, 4, 1, devices)
        return jax.device_get(_evaluate(tier, params, calibration, test, devices))

    one, four = metrics(1), metrics(4)
    assert one.examples == four.examples == 23
    assert float(one.correct) == float(four.correct)
    assert float(one.loss) == pytest.approx(float(four.loss), rel=1e-4)


def test_probabilities_are_those_of_each_example_in_order():
    """By one device and by four, whose last batches are padding."""

    def apply(params, images):
        return images.reshape(images.shape[0], -1) @ params

    params = jax.random.normal(jax.random.key(0), (64, 10))
    tier = Tier("full", Model(lambda key: params, apply))
    for devices in (1, 4):
        test = _examples(23, 4, 1, devices)
        evaluate = make_evaluator(tier, make_mesh(devices), keep=True)
        tested = evaluate(params, (), _examples(4, 4, multiple=devices), test)
        flat = np.asarray(test.images.pixels, np.float64).reshape(23, 64)
        powers = np.exp((flat - 100) / 50 @ np.asarray(params))
        expected = powers / powers.sum(1, keepdims=True)
        np.testing.assert_allclose(tested.probabilities[:23], expected, rtol=1e-4, atol=1e-6)
        hits = np.asarray(tested.probabilities)[:23].argmax(1) == test.images.labels
        assert int(tested.metrics.correct) == hits.sum()
    assert make_evaluator(tier, make_mesh(1))(params, (), test, test).probabilities is None


def test_a_layer_reports_the_statistics_it_used():
    layer = ConvNorm(1, 3, Style(), nnx.Rngs(0))
    given = Moments(jnp.zeros(3), jnp.ones(3))
    _, used = layer(jnp.ones((2, 4, 4, 1)), None, given)
    assert used is given
