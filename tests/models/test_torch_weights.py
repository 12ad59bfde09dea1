"""Weights of PyTorch's ResNets, against logits of the networks that they are of.

The weights are a formula of their names and shapes. The logits were computed by PyTorch 2.13.0 and
torchvision 0.28.0 (`torchvision.models.resnet18(num_classes=5)` and so on, `eval()`) from the same
formula, those of the CIFAR ResNets by networks written in PyTorch with the layers, names and
shortcuts of akamaster/pytorch_resnet_cifar10 (options A and B).
"""

import dataclasses
import zlib

import jax
import numpy as np
import pytest

from jfed.errors import ConfigError
from jfed.models import ResNetConfig, build, load_torch, preset


def weights(name, shape):
    """A weight, from its name in PyTorch and its shape there."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kind = name.rpartition(".")[2]
    if kind == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:
        base = 0.6 if kind == "weight" else 0.0
        return (base + 0.1 * rng.normal(size=shape)).astype(np.float32)
    return (rng.normal(size=shape) * np.sqrt(1.5 / np.prod(shape[1:]))).astype(np.float32)


def images(size):
    rng = np.random.default_rng(7)
    return 2 * rng.normal(size=(2, size, size, 3)).astype(np.float32)


def norm_shapes(name, channels):
    ends = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{end}": (channels,) for end in ends} | {f"{name}.num_batches_tracked": ()}


def shapes_in_torch(blocks, widths, *, bottleneck=False, stem=(64, 7), names=None, classes=5):
    """Names and shapes of a ResNet's state_dict.

    Args:
      blocks: of each stage.
      widths: channels of each stage.
      bottleneck: three convolutions a block.
      stem: its channels and size.
      names: of shortcuts (None: they have no weights) and of the classifier.
      classes: how many.
    """
    shortcut, linear = names or ("downsample", "fc")
    channels, size = stem
    found = {"conv1.weight": (channels, 3, size, size)} | norm_shapes("bn1", channels)
    for k, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
        for i in range(count):
            place, inner = f"layer{k}.{i}", width // 4
            plan = [(width, channels, 3), (width, width, 3)]
            if bottleneck:
                plan = [(inner, channels, 1), (inner, inner, 3), (width, inner, 1)]
            for j, (outputs, inputs, size) in enumerate(plan, 1):
                found[f"{place}.conv{j}.weight"] = (outputs, inputs, size, size)
                found |= norm_shapes(f"{place}.bn{j}", outputs)
            if shortcut is not None and i == 0 and (k > 1 or channels != width):
                found[f"{place}.{shortcut}.0.weight"] = (width, channels, 1, 1)
                found |= norm_shapes(f"{place}.{shortcut}.1", width)
            channels = width
    return found | {f"{linear}.weight": (classes, channels), f"{linear}.bias": (classes,)}


def state_dict(*args, prefix="", **options):
    shapes = shapes_in_torch(*args, **options)
    counter = np.int64(3)
    return {
        prefix + name: counter if name.endswith("tracked") else weights(name, shape)
        for name, shape in shapes.items()
    }


PLAN = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BASIC, WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)
TORCHVISION = {
    18: [
        [-0.00810261070728302, 0.5760046243667603, -0.8523578643798828, -0.24680188298225403,
         0.10042648017406464],
        [0.15196266770362854, 0.8030788898468018, -0.7456740140914917, -0.26036888360977173,
         0.09920365363359451],
    ],
    34: [
        [0.1983696073293686, 0.5524296760559082, -0.9838274717330933, 0.1461632251739502,
         0.0550023689866066],
        [0.3308771848678589, 0.633536696434021, -0.7606745958328247, 0.18425117433071136,
         -0.0722566768527031],
    ],
    50: [
        [0.13424955308437347, -0.5761401653289795, 0.24373209476470947, 0.426469624042511,
         -0.18345582485198975],
        [0.13987717032432556, -0.5436105728149414, 0.23978614807128906, 0.5151408314704895,
         -0.2108222246170044],
    ],
    101: [
        [-0.41540050506591797, -1.704759120941162, 0.5563849210739136, 0.4042394161224365,
         -0.9346115589141846],
        [-0.389926016330719, -1.5855133533477783, 0.5349159240722656, 0.380734920501709,
         -0.9451802968978882],
    ],
}  # fmt: skip
OPTION_A = [
    [-1.4021179676055908, -0.28486183285713196, 0.877522349357605, 1.079154133796692,
     -1.3690346479415894],
    [-1.50494384765625, -0.13237908482551575, 0.962050199508667, 1.251988172531128,
     -1.5010511875152588],
]  # fmt: skip
PROJECTIONS = {
    ("shortcut", "linear"): [
        [0.002340845763683319, -0.2437359094619751, -0.21739430725574493, 0.847363293170929,
         -0.6378679871559143],
        [0.18088746070861816, -0.2323039472103119, 0.01930546760559082, 0.986876904964447,
         -0.8353495001792908],
    ],
    ("downsample", "fc"): [
        [0.16617386043071747, -1.007583498954773, -0.5965449810028076, 0.052309781312942505,
         0.06592292338609695],
        [0.14175187051296234, -1.2285062074661255, -0.6845594644546509, 0.05846196413040161,
         0.0944429561495781],
    ],
}  # fmt: skip


def logits(config, given, size):
    """jfed's, in evaluation."""
    params, statistics = load_torch(config, given)
    return np.asarray(jax.jit(build(config).apply)(params, images(size), None, statistics))


@pytest.mark.parametrize(
    "n", [18, 50, *(pytest.param(n, marks=pytest.mark.slow) for n in (34, 101))]
)
def test_resnets_are_torchvisions(n):
    config = dataclasses.replace(preset(f"resnet-{n}"), entry="7x7-pool", classes=5)
    given = state_dict(PLAN[n], WIDE if n > 34 else BASIC, bottleneck=n > 34)
    np.testing.assert_allclose(logits(config, given, 32), TORCHVISION[n], atol=1e-4, rtol=0)


CIFAR = {"blocks": (3, 3, 3), "widths": (16, 32, 64), "stem": (16, 3)}


@pytest.mark.parametrize("names", PROJECTIONS)
def test_a_resnet_for_cifar_with_projections(names):
    config = dataclasses.replace(preset("resnet-20"), shortcut="projection", classes=5)
    given = state_dict(**CIFAR, names=names)
    np.testing.assert_allclose(logits(config, given, 16), PROJECTIONS[names], atol=1e-4, rtol=0)


def test_a_resnet_for_cifar_whose_shortcuts_pad_with_zeros_on_both_sides():
    config = dataclasses.replace(preset("resnet-20"), classes=5)
    given = state_dict(**CIFAR, names=(None, "linear"), prefix="module.")
    np.testing.assert_allclose(logits(config, given, 16), OPTION_A, atol=1e-4, rtol=0)


SMALL = ResNetConfig(widths=(4, 8), blocks=(1, 2), shortcut="projection", classes=5)


def small(**changes):
    options = {"blocks": (1, 2), "widths": (4, 8), "stem": (4, 3)} | changes
    return state_dict(**options)


def test_weights_are_placed_by_name():
    params, statistics = load_torch(SMALL, small())
    shapes = jax.eval_shape(build(SMALL).init, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    kernel = params["stages"][1]["block1"]["layers"][0]["conv"]["kernel"]
    there = weights("layer2.1.conv1.weight", (8, 8, 3, 3))
    assert kernel.shape == (3, 3, 8, 8)
    assert kernel.dtype == np.float32
    assert kernel[2, 0, 5, 1] == there[1, 5, 2, 0]
    scale = params["stages"][1]["block0"]["projection"]["norm"]["scale"]
    np.testing.assert_array_equal(scale, weights("layer2.0.downsample.1.weight", (8,)))
    linear = params["classifier"]["linear"]
    np.testing.assert_array_equal(linear["kernel"], weights("fc.weight", (5, 8)).T)
    measured = jax.eval_shape(build(SMALL).measure, params, images(8), np.ones(2, np.float32))
    assert jax.tree.structure(statistics) == jax.tree.structure(measured)
    mean, var = statistics["stage1_block1"]["layer1"]
    np.testing.assert_array_equal(mean, weights("layer2.1.bn2.running_mean", (8,)))
    np.testing.assert_array_equal(var, weights("layer2.1.bn2.running_var", (8,)))


def test_without_running_statistics_there_are_none():
    given = {name: value for name, value in small().items() if "running" not in name}
    assert load_torch(SMALL, given).statistics is None
    group = dataclasses.replace(SMALL, norm="group")
    assert load_torch(group, small()).statistics is None
    assert load_torch(group, given).statistics is None


def without(name):
    return {key: value for key, value in small().items() if key != name}


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, without("conv1.weight"), r"no 'conv1\.weight', .* of shape \(4, 3, 3, 3\)"),
        ({}, without("layer2.0.bn2.bias"), r"no 'layer2\.0\.bn2\.bias', .* 'stages/1/block0/lay"),
        ({}, without("bn1.running_var"), r"no 'bn1\.running_var'"),
        ({}, small() | {"layer5.x": np.ones(3)}, r"no place for weights 'layer5\.x' of .*\(3,\)"),
        (
            {},
            small() | {"layer1.0.conv2.weight": np.ones((4, 4, 5, 5))},
            r"'layer1\.0\.conv2\.weight' are of shape \(4, 4, 5, 5\), .* of \(4, 4, 3, 3\)",
        ),
        (
            {"classes": 7},
            small(),
            r"'fc\.weight' are of shape \(5, 8\), .* \(7, 8\) .* with classes=5 \(not 7\).*"
            r"--init-fresh 'classifier/\*'",
        ),
        (
            {},
            small(stem=(4, 7)),
            r"'conv1\.weight' are of .* with entry='7x7-pool' \(not '3x3'\).*--init-fresh 'stem/",
        ),
        ({"entry": "7x7-pool"}, small(), r"with entry='3x3' \(not '7x7-pool'\)"),
        ({"channels": 1}, small(), r"with channels=3 \(not 1\)"),
        ({"blocks": (1, 3)}, small(), r"no 'layer2\.2\.conv1.* with blocks=\(1, 2\) \(not \(1, 3"),
        ({"blocks": (1, 1)}, small(), r"no place for .*'layer2\.1\.conv1\.weight'.*blocks=\(1, 2"),
        ({"widths": (4, 16)}, small(), r"with widths=\(4, 8\) \(not \(4, 16\)\)"),
        ({"bottleneck": True}, small(), r"with bottleneck=False \(not True\)"),
        ({"shortcut": "pad"}, small(), r"'layer2\.0\.downsample\.0.*shortcut='projection' \(not"),
        ({}, small(names=(None, "fc")), r"no 'layer2\.0\.downsample\.0.*shortcut='pad' \(not"),
        ({"preactivation": True}, small(), "no network with preactivation, got True"),
        ({"learn_steps": True}, small(), "no network with learn_steps, got True"),
        ({"kept": ((0,), (0,))}, small(), r"no network with kept, got \(\(0,\), \(0,\)\)"),
        ({}, {"state_dict": small()}, "give their entry 'state_dict'"),
        ({}, {}, r"no 'conv1\.weight'"),
        ({}, small() | {"linear.bias": np.ones(5)}, r"'fc\.bias' and 'linear\.bias' are of one"),
        ({}, small() | {"bn1.bias": np.full(4, np.nan)}, r"'bn1\.bias' must be finite, got nan"),
        ({}, small() | {"bn1.bias": np.ones(4, int)}, r"'bn1\.bias' must be floating.*int64"),
        ({}, small() | {"bn1.bias": object()}, r"'bn1\.bias' are of shape \(\)"),
    ],
)
def test_weights_that_do_not_fit_name_the_first_misfit(changes, given, message):
    with pytest.raises(ConfigError, match=message):
        load_torch(dataclasses.replace(SMALL, **changes), given)
