"""Exported tiers against the model itself, in ONNX Runtime, StableHLO and NumPy."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import export as jax_export
from safetensors import safe_open

import jfed
from jfed.cli import main
from jfed.data.preprocessing import ModelInputs
from jfed.errors import ConfigError, RunFolderError
from jfed.models.model import initialise
from jfed.simulation import exports
from jfed.simulation.prediction import Predictor
from jfed.tiers import single

ODENET = jfed.models.ODENetConfig(widths=(4, 6), channels=2)
RESNET = jfed.models.ResNetConfig(widths=(4, 8), blocks=(1, 1), channels=2)
LEARNED = dataclasses.replace(ODENET, learn_steps=True)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 2)).astype(np.uint8)
INPUTS = ModelInputs(
    (8, 8, 2), np.float32([100, 130]), np.float32([50, 70]), tuple("abcdefghij"), "uint8"
)
MAKERS = {
    "ode": lambda: jfed.tiers.ode(ODENET, (1, 2, 4)),
    "separable": lambda: jfed.tiers.ode(dataclasses.replace(ODENET, separable=True), (1, 2)),
    "learned": lambda: jfed.tiers.ode(LEARNED, (1, 2), sharing="norms-and-steps-per-depth"),
    "resnet": lambda: single(jfed.models.build(RESNET)),
    "group norm": lambda: single(jfed.models.build(dataclasses.replace(RESNET, norm="group"))),
    "width": lambda: jfed.tiers.heterofl(RESNET, (0.5, 1.0)),
    "exits": lambda: jfed.tiers.depthfl(RESNET),
}
SLOW = ("separable", "learned", "exits")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MAKERS]
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("jax2onnx") is None, reason="jax2onnx is not installed"
)


@functools.cache
def _compiled(model, what):
    """The model's function, with iterations as data, as runs test them."""

    def call(setting, *args):
        bound = model if isinstance(model, jfed.models.Model) else model(setting, None)
        return getattr(bound, what)(*args)

    return jax.jit(call)


def _call(what, tier, *args):
    setting = jax.tree.map(jnp.int32, tier.setting)
    return jax.device_get(_compiled(tier.model, what)(setting, *args))


def _measured(tier, params, pixels):
    """Statistics of the norms on these images."""
    images = jnp.asarray(INPUTS.standardise(pixels))
    if tier.bound().measure is None:
        return None
    return _call("measure", tier, params, images, jnp.ones(len(images)))


def _predictor(tiers, inputs=INPUTS):
    """Random parameters, and norms measured on other images than those that are classified."""
    variables = initialise(tiers.init, jax.random.key(0))
    tested = (*tiers.members, *tiers.tested)
    norms = {t.name: _measured(t, t.extract(variables, 0), 255 - PIXELS) for t in tested}
    return Predictor(tiers, tested, variables, norms, inputs)


def _logits(predictor, tier):
    """Of the model as it is tested."""
    params, norms = tier.extract(predictor.variables, 0), predictor.norms[tier.name]
    given = () if norms is None else (None, norms)
    return _call("apply", tier, params, jnp.asarray(INPUTS.standardise(PIXELS)), *given)


@needs_onnx
@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_gives_the_logits_of_every_tier(name, tmp_path):
    import onnx
    import onnxruntime

    predictor, file = _predictor(MAKERS[name]()), tmp_path / "model.onnx"
    for count, tier in enumerate(predictor.tested, 2):  # images: any number
        exports.write(predictor, tier, file, format="onnx")
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        kinds = {node.op_type for node in model.graph.node}
        assert "Conv" in kinds
        assert not kinds & {"Loop", "Scan", "If"}
        session = onnxruntime.InferenceSession(file)
        assert session.get_inputs()[0].type == "tensor(uint8)"
        (found,) = session.run(["logits"], {"pixels": PIXELS[:count]})
        expected = _logits(predictor, tier)[:count]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
        told = session.get_modelmeta().custom_metadata_map
        assert (told["tier"], told["pixels"]) == (tier.name, "uint8")
        assert json.loads(told["class_names"]) == list(INPUTS.class_names)


@pytest.mark.parametrize("name", NAMES)
def test_stablehlo_gives_the_logits_of_every_tier(name, tmp_path):
    predictor, file = _predictor(MAKERS[name]()), tmp_path / "model.stablehlo"
    for count, tier in enumerate(predictor.tested, 2):  # images: any number
        exports.write(predictor, tier, file, format="stablehlo")
        program = jax_export.deserialize(bytearray(file.read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        text = program.mlir_module()
        assert "stablehlo.convolution" in text
        assert "stablehlo.while" not in text
        folder = str(pathlib.Path(jfed.__file__).parents[1])
        assert folder.encode() not in file.read_bytes()  # the paths of this machine
        expected = _logits(predictor, tier)[:count]
        np.testing.assert_allclose(program.call(PIXELS[:count]), expected, atol=1e-4, rtol=0)


def test_a_file_of_few_iterations_holds_nothing_of_more(tmp_path):
    """Neither of the other tiers' own norms, nor of norms that only they measure."""
    predictor, file = _predictor(MAKERS["learned"]()), tmp_path / "model"
    sizes = {}
    for tier in predictor.tested:
        exports.write(predictor, tier, file, format="stablehlo")
        text = jax_export.deserialize(bytearray(file.read_bytes())).mlir_module()
        # Of three platforms each has its own branch, with the same operands.
        sizes[tier.name] = len(set(re.findall(r"stablehlo\.convolution\((.*?)\)", text)))
        exports.write(predictor, tier, file, format="safetensors")
        arrays = safetensors.numpy.load_file(file)
        own = {name: x.shape[0] for name, x in arrays.items() if name.startswith("params/own/")}
        assert set(own.values()) == {1}
        steps = arrays["params/own/steps/0"]
        assert steps.shape == (1, tier.iterations[0])
        row = [other.name for other in predictor.tested].index(tier.name)
        expected = predictor.variables["own"]["steps/0"][row, : tier.iterations[0]]
        np.testing.assert_array_equal(steps[0], expected)
    blocks = {"1": 1, "2": 2}  # two convolutions a step in two stages, and three outside
    assert sizes == {name: 3 + 4 * steps for name, steps in blocks.items()}


def _convolve(x, kernel):
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def test_safetensors_hold_all_that_logits_are_computed_from(tmp_path):
    """An ODENet of one stage, two Euler steps of 1/2, in NumPy from the file alone."""
    config = jfed.models.ODENetConfig(widths=(4,), channels=2)
    predictor = _predictor(jfed.tiers.ode(config, (2, 3)))
    tier, file = predictor.tested[0], tmp_path / "two.safetensors"
    exports.write(predictor, tier, file, format="safetensors")
    a = {name: x.astype(np.float64) for name, x in safetensors.numpy.load_file(file).items()}

    def norm(x, params, norms, at=...):
        mean, var = (a[f"norms/{norms}/{what}"][at] for what in ("mean", "var"))
        x = (x - mean) / np.sqrt(var + 1e-5)
        return x * a[f"params/{params}/scale"] + a[f"params/{params}/offset"]

    z = _convolve((PIXELS - a["images/mean"]) / a["images/std"], a["params/stem/conv/kernel"])
    z = np.maximum(norm(z, "stem/norm", "stem"), 0)
    for step in range(2):
        x = z
        for i in (1, 2):
            x = np.maximum(norm(x, f"functions/0/norm{i}", f"ode0/norm{i}", (step, 0)), 0)
            timed = np.concatenate([np.full((*x.shape[:3], 1), step / 2), x], -1)
            x = _convolve(timed, a[f"params/functions/0/conv{i}/kernel"])
        z = z + x / 2
    z = np.maximum(norm(z, "norm", "norm"), 0).mean((1, 2))
    logits = z @ a["params/classifier/linear/kernel"] + a["params/classifier/linear/bias"]
    np.testing.assert_allclose(logits, _logits(predictor, tier), atol=1e-4)
    with safe_open(file, "np") as opened:
        told = opened.metadata()
    assert told["class_names"] == json.dumps(INPUTS.class_names)
    assert {"tier": "2", "kind": "iterations", "iterations": "[2]"}.items() <= told.items()


def test_wide_pixels_keep_their_type(tmp_path):
    predictor = _predictor(MAKERS["resnet"](), INPUTS._replace(pixels="uint16"))
    tier, file = predictor.tested[0], tmp_path / "model"
    exports.write(predictor, tier, file, format="stablehlo", batch_size=5)
    program = jax_export.deserialize(bytearray(file.read_bytes()))
    assert str(program.in_avals[0]) == "uint16[5,8,8,2]"
    found = program.call(PIXELS.astype(np.uint16))
    np.testing.assert_allclose(found, _logits(predictor, tier), atol=1e-4)


def test_a_model_that_takes_no_unknown_number_of_images_says_what_to_give(tmp_path):
    own = jfed.models.Model(
        lambda key: {"w": jax.random.normal(key, (128, 10))},
        lambda params, x: x.reshape(len(x), 128) @ params["w"],
    )
    predictor, file = _predictor(single(own)), tmp_path / "model"
    tier = predictor.tested[0]
    with pytest.raises(ConfigError, match=r"pixels of shape \(N, 8, 8, 2\).* give batch_size"):
        exports.write(predictor, tier, file, format="stablehlo")
    assert not list(tmp_path.iterdir())
    exports.write(predictor, tier, file, format="stablehlo", batch_size=5)
    found = jax_export.deserialize(bytearray(file.read_bytes())).call(PIXELS)
    np.testing.assert_allclose(found, _logits(predictor, tier), atol=1e-4)


def test_without_the_converter_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    predictor = _predictor(MAKERS["resnet"]())
    with pytest.raises(ConfigError, match=r"pip install 'jfed\[onnx\]'"):
        exports.write(predictor, predictor.tested[0], tmp_path / "model.onnx", format="onnx")


def test_the_command_exports_a_finished_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--preset", "smoke", "--no-cache", "--workdir", "run"]) == 0
    assert main("export run --iterations 1 --format stablehlo".split()) == 0
    assert "Written to run-1.stablehlo: tier 1," in capsys.readouterr().out
    pixels = jfed.data.load("digits").test.images[:4]
    program = jax_export.deserialize(bytearray((tmp_path / "run-1.stablehlo").read_bytes()))
    result = jfed.load("run")
    found = jax.nn.softmax(program.call(pixels), -1)
    np.testing.assert_allclose(found, result.predict(pixels, iterations=1), atol=1e-4)
    before = set(tmp_path.iterdir())
    for flags, message in [
        ("--format onx", "unknown format 'onx'. Did you mean 'onnx'"),
        ("--format safetensors --iterations 7", "unknown tested tier '7'"),
        ("--format safetensors --output none/model", "cannot write to 'none/model'"),
        ("--format stablehlo --batch-size 0", "batch_size must be 1 or more, got 0"),
    ]:
        assert main(["export", "run", *flags.split()]) == 2
        assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(ConfigError, match="does not know its tiers"):
        dataclasses.replace(result, tiers=None).export("model", format="safetensors")
    (tmp_path / "run" / "summary.json").unlink()
    assert main("export run --format safetensors".split()) == 2
    assert "has not finished" in capsys.readouterr().err
    with pytest.raises(RunFolderError, match="holds no run"):
        jfed.load(tmp_path).export("model", format="safetensors")
