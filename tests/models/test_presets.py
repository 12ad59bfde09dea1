"""Sizes of the networks against published ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.errors import ConfigError
from jfed.models import PRESETS, ODENetConfig, ResNetConfig, build, cnn, odenet, preset, twin
from jfed.models.model import initialise
from jfed.models.ode_nets import per_stage
from jfed.tiers.communication import tree_bytes, tree_size

# torchvision's totals with its 7x7 stem and 1000 classes; resnet_total() undoes both.
TORCHVISION = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160}
# He et al. 2016, table 6, in millions.
CIFAR_MILLIONS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize("n", TORCHVISION)
def test_imagenet_style_resnets_have_torchvisions_parameters(n):
    stem = (7 * 7 - 3 * 3) * 3 * 64
    features = 512 if n < 50 else 2048
    head = (features + 1) * (1000 - 10)
    assert tree_size(_shapes(build(preset(f"resnet-{n}")))) == TORCHVISION[n] - stem - head


@pytest.mark.parametrize("n", CIFAR_MILLIONS)
def test_cifar_style_resnets_have_the_published_parameters(n):
    size = tree_size(_shapes(build(preset(f"resnet-{n}")))) / 1e6
    assert size == pytest.approx(CIFAR_MILLIONS[n], abs=0.05 if n == 110 else 0.0055)


def test_odenet_has_the_bytes_per_block_of_rodenet():
    """arXiv 2012.15465, for CIFAR-100, in kB."""
    config = dataclasses.replace(preset("odenet-20"), classes=100, function="postactivation")
    shapes = _shapes(build(config))
    parts = {
        "conv1": shapes["stem"],
        "layer1": shapes["functions"][0],
        "layer2_1": shapes["downs"][0],
        "layer2_2": shapes["functions"][1],
        "layer3_1": shapes["downs"][1],
        "layer3_2": shapes["functions"][2],
        "fc": shapes["classifier"],
    }
    published = {
        "conv1": 1.86,
        "layer1": 19.84,
        "layer2_1": 55.81,
        "layer2_2": 76.54,
        "layer3_1": 222.21,
        "layer3_2": 300.54,
        "fc": 26.00,
    }
    measured = {name: round(tree_bytes(part) / 1000, 2) for name, part in parts.items()}
    assert measured == published
    assert tree_bytes(shapes) == sum(tree_bytes(part) for part in parts.values())


@pytest.mark.parametrize("n", CIFAR_MILLIONS)
def test_odenet_n_iterates_as_often_as_rodenet_n(n):
    assert preset(f"odenet-{n}").iterations == ((n - 2) // 6, (n - 8) // 6, (n - 8) // 6)


def test_an_odenet_cuts_the_bytes_of_resnet_34_as_far_as_the_paper_says():
    resnet = tree_bytes(_shapes(build(preset("resnet-34"))))
    assert 1 - tree_bytes(_shapes(build(preset("odenet-34")))) / resnet >= 0.924
    assert 1 - tree_bytes(_shapes(build(preset("dsodenet-34")))) / resnet >= 0.95


def test_size_does_not_depend_on_iterations():
    sizes = {tree_size(_shapes(odenet(ODENetConfig(iterations=c)))) for c in (0, 1, 7, (1, 2, 3))}
    assert len(sizes) == 1


def test_every_odenet_has_its_twin():
    for name, config in PRESETS.items():
        if isinstance(config, ODENetConfig):
            twin_name, twin_config = twin(name, config)
            assert twin_name == name.removeprefix("ds").replace("odenet", "resnet")
            assert twin_config == PRESETS[twin_name]


def test_the_twin_of_other_widths_has_a_block_for_each_iteration():
    config = dataclasses.replace(preset("odenet-20"), widths=(8, 16, 32), norm="group")
    _, resnet = twin("odenet-20", config, (5, 2, 4))
    assert resnet == ResNetConfig(widths=(8, 16, 32), blocks=(5, 3, 5), norm="group")


def test_unknown_names_show_the_close_ones():
    with pytest.raises(ConfigError, match=r"unknown model 'odenet-35'.*odenet-34"):
        preset("odenet-35")


@pytest.mark.parametrize(
    ("iterations", "message"),
    [
        (-1, "iterations must be 0 or more, got -1"),
        ((1, 2), r"iterations \(1, 2\) do not fit a network of 3 stages"),
        ((1, 2, -3), "got -3"),
        (True, "got True"),
    ],
)
def test_iterations_that_do_not_fit_are_refused(iterations, message):
    with pytest.raises(ConfigError, match=message):
        per_stage(iterations, 3)


@pytest.mark.parametrize(
    "changes",
    [{"widths": ()}, {"widths": (16, 0)}, {"norm": "layer"}, {"dtype": "float16"}, {"classes": 0}],
)
def test_configs_that_cannot_work_are_refused(changes):
    with pytest.raises(ConfigError, match=str(next(iter(changes)))):
        ODENetConfig(**changes)
    with pytest.raises(ConfigError, match=str(next(iter(changes)))):
        ResNetConfig(**changes)


def test_cnn_is_the_published_benchmark_network():
    model = cnn()
    assert tree_size(_shapes(model)) == 1_626_442
    params = initialise(model.init, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    def reference(x):
        for name in ("conv1", "conv2"):
            x = jax.lax.conv_general_dilated(
                x,
                params[name]["kernel"],
                (1, 1),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = np.maximum(x, 0)
        x = np.asarray(x).reshape(2, 14, 2, 14, 2, 64).max((2, 4)).reshape(2, -1)
        x = np.maximum(x @ params["dense1"]["kernel"], 0)
        return x @ params["dense2"]["kernel"]

    np.testing.assert_allclose(model.apply(params, x), reference(x), atol=1e-4)
    with pytest.raises(ConfigError, match="got 5x5"):
        cnn(size=5)


def test_zero_iterations_switch_the_ode_blocks_off():
    config = ODENetConfig(widths=(4, 8), iterations=0, channels=1, norm="group")
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    params = initialise(odenet(config).init, jax.random.key(0))
    other = jax.tree.map(jnp.array, params)
    other["functions"] = jax.tree.map(lambda p: p + 1.0, other["functions"])
    control, three = odenet(config), odenet(dataclasses.replace(config, iterations=3))
    np.testing.assert_array_equal(control.apply(params, x), control.apply(other, x))
    assert np.abs(three.apply(params, x) - three.apply(other, x)).max() > 1e-3
