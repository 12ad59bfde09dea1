"""Networks with exits, and with some blocks only, against separately written ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jfed import tiers as tiers_lib
from jfed.algorithms.algorithm import Client
from jfed.algorithms.training import local_training
from jfed.errors import ConfigError
from jfed.models import ResNetConfig, preset
from jfed.models.exits import exit_resnet
from jfed.models.losses import Batch, training_loss
from jfed.models.model import initialise
from jfed.tiers.communication import tree_size
from jfed.tiers.depth import blocks_for, check_blocks, mutual_divergence

CONFIG = ResNetConfig(widths=(4, 6), blocks=(3, 2), channels=1, classes=5, conv="xla")
KEY = jax.random.key(0)  # which no loss here draws from
# Kept blocks of every stage of ResNet-56 and 110, and the share of the parameters that the authors
# give for them (https://github.com/honggkang/nested-federated-learning, NeFL-D). Of the third of
# ResNet-110 their list names 17 blocks of the first stage.
PUBLISHED = {
    "resnet-56": {(2, 2, 2): 0.2, (3, 3, 4): 0.4, (4, 4, 6): 0.6, (9, 8, 7): 0.8},
    "resnet-110": {(16, 4, 3): 0.2, (14, 7, 7): 0.4, (17, 13, 10): 0.6, (16, 16, 14): 0.8},
}


def _conv(x, kernel, stride=1):
    pads = [(n // 2, n // 2) for n in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _conv_norm(p, x, stride=1):
    y = np.asarray(_conv(jnp.asarray(x, jnp.float32), p["conv"]["kernel"], stride), np.float64)
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    return y * np.asarray(p["norm"]["scale"]) + np.asarray(p["norm"]["offset"])


def _relu(x):
    return np.maximum(x, 0)


def _stage(z, blocks, stride):
    """A plain stage: z <- relu(shortcut(z) + s f(z)) for each of `blocks`, a list of parameters."""
    for i, p in enumerate(blocks):
        by = stride if i == 0 else 1
        y = _relu(_conv_norm(p["layers"][0], z, by))
        y = _conv_norm(p["layers"][1], y) * np.asarray(p.get("step", 1.0))
        short = z[:, ::by, ::by]
        short = np.pad(short, ((0, 0),) * 3 + ((0, y.shape[-1] - short.shape[-1]),))
        z = _relu(short + y)
    return z


def _classify(p, z):
    return z.mean((1, 2)) @ np.asarray(p["linear"]["kernel"]) + np.asarray(p["linear"]["bias"])


def _random(like, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), like)


def _batch(seed=1, size=6):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    labels = rng.integers(0, 5, size).astype(np.int32)
    return Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(size))


@pytest.fixture(scope="module")
def exits():
    """Global variables of DepthFL, images, and what each exit says of them, written separately."""
    tiers = tiers_lib.depthfl(CONFIG, distillation=0.5, temperature=2.0)
    variables = _random(jax.eval_shape(tiers.init, jax.random.key(0)))
    batch = _batch()
    p = jax.tree.map(np.asarray, tiers.members[1].extract(variables, 0))
    z = _relu(_conv_norm(p["stem"], batch.images))
    logits = []
    for k, stride in enumerate((1, 2)):
        z = _stage(z, [p["stages"][k][i] for i in range(CONFIG.blocks[k])], stride)
        logits.append(_classify(p["exits"][k], z))
    return tiers, variables, batch, np.stack(logits)


def test_depthfl_exits_are_those_of_a_separately_written_network(exits):
    tiers, variables, batch, expected = exits
    shallow, deep = (
        jax.jit(t.model.apply)(t.extract(variables, 0), batch.images) for t in tiers.members
    )
    np.testing.assert_allclose(shallow, expected[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(deep, expected[1], rtol=1e-3, atol=1e-3)
    (ensemble,) = tiers.tested
    both = ensemble.model.apply(ensemble.extract(variables, 0), batch.images)
    np.testing.assert_allclose(both, expected.mean(0), rtol=1e-3, atol=1e-3)


def test_a_depthfl_tier_owns_its_stages_and_their_exits():
    tiers = tiers_lib.depthfl(CONFIG)
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    owned = tiers.members[0].owned(like)["shared"]
    for name, mask in owned.items():
        first = name.startswith(("stem", "stages/0", "exits/0"))
        assert np.all(np.asarray(mask) == first), name


def test_the_loss_of_exits_is_cross_entropy_and_mutual_divergence(exits):
    tiers, variables, batch, logits = exits
    deep = tiers.members[1]
    loss, metrics = deep.model.loss(deep.extract(variables, 0), batch, KEY)
    labels = np.asarray(batch.labels)
    log_p = scipy.special.log_softmax(logits, -1)
    expected = -log_p[:, np.arange(6), labels].mean(1).sum()
    soft = scipy.special.log_softmax(logits / 2.0, -1)
    for i, j in ((0, 1), (1, 0)):
        divergence = (np.exp(soft[j]) * (soft[j] - soft[i])).sum(-1).mean()
        expected += 0.5 * 2.0**2 * divergence
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics.loss, 6 * expected, rtol=1e-4)
    assert int(metrics.correct) == (logits[-1].argmax(-1) == labels).sum()


def test_each_exit_learns_from_the_softened_mean_of_the_others():
    """The gradient of the distillation with respect to the logits: p_i - mean_j p_j, times T."""
    logits = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    gradient = jax.grad(lambda x: mutual_divergence(x, 2.0).sum())(jnp.asarray(logits))
    p = scipy.special.softmax(logits / 2.0, -1)
    for i in range(3):
        others = np.delete(p, i, 0).mean(0)
        np.testing.assert_allclose(gradient[i], 2.0 * (p[i] - others), atol=1e-5)


def test_padding_does_not_change_the_loss_of_exits(exits):
    tiers, variables, batch, _ = exits
    model, params = tiers.members[1].model, tiers.members[1].extract(variables, 0)
    filled = [jnp.concatenate([x, x[:2]]) for x in (batch.images, batch.labels)]
    padded = Batch(*filled, jnp.asarray([1.0] * 6 + [0.0] * 2))
    np.testing.assert_allclose(
        model.loss(params, padded, KEY)[0], model.loss(params, batch, KEY)[0], rtol=1e-5
    )


def test_local_training_uses_the_loss_of_the_model(exits):
    tiers, variables, batch, _ = exits
    deep = tiers.members[1]
    params, training = deep.extract(variables, 0), local_training(optax.sgd)
    one = jnp.int32(1)
    client = Client(
        params, training_loss(deep.model), one, one, one, jnp.ones(()), one, jnp.float32(0.1)
    )
    local = training.client_init(client, (), KEY)
    moved, _ = jax.jit(lambda local: training.client_step(client, local, batch, KEY))(local)
    gradient = jax.jit(jax.grad(lambda p: deep.model.loss(p, batch, KEY)[0]))(params)
    jax.tree.map(
        lambda m, p, g: np.testing.assert_allclose(m, p - 0.1 * g, rtol=1e-4, atol=1e-4),
        moved.params,
        params,
        gradient,
    )


def test_nefl_tiers_run_their_blocks_scaled_by_their_own_steps():
    blocks = ((0, 2), (0,))
    tiers = tiers_lib.nefl_d(CONFIG, [blocks, ((0, 1, 2), (0, 1))])
    assert [tier.name for tier in tiers.members] == ["2-1", "3-2"]
    variables = _random(jax.eval_shape(tiers.init, jax.random.key(0)), seed=3)
    images = _batch().images
    found = tiers.members[0].model.apply(tiers.members[0].extract(variables, 0), images)

    shared = jax.tree.map(np.asarray, variables["shared"])
    own = jax.tree.map(np.asarray, variables["own"]["2-1"])

    def conv_norm(kernel, norm):
        norm = {part: own[f"{norm}/norm/{part}"] for part in ("scale", "offset")}
        return {"conv": {"kernel": shared[f"{kernel}/conv/kernel"]}, "norm": norm}

    z = _relu(_conv_norm(conv_norm("stem", "stem"), images))
    for k, stride in enumerate((1, 2)):
        stage = []
        for position, block in enumerate(blocks[k]):
            here, there = f"stages/{k}/{position}", f"stages/{k}/{block}"
            layers = [conv_norm(f"{there}/layers/{i}", f"{here}/layers/{i}") for i in range(2)]
            stage.append({"layers": layers, "step": own[f"{here}/step"]})
        z = _stage(z, stage, stride)
    linear = {part: shared[f"classifier/linear/{part}"] for part in ("kernel", "bias")}
    np.testing.assert_allclose(found, _classify({"linear": linear}, z), rtol=1e-3, atol=1e-3)


def test_nefl_steps_start_at_one():
    tiers = tiers_lib.nefl_d(CONFIG, (1.0,))
    variables = initialise(tiers.init, jax.random.key(0))
    steps = [x for name, x in variables["own"]["1"].items() if name.endswith("/step")]
    assert len(steps) == 5
    assert all(step == 1 for step in steps)


@pytest.mark.parametrize("name", ["resnet-56", pytest.param("resnet-110", marks=pytest.mark.slow)])
def test_nefl_tiers_have_the_published_shares_of_the_parameters(name):
    config = preset(name)
    full = tuple(config.blocks)
    chosen = [tuple(tuple(range(n)) for n in counts) for counts in (*PUBLISHED[name], full)]
    tiers = tiers_lib.nefl_d(config, chosen)
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    sizes = [tree_size(tier.shapes(like)) for tier in tiers.members]
    shares = [size / sizes[-1] for size in sizes[:-1]]
    np.testing.assert_allclose(shares, list(PUBLISHED[name].values()), atol=0.005)
    assert sizes[-1] == pytest.approx({"resnet-56": 0.86e6, "resnet-110": 1.73e6}[name], rel=0.01)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_blocks_for_a_ratio_hold_that_share_of_the_parameters(ratio):
    config = preset("resnet-56")
    blocks = blocks_for(config, ratio)
    total, mine = (
        tree_size(jax.eval_shape(exit_resnet(c).model.init, jax.random.key(0))["stages"])
        for c in (config, ResNetConfig(blocks=tuple(map(len, blocks))))
    )
    assert mine / total == pytest.approx(ratio, abs=0.03)
    assert max(len(b) for b in blocks) - min(len(b) for b in blocks) <= 2


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (((0,), (0, 2)), "stage 1 must be from 0 to 1, got 2"),
        (((0,), (1,)), r"stage 1 must include block 0, .* got \(1,\)"),
        (((0,), ()), r"stage 1 must be one or more in ascending order, got \(\)"),
        (((0, 0), (0,)), r"got \(0, 0\)"),
        (((0,),), r"each of the 2 stages, got \(\(0,\),\)"),
        (((-1,), (0,)), "got -1"),
    ],
)
def test_blocks_that_the_network_does_not_have_are_refused(blocks, message):
    with pytest.raises(ConfigError, match=message):
        tiers_lib.nefl_d(CONFIG, [blocks])


def test_a_first_block_that_changes_no_shape_can_be_left_out():
    assert check_blocks(CONFIG, [[1, 2], [0]]) == ((1, 2), (0,))


def test_nefl_tiers_need_different_names():
    with pytest.raises(ConfigError, match="'1-1' twice"):
        tiers_lib.nefl_d(CONFIG, [((0,), (0,)), ((1,), (0,))])
