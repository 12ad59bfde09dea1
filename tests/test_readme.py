"""What the README shows works as shown."""

import json
import pathlib
import re
import subprocess
import sys
import time

import pytest

import jfed
from jfed.algorithms.catalogue import make_algorithm
from jfed.algorithms.codecs import compressed
from jfed.algorithms.privacy import check_guarantee
from jfed.cli import run_command

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def _run(example, *shorter):
    for long, short in shorter:
        assert long in example
        example = example.replace(long, short)
    names = {"__name__": "__main__"}
    exec(example, names)
    return names


SIMULATION, ALGORITHM, STUDY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_simulation_runs():
    result = _run(SIMULATION, ("rounds=20", "rounds=1"), ("(1, 2, 4)", "(0, 1)"))["result"]
    assert set(result.accuracies) == {"0", "1"}
    assert len(result.history) == 1


def test_the_algorithm_runs():
    names = _run(ALGORITHM, ("rounds=5", "rounds=1"), ("(1, 2))", "(0, 1))"))
    assert isinstance(names["fedprox"](names["config"], 0.1), jfed.algorithms.Algorithm)


COMMANDS = [
    line.partition("#")[0].split()
    for line in re.findall(r"^jfed run .*", README, re.MULTILINE)
    if "..." not in line
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_settings_that_work_together(command):
    run = run_command.parse(command[2:]).run
    algorithm = make_algorithm(run.algorithm, run.client, run.server)
    algorithm = compressed(algorithm, run.codec.up, run.codec.down)
    assert isinstance(algorithm, jfed.algorithms.Algorithm)
    if run.privacy.clip is not None:
        check_guarantee(run.privacy, run.server, run.population.clients, attacks=False)


@pytest.mark.slow
def test_the_study_runs(tmp_path, monkeypatch, compiled):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    smaller = ('run_preset("digits")', 'run_preset("smoke")'), ("seeds=3", "seeds=1")
    runs = _run(STUDY, *smaller)["runs"]
    assert [run.arm for run in runs] == ["fixed", "proportional"]


@pytest.mark.slow
def test_the_first_command_reaches_90_percent_at_every_trained_count(tmp_path):
    assert "pip install -e . && jfed run\n" in README
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        "from jfed.cli import command; command()",
        "run",
        "--no-cache",
    ]
    began = time.monotonic()
    subprocess.run([*command, "--workdir", str(folder)], check=True, timeout=600)
    print(f"{time.monotonic() - began:.1f} s")
    tiers = json.loads((folder / "summary.json").read_text())["tiers"]
    assert [tier["tier"] for tier in tiers] == ["1", "2", "4"]
    assert all(tier["trained"] and tier["accuracy"] > 0.9 for tier in tiers)
