"""The files for clusters: what they start jfed with, and what they do once it has ended."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import time

import pytest
import yaml

from jfed.cli import run_command

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def _jobset():
    return yaml.safe_load((FOLDER / "jobset.yaml").read_text())


def _commands(text):
    """The flags of each `jfed run` in a shell text, with 1 in place of what the shell fills in."""
    found = re.findall(r"jfed run (--.*)", text.replace("\\\n", " "))
    for command in found:
        own = re.sub(r'"\$@" &|\$\*"', "", command)  # without those that a user adds
        yield shlex.split(re.sub(r"\$\{\w+:\?\}|\$\w+", "1", own))


def _all_commands():
    texts = {path.name: path.read_text() for path in SCRIPTS}
    jobset = _jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    texts["jobset.yaml"] = jobset["containers"][0]["args"][0]
    return {name: list(_commands(text)) for name, text in texts.items()}


@pytest.mark.parametrize("name", ["jobset.yaml", "slurm.sh", "tpu_slice.sh"])
def test_every_file_starts_one_run_of_several_hosts(name):
    assert set(_all_commands()) == {"jobset.yaml", "slurm.sh", "tpu_slice.sh"}
    (command,) = _all_commands()[name]
    launch = run_command.parse(command).launch
    assert launch.hosts.distributed
    assert launch.workdir is not None  # one by the time of day would be another one every time


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_jobset_agrees_with_its_command():
    spec = _jobset()["spec"]
    (hosts,) = spec["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert spec["coordinator"]["replicatedJob"] == hosts["name"]
    assert job["completionMode"] == "Indexed"  # which gives pods $JOB_COMPLETION_INDEX
    assert job["completions"] == job["parallelism"]
    (command,) = _all_commands()["jobset.yaml"]
    given = run_command.parse(command).launch.hosts
    assert given.num_processes == job["completions"]
    (container,) = job["template"]["spec"]["containers"]
    port = container["ports"][0]["containerPort"]
    assert given.coordinator_address == f"1:{port}"
    # One end of a pod ends the job, and that starts all jobs again.
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    codes = [rule.get("onExitCodes", {}).get("values") for rule in job["podFailurePolicy"]["rules"]]
    assert codes == [[143], None]


SRUN = 'trap "exit $STATUS" TERM; echo $$ > "$HERE/pid"; for i in {1..600}; do sleep 0.1; done'


@pytest.mark.parametrize(("status", "queued"), [(143, True), (0, False), (2, False)])
def test_a_slurm_job_whose_time_is_over_saves_and_queues_again(tmp_path, commands, status, queued):
    here = commands(srun=SRUN, scancel='kill $(< "$HERE/pid")', scontrol="")
    own = {"SHARED": str(tmp_path), "SLURM_JOB_ID": "17", "STATUS": str(status)}
    own["SLURM_CPUS_PER_TASK"] = "8"  # which srun does not take over by itself
    job = subprocess.Popen(["bash", str(FOLDER / "slurm.sh"), "--seed", "3"], env=os.environ | own)
    while not (here / "pid").exists():
        assert job.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # until it waits
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == status
    calls = (here / "calls").read_text().splitlines()
    assert calls[0].startswith("srun --kill-on-bad-exit=0 --cpus-per-task=8 ")
    assert calls[0].endswith(f"--workdir {tmp_path}/jfed-17 --seed 3")
    assert calls[1] == "scancel --signal=TERM 17"
    assert calls[2:] == ["scontrol requeue 17"] * queued


@pytest.mark.parametrize("status", [0, 1, 143])
def test_a_slurm_job_that_ends_by_itself_does_not_queue_again(tmp_path, commands, status):
    here = commands(srun=f"exit {status}", scontrol="")
    own = {"SHARED": str(tmp_path), "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", str(FOLDER / "slurm.sh")], env=os.environ | own, check=False)
    assert done.returncode == status
    assert "scontrol" not in (here / "calls").read_text()


# A slice has the state that is in a file; runs end as a list of states and statuses says.
GCLOUD = """
case "$*" in
    *describe*) cat "$HERE/state" ;;
    *create*) echo ACTIVE > "$HERE/state" ;;
    *delete*) : > "$HERE/state" ;;
    *"jfed run"*)
        read -r state status < "$HERE/ends"
        sed -i 1d "$HERE/ends"
        echo "$state" > "$HERE/state"
        exit "$status" ;;
esac
"""


@pytest.mark.parametrize(
    ("ends", "status", "slices"),
    [
        (["ACTIVE 0"], 0, 1),
        (["SUSPENDED 1", "SUSPENDED 1", "ACTIVE 0"], 0, 3),
        (["ACTIVE 1", "SUSPENDED 1", "ACTIVE 0"], 0, 2),
        (["ACTIVE 1"] * 5, 1, 1),
    ],
    ids=["finishes", "taken away", "fails", "fails always"],
)
def test_a_slice_that_is_taken_away_is_requested_again(commands, ends, status, slices):
    here = commands(gcloud=GCLOUD, sleep="")
    (here / "ends").write_text("".join(f"{end}\n" for end in ends))
    (here / "state").touch()
    own = {"BUCKET": "gs://mine", "JFED": "git+https://jfed"}
    script = ["bash", str(FOLDER / "tpu_slice.sh"), "--seed", "3"]
    done = subprocess.run(script, env=os.environ | own, check=False, timeout=60)
    assert done.returncode == status
    calls = (here / "calls").read_text().splitlines()
    runs = [call for call in calls if "jfed run" in call]
    assert len(runs) == len(ends)
    assert all(run.endswith("--workdir gs://mine/runs/jfed --seed 3") for run in runs)
    assert sum("queued-resources create" in call for call in calls) == slices
    assert "queued-resources delete" in calls[-1]  # nothing that costs is left


def test_a_slice_is_given_back_where_the_script_is_stopped(commands):
    here = commands(
        gcloud=GCLOUD.replace("read -r", "exec /bin/sleep 100; read -r"), sleep="exec /bin/sleep 1"
    )
    (here / "state").touch()
    own = {"BUCKET": "gs://mine", "JFED": "git+https://jfed"}
    script = ["bash", str(FOLDER / "tpu_slice.sh")]
    job = subprocess.Popen(script, env=os.environ | own, start_new_session=True)
    calls = here / "calls"
    while not calls.exists() or "jfed run" not in calls.read_text():
        assert job.poll() is None
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)  # as Ctrl-C, which a test may have been told to ignore
    assert job.wait(timeout=60) != 0
    assert "queued-resources delete" in calls.read_text().splitlines()[-1]
