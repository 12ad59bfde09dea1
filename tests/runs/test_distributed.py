"""Several processes, as on several hosts, against one process with as many devices."""

import csv
import os
import shutil
import socket
import subprocess
import sys

import pytest

from jfed.cli import main

SMALL = (
    "--rounds 2 --epochs 1 --train-examples 160 --eval-examples 50 --clients 6 --iterations 1 "
    "--widths 4 --conv transposed --norm batch --seed 3 --no-cache"
).split()


def _start(arguments, devices):
    code = "import sys; from jfed.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", *SMALL, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def _metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_two_processes_equal_one_with_as_many_devices(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    join = ["--distributed", "--coordinator-address", address, "--num-processes", 2]
    both = ["--workdir", tmp_path / "two", "--checkpoint-every", 1]
    processes = [_start([*join, "--process-id", i, *both], 2) for i in range(2)]
    processes.append(_start(["--workdir", tmp_path / "one"], 4))
    outputs = _finish(processes)
    assert "Run folder" in outputs[0]
    assert "Run folder" not in outputs[1]
    two, one = _metrics(tmp_path / "two"), _metrics(tmp_path / "one")
    assert len(two) == len(one) == 2
    for a, b in zip(two, one, strict=True):
        assert a["examples"] == b["examples"] == "160"
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
    assert float(two[1]["train_loss"]) < float(two[0]["train_loss"])
    (tmp_path / "two" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "2")
    _finish([_start([*join, "--process-id", i, *both], 2) for i in range(2)])
    again = _metrics(tmp_path / "two")
    assert [row["train_loss"] for row in again] == [row["train_loss"] for row in two]
    assert (tmp_path / "two" / "summary.json").exists()


def test_a_process_number_without_distributed_is_refused(capsys):
    assert main(["run", "--process-id", "1"]) == 2
    assert "process_id 1 goes with --distributed" in capsys.readouterr().err
