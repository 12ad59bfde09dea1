"""Networks with exits against separately written ones, and the loss that they learn by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from numpy_resnets import (
    CONFIG,
    batch_of,
    classify,
    conv,
    conv_norm,
    norm,
    random_like,
    relu,
    stage,
)

from jfed import tiers as tiers_lib
from jfed.algorithms.algorithm import Client
from jfed.algorithms.training import local_training
from jfed.models import preset, resnet
from jfed.models.flops import forward_flops
from jfed.models.losses import Batch, training_loss
from jfed.tiers.communication import tree_size
from jfed.tiers.stages import mutual_divergence

KEY = jax.random.key(0)  # which no loss here draws from


@pytest.fixture(scope="module")
def exits():
    """Global variables of DepthFL, images, and what each exit says of them, written separately."""
    tiers = tiers_lib.depthfl(CONFIG, exits="linear", distillation=0.5, ramp=0, temperature=2.0)
    variables = random_like(jax.eval_shape(tiers.init, jax.random.key(0)))
    batch = batch_of()
    p = jax.tree.map(np.asarray, tiers.members[1].extract(variables, 0))
    z = relu(conv_norm(p["stem"], batch.images))
    logits = []
    for k, stride in enumerate((1, 2)):
        z = stage(z, [p["stages"][k][f"block{i}"] for i in range(CONFIG.blocks[k])], stride)
        logits.append(classify(p["exits"][k]["classifier"], z))
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


def test_the_weight_of_distillation_rises_over_rounds(exits):
    """exp(-5 (1 - r / 300)^2) in round r, and 1 from round 300 on (the authors' code)."""
    _, variables, batch, _ = exits
    found = {}
    for weight in (0.0, 1.0):
        deep = tiers_lib.depthfl(CONFIG, exits="linear", distillation=weight).members[1]
        params = deep.extract(variables, 0)
        loss = jax.jit(
            lambda r, model=deep.model, p=params: model.loss(p, batch._replace(round=r), KEY)[0]
        )
        found[weight] = np.array([loss(jnp.int32(r)) for r in (0, 150, 300, 900)])
    risen = found[1.0] - found[0.0]
    np.testing.assert_allclose(risen / risen[-1], [np.exp(-5), np.exp(-1.25), 1, 1], atol=1e-3)


def test_bottleneck_exits_are_those_of_a_separately_written_network():
    tiers = tiers_lib.depthfl(CONFIG)
    variables = random_like(jax.eval_shape(tiers.init, jax.random.key(0)))
    batch, deep = batch_of(), tiers.members[1]
    p = jax.tree.map(np.asarray, deep.extract(variables, 0))

    def halving(p, x):
        for i, stride in enumerate((2, 1)):
            x = conv(x, p["depthwise"][i]["kernel"], stride, groups=x.shape[-1])
            x = relu(norm(p["norms"][i], conv(x, p["pointwise"][i]["kernel"])))
        return x

    first = p["exits"][0]
    z = relu(conv_norm(p["stem"], batch.images))
    z = stage(z, [p["stages"][0][f"block{i}"] for i in range(3)], 1)
    attention = relu(norm(first["norm"], halving(first["attention"], z)))
    # Bilinear by 2: a pixel is 3/4 of its parent and 1/4 of the next one, which ends at the edge.
    for axis in (1, 2):
        parent = np.moveaxis(attention, axis, 0)
        padded = np.concatenate([parent[:1], parent, parent[-1:]])
        pairs = [0.75 * padded[1:-1] + 0.25 * side for side in (padded[:-2], padded[2:])]
        attention = np.moveaxis(np.stack(pairs, 1).reshape(-1, *parent.shape[1:]), 0, axis)
    seen = z / (1 + np.exp(-attention))
    shallow = classify(first["classifier"], halving(first["halvings"][0], seen))
    z = stage(z, [p["stages"][1][f"block{i}"] for i in range(2)], 2)
    (ensemble,) = tiers.tested
    for tier, expected in (
        (tiers.members[0], shallow),
        (deep, classify(p["exits"][1]["classifier"], z)),
        (ensemble, (shallow + classify(p["exits"][1]["classifier"], z)) / 2),
    ):
        logits = jax.jit(tier.model.apply)(tier.extract(variables, 0), batch.images)
        np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-3)


def test_tiers_have_the_parameters_of_the_authors_network():
    """ResNet-18, 100 classes, counted in their code (Flower's baseline depthfl)."""
    tiers = tiers_lib.depthfl(dataclasses.replace(preset("resnet-18"), classes=100))
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    sizes = [tree_size(tier.shapes(like)) for tier in tiers.members]
    assert sizes == [479_652, 1_347_336, 3_838_316, 12_283_344]


def test_depthfl_trains_by_feddyn_unless_told():
    tiers = tiers_lib.depthfl(CONFIG)
    assert dict(tiers.algorithm) == {"name": "feddyn", "alpha": 0.1, "h_over": "clients"}
    assert tiers.weights == "count"


def test_a_tier_is_tested_by_its_deepest_exit_alone():
    """Its FLOPs are those of a plain ResNet, and one exit makes no ensemble."""
    tiers = tiers_lib.depthfl(preset("resnet-20"))
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    deep = tiers.members[-1]
    plain = resnet(preset("resnet-20"))
    shapes = jax.eval_shape(plain.init, jax.random.key(0))
    expected = forward_flops(plain, shapes, (16, 16, 3))
    assert forward_flops(deep.model, deep.shapes(like), (16, 16, 3)) == expected
    assert tiers_lib.depthfl(CONFIG, (1,)).tested == ()
