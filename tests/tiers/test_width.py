"""Slices of channels against index lists worked out by hand, and against the full network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed import tiers as tiers_lib
from jfed.models import ODENetConfig, ResNetConfig, build, preset
from jfed.tiers.communication import tree_size
from jfed.tiers.width import narrow, rolling_window, window_of

RESNET = ResNetConfig(widths=(4, 8), blocks=(1, 2), channels=1, conv="xla")
PROJECTED = ResNetConfig(
    widths=(4, 8), blocks=(2, 1), channels=1, shortcut="projection", conv="xla"
)
BOTTLENECK = ResNetConfig(
    widths=(8, 16), blocks=(1, 2), bottleneck=True, stem=4, shortcut="projection", conv="xla"
)
SEPARABLE = ODENetConfig(widths=(4, 8), iterations=2, separable=True, channels=1, conv="xla")
ODENET = ODENetConfig(widths=(4, 8), iterations=2, channels=1, function="postactivation")


def _random(like, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), like)


def test_heterofl_takes_the_first_channels():
    tiers = tiers_lib.heterofl(RESNET, (0.5, 1.0))
    variables = _random(jax.eval_shape(tiers.init, jax.random.key(0)))
    half, full = (tier.extract(variables, 3) for tier in tiers.members)
    jax.tree.map(np.testing.assert_array_equal, full, variables)
    np.testing.assert_array_equal(
        half["stem"]["conv"]["kernel"], variables["stem"]["conv"]["kernel"][..., :2]
    )
    first = [v["stages"][1]["block0"]["layers"][0] for v in (half, variables)]
    np.testing.assert_array_equal(
        first[0]["conv"]["kernel"], first[1]["conv"]["kernel"][:, :, :2, :4]
    )
    np.testing.assert_array_equal(first[0]["norm"]["scale"], first[1]["norm"]["scale"][:4])
    linear = [v["classifier"]["linear"] for v in (half, variables)]
    np.testing.assert_array_equal(linear[0]["kernel"], linear[1]["kernel"][:4])
    np.testing.assert_array_equal(linear[0]["bias"], linear[1]["bias"])


@pytest.mark.parametrize(
    ("channels", "kept", "round_", "expected"),
    [
        (4, 2, 0, [0, 1]),
        (4, 2, 3, [3, 0]),
        (4, 2, 4, [0, 1]),
        (8, 4, 6, [6, 7, 0, 1]),
        (5, 3, 13, [3, 4, 0]),
        (3, 3, 1, [1, 2, 0]),
    ],
)
def test_the_window_rolls_and_wraps_around(channels, kept, round_, expected):
    assert rolling_window(channels, kept, round_).tolist() == expected


@pytest.mark.parametrize(
    ("round_", "expected"),
    [(0, [0, 1, 4, 5]), (1, [1, 2, 5, 6]), (3, [3, 0, 7, 4]), (6, [2, 3, 6, 7])],
)
def test_where_shortcuts_pad_the_window_rolls_within_what_a_stage_adds(round_, expected):
    window = window_of(RESNET, narrow(RESNET, 0.5))
    assert window(8, 4, round_).tolist() == expected
    assert window(4, 2, round_).tolist() == expected[:2]


def test_fedrolex_takes_the_same_channels_of_producer_and_consumer():
    tiers = tiers_lib.fedrolex(PROJECTED, (0.5, 1.0))
    variables = _random(jax.eval_shape(tiers.init, jax.random.key(0)))
    half = jax.jit(tiers.members[0].extract)(variables, jnp.int32(7))
    few, many = [3, 0], [7, 0, 1, 2]
    for kind, rows, columns in (("layers", few, many), ("projection", few, many)):
        found, full = (v["stages"][1]["block0"][kind] for v in (half, variables))
        if kind == "layers":
            found, full = found[0], full[0]
        kernel = full["conv"]["kernel"][:, :, np.array(rows)][..., np.array(columns)]
        np.testing.assert_array_equal(found["conv"]["kernel"], kernel)
        np.testing.assert_array_equal(
            found["norm"]["scale"], full["norm"]["scale"][np.array(columns)]
        )
    kernel = variables["classifier"]["linear"]["kernel"][np.array(many)]
    np.testing.assert_array_equal(half["classifier"]["linear"]["kernel"], kernel)


@pytest.mark.parametrize(
    ("make", "config", "ratio"),
    [
        (tiers_lib.heterofl, RESNET, 0.5),
        (tiers_lib.heterofl, BOTTLENECK, 0.5),
        (tiers_lib.heterofl, ODENET, 0.5),
        (tiers_lib.heterofl, SEPARABLE, 0.5),
        (tiers_lib.fedrolex, RESNET, 0.5),
        (tiers_lib.fedrolex, RESNET, 0.8),  # keeps 4 of 4 channels, 7 of 8
        (tiers_lib.fedrolex, PROJECTED, 0.8),
        (tiers_lib.fedrolex, BOTTLENECK, 0.5),
    ],
)
def test_a_submodel_is_the_full_network_with_the_other_weights_at_zero(make, config, ratio):
    """It is not, unless each layer reads the channels that the one before writes."""
    tiers = make(config, (ratio,), scaler=False)
    variables = _random(jax.eval_shape(tiers.init, jax.random.key(0)))
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, config.channels))
    (tier,), full = tiers.members, jax.jit(build(config).apply)
    small = jax.jit(tier.model.apply)
    for round_ in (0, 3, 7):
        local = tier.extract(variables, round_)
        embedded = tier.embed(local, variables, round_)
        np.testing.assert_allclose(
            small(local, images), full(embedded, images), rtol=2e-4, atol=2e-4
        )


def test_fedrolex_tests_the_whole_model_whatever_clients_train():
    tiers = tiers_lib.fedrolex(RESNET, (0.25, 0.5))
    assert [tier.name for tier in tiers.tested] == ["1"]
    assert tiers_lib.fedrolex(RESNET, (0.5, 1.0)).tested == ()


def test_over_as_many_rounds_as_channels_every_weight_is_trained():
    tiers = tiers_lib.fedrolex(RESNET, (0.5,))
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    owned = jax.jit(lambda r: tiers.members[0].owned(like, r))
    sums = [owned(jnp.int32(r)) for r in range(8)]
    for position, leaf in enumerate(jax.tree.leaves(like)):
        times = sum(np.asarray(jax.tree.leaves(tree)[position]) for tree in sums)
        if leaf.ndim == 1:
            assert np.all(times == (8 if leaf.size == 10 else 4))


def test_half_of_the_channels_are_a_quarter_of_the_parameters():
    """HeteroFL, table 1: each halving of the width leaves about a fourth of the parameters."""
    sizes = [
        tree_size(jax.eval_shape(build(narrow(preset("resnet-18"), r)).init, jax.random.key(0)))
        for r in (1.0, 0.5, 0.25)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(0.25, abs=0.01)
    assert sizes[2] / sizes[0] == pytest.approx(0.0625, abs=0.005)


@pytest.mark.parametrize(
    ("ratio", "widths"), [(0.2, (4, 7, 13)), (0.25, (4, 8, 16)), (1.0, (16, 32, 64))]
)
def test_channels_are_rounded_up(ratio, widths):
    assert narrow(preset("resnet-20"), ratio).widths == widths
    assert narrow(ODENetConfig(), ratio).widths == widths
    assert narrow(ResNetConfig(widths=(5, 10), blocks=(1, 1)), 0.2).widths == (1, 2)
