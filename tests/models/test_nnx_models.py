"""Flax NNX modules as models: dropout by the key of the step, and state that is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jfed
from jfed.data import Dataset, Split
from jfed.errors import ConfigError
from jfed.models import from_nnx
from jfed.models.losses import Batch, training_loss


class Dropping(nnx.Module):
    """A linear layer between two dropouts of half."""

    def __init__(self, rngs):
        self.before = nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(16, 3, rngs=rngs)
        self.after = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images):
        return self.after(self.linear(self.before(images.reshape(len(images), -1))))


IMAGES = jax.random.normal(jax.random.key(1), (64, 4, 4, 1))
BATCH = Batch(IMAGES, jnp.arange(64) % 3, jnp.ones(64))


@pytest.fixture(scope="module")
def model():
    return from_nnx(Dropping)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def test_only_params_are_parameters(model, params):
    assert jax.tree.map(jnp.shape, params) == {"linear": {"kernel": (16, 3), "bias": (3,)}}


def test_evaluation_drops_nothing(model, params):
    flat = np.asarray(IMAGES).reshape(64, 16)
    expected = flat @ np.asarray(params["linear"]["kernel"]) + np.asarray(params["linear"]["bias"])
    np.testing.assert_allclose(model.apply(params, IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_training_drops_by_the_key_of_the_step(model, params):
    loss = jax.jit(jax.value_and_grad(training_loss(model), has_aux=True))
    (one, _), gradient = loss(params, BATCH, jax.random.key(5))
    (same, _), again = loss(params, BATCH, jax.random.key(5))
    (other, _), _ = loss(params, BATCH, jax.random.key(6))
    assert one == same != other
    jax.tree.map(np.testing.assert_array_equal, gradient, again)
    logits = np.asarray(model.apply(params, IMAGES))
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, BATCH.labels).mean()
    assert one != plain


def test_each_key_drops_half_and_doubles_the_rest(model):
    """The dropouts' own numbers: logits that are all 1 before the last one become 0 or 2."""
    params = {"linear": {"kernel": jnp.zeros((16, 3)), "bias": jnp.ones(3)}}
    label = jnp.zeros(64, int)
    losses = jax.jit(
        jax.vmap(
            lambda image, label, key: training_loss(model)(
                params, Batch(image[None], label[None], jnp.ones(1)), key
            )[0]
        )
    )(IMAGES, label, jax.random.split(jax.random.key(2), 64))
    possible = [
        -jax.nn.log_softmax(jnp.asarray([a, b, c]))[0]
        for a in (0.0, 2.0)
        for b in (0.0, 2.0)
        for c in (0.0, 2.0)
    ]
    nearest = np.abs(np.asarray(losses)[:, None] - np.asarray(possible)).min(1)
    np.testing.assert_allclose(nearest, 0, atol=1e-5)
    assert len(set(np.round(np.asarray(losses), 4))) == 5  # all that can be


def test_two_dropouts_of_one_key_draw_differently():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
            self.bias = nnx.Param(jnp.ones(40))

        def __call__(self, images):
            one, two = (drop(self.bias[...][None]) for drop in self.drops)
            return one - two

    model = from_nnx(Two)
    batch = Batch(IMAGES[:1], jnp.zeros(1, int), jnp.ones(1))
    loss, _ = model.loss({"bias": jnp.ones(40)}, batch, jax.random.key(0))
    assert abs(loss - np.log(40)) > 0.1  # what it is if both drop the same


def test_split_streams_are_rekeyed_in_their_shape():
    class Ensemble(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(16, 3, rngs=rngs)
            self.streams = rngs.dropout.split(4)

        def __call__(self, images):
            noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(self.streams.key[...])
            return self.linear(images.reshape(len(images), -1)) + noise.mean(0)[None]

    model = from_nnx(Ensemble)
    params = model.init(jax.random.key(0))
    losses = [model.loss(params, BATCH, jax.random.key(k))[0] for k in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_the_loss_counts_the_real_examples_only(model, params):
    key = jax.random.key(3)
    wrong = BATCH._replace(mask=(jnp.arange(64) < 40).astype(jnp.float32))
    other = wrong._replace(images=IMAGES.at[40:].set(7.0))
    (one, metrics), (two, _) = (model.loss(params, batch, key) for batch in (wrong, other))
    assert one == two
    assert metrics.examples == 40


class WithBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(1, rngs=rngs)

    def __call__(self, images):
        return self.norm(images)[:, 0, :3, 0]


class Counter(nnx.Variable):
    pass


class WithCounter(nnx.Module):
    def __init__(self, rngs):
        self.calls = Counter(jnp.zeros(()))

    def __call__(self, images):
        return images[:, 0, :3, 0]


class WithTable(nnx.Module):
    def __init__(self, rngs, table=None):
        self.table = jnp.ones((3,)) if table is None else table

    def __call__(self, images):
        return images[:, 0, :3, 0] + self.table[None]


class WithNumbers(nnx.Module):
    def __init__(self, rngs):
        self.inner = WithTable(rngs, np.ones((3,), np.float32))

    def __call__(self, images):
        return self.inner(images)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (WithBatchNorm, r"got BatchStat 'norm\.mean'; use .* nnx\.GroupNorm"),
        (WithCounter, r"got Counter 'calls'; make it an nnx\.Param"),
        (WithTable, r"got array 'table'; make it an nnx\.Param"),
        (WithNumbers, r"got array 'inner\.table'; make it an nnx\.Param"),
    ],
)
def test_other_state_is_refused(module, message):
    with pytest.raises(ConfigError, match=message):
        from_nnx(module)


class Broken(nnx.Module):
    def __init__(self, rngs):
        raise KeyError("width")


def test_what_a_module_raises_is_told_with_its_name():
    with pytest.raises(ConfigError, match=r"test_nnx_models\.Broken .*rngs.* 'width'") as error:
        from_nnx(Broken)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_federation_trains_with_dropout(model):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90).astype(np.int32)
    images = rng.integers(0, 60, (90, 4, 4, 1)).astype(np.uint8)
    images[np.arange(90), labels] += 150  # the row tells the class
    data = Dataset(
        "rows", Split(images[:60], labels[:60]), Split(images[60:], labels[60:]), ("a", "b", "c")
    )
    result = jfed.simulate(
        data,
        tuple(np.split(np.arange(60), 3)),
        model,
        rounds=15,
        client=jfed.ClientConfig(batch_size=10, learning_rate=0.2),
        evaluation=jfed.EvaluationConfig(every=0, batch_size=30),
        engine=jfed.EngineConfig(devices=1),
        seed=0,
    )
    assert result.accuracies["full"] > 0.8
