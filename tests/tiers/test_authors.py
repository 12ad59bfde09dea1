"""The rivals against numbers that their authors' own code gave, on the same inputs.

Run from honggkang/nested-federated-learning (NeFL), diaoenmao/HeteroFL, and Flower's baselines
depthfl and fjord (fdef7afb1d), which are their authors'. Weights are made by their names there,
images from a seed, batch norms are in training. Logits are those of the first three classes.
"""

import dataclasses
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfed
from jfed import tiers as tiers_lib
from jfed.algorithms.algorithm import Merged, Server
from jfed.engine.merging import Delivered, Group, Report, merge
from jfed.models import ConvNetConfig, preset
from jfed.models.losses import Batch
from jfed.tiers.communication import tree_size
from jfed.tiers.ordered_dropout import dropout_loss

RESNET = preset("resnet-18")
LABELS = jnp.asarray([1, 3, 3, 7])


def _formula(name, shape):
    """The weights of an array of PyTorch's, by its name and shape."""
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) > 1:
        return x * np.sqrt(2 / np.prod(shape[1:]))
    return 0.1 * x + name.endswith("weight")


def _batch(size, present=None):
    images = np.random.default_rng(0).normal(size=(4, 3, size, size)).transpose(0, 2, 3, 1)
    return Batch(jnp.asarray(images, jnp.float32), LABELS, jnp.ones(4), present)


def _filled(shapes, torch_name):
    """Parameters of such shapes; `torch_name(path)` is what PyTorch calls the array there."""

    def fill(path, leaf):
        found = torch_name(jax.tree_util.keystr(path, simple=True, separator="/"))
        if found is None:
            return jnp.ones(leaf.shape)  # a step size
        turned = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim, tuple(range(leaf.ndim)))
        values = _formula(found, tuple(leaf.shape[axis] for axis in turned))
        return jnp.asarray(values.transpose(np.argsort(turned)), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _end(name):
    return {"kernel": "weight", "scale": "weight", "offset": "bias", "bias": "bias"}[name]


def _resnet_name(path, norm="bn{}", shortcut="downsample", classifier="fc"):
    """As in torchvision and NeFL; elsewhere some parts have other names."""
    parts = path.split("/")
    if parts[-1] == "step":
        return None
    number, end = 1, _end(parts[-1])
    if parts[0] == "classifier":
        return f"{classifier}.{end}"
    if parts[0] == "stages":
        stage, block = int(parts[1]) + 1, parts[2].removeprefix("block")
        prefix = f"layer{stage}.{block}."
        if parts[3] == "projection":
            inner = ".norm" if "{}.norm" in norm else ""
            return f"{prefix}{shortcut}." + ("0" if parts[4] == "conv" else f"1{inner}") + f".{end}"
        number = int(parts[4]) + 1
    else:
        prefix = ""
    kind = f"conv{number}" if parts[-2] == "conv" else norm.format(number)
    return f"{prefix}{kind}.{end}"


def _preactivation_name(path):
    parts = path.split("/")
    end = _end(parts[-1])
    if parts[0] != "stages":
        return {"classifier": "linear", "stem": "conv1", "norm": "n4"}[parts[0]] + f".{end}"
    prefix = f"layer{int(parts[1]) + 1}.{parts[2].removeprefix('block')}"
    if parts[3] == "projection":
        return f"{prefix}.shortcut.{end}"
    return f"{prefix}.{'n' if parts[3] == 'norms' else 'conv'}{int(parts[4]) + 1}.{end}"


def _conv_net_name(path):
    """Convolution, scaler, norm, relu, pooling, five to a layer; the last has no pooling."""
    parts = path.split("/")
    if parts[0] == "classifier":
        return f"blocks.21.{_end(parts[-1])}"
    if parts[0] == "biases":
        return f"blocks.{5 * int(parts[1])}.bias"
    return f"blocks.{5 * int(parts[1]) + 2 * (parts[0] == 'norms')}.{_end(parts[-1])}"


def _exit_name(path):
    """The exits of DepthFL: halvings are sequences of eight, six of which have weights."""
    parts = path.split("/")
    if parts[0] != "exits":
        return _resnet_name(path, norm="bn{}.norm")
    exit_, end = int(parts[1]) + 1, _end(parts[-1])
    if "linear" in parts:
        return f"{'fc_layer' if exit_ == 4 else f'middle_fc{exit_}'}.{end}"
    if parts[2] == "norm":
        return f"attention{exit_}.1.norm.{end}"
    at = f"attention{exit_}.0" if parts[2] == "attention" else f"scala{exit_}.{parts[3]}"
    kind, second = re.findall(r"(depthwise|pointwise|norms)/(\d)", path)[0]
    place = {"depthwise": 0, "pointwise": 1, "norms": 2}[kind] + 4 * int(second)
    return f"{at}.operations.{place}{'.norm' if kind == 'norms' else ''}.{end}"


def _check(found, expected):
    np.testing.assert_allclose(np.asarray(found)[..., :3], expected, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        (
            tiers_lib.nefl_d,
            [
                [0.39536726, 1.53668988, -1.38237453],
                [-0.23610796, 0.97480011, -1.14055908],
                [0.09339167, 0.69839513, -1.00885010],
                [-0.77590871, 0.61981130, -0.71969342],
            ],
        ),
        (
            tiers_lib.nefl_wd,
            [
                [-0.06519859, 1.03604257, 1.04570711],
                [-0.68225640, 0.48357719, 0.46449372],
                [-0.65230387, 0.99817002, 1.13842630],
                [0.16434081, 0.13758132, 0.12665206],
            ],
        ),
    ],
    ids=["D", "WD"],
)
def test_the_smallest_submodels_of_nefl(tiers, expected):
    network = dataclasses.replace(RESNET, entry="3x3-pool")
    found = tiers(network, (0.2,))
    (tier,), batch = found.members, _batch(32)
    params = _filled(tier.shapes(jax.eval_shape(found.init, jax.random.key(0))), _resnet_name)
    _check(jax.jit(tier.model.apply)(params, batch.images, batch.mask), expected)


@pytest.mark.parametrize(
    ("network", "name", "ratio", "loss", "expected"),
    [
        (
            ConvNetConfig(),
            _conv_net_name,
            0.5,
            2.85979867,
            [
                [0.46952888, 0.04550298, 0.29023463],
                [0.23126569, 0.20732759, -0.74183136],
                [0.60559553, -0.15942498, -1.19948006],
                [0.52743632, -0.39120215, -0.00393437],
            ],
        ),
        pytest.param(
            preset("preresnet-18"),
            _preactivation_name,
            0.25,
            2.48468018,
            [
                [0.17633754, -0.35201696, -0.08876597],
                [-0.25660133, -0.29913199, -0.51028788],
                [0.26415247, -0.38727173, -0.25226063],
                [0.03786512, 0.30615547, -0.87662077],
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            preset("preresnet-50"),
            _preactivation_name,
            0.125,
            2.56997628,
            [
                [-0.36242029, -1.36436713, 0.44979221],
                [0.67663753, -0.57573617, -0.30697560],
                [-0.08666709, -0.83522201, 0.37096858],
                [0.26916042, -1.00628436, -0.32908612],
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["conv", "resnet18", "resnet50"],
)
def test_networks_of_heterofl_with_its_scaler_and_masked_loss(network, name, ratio, loss, expected):
    found = tiers_lib.heterofl(network, (ratio,))
    (tier,) = found.members
    batch = _batch(16, present=jnp.zeros(10, bool).at[LABELS].set(True))
    params = _filled(tier.shapes(jax.eval_shape(found.init, jax.random.key(0))), name)
    logits = jax.jit(tier.model.apply)(params, batch.images, batch.mask)
    _check(logits, expected)
    masked, _ = jfed.models.cross_entropy(logits, batch)
    np.testing.assert_allclose(masked, loss, rtol=1e-3)


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        ("preresnet-18", (11_172_170, 2_796_714, 701_018, 176_178, 44_510)),
        ("preresnet-34", (21_280_330,)),
        ("preresnet-50", (23_513_162,)),
        ("heterofl-conv", (1_558_026, 391_946)),
    ],
)
def test_networks_of_heterofl_have_its_parameters(network, sizes):
    found = tiers_lib.heterofl(preset(network), [2.0**-i for i in range(len(sizes))])
    like = jax.eval_shape(found.init, jax.random.key(0))
    assert [tree_size(tier.shapes(like)) for tier in found.members] == list(sizes)


def test_heterofl_averages_each_entry_over_its_owners():
    """Clients of rates 1, 0.5 and 0.25 whose weights are all 1, 2 and 4."""
    network = ConvNetConfig(widths=(4, 8), channels=1, classes=4)
    tiers = tiers_lib.heterofl(network, (1.0, 0.5, 0.25))
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    groups = []
    for tier, value in zip(tiers.members, (1.0, 2.0, 4.0), strict=True):
        part = jax.tree.map(lambda x, v=value: jnp.full(x.shape, v), tier.shapes(like))
        report = Report((), jnp.ones(1, bool), jnp.zeros(1, bool))
        told = Delivered({"update": part}, {"update": jnp.ones(1)}, report)
        groups.append(Group([tier], told, jnp.zeros(1, int)))
    merged, _ = merge(like, groups)
    inner, middle, outer = 7 / 3, 1.5, 1.0
    kernel = merged["update"]["convs"][1]["kernel"][1, 1]  # [inputs, outputs]
    rows = [[inner, inner, middle, middle], [middle] * 4, [outer] * 4, [outer] * 4]
    np.testing.assert_allclose(kernel, [row + [outer] * 4 for row in rows], rtol=1e-6)
    linear = merged["update"]["classifier"]["linear"]
    expected = [[inner] * 4] * 2 + [[middle] * 4] * 2 + [[outer] * 4] * 4
    np.testing.assert_allclose(linear["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(linear["bias"], [inner] * 4, rtol=1e-6)


DEPTHFL = [
    [
        [-0.48627323, 0.53517312, -0.69902837],
        [0.26931894, 2.53945160, -0.62277436],
        [-0.66876197, 1.98827708, 0.50821304],
        [-0.24403059, 1.29815304, -0.46306404],
    ],
    [
        [0.91047913, -0.04149110, -0.46776199],
        [-0.32997149, 0.24996328, -0.20079249],
        [0.89635736, -0.07400089, -0.09801071],
        [0.28587502, -0.15717632, -0.24675927],
    ],
    [
        [-0.14266425, 0.85950565, -0.63612056],
        [-0.05173220, 1.14826965, 0.04569224],
        [0.33837521, 0.73089701, 0.44748718],
        [0.14171982, 1.80071032, 0.37736502],
    ],
    [
        [-0.25392416, 0.60964841, -0.48189175],
        [-1.53260493, 1.52945840, -1.50948381],
        [-1.37647605, -0.24056616, -0.84288955],
        [-0.30521178, -0.23669976, -0.89586139],
    ],
]


@pytest.mark.slow
def test_exits_and_loss_of_depthfl():
    """The loss with a weight of distillation of 0.5."""
    tiers = tiers_lib.depthfl(RESNET, distillation=0.5, ramp=0)
    like, batch = jax.eval_shape(tiers.init, jax.random.key(0)), _batch(16)
    variables = {
        "shared": {
            name: _filled(leaf, lambda _, name=name: _exit_name(name))
            for name, leaf in like["shared"].items()
        },
        "own": like["own"],
    }
    for tier, expected in zip(tiers.members, DEPTHFL, strict=True):
        params = tier.extract(variables, 0)
        _check(jax.jit(tier.model.apply)(params, batch.images, batch.mask), expected)
    loss, _ = jax.jit(tiers.members[-1].model.loss)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, 11.23020649, rtol=1e-3)


def test_the_server_of_depthfl_divides_h_by_all_clients():
    """Ten clients; two train a first entry, one a second one, none a third; then one the first."""
    tiers = tiers_lib.depthfl(RESNET)
    algorithm = jfed.algorithms.make_algorithm(
        jfed.algorithms.AlgorithmConfig(),
        jfed.ClientConfig(),
        jfed.ServerConfig(),
        tiers.algorithm,
    )
    server = Server(jnp.ones(3), algorithm.server_init(jnp.ones(3)))

    def step(server, means, owners):
        owners = jnp.asarray(owners, jnp.float32)
        update = jnp.where(owners > 0, jnp.asarray(means) - server.variables, 0)
        merged = Merged(
            {"update": update},
            owners,
            owners.max(),
            jnp.asarray([10.0, 5.0, 5.0]),
            jnp.int32(0),
            jax.random.key(0),
            jnp.float32(10),
        )
        return algorithm.server_step(server, merged)

    first = step(server, [(2.0 + 4.0) / 2, 5.0, 0.0], [2, 1, 0])
    np.testing.assert_allclose(first.variables, [3.4, 5.4, 1.0], rtol=1e-6)
    np.testing.assert_allclose(first.state, [-0.04, -0.04, 0.0], rtol=1e-6)
    second = step(first, [3.0, 0.0, 0.0], [1, 0, 0])
    np.testing.assert_allclose(second.variables, [3.36, 5.4, 1.0], rtol=1e-6)
    np.testing.assert_allclose(second.state, [-0.036, -0.04, 0.0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distillation", "losses"), [(0.0, (2.66673517, 2.83061600)), (1.0, (5.09968377, 4.98112106))]
)
def test_the_losses_of_fjord(distillation, losses):
    """A client of ratio 0.5, whose draw is 0.25 or 0.5: every loss is one of the two."""
    tiers = tiers_lib.fjord(RESNET, (0.25, 0.5, 1.0), distillation=distillation)
    tier, like = tiers.members[1], jax.eval_shape(tiers.init, jax.random.key(0))

    def name(path):
        return _resnet_name(path, shortcut="shortcut", classifier="linear")

    params = tier.extract(_filled(like, name), 0)
    loss = jax.jit(lambda key: tier.model.loss(params, _batch(32), key)[0])
    found = np.array([loss(jax.random.key(seed)) for seed in range(12)])
    near = np.abs(found[:, None] - np.array(losses)) < 2e-3
    assert near.any(1).all()
    assert near.any(0).all()


def test_the_widths_of_fjord_are_drawn_alike():
    def model(logit):
        return jfed.models.Model(
            lambda key: {"w": jnp.ones(1)},
            lambda params, images: jnp.zeros((len(images), 3)).at[:, 0].set(logit * params["w"]),
        )

    loss = dropout_loss([model(0.0), model(1.0), model(2.0)], 0.0)
    batch = Batch(jnp.zeros((2, 1, 1, 1)), jnp.zeros(2, int), jnp.ones(2))
    keys = jax.random.split(jax.random.key(0), 3000)
    found = jax.vmap(lambda key: loss({"w": jnp.ones(1)}, batch, key)[0])(keys)
    _, counts = np.unique(np.round(found, 4), return_counts=True)
    assert len(counts) == 3
    # 1000 each, but for 5 standard deviations.
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(3000 * (1 / 3) * (2 / 3))
