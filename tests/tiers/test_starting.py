"""Tiers that start from given weights, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed import tiers as tiers_lib
from jfed.errors import ConfigError
from jfed.models import ODENetConfig, ResNetConfig, build
from jfed.models.model import initialise

RESNET = ResNetConfig(widths=(4, 8), blocks=(1, 2), shortcut="projection", classes=3)
ODENET = ODENetConfig(widths=(4, 8), classes=3)
KEY = jax.random.key(5)


def numbers(config):
    """Parameters of the network in which every number is another one."""
    shapes = jax.eval_shape(build(config).init, KEY)
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    return structure.unflatten(
        [
            np.arange(end - leaf.size, end, dtype=np.float32).reshape(leaf.shape) + 100
            for leaf, end in zip(leaves, ends, strict=True)
        ]
    )


def begin(tiers):
    return jax.tree.map(np.asarray, initialise(tiers.init, KEY))


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_network_begins_with_the_weights():
    params = numbers(RESNET)
    tiers = tiers_lib.heterofl(RESNET, (0.5, 1.0))
    started = tiers_lib.start_from(tiers, params)
    same(begin(started), params)
    assert started.members == tiers.members
    half = started.members[0].extract(jax.tree.map(jnp.asarray, begin(started)), 0)
    kernel = half["stages"][1]["block1"]["layers"][0]["conv"]["kernel"]
    given = params["stages"][1]["block1"]["layers"][0]["conv"]["kernel"]
    same(kernel, given[:, :, :4, :4])


def test_a_model_starts_too_and_what_the_weights_lack_begins_as_before():
    model, params = build(RESNET), numbers(RESNET)
    del params["stages"][1]["block1"], params["stem"]
    variables, before = begin(tiers_lib.start_from(model, params)), begin(tiers_lib.single(model))
    same(variables["classifier"], params["classifier"])
    same(variables["stages"][1]["block0"], params["stages"][1]["block0"])
    same(variables["stages"][1]["block1"], before["stages"][1]["block1"])
    same(variables["stem"], before["stem"])


def test_norms_of_each_tier_of_nefl_begin_with_the_first_channels():
    params = numbers(RESNET)
    tiers = tiers_lib.nefl(RESNET, {"thin": (0.5, None), "short": (1.0, ((0,), ()))})
    variables = begin(tiers_lib.start_from(tiers, params))
    second = params["stages"][1]["block1"]["layers"][0]
    name = "stages/1/block1/layers/0"
    shared, own = variables["shared"], variables["own"]
    same(shared[f"{name}/conv/kernel"], second["conv"]["kernel"])
    same(shared["classifier/linear/bias"], params["classifier"]["linear"]["bias"])
    same(own["thin"][f"{name}/norm/scale"], second["norm"]["scale"][:4])
    same(own["thin"]["stem/norm/offset"], params["stem"]["norm"]["offset"][:2])
    same(own["short"]["stem/norm/offset"], params["stem"]["norm"]["offset"])
    assert f"{name}/norm/scale" not in own["short"]
    steps = [leaf for tier in own.values() for n, leaf in tier.items() if n.endswith("/step")]
    assert len(steps) == 3 + 1
    assert all(step == 1 for step in steps)


@pytest.mark.parametrize("sharing", ["norms-per-depth", "classifier-per-depth"])
def test_the_rows_of_all_iteration_counts_begin_alike(sharing):
    params = numbers(ODENET)
    tiers = tiers_lib.ode(ODENET, (1, 2, 4), sharing=sharing)
    variables = begin(tiers_lib.start_from(tiers, params))
    given = {
        "stem/norm/scale": params["stem"]["norm"]["scale"],
        "classifier/linear/kernel": params["classifier"]["linear"]["kernel"],
        "stem/conv/kernel": params["stem"]["conv"]["kernel"],
    }
    kept = {
        "norms-per-depth": "stem/norm/scale",
        "classifier-per-depth": "classifier/linear/kernel",
    }
    for name, value in given.items():
        if name == kept[sharing]:
            same(variables["own"][name], np.stack([value] * 3))
        else:
            same(variables["shared"][name], value)


def test_iteration_counts_that_share_all_have_the_networks_own_variables():
    params = numbers(ODENET)
    same(begin(tiers_lib.start_from(tiers_lib.ode(ODENET, (1, 2)), params)), params)


def test_learned_step_sizes_begin_anew():
    config = ODENetConfig(widths=(4, 8), classes=3, learn_steps=True, iterations=3)
    params = numbers(config)
    assert "steps" in params
    tiers = tiers_lib.ode(config, (1, 2), sharing="norms-and-steps-per-depth")
    variables = begin(tiers_lib.start_from(tiers, params))
    same(variables["own"]["steps/0"], begin(tiers)["own"]["steps/0"])
    same(variables["shared"]["stem/conv/kernel"], params["stem"]["conv"]["kernel"])


def test_the_exits_of_depthfl_begin_anew():
    params, tiers = numbers(RESNET), tiers_lib.depthfl(RESNET)
    variables, before = begin(tiers_lib.start_from(tiers, params))["shared"], begin(tiers)["shared"]
    exits = [name for name in before if name.startswith("exits/")]
    assert exits
    for name in exits:
        same(variables[name], before[name])
    assert set(variables) - set(exits) == {
        name for name in variables if name.startswith(("stem/", "stages/"))
    }
    name = "stages/1/block0/projection/conv/kernel"
    same(variables[name], params["stages"][1]["block0"]["projection"]["conv"]["kernel"])


def test_fresh_entries_begin_as_before_whatever_their_shape():
    params, model = numbers(RESNET), build(RESNET)
    params["classifier"]["linear"] = {"kernel": np.zeros((8, 100)), "bias": np.zeros(100)}
    started = tiers_lib.start_from(model, params, ("classifier/*", "stem/*/offset"))
    variables, before = begin(started), begin(tiers_lib.single(model))
    same(variables["classifier"], before["classifier"])
    same(variables["stem"]["norm"]["offset"], before["stem"]["norm"]["offset"])
    same(variables["stem"]["norm"]["scale"], params["stem"]["norm"]["scale"])


def test_weights_of_half_precision_become_those_of_the_variables():
    params = jax.tree.map(lambda x: jnp.asarray(x / 2**12, jnp.bfloat16), numbers(RESNET))
    variables = begin(tiers_lib.start_from(build(RESNET), params))
    same(variables, jax.tree.map(lambda x: np.asarray(x, np.float32), params))


def test_the_digest_tells_weights_apart():
    model, params, others = build(RESNET), numbers(RESNET), numbers(RESNET)
    others["stem"]["norm"]["scale"][2] += 1

    def digest(*args):
        return tiers_lib.start_from(*args).weights_digest

    assert tiers_lib.single(model).weights_digest is None
    assert digest(model, params) == digest(model, numbers(RESNET))
    assert digest(model, params) != digest(model, others)
    assert digest(model, params) != digest(model, params, ("stem/*",))
    partly = {"stem": params["stem"]}, {"classifier": params["classifier"]}
    twice = tiers_lib.start_from(tiers_lib.start_from(model, partly[0]), partly[1])
    assert twice.weights_digest != digest(model, partly[1])
    same(begin(twice)["stem"], params["stem"])
    same(begin(twice)["classifier"], params["classifier"])


def changed(**entries):
    return {"stem": numbers(RESNET)["stem"]} | entries


@pytest.mark.parametrize(
    ("params", "fresh", "message"),
    [
        (
            {"classifier": {"linear": {"kernel": np.ones((8, 100))}}},
            (),
            r"'classifier/linear/kernel' are of shape \(8, 100\), the network's are of \(8, 3\)"
            r".*fresh=\('classifier/\*',\).*--init-fresh 'classifier/\*'",
        ),
        (
            changed(),
            ("clasifier/*",),
            r"'clasifier/\*' matches no entry. Did you mean 'classifier/\*'",
        ),
        ({"conv": np.ones(3)}, (), "begin no entry of the network: they are called 'conv'"),
        ({}, (), "begin no entry of the network: they are called nothing"),
        (changed(), ("stem/*",), r"begin no entry of .*fresh is \('stem/\*',\)"),
        ({"stem": {"norm": {"scale": np.full(4, np.inf)}}}, (), "must be finite, got inf"),
        ({"stem": {"norm": {"scale": np.ones(4, int)}}}, (), "'stem/norm/scale' must be float"),
        ({"stem": {"norm": {"scale": "x"}}}, (), "'stem/norm/scale' must be float"),
    ],
)
def test_weights_that_do_not_fit_are_refused(params, fresh, message):
    with pytest.raises(ConfigError, match=message):
        tiers_lib.start_from(build(RESNET), params, fresh)


def test_norms_of_a_narrower_network_do_not_fit_the_tiers_of_nefl():
    tiers = tiers_lib.nefl(RESNET, {"all": (1.0, None)})
    params = {"stem": {"norm": {"scale": np.ones(2)}}}
    with pytest.raises(ConfigError, match=r"'stem/norm/scale' are of shape \(2,\), .* of \(4,\)"):
        tiers_lib.start_from(tiers, params)
