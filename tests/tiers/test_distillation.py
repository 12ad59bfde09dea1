"""Self-distillation among iteration counts, against a network and a loss written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jfed
from jfed import tiers as tiers_lib
from jfed.data import Dataset, Split
from jfed.models import ODENetConfig
from jfed.models.losses import Batch, training_loss
from jfed.models.model import initialise
from jfed.tiers import MethodConfig, make_tiers

CONFIG = ODENetConfig(
    widths=(4,), channels=1, classes=5, horizon="proportional", unroll=False, conv="transposed"
)
COUNTS = (2, 1, 4)
PRESENT = np.array([True, False, True, True, False])
REAL = 6
KEY = jax.random.key(0)  # which no loss here draws from
WEIGHT = 20.0  # so that what is learned from the deepest stands out from rounding
TOLERANCE = 2e-4


def _conv(x, kernel):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def _norm(p, x):
    y = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return y * p["scale"] + p["offset"]


def _relu(x):
    return np.maximum(x, 0)


def _logits(p, x, steps):
    """One ODE block in so many Euler steps of 1, each norm by the moments of its input."""
    z, f = _relu(_norm(p["stem"]["norm"], _conv(x, p["stem"]["conv"]["kernel"]))), p["functions"][0]
    for step in range(steps):
        y, time = z, np.full((*z.shape[:3], 1), step)
        for k in "12":
            y = np.concatenate([time, _relu(_norm(f[f"norm{k}"], y))], -1)
            y = _conv(y, f[f"conv{k}"]["kernel"])
        z = z + y
    linear = p["classifier"]["linear"]
    return _relu(_norm(p["norm"], z)).mean((1, 2)) @ linear["kernel"] + linear["bias"]


@pytest.fixture(scope="module")
def tiers():
    return tiers_lib.ode(CONFIG, COUNTS, distillation=WEIGHT)


@pytest.fixture(scope="module")
def params(tiers):
    rng = np.random.default_rng(6)
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), like)
    linear = params["classifier"]["linear"]
    linear["kernel"] *= 3  # so that the counts differ in what they predict
    return params


def _batch(present=None, padding=0):
    rng = np.random.default_rng(1)
    images = rng.normal(size=(REAL + padding, 4, 4, 1)).astype(np.float32)
    labels = rng.choice([0, 2, 3], REAL + padding).astype(np.int32)
    mask = (np.arange(REAL + padding) < REAL).astype(np.float32)
    return Batch(*map(jnp.asarray, (images, labels, mask)), present)


def _student_counts(count):
    return [other for other in COUNTS if other < count]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("present", [None, PRESENT], ids=["all classes", "some"])
def test_the_loss_is_cross_entropy_and_the_divergence_of_shallower_counts(
    tiers, params, present, padding
):
    batch = _batch(None if present is None else jnp.asarray(present), padding)
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x, labels = np.asarray(batch.images[:REAL], np.float64), np.asarray(batch.labels[:REAL])
    log_p = {}
    for count in COUNTS:
        logits = _logits(weights, x, count)
        log_p[count] = scipy.special.log_softmax(
            logits if present is None else np.where(present, logits, 0), -1
        )
    for count in (2, 4):
        model = tiers.members[COUNTS.index(count)].bound()
        loss, metrics = jax.jit(model.loss)(params, batch, KEY)
        expected = -log_p[count][np.arange(REAL), labels].mean()
        divergences = [
            (np.exp(log_p[count]) * (log_p[count] - log_p[other])).sum(-1).mean()
            for other in _student_counts(count)
        ]
        expected += WEIGHT * np.mean(divergences)
        assert WEIGHT * min(divergences) > 100 * TOLERANCE * expected
        np.testing.assert_allclose(loss, expected, rtol=TOLERANCE)
        np.testing.assert_allclose(metrics.loss, REAL * expected, rtol=TOLERANCE)
        assert int(metrics.examples) == REAL
        assert int(metrics.correct) == (log_p[count].argmax(-1) == labels).sum()


def test_the_shallower_counts_learn_from_the_deepest_and_not_the_other_way(tiers, params):
    """The gradient is that of cross-entropy with the deepest count's probabilities, as numbers."""
    batch, plain = _batch(), tiers_lib.ode(CONFIG, COUNTS)

    def log_p(params, count):
        logits = plain.at([count])[0].bound().apply(params, batch.images, batch.mask)
        return jax.nn.log_softmax(logits)

    given = np.asarray(jnp.exp(jax.jit(log_p, static_argnums=1)(params, 4)))

    def expected(params):
        own = -log_p(params, 4)[jnp.arange(REAL), batch.labels].mean()
        soft = [-(given * log_p(params, count)).sum(-1).mean() for count in (2, 1)]
        return own + WEIGHT * (soft[0] + soft[1]) / 2

    found = jax.jit(jax.grad(lambda p: tiers.members[2].bound().loss(p, batch, KEY)[0]))(params)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-3, atol=1e-4),
        found,
        jax.jit(jax.grad(expected))(params),
    )


def test_a_batch_of_padding_alone_teaches_nothing(tiers, params):
    batch = _batch()._replace(mask=jnp.zeros(REAL))
    gradient = jax.jit(jax.grad(lambda p: tiers.members[2].bound().loss(p, batch, KEY)[0]))(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_only_counts_with_shallower_ones_distil():
    config = dataclasses.replace(CONFIG, widths=(4, 4))
    tiers = tiers_lib.ode(config, ((1, 3), (2, 2), 1, 3), distillation=1.0)
    params = initialise(tiers.init, jax.random.key(0))
    plain = tiers_lib.ode(config, ((1, 3), (2, 2), 1, 3))

    def losses(tiers):
        return [float(_loss(tier)(params, _batch(), KEY)[0]) for tier in tiers.members]

    teaching, none = losses(tiers), losses(plain)
    assert [a > b for a, b in zip(teaching, none, strict=True)] == [True, True, False, True]
    assert teaching[2] == none[2]
    # Of equal totals neither learns from the other: the only student of (1, 3) is 1.
    assert losses(tiers_lib.ode(config, ((1, 3), 1), distillation=1.0))[0] == teaching[0]


def _loss(tier):
    return jax.jit(training_loss(tier.bound()))


def test_one_program_teaches_from_every_count(tiers, params):
    """Which counts learn is data: each loss and gradient are those of the count by itself."""

    @jax.jit
    def at(setting):
        loss = tiers.members[0].bound(setting).loss
        return jax.value_and_grad(lambda p: loss(p, _batch(), KEY)[0])(params)

    compiled = at.lower(jax.tree.map(jnp.int32, tiers.members[0].setting)).compile()
    for tier in tiers.members:
        alone = jax.jit(jax.value_and_grad(lambda p, t=tier: t.bound().loss(p, _batch(), KEY)[0]))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            compiled(jax.tree.map(jnp.int32, tier.setting)),
            alone(params),
        )


def _data():
    rng = np.random.default_rng(0)

    def split(count):
        images = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
        return Split(images, rng.integers(0, 5, count).astype(np.int32))

    return Dataset("noise", split(40), split(20), tuple("abcde"))


def _train(tiers):
    return jfed.simulate(
        _data(),
        tuple(np.split(np.arange(40), 4)),
        tiers,
        rounds=1,
        client=jfed.ClientConfig(batch_size=4, mask_absent_classes=True),
        evaluation=jfed.EvaluationConfig(every=0, batch_size=20, calibration_examples=20),
        engine=jfed.EngineConfig(devices=1),
        seed=0,
    )


def _ode(weight):
    return make_tiers(CONFIG, MethodConfig("ode", iterations=(1, 2), distillation=weight))


def test_a_weight_of_zero_is_no_distillation_bit_for_bit(params):
    for plain, none in zip(_ode(None).members, _ode(0.0).members, strict=True):
        one, other = (
            jax.jit(jax.grad(training_loss(t.bound()), has_aux=True))(params, _batch(), KEY)
            for t in (plain, none)
        )
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_same_teachers_made_twice_share_a_program():
    one, other = (tiers_lib.ode(CONFIG, (1, 2), distillation=0.5) for _ in range(2))
    programs = {tier.program for tier in (*one.members, *other.members)}
    assert len(programs) == 1


@pytest.mark.slow
def test_a_mixed_federation_distils():
    none, some = _train(_ode(None)), _train(_ode(0.7))
    assert some.traffic == none.traffic
    assert some.history[-1].train_loss > none.history[-1].train_loss
    moved = jax.tree.map(lambda a, b: np.any(a != b), some.variables, none.variables)
    assert any(jax.tree.leaves(moved))
