"""Every experiment runs at its smoke scale, as its docstring says."""

import csv
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from jfed.models.convolutions.convolution import FORMS
from jfed.models.flops import forward_flops
from jfed.models.presets import NetworkConfig
from jfed.provenance import cores
from jfed.runs.config import run_preset
from jfed.tiers import make_tiers
from jfed.tiers.communication import tree_size

SCRIPTS = pathlib.Path(__file__).parents[1] / "experiments"


# Each script, and the arms of its table at the smoke scale.
ARMS = {
    "flexible": ["IID/mixed", "IID/only 1", "IID/ResNet-digits"],
    "ablation": ["default", "proportional horizon"],
    "rivals": ["ode", "full ResNet"],
    "communication": [
        f"{net}-digits{codec}" for net in ("ResNet", "ODENet") for codec in ("", ", int8")
    ],
    "nefl_protocol": ["NeFL-D", "ode", "ode, fewer FLOPs"],
    "depth_transfer": ["fixed horizon/mixed"],
    "algorithms": [
        "digits, Dirichlet 0.5, mixed/FedAvg",
        "digits, Dirichlet 0.5, mixed/FedPer",
    ],
}


def _run(command, compiled):
    """Runs a script, compiled quickly."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=os.environ | quick
    )
    assert done.returncode == 0, done.stderr
    return done


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_a_study_runs_at_its_smoke_scale(name, tmp_path, compiled):
    table = tmp_path / "table.csv"
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--scale", "smoke", "--seeds", "1"]
    command += ["--workdir", str(tmp_path / "runs"), "--output", str(table), "--workers", "1"]
    first = _run(command, compiled)
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert list(dict.fromkeys(line["arm"] for line in lines)) == ARMS[name]
    assert all(0 <= float(line["accuracy"]) <= 1 for line in lines)
    own = f"python experiments/{name}.py --scale smoke --seeds 1"
    assert {line["command"] for line in lines} == {own}
    assert all(arm.rpartition("/")[2] in first.stdout for arm in ARMS[name])
    if name == "depth_transfer":
        assert {"0", "3", "1 Midpoint", "3 Midpoint"} <= {line["tier"] for line in lines}


SCALES = [(name, scale) for name in ARMS for scale in ("cpu", "full", "smoke")]
SCALES += [(name, "medium") for name in ("flexible", "rivals", "communication")]


@pytest.mark.parametrize(
    ("name", "scale"),
    [pytest.param(*x, marks=[pytest.mark.slow] * (x[1] in ("medium", "full"))) for x in SCALES],
)
def test_arms_differ_and_have_tiers(name, scale, monkeypatch):
    """No two arms train the same thing."""
    made = []
    for arm, config in load(name, monkeypatch).arms(scale).items():
        network = config.network.make(classes=10, channels=3)
        assert make_tiers(network, config.tiers).members, arm
        if "odenet" in config.network.model:  # whose own iterations are not used
            network = dataclasses.replace(network, iterations=0)
        rest = dataclasses.replace(config, network=NetworkConfig()).replace(eval_iterations=())
        made.append((network, rest))
    assert all(a != b for a, b in itertools.combinations(made, 2))


@pytest.mark.parametrize(("name", "rival"), [("rivals", "HeteroFL"), ("nefl_protocol", "NeFL-D")])
@pytest.mark.parametrize("scale", ["cpu", pytest.param("full", marks=pytest.mark.slow)])
def test_odenets_stay_within_the_budgets_of_their_rivals(name, rival, scale, monkeypatch):
    def costs(config):
        tiers = make_tiers(config.network.make(10, 3), config.tiers)
        like = jax.eval_shape(tiers.init, jax.random.key(0))
        shapes = [tier.shapes(like) for tier in tiers.members]
        flops = [
            forward_flops(tier.bound(), shape, (32, 32, 3))
            for tier, shape in zip(tiers.members, shapes, strict=True)
        ]
        return tree_size(like), flops

    arms = load(name, monkeypatch).arms(scale)
    ode, cheap, other = (costs(arms[arm]) for arm in ("ode", "ode, fewer FLOPs", rival))
    assert 0.9 * other[0] < ode[0] <= other[0]
    assert cheap[0] <= other[0]
    assert all(ours <= theirs for ours, theirs in zip(cheap[1], other[1], strict=True))


@pytest.mark.slow
def test_robustness(tmp_path, compiled):
    table = tmp_path / "table.csv"
    command = [sys.executable, str(SCRIPTS / "robustness.py"), "--scale", "smoke", "--seeds", "1"]
    command += ["--output", str(table), "--cache", str(compiled)]
    done = _run(command, compiled)
    with table.open() as file:
        lines = list(csv.DictReader(file))
    names = ["mean", "multi-Krum"]
    assert [line["aggregator"] for line in lines] == names
    assert {(line["attack"], line["hostile"]) for line in lines} == {("sign-flip", "0.2")}
    assert all(0 <= float(line["accuracy"]) <= 1 for line in lines)
    assert all(name in done.stdout for name in names)


def test_convolution_forms(tmp_path, compiled):
    table = tmp_path / "table.csv"
    command = [sys.executable, str(SCRIPTS / "convolution_forms.py"), "--scale", "smoke"]
    command += ["--output", str(table), "--repeats", "1", "--batch", "2"]
    _run(command, compiled)
    with table.open() as file:
        (line,) = csv.DictReader(file)
    assert line["auto"] in FORMS
    forms = ["im2col", "winograd2", "xla", *["auto, devices"] * (len(cores()) > 1)]
    assert all(float(line[form]) > 0 for form in forms)


@pytest.mark.slow
def test_plan_check(tmp_path, compiled):
    table = tmp_path / "table.csv"
    command = [sys.executable, str(SCRIPTS / "plan_check.py"), "--scale", "smoke"]
    _run([*command, "--output", str(table), "--repeats", "1"], compiled)
    with table.open() as file:
        lines = list(csv.DictReader(file))
    flops = [float(line["FLOPs"]) for line in lines]
    assert flops[1] == pytest.approx(flops[0])
    assert flops[2] == pytest.approx(2 * flops[0], rel=0.01)  # two clients on four lanes
    for name in ("arithmetic", "moving", "round", "temporary MB"):
        assert all(float(line[name]) > 0 for line in lines)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--minutes 5", "minutes is of jobs; it goes with --submit slurm"),
        ("--submit slurm --workers 2", "workers 2 is of runs on this machine, not of jobs"),
        ("--submit slurm --gpus -1", "gpus must be 0 or more, got -1"),
        ("--scale medium", "unknown scale 'medium'"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message, monkeypatch, tmp_path):
    script = load("script", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["study.py", "--workdir", str(tmp_path), *given.split()])
    with pytest.raises(SystemExit, match=f"study: error: {message}"):
        script.main("study.py", lambda scale: {"one": run_preset("smoke")})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_best_learning_rate_is_taken(tmp_path, monkeypatch, compiled):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    script = load("script", monkeypatch)
    arms = {"one": run_preset("smoke")}
    best, told = script.best_rates(arms, (1e30, 0.1), {}, tmp_path, script.Command(workers=1))
    assert best["one"].client.learning_rate == told["one"]["learning_rate"] == 0.1
    assert told["one"]["at_rate_1e+30"] is None  # it diverged
    assert 0 < told["one"]["at_rate_0.1"] < 1
    folders = sorted(path.name for path in (tmp_path / "search").iterdir())
    assert folders == ["one,-rate-0.1", "one,-rate-1e+30"]
    assert [p.name for p in (tmp_path / "search" / folders[0]).iterdir()] == ["1000"]
