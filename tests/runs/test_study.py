"""A study runs what is left, tells what diverges, and reads the rest."""

import subprocess
import sys
import time

import filelock
import jax
import pytest

from jfed.errors import ConfigError, RunFolderError
from jfed.runs import study
from jfed.runs.config import run_preset


@pytest.fixture(autouse=True)
def compiled_quickly(monkeypatch, compiled):
    """In the workers too, and kept out of the user's cache."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    yield
    jax.config.update("jax_compilation_cache_dir", None)


SMOKE = run_preset("smoke").replace(iterations=(1,))


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_arms_run_once(tmp_path, workers, capsys):
    arms = {"IID/small": SMOKE, "diverges": SMOKE.replace(learning_rate=1e30)}
    seen = []
    runs, diverged = study.run_all(arms, tmp_path, seeds=1, workers=workers, on_run=seen.append)
    assert [run.arm for run in runs] == ["IID/small"]
    assert list(diverged) == [("diverges", 0)]
    assert diverged["diverges", 0].startswith("round 1 diverged")
    assert seen == [runs]
    assert runs[0].config["client"]["learning_rate"] == SMOKE.client.learning_rate
    assert (tmp_path / "IID-small" / "0" / "summary.json").exists()
    assert "[2 of 2]" in capsys.readouterr().err
    del arms["diverges"]
    assert study.run_all(arms, tmp_path, seeds=1, workers=workers) == (runs, {})
    assert capsys.readouterr().err == ""
    arms["IID/small"] = SMOKE.replace(epochs=3)
    with pytest.raises(RunFolderError, match=r"client.epochs is 1 there, 3 here"):
        study.run_all(arms, tmp_path, seeds=1, workers=workers)


def test_an_error_in_a_worker_is_told(tmp_path):
    arms = {"fits": SMOKE, "wrong": SMOKE.replace(train_examples=10**6)}
    with pytest.raises(ConfigError, match="train_examples is 1000000"):
        study.run_all(arms, tmp_path, seeds=1, workers=2)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = f"""
from jfed.runs import study
from jfed.runs.config import run_preset
if __name__ == "__main__":
    digits = run_preset("digits").replace(rounds=10**6, epochs=1)
    arms = {{str(n): digits.replace(clients=30 + n) for n in (0, 1)}}
    study.run_all(arms, __import__("pathlib").Path({str(tmp_path)!r}), seeds=1, workers=2)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)])
    for arm in "01":
        while not (tmp_path / arm / "0" / ".lock").exists():
            assert process.poll() is None
            time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    for arm in "01":
        while not _free(tmp_path / arm / "0" / ".lock"):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _free(lock):
    try:
        with filelock.FileLock(lock, timeout=0):
            return True
    except filelock.Timeout:
        return False


def test_arms_that_cannot_be_told_apart_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"folders of their own, got \['a b', 'A-b'\]"):
        study.run_all({"a b": SMOKE, "A-b": SMOKE}, tmp_path)
    with pytest.raises(ConfigError, match="at least one arm"):
        study.run_all({}, tmp_path)
