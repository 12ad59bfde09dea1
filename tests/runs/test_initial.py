"""Runs that start from the weights of a file."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jfed
from jfed.cli import main
from jfed.errors import ConfigError, RunFolderError
from jfed.models import build
from jfed.models.model import path_name
from jfed.runs.assembly import set_up
from jfed.runs.config import run_preset

# A network that a few epochs teach something, and a federation that then leaves it as it is.
NETWORK = "--preset smoke --iterations 1 --widths 8 8 --train-examples 600 --eval-examples 200"
SOURCE = f"{NETWORK} --rounds 3 --epochs 2 --momentum 0.9 --learning-rate 0.1 --seed 1"
STILL = f"{NETWORK} --rounds 1 --learning-rate 1e-9 --seed 1"


def run(arguments, folder):
    flags = ["--no-cache", "--devices", "1", "--workdir", str(folder)]
    return main(["run", *arguments.split(), *flags])


def named(variables):
    """Arrays by jfed's names."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {path_name(path): np.array(leaf) for path, leaf in leaves}


def accuracy(folder):
    return jfed.load(folder).history[-1].evaluations["1"].accuracy


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run, whose weights are in a file beside it."""
    folder = tmp_path_factory.mktemp("source")
    assert run(SOURCE, folder / "run") == 0
    save_file(named(jfed.load(folder / "run").variables), folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def started(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("started") / "run"
    assert run(f"{STILL} --init {source / 'weights.safetensors'}", folder) == 0
    return folder


def test_a_folder_of_a_run_is_as_good_as_a_file_of_its_weights(source):
    config = run_preset("smoke").replace(iterations=(1,), widths=(8, 8))
    from_file, from_run = (
        set_up(config.replace(init=str(source / name))).federation.start.server.variables
        for name in ("weights.safetensors", "run")
    )
    for name, array in named(from_file).items():
        np.testing.assert_array_equal(named(from_run)[name], array)
    assert len(named(from_file)) == len(named(from_run))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no run: it has no config\.json"):
        set_up(run_preset("smoke").replace(init=str(tmp_path)))


@pytest.mark.slow
def test_a_run_that_learns_nothing_is_as_good_as_the_one_that_it_starts_from(
    source, started, tmp_path
):
    assert accuracy(started) == accuracy(source / "run")
    assert run(STILL, tmp_path / "random") == 0
    assert accuracy(tmp_path / "random") < accuracy(source / "run") - 0.2
    there = named(jfed.load(source / "run").variables)
    for name, value in named(jfed.load(started).variables).items():
        np.testing.assert_allclose(value, there[name], atol=1e-6)


def test_a_run_goes_on_with_the_same_weights_only(source, started, tmp_path, capsys):
    path = source / "weights.safetensors"
    again = f"{STILL} --init {path}"
    assert run(again, started) == 0
    assert "had finished already" in capsys.readouterr().out
    before = path.read_bytes()
    arrays = named(jfed.load(source / "run").variables)
    arrays["classifier/linear/bias"][3] += 1e-3
    try:
        save_file(arrays, path)
        assert run(again, started) == 2
    finally:
        path.write_bytes(before)
    assert "inputs.weights is " in capsys.readouterr().err
    assert run(STILL, started) == 2
    assert "initial.weights is " in capsys.readouterr().err
    settings = json.loads((started / "config.json").read_text())
    assert settings["initial"] == {"weights": str(path), "fresh": []}


def test_simulate_goes_on_with_the_same_weights_only(tmp_path):
    labels = np.arange(12, dtype=np.int32) % 3
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1)).astype(np.uint8)
    split = jfed.data.Split(images, labels)
    data = jfed.data.Dataset("mine", split, split, ("a", "b", "c"))
    model = jfed.models.Model(
        lambda key: {"w": jax.random.normal(key, (16, 3))},
        lambda params, images: images.reshape(images.shape[0], -1) @ params["w"],
    )

    def simulate(tiers):
        parts, folder = tuple(np.split(np.arange(12), 3)), tmp_path / "run"
        return jfed.simulate(data, parts, tiers, rounds=1, workdir=folder)

    def started(value):
        return jfed.tiers.start_from(model, {"w": np.full((16, 3), value)})

    result = simulate(started(0.5))
    simulate(started(0.5))
    assert np.abs(result.variables["w"] - 0.5).max() < 0.3
    for others in (started(0.25), model):
        with pytest.raises(jfed.RunFolderError, match=r"inputs\.weights is "):
            simulate(others)
    assert jfed.load(tmp_path / "run", model).tiers is not None


SMALL = run_preset("smoke").replace(model="resnet-digits", iterations=None)


def begin(config):
    federation = set_up(config).federation
    return jax.tree.map(np.asarray, federation.tiers.init(jax.random.key(3)))


@pytest.fixture
def resnet():
    """Weights of the network of `SMALL` by name."""
    config = SMALL.network.make(10, 1)
    return named(build(config).init(jax.random.key(8)))


def test_weights_of_half_precision_become_single(resnet, tmp_path):
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in resnet.items()}
    save_file(half, tmp_path / "weights")
    variables = named(begin(SMALL.replace(init=tmp_path / "weights")))
    for name, value in half.items():
        assert variables[name].dtype == np.float32
        np.testing.assert_array_equal(variables[name], value.astype(np.float32))


def test_what_is_fresh_need_not_fit_or_be_there(resnet, tmp_path):
    given = resnet | {"classifier/linear/kernel": np.ones((4, 1000), np.float32)}
    del given["classifier/linear/bias"]
    save_file(given, tmp_path / "weights")
    config = SMALL.replace(init=str(tmp_path / "weights"), init_fresh=("classifier/*",))
    variables, before = named(begin(config)), named(begin(SMALL))
    for name in variables:
        wanted = before if name.startswith("classifier/") else given
        np.testing.assert_array_equal(variables[name], wanted[name])


def torch_weights(classes=1000):
    """A ResNet of two stages with projections, in torchvision's names."""
    rng, found = np.random.default_rng(0), {}

    def add(conv, norm, *shape):
        found[f"{conv}.weight"] = rng.normal(size=shape)
        for end in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{end}"] = rng.uniform(size=shape[0])

    add("conv1", "bn1", 4, 1, 3, 3)
    for k, blocks in ((1, 4), (2, 5)):
        for i in range(blocks):
            for j in (1, 2):
                add(f"layer{k}.{i}.conv{j}", f"layer{k}.{i}.bn{j}", 4, 4, 3, 3)
    add("layer2.0.downsample.0", "layer2.0.downsample.1", 4, 4, 1, 1)
    found |= {"fc.weight": rng.normal(size=(classes, 4)), "fc.bias": rng.normal(size=classes)}
    return {name: value.astype(np.float32) for name, value in found.items()}


PROJECTING = SMALL.replace(shortcut="projection")


@pytest.mark.slow
def test_weights_of_pytorch_start_methods(tmp_path):
    given = torch_weights()
    save_file(given, tmp_path / "weights")
    config = PROJECTING.replace(init=tmp_path / "weights", init_fresh=("classifier/*",))
    kernel = given["layer2.3.conv1.weight"]
    name = "stages/1/block3/layers/0/conv/kernel"
    for method in ({"method": "nefl-w", "ratios": (0.5, 1.0)}, {"method": "depthfl"}):
        variables = begin(config.replace(**method))["shared"]
        np.testing.assert_array_equal(variables[name][2, 0, 3, 1], kernel[1, 3, 2, 0])


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        ({}, {"extra/kernel": np.ones(3)}, "no place for weights 'extra/kernel' of init"),
        ({}, {"stem/norm/scale": None}, r"no weights 'stem/norm/scale' of shape \(4,\)"),
        (
            {},
            {"classifier/linear/bias": np.ones(7)},
            r"'classifier/linear/bias' are of shape \(7,\), .* \(10,\).*--init-fresh 'classifier/",
        ),
        ({}, {"stem/norm/scale": np.full(4, np.nan)}, "'stem/norm/scale' must be finite"),
        ({"init_fresh": ("fc/*",)}, {}, r"'fc/\*' matches no entry.* 'classifier/\*'"),
        ({"model": "odenet-digits"}, {}, r"init has no weights '[a-z0-9/]+' of shape \("),
    ],
)
def test_weights_that_do_not_fit_the_network_are_refused(
    changes, change, message, resnet, tmp_path
):
    given = {name: value for name, value in (resnet | change).items() if value is not None}
    save_file(given, tmp_path / "weights")
    with pytest.raises(ConfigError, match=message):
        set_up(SMALL.replace(init=tmp_path / "weights", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"'fc\.weight' are of shape \(1000, 4\).*--init-fresh 'classifier/\*'"),
        (
            {"shortcut": "pad", "init_fresh": ("classifier/*",)},
            r"no place for weights 'layer2\.0\.downsample\..*with shortcut='projection'",
        ),
        (
            {"model": "odenet-digits", "shortcut": None},
            r"'bn1\.bias', .* ResNets, not into the ODENet",
        ),
    ],
)
def test_weights_of_pytorch_that_do_not_fit_are_refused(changes, message, tmp_path):
    save_file(dict(reversed(torch_weights().items())), tmp_path / "weights")
    with pytest.raises(ConfigError, match=message):
        set_up(PROJECTING.replace(init=tmp_path / "weights", **changes))


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "empty"])
def test_what_is_no_file_of_weights_is_told_by_its_path(kind, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    if kind == "text":
        path.write_text("nothing of the kind " * 9)
    elif kind != "missing":
        save_file({"a": np.ones(3, np.float32)} if kind == "cut" else {}, path)
        path.write_bytes(path.read_bytes()[: -2 if kind == "cut" else None])
    assert run(f"--preset smoke --init {path}", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"jfed: error: init {'' if kind == 'empty' else 'must be '}" in said
    assert repr(str(path)) in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_fresh_entries_need_weights():
    with pytest.raises(ConfigError, match=r"init_fresh needs .*got \('stem/\*',\) alone"):
        run_preset("smoke").replace(init_fresh=("stem/*",))
