"""Several processes, as on several hosts: what they compute, and how they end together."""

import concurrent.futures
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from jfed.cli import main
from jfed.runs.checkpoints import stored
from jfed.runs.folder import claim

SMALL = (
    "--epochs 1 --train-examples 160 --eval-examples 50 --clients 6 --iterations 1 "
    "--widths 4 --conv transposed --norm batch --seed 3"
).split()


@pytest.fixture(scope="module", autouse=True)
def cache(compiled):
    """Where the processes keep what they compiled; what they run is mostly the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
        yield


def _start(arguments, devices, before=""):
    code = f"{before}\nimport sys; from jfed.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return _process([code, "run", *SMALL, *map(str, arguments)], environment)


def _process(code, environment):
    """A Python process; its output is to be read."""
    return subprocess.Popen(
        [sys.executable, "-c", *code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _join():
    """Flags of two processes that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    join = ["--distributed", "--coordinator-address", address, "--num-processes", 2]
    return [[*join, "--process-id", i] for i in range(2)]


def _start_both(flags, before=("", ""), own=((), ())):
    return [_start([*join, *flags, *own[i]], 2, before[i]) for i, join in enumerate(_join())]


def _outputs(processes, timeout=300):
    return [process.communicate(timeout=timeout)[0] for process in processes]


def _finish(processes):
    outputs = _outputs(processes)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def _end_alike(processes, message, status=2):
    """All end with the same line of an error, within a minute of each other."""
    with concurrent.futures.ThreadPoolExecutor() as pool:  # both are read, lest a pipe is full
        found = [pool.submit(process.communicate, timeout=300) for process in processes]
        concurrent.futures.wait(found, return_when="FIRST_COMPLETED")
        began = time.monotonic()
        outputs = [future.result()[0] for future in found]
        assert time.monotonic() - began < 60, outputs
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
        lines = [line for line in output.splitlines() if line.startswith("jfed: error: ")]
        assert any(message in line for line in lines), output


def _metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_equal_one_with_as_many_devices(tmp_path):
    same = ["--rounds", 2, "--metrics", "f1", "auc", "ece", "--workdir"]
    both = [*same, tmp_path / "two", "--checkpoint-every", 1]
    processes = _start_both(both)
    processes.append(_start([*same, tmp_path / "one"], 4))
    outputs = _finish(processes)
    assert "Run folder" in outputs[0]
    assert "Run folder" not in outputs[1]
    two, one = _metrics(tmp_path / "two"), _metrics(tmp_path / "one")
    assert len(two) == len(one) == 2
    for a, b in zip(two, one, strict=True):
        assert a["examples"] == b["examples"] == "160"
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
    for name in ("f1", "auc", "ece"):  # of examples on the devices of both
        column = f"test_{name}_1"
        assert float(two[1][column]) == pytest.approx(float(one[1][column]), abs=0.02)
    assert float(two[1]["train_loss"]) < float(two[0]["train_loss"])
    (tmp_path / "two" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "2")
    _finish(_start_both(both))
    again = _metrics(tmp_path / "two")
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in two]
    assert (tmp_path / "two" / "summary.json").exists()


@pytest.mark.slow
def test_two_processes_have_client_memory_codecs_and_tests_of_clients(tmp_path):
    """As one process with as many devices; then the last round anew, from a checkpoint."""
    flags = "--rounds 3 --cohort 4 --algorithm ditto --ditto-strength 1 --local-test 0.2"
    flags += (
        " --codec-up topk:0.5 --codec-down bfloat16 --checkpoint-every 1 --eval-every 1 --workdir"
    )
    processes = _start_both([*flags.split(), tmp_path / "two", "--images", "host"])
    processes.append(_start([*flags.split(), tmp_path / "one"], 4))
    _finish(processes)
    two, one = _metrics(tmp_path / "two"), _metrics(tmp_path / "one")
    for a, b in zip(two, one, strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)
        assert float(a["bytes_up"]) == pytest.approx(float(b["bytes_up"]), rel=0.02)
        local = float(a["local_accuracy_mean"]), float(b["local_accuracy_mean"])
        assert local[0] == pytest.approx(local[1], abs=0.03)
    assert len(list((tmp_path / "two" / "memory").glob("*.row"))) >= 4
    (tmp_path / "two" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "3")
    _finish(_start_both([*flags.split(), tmp_path / "two"]))
    again = _metrics(tmp_path / "two")
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in two]
    assert [row["local_accuracy_mean"] for row in again] == [
        row["local_accuracy_mean"] for row in two
    ]


def test_a_process_number_without_distributed_is_refused(capsys):
    assert main(["run", "--process-id", "1"]) == 2
    assert "process_id 1 goes with --distributed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_that_is_locked_ends_both(tmp_path):
    with claim(epath.Path(tmp_path / "run")):
        processes = _start_both(["--workdir", tmp_path / "run"])
        _end_alike(processes, "host 0: another process is running in")


NO_DATA = """
from jfed.data import sources
from jfed.errors import DataNotFoundError
def lost(*_):
    raise DataNotFoundError("digits are not here")
sources._digits = lost
"""


@pytest.mark.slow
def test_data_that_one_host_lacks_end_both(tmp_path):
    processes = _start_both(["--workdir", tmp_path / "run"], before=("", NO_DATA))
    _end_alike(processes, "host 1: digits are not here")
    assert not (tmp_path / "run").exists()


OTHER_VERSION = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.7" if name == "jfed" else version(name)
"""
OTHER_DATA = """
from jfed.data import sources
digits = sources._digits
def other(*args):
    found = digits(*args)
    found.train.images[0, 0, 0, 0] ^= 1
    return found
sources._digits = other
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "before", "message"),
    [
        (
            ["--learning-rate", "0.2"],
            "",
            "learning_rate is 0.1 on host 0, 0.2 on host 1",
        ),
        ([], OTHER_VERSION, "on host 0, '0.0.7' on host 1"),
        ([], OTHER_DATA, "hosts differ in what they train on: data.train.digest is"),
        (["--no-such-flag"], "", "host 1: Unrecognized options: --no-such-flag"),
    ],
    ids=["settings", "version", "data", "flag"],
)
def test_hosts_that_differ_end_with_the_difference(tmp_path, own, before, message):
    flags = ["--workdir", tmp_path / "run"]
    processes = _start_both(flags, before=("", before), own=((), own))
    _end_alike(processes, message)
    assert not (tmp_path / "run").exists()


LONG = ["--rounds", 3000, "--eval-every", 0, "--checkpoint-every", 5]


def _begun(processes, folder):
    """Waits until rounds are under way."""
    while not (folder / "metrics.csv").exists() or len(_metrics(folder)) < 3:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


SMALL_FILES = """
import os, resource, signal
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # where no half of a program should be left
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
"""
FAILS = """
from jfed.simulation import loop
check = loop.check_finite
def fails(record, *args, **options):
    if record.round == 7:
        raise ValueError("a cosmic ray")
    check(record, *args, **options)
loop.check_finite = fails
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "message"),
    [
        ((SMALL_FILES, ""), "host 0: cannot "),
        (("", FAILS), "host 1: the rounds failed with ValueError: a cosmic ray"),
    ],
    ids=["disk", "program"],
)
def test_an_error_in_mid_run_ends_both(tmp_path, before, message):
    processes = _start_both([*LONG, "--workdir", tmp_path / "run"], before)
    _end_alike(processes, message)
    assert (tmp_path / "run" / "checkpoints").exists()


FAILS_AT_THE_END = """
from jfed.runs import running
def fails(*_):
    raise ValueError("a cosmic ray")
running.summarise = fails
"""


@pytest.mark.slow
def test_a_summary_that_one_host_cannot_make_ends_both(tmp_path):
    flags = ["--rounds", 1, "--workdir", tmp_path / "run"]
    processes = _start_both(flags, ("", FAILS_AT_THE_END))
    _end_alike(processes, "host 1: the summary failed with ValueError: a cosmic ray")
    assert not (tmp_path / "run" / "summary.json").exists()


STUCK = FAILS.replace('raise ValueError("a cosmic ray")', "import time; time.sleep(1000)")
SLOW_TO_LEAVE = "from jfed.engine import hosts; hosts._POLL = 5.0"


IN_MEMORY = """
import sys
import jax
address, host, seed, fails = sys.argv[1:]
jax.distributed.initialize(address, 2, int(host))
import jfed

def callback(record):
    if record.round == 3 and fails == host:
        raise ValueError("a cosmic ray")

try:
    data = jfed.data.load("digits", train_examples=160, test_examples=50)
    clients = jfed.data.iid(data.train.labels, 6, seed=0)
    network = jfed.models.ODENetConfig(widths=(4,), iterations=1, channels=1, conv="transposed")
    tiers = jfed.tiers.ode(network, (1,))
    engine = jfed.EngineConfig(devices=2)
    found = jfed.simulate(
        data, clients, tiers, rounds=2000, callbacks=[callback], engine=engine, seed=int(seed)
    )
except jfed.errors.JfedError as error:
    print(f"jfed: error: {error}", flush=True)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "fails", "message"),
    [
        ((0, 1), "none", "seed is 0 on host 0, 1 on host 1"),
        ((0, 0), "1", "host 1: the callback __main__.callback raised ValueError('a cosmic ray')"),
    ],
    ids=["settings", "program"],
)
def test_runs_in_memory_end_alike_too(seeds, fails, message):
    address = _join()[0][2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        _process([IN_MEMORY, address, str(host), str(seed), fails], environment)
        for host, seed in enumerate(seeds)
    ]
    _end_alike(processes, message)


LEAVES = IN_MEMORY.replace(  # as after a run that both did
    "    clients =", "    import jfed.engine.hosts\n    sys.exit(2)\n    clients ="
)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_ends_too_early_ends_the_other(host):
    address = _join()[0][2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    code = [LEAVES if i == host else IN_MEMORY for i in range(2)]
    processes = [
        _process([text, address, str(i), "0", str(host)], environment)
        for i, text in enumerate(code)
    ]
    began = time.monotonic()
    output = processes[1 - host].communicate(timeout=300)[0]
    assert f"jfed: error: host {host} has ended, before versions and settings" in output
    assert processes[1 - host].returncode == 2
    assert processes[host].wait(timeout=60) == 2
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_first_host_that_is_stuck_leaves_last(tmp_path):
    """If it left while the other one waits for it, JAX would abort that one."""
    processes = _start_both(
        [*LONG, "--workdir", tmp_path / "run"], (STUCK, f"{FAILS}\n{SLOW_TO_LEAVE}")
    )
    _end_alike(processes, "host 1: the rounds failed with ValueError: a cosmic ray")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_killed_ends_the_other(tmp_path, victim):
    processes = _start_both([*LONG, "--workdir", tmp_path / "run"])
    _begun(processes, tmp_path / "run")
    os.kill(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    _outputs(processes, 300)
    assert time.monotonic() - began < 60
    assert processes[1 - victim].returncode != 0


SLOW_TO_SAVE = """
import time
from jfed.runs.checkpoints import Checkpoints
save = Checkpoints.save
def slow(*args):
    time.sleep(6)
    save(*args)
Checkpoints.save = slow
"""
IMPATIENT = "from jfed.engine import hosts; hosts._GRACE, hosts._LAST = 1.0, 0.0"


@pytest.mark.slow
def test_no_host_that_is_terminated_leaves_before_the_first_has_saved(tmp_path):
    flags = [*LONG, "--checkpoint-every", 3000, "--workdir", tmp_path / "run"]
    processes = _start_both(flags, (f"{SLOW_TO_SAVE}\n{IMPATIENT}", IMPATIENT))
    _begun(processes, tmp_path / "run")
    processes[0].terminate()
    outputs = _outputs(processes)
    assert [process.returncode for process in processes] == [143, 143], outputs
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [len(_metrics(tmp_path / "run"))]


WITH_MEMORY = (
    "--rounds 40 --cohort 4 --algorithm ditto --ditto-strength 1 --local-test 0.2 --eval-every 9 "
    "--codec-up topk:0.5 int8 --codec-down bfloat16 --images host"
).split()


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """A run of two processes with client memory and codecs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    _finish(_start_both([*WITH_MEMORY, "--workdir", folder]))
    return folder


def _same_end(folder, other):
    """The same numbers in every round, and the same weights, server state and client memory."""
    rows = [[row | {"seconds": ""} for row in _metrics(path)] for path in (folder, other)]
    assert rows[0] == rows[1]
    here, there = (stored(epath.Path(path)).state for path in (folder, other))
    jax.tree.map(np.testing.assert_array_equal, here, there)
    names = [f"{n}-{round_}.row" for n, round_ in enumerate(here["latest"]) if round_ >= 0]
    assert len(names) == 6
    for name in names:
        assert (folder / "memory" / name).read_bytes() == (other / "memory" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "every"), [(signal.SIGTERM, 1000), (signal.SIGKILL, 5)], ids=["terminated", "killed"]
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_goes_on_after_a_host_was_disturbed(tmp_path, left_alone, sent, every, victim):
    """SIGTERM to one host lets all save the same round; SIGKILL leaves the last checkpoint."""
    flags = [*WITH_MEMORY, "--checkpoint-every", every, "--workdir", tmp_path / "run"]
    processes = _start_both(flags)
    _begun(processes, tmp_path / "run")
    while len(_metrics(tmp_path / "run")) < 7:
        time.sleep(0.01)
    processes[victim].send_signal(sent)
    outputs = _outputs(processes)
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    statuses = [process.returncode for process in processes]
    if sent == signal.SIGTERM:
        assert statuses == [143, 143], outputs
        assert saved == [len(_metrics(tmp_path / "run"))]
    else:
        assert statuses[victim] == -signal.SIGKILL
        assert 0 < max(saved) < 40
    _finish(_start_both(flags))
    _same_end(tmp_path / "run", left_alone)
