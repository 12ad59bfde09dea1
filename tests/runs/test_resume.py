"""Runs that are killed, terminated or run out of disk, as processes of their own."""

import csv
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jfed.cli import run_command
from jfed.runs.assembly import set_up
from jfed.runs.checkpoints import CheckpointConfig, Checkpoints

ROUNDS = 40
ARGUMENTS = (
    f"--rounds {ROUNDS} --epochs 1 --train-examples 300 --eval-examples 60 --clients 8 --cohort 4 "
    "--iterations 0 1 --eval-every 3 --widths 4 --conv transposed --server-optimizer adam "
    "--server-learning-rate 0.01 --seed 5"
).split()
# Compiled quickly; the run left alone is so too.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
EVERY_ROUND = ("--checkpoint-every", "1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of its own: what is killed may leave half a program behind."""
    return tmp_path_factory.mktemp("cache")


def _start(folder, cache, *, before="", more=EVERY_ROUND):
    code = f"{before}\nimport sys; from jfed.cli import main; sys.exit(main(sys.argv[1:]))"
    places = ["--workdir", str(folder), "--cache-dir", str(cache)]
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", *ARGUMENTS, *places, *more],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | QUICK,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process):
    return process.communicate(timeout=300)[0]


def _wait_for(process, path):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def _rows(folder):
    """The lines of metrics.csv, without the seconds, which no two runs share."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _state(folder):
    """The server's last state, from its checkpoint."""
    with jax.numpy_dtype_promotion("standard"):  # which Optax's Adam needs
        federation, _, _ = set_up(run_command.parse(ARGUMENTS).run)
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())
    saved = checkpoints.latest(federation.state_shapes)
    assert saved is not None
    return saved.state


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    process = _start(folder, cache)
    output = _finish(process)
    assert process.returncode == 0, output
    return folder


def _kill_until_finished(folder, cache, kills, rng):
    """Kills the run at random moments, most of them during its rounds and saves."""
    done = 0
    while True:
        process = _start(folder, cache)
        if done < kills:
            _wait_for(process, folder / "metrics.csv")
            time.sleep(rng.uniform(0, 2.5))
            process.kill()
        output = _finish(process)
        if process.returncode == 0:
            return done
        assert process.returncode == -signal.SIGKILL, output
        rows = _rows(folder)
        assert [row["round"] for row in rows] == [str(n + 1) for n in range(len(rows))]
        done += 1


def _check(folder, left_alone):
    assert _rows(folder) == _rows(left_alone)
    assert len(_rows(folder)) == ROUNDS
    jax.tree.map(np.testing.assert_array_equal, _state(folder), _state(left_alone))
    assert (folder / "summary.json").exists()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, cache, left_alone):
    assert _kill_until_finished(tmp_path / "run", cache, 2, random.Random(0)) >= 1
    _check(tmp_path / "run", left_alone)


@pytest.mark.slow
def test_a_run_killed_twenty_times_goes_on_as_if_nothing_had_happened(tmp_path, cache, left_alone):
    rng, kills = random.Random(1), 0
    for number in range(20):
        kills += _kill_until_finished(tmp_path / f"{number}", cache, 20 - kills, rng)
        _check(tmp_path / f"{number}", left_alone)
        if kills >= 20:
            return
    pytest.fail(f"only {kills} of 20 kills found a run under way")


@pytest.mark.slow
def test_a_terminated_run_saves_and_says_so(tmp_path, cache, left_alone):
    folder = tmp_path / "run"
    process = _start(folder, cache, more=["--checkpoint-every", "1000"])
    _wait_for(process, folder / "metrics.csv")
    while len(_rows(folder)) < 3:
        time.sleep(0.01)
    process.terminate()
    began = time.monotonic()
    output = _finish(process)
    assert process.returncode == 143, output
    assert time.monotonic() - began < 10
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    assert saved == [str(len(_rows(folder)))]
    assert f"stopped after round {saved[0]} of {ROUNDS}" in output
    metrics = folder / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-9] + "\n\0torn")
    process = _start(folder, cache, more=["--checkpoint-every", "1000"])
    output = _finish(process)
    assert "metrics.csv was damaged; rewritten from the checkpoint" in output
    assert process.returncode == 0, output
    _check(folder, left_alone)


def test_a_finished_run_is_left_as_it_is(cache, left_alone):
    def contents():
        return {p: p.read_bytes() for p in left_alone.rglob("*") if p.is_file()}

    before = contents()
    process = _start(left_alone, cache)
    assert "had finished already; nothing was changed" in _finish(process)
    assert process.returncode == 0
    assert contents() == before


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path, cache, left_alone):
    """Files may not grow beyond what 20 rounds of metrics need."""
    limit = sum(map(len, (left_alone / "metrics.csv").read_bytes().splitlines(True)[:21]))
    folder = tmp_path / "run"
    small_files = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""
    first = _start(folder, cache)
    _wait_for(first, folder / "metrics.csv")
    while not _rows(folder):  # before that, there is nothing to save
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    output = _finish(first)
    assert first.returncode == 143, output
    rows = len(_rows(folder))
    process = _start(folder, cache, before=small_files)
    output = _finish(process)
    assert process.returncode == 2, output
    assert "the same command goes on" in output
    # Not always the last line: Orbax's threads may complain as Python ends.
    assert any(line.startswith("jfed: error: cannot ") for line in output.splitlines()), output
    assert len(_rows(folder)) >= rows
    process = _start(folder, cache)
    assert process.wait(300) == 0
    _check(folder, left_alone)
