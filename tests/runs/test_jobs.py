"""Runs as jobs: what Slurm is asked for, and what becomes of jobs that end in one way or another.

Slurm's commands are stand-ins: `sbatch` numbers the jobs that it is given, `squeue` tells of those
in a file. Jobs that run are submitit's own processes, as `srun` would start them.
"""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from jfed.errors import ConfigError, RunFolderError
from jfed.runs import study
from jfed.runs.config import run_preset
from jfed.runs.jobs import JobConfig

submitit = pytest.importorskip("submitit")

SMOKE = run_preset("smoke").replace(iterations=(1,))
ARMS = {"IID/one": SMOKE, "two": SMOKE.replace(epochs=2)}
SBATCH = """
cp "$1" "$HERE/submitted"
echo >> "$HERE/count"
echo "Submitted batch job $(wc -l < "$HERE/count")"
"""


@pytest.fixture
def slurm(commands):
    """The folder of stand-ins; `queue` in it holds the jobs that have not ended."""
    here = commands(sbatch=SBATCH, squeue='cat "$HERE/queue"', srun="", scontrol="")
    (here / "queue").touch()
    return here


def _submit(tmp_path, arms=ARMS, **settings):
    return study.submit_all(arms, tmp_path / "runs", JobConfig(**settings), seeds=1)


def _end(tmp_path, number, *result):
    """Leaves behind what submitit's process does when a job has ended."""
    (submitted,) = (tmp_path / "runs" / "jobs").glob(f"*/0/{number}_submitted.pkl")
    submitit.core.utils.cloudpickle_dump(result, submitted.with_name(f"{number}_0_result.pkl"))


def test_settings_become_options_of_sbatch(tmp_path, slurm):
    _submit(
        tmp_path,
        {"one": SMOKE},
        partition="gpu",
        minutes=90,
        cpus=4,
        gpus=1,
        memory=1.5,
        slurm_args=("account=vision", "exclusive"),
    )
    lines = (slurm / "submitted").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {
        "partition=gpu",
        "time=90",
        "cpus-per-task=4",
        "gpus-per-node=1",
        "mem=1536MB",
        "account=vision",
        "exclusive",
        "requeue",
        "open-mode=append",
        "job-name=one-0",
        "signal=USR2@90",
    } <= set(asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 4}, "minutes must be 5 or more, got 4"),
        ({"cpus": 0}, "cpus must be 1 or more, got 0"),
        ({"gpus": -1}, "gpus must be 0 or more, got -1"),
        ({"memory": 0.0}, "memory must be a number, above 0, got 0.0"),
        ({"timeouts": -1}, "timeouts must be 0 or more, got -1"),
        ({"slurm_args": ("--qos=low",)}, "look like qos=low or exclusive, got '--qos=low'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        JobConfig(**settings)


def test_each_job_is_left_alone_until_it_has_ended(tmp_path, slurm):
    first = _submit(tmp_path)
    assert {key: job.number for key, job in first.jobs.items()} == {
        ("IID/one", 0): "1",
        ("two", 0): "2",
    }
    (slurm / "queue").write_text("1 PENDING\n2 RUNNING\n77 RUNNING\n")
    again = _submit(tmp_path)
    assert [job.state for job in again.jobs.values()] == ["PENDING", "RUNNING"]
    assert (slurm / "count").read_text().count("\n") == 2
    (slurm / "queue").write_text("77 RUNNING\n")
    _end(tmp_path, 1, "success", "round 1 diverged: inf")
    _end(tmp_path, 2, "error", "Traceback ...\nValueError: a cosmic ray\n")
    ended = _submit(tmp_path)
    assert (ended.runs, ended.diverged) == ([], {("IID/one", 0): "round 1 diverged: inf"})
    ((key, job),) = ended.jobs.items()
    assert (key, job.number, job.failed) == (("two", 0), "3", "ValueError: a cosmic ray")


def test_a_job_that_was_killed_is_submitted_anew(tmp_path, slurm):
    _submit(tmp_path, {"one": SMOKE})
    (job,) = _submit(tmp_path, {"one": SMOKE}).jobs.values()
    assert job.number == "2"
    assert job.failed.startswith("it was killed; see ")
    assert job.failed.endswith("/one/0/1_0_log.out")


def test_nothing_is_submitted_if_a_folder_is_of_other_settings(tmp_path, slurm):
    folder = tmp_path / "runs" / "two" / "0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").touch()
    with pytest.raises(RunFolderError, match=r"holds no run but \['thesis.txt'\]"):
        _submit(tmp_path)
    assert not (slurm / "count").exists()


def test_what_slurm_refuses_is_told(tmp_path, slurm, commands):
    commands(sbatch='echo "sbatch: error: Invalid partition name specified" >&2; exit 1')
    with pytest.raises(ConfigError, match=r"refuses the job 'IID-one-0': .*Invalid partition name"):
        _submit(tmp_path, partition="nowhere")
    commands(squeue='echo "squeue: error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(ConfigError, match=r"Slurm does not answer: .*Unable to contact"):
        _submit(tmp_path)


def test_a_machine_without_slurm_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no command squeue"):
        _submit(tmp_path)


def _metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


def _start(folder, number, compiled):
    """A job's process, as the script that was submitted starts it."""
    own = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": str(number), "JAX_PLATFORMS": "cpu"}
    own |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    command = [sys.executable, "-m", "submitit.core._submit", str(folder)]
    return subprocess.Popen(command, env=os.environ | own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "queued"), [(signal.SIGUSR2, ["scontrol requeue 1"]), (signal.SIGTERM, [])]
)
def test_a_job_that_has_to_go_saves_and_goes_on_where_it_was(
    tmp_path, slurm, compiled, sent, queued
):
    """Under the same number, as Slurm would start it again; it ends as a run left alone."""
    arms = {"one": SMOKE.replace(rounds=100, eval_every=20)}
    _submit(tmp_path, arms)
    run, folder = tmp_path / "runs" / "one" / "0", tmp_path / "runs" / "jobs" / "one" / "0"
    job = _start(folder, 1, compiled)
    while not (run / "metrics.csv").exists() or len(_metrics(run)) < 12:
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(sent)
    assert job.wait(timeout=60) not in (0, -sent)
    assert [c for c in (slurm / "calls").read_text().splitlines() if "scontrol" in c] == queued
    done = len(_metrics(run))
    assert 12 <= done < 100
    assert (run / "checkpoints" / str(done)).exists()
    assert _start(folder, 1, compiled).wait(timeout=300) == 0
    submitted = _submit(tmp_path, arms)
    assert (submitted.diverged, submitted.jobs) == ({}, {})
    alone = tmp_path / "alone"
    alone.mkdir()
    other = study.submit_all(arms, alone, JobConfig(), seeds=1)
    ((_, last),) = other.jobs.items()
    assert _start(alone / "jobs" / "one" / "0", last.number, compiled).wait(timeout=300) == 0
    assert _metrics(alone / "one" / "0") == _metrics(run)
