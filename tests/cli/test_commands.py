"""The command line, run as a user runs it."""

import csv
import json
import os
import pathlib
import re

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jfed.cli import run_command
from jfed.cli.commands import main
from jfed.cli.models_command import model_table

REPOSITORY = pathlib.Path(__file__).parents[2]
SMALL = (
    "--rounds 3 --epochs 1 --train-examples 200 --clients 6 --cohort 4 --iterations 0 1 "
    "--eval-iterations 2 --eval-solvers Heun --eval-every 2 --widths 4 8 --conv transposed --seed 1"
).split()


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory):
    """Keeps the tests' compiled programs out of the user's cache, and off for other tests."""
    folder = tmp_path_factory.mktemp("cache")
    _forget_cache()  # of a test before these
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "jfed"
    _forget_cache()


def _forget_cache():
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, cache_folder):
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)  # a relative folder, as the default is
        assert main(["run", *SMALL, "--workdir", folder.name]) == 0
    return folder


@pytest.mark.slow
def test_an_algorithm_codecs_privacy_and_tests_of_clients_go_together(tmp_path, capsys):
    flags = "--preset smoke --rounds 2 --iterations 1 --algorithm ditto --ditto-strength 0.5"
    flags += " --local-test 0.2 --codec-up topk:0.5 int8 --codec-down bfloat16 --weights count"
    flags += " --dp-clip 0.5 --dp-noise 2 --dp-delta 0.01 --seed 1 --workdir"
    assert main(["run", *flags.split(), str(tmp_path / "run")]) == 0
    said, log = capsys.readouterr()
    assert re.search(r"^round 2 of 2: loss \S+, train \S+, test 1: \S+$", log, re.MULTILINE)
    assert re.search(r"Clients are \([0-9.]+, 0.01\)-differentially private", said)
    assert re.search(r"Accuracy of clients on examples of their own: mean [0-9.]+%", said)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epsilon"] > 0
    assert set(summary["local"]["by_tier"]) == {"1"}
    tier = summary["tiers"][0]
    assert tier["bytes_up"] < 2 * tier["parameters"]  # half of the entries, a byte each, and where
    assert (tmp_path / "run" / "local_accuracy.png").exists()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert {"clients'", "worst"} <= set(capsys.readouterr().out.split())


def test_run_writes_its_folder(run_folder, cache_folder):
    assert any(cache_folder.iterdir())
    config = json.loads((run_folder / "config.json").read_text())
    assert config["rounds"] == 3
    assert config["seed"] == 1
    assert config["tiers"]["iterations"] == [0, 1]
    with (run_folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["test_accuracy_2"]) for row in rows] == [False, True, True]
    assert int(rows[2]["bytes_up_total"]) == sum(int(row["bytes_up"]) for row in rows)
    summary = json.loads((run_folder / "summary.json").read_text())
    names = ["0", "1", "2", "1 Heun", "2 Heun"]  # 0 iterations are the same with any solver
    assert [tier["tier"] for tier in summary["tiers"]] == names
    assert [tier["trained"] for tier in summary["tiers"]] == [True, True] + [False] * 3
    tier = summary["tiers"][0]
    assert tier["bytes_up"] == tier["bytes_down"] == 4 * tier["parameters"]
    assert tier["reduction"] == 1 - tier["bytes_up"] / tier["twin_bytes"]
    assert int(rows[0]["bytes_up"]) == 4 * tier["bytes_up"]
    for figure in (
        "accuracy",
        "accuracy_by_bytes",
        "accuracy_by_flops",
        "accuracy_by_iterations",
        "clients",
    ):
        assert (run_folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_devices_of_clients_and_a_deadline(tmp_path, capsys):
    """The tier of 1 iteration takes 2 ms for the model alone, the other one a tenth of that."""
    folder = tmp_path / "run"
    flags = "--devices-of-clients nvidia-t4@ethernet raspberry-pi-4@mobile --deadline 1e-3"
    assert main(["run", *SMALL, *flags.split(), "--workdir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "0.003 simulated seconds on the devices of the clients" in said
    assert {"training", "GFLOPs", "memory", "[MB]"} <= set(said.split("\n---")[0].split())
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["simulated_seconds"]) for row in rows] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert all(int(row["dropped"]) > 0 and int(row["delivered"]) > 0 for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["simulated_seconds"] == pytest.approx(3e-3)
    zero, one, *untrained = summary["tiers"]
    assert one["training_flops"] > 1.5 * zero["training_flops"] > 0
    assert one["peak_bytes"] > zero["peak_bytes"] > 3 * 4 * zero["parameters"]
    assert {tier["peak_bytes"] for tier in untrained} == {None}
    assert (folder / "accuracy_by_time.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(folder), "--target", "0.01"]) == 0
    told = capsys.readouterr().out
    assert {"simulated", "[s]"} <= set(told.split())
    assert "s to 1 %" in told


def test_a_run_folder_is_never_overwritten(run_folder, capsys):
    before = (run_folder / "metrics.csv").read_bytes()
    assert main(["run", *SMALL, "--workdir", str(run_folder), "--alpha", "2"]) == 2
    assert "other settings: partition.alpha is" in capsys.readouterr().err
    assert (run_folder / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_a_resnet_runs_in_the_same_federation(tmp_path, capsys):
    flags = [*SMALL[: SMALL.index("--iterations")], "--widths", "4", "8", "--conv", "transposed"]
    flags += ["--model", "resnet-digits", "--iterations", "--workdir", str(tmp_path / "run")]
    assert main(["run", *flags]) == 0
    captured = capsys.readouterr()
    assert "full" in captured.out
    assert re.search(r"^read and compiled in \d+\.\d s$", captured.err, re.MULTILINE)


@pytest.mark.slow
def test_a_method_is_chosen_by_name(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = "--method heterofl --ratios 0.5 1 --mask-absent-classes --widths 4 8 --conv transposed"
    flags += " --rounds 1 --epochs 1 --train-examples 200 --clients 6 --no-cache"
    assert main(["run", *flags.split(), "--workdir", str(folder)]) == 0
    assert capsys.readouterr().out.split()[0] == "ratio"
    tiers = json.loads((folder / "summary.json").read_text())["tiers"]
    assert [(tier["kind"], tier["tier"]) for tier in tiers] == [("ratio", "0.5"), ("ratio", "1")]
    assert tiers[0]["bytes_up"] < 0.4 * tiers[1]["bytes_up"]
    assert not (folder / "accuracy_by_iterations.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "cifar10-flexibl"], "Did you mean 'cifar10-flexible'"),
        (["--preset=digit"], "Did you mean 'digits'"),
        (["--alpha", "0"], "alpha"),
        (["--solver", "Kvaerno3"], "'Kvaerno3' of diffrax"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "jfed prepare cifar10 --data-dir nowhere"),
        (["--clients", "5000"], "5000"),
        (["--iterations", "1", "-1"], "-1"),
        (["--method", "heterofl", "--ratios", "1.5"], "1.5"),
        (["--method", "full", "--ratios", "0.5"], "has no ratios"),
        (["--devices-of-clients", "nvidia-t5@5g"], "Did you mean 'nvidia-t4'"),
        (["--devices-of-clients", "nvidia-t4@5g", "--deadline", "1e-9"], "deadline of 1e-09 s"),
        (
            ["--devices-of-clients", "none.csv"],
            "cannot read the devices of clients from 'none",
        ),
    ],
    ids=str,
)
def test_bad_settings_touch_no_folder(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *flags, "--workdir", "run"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_keeps_what_it_recorded(tmp_path, capsys):
    flags = [*SMALL, "--learning-rate", "1e38", "--workdir", str(tmp_path / "run")]
    assert main(["run", *flags]) == 1
    assert "diverged" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.csv").read_text().startswith("round,")
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_run_in_which_nobody_delivers_writes_its_folder(tmp_path):
    flags = [*SMALL, "--dropout", "1", "--aggregator", "median", "--workdir", str(tmp_path / "run")]
    assert main(["run", *flags]) == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["train_loss"] for row in rows] == ["nan"] * 3
    assert [(row["delivered"], row["dropped"], row["bytes_up"]) for row in rows] == [
        ("0", "4", "0")
    ] * 3
    assert len({row["test_loss_1"] for row in rows[1:]}) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_loss"] is None


def test_an_unknown_field_names_the_close_ones(capsys):
    assert main(["run", "--epoch", "3"]) == 2
    assert "--epochs" in capsys.readouterr().err


def test_an_unknown_command_names_the_close_ones(capsys):
    assert main(["rum"]) == 2
    assert "Did you mean 'run'" in capsys.readouterr().err
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.slow
def test_flags_are_all_left_out_in_the_first_command_of_the_readme():
    assert run_command.parse([]) == run_command.parse(["--preset", "digits"])


def test_of_a_preset_that_is_given_twice_the_last_counts():
    smoke = run_command.parse(["--preset", "smoke"])
    assert run_command.parse(["--preset", "digits", "--preset=smoke"]) == smoke


@pytest.mark.slow
def test_models_lists_every_preset():
    table = model_table(32, (1,))
    lines = {line.split()[0]: line.split() for line in table.splitlines()[2:]}
    assert len(lines) == 40
    assert lines["preresnet-18"][1] == "11,172,170"
    assert lines["odenet-34"][-2:] == ["resnet-34", "92.6%"]
    assert lines["dsodenet-34"][-2:] == ["resnet-34", "96.1%"]
    assert lines["odenet-20"][2:4] == ["169,978", "679,912"]
    assert lines["resnet-110"][1] == "1,727,962"


def _cifar10():
    for folder in (
        os.environ.get("TFDS_DATA_DIR"),
        REPOSITORY.parent / "shared/tensorflow_datasets",
    ):
        if folder and (pathlib.Path(folder) / "cifar10").is_dir():
            return str(folder)
    return pytest.skip("CIFAR-10 is not prepared in TFDS_DATA_DIR")


@pytest.mark.slow
def test_cifar10_runs_on_real_images(tmp_path):
    flags = "--preset cifar10-flexible --rounds 1 --seed 1 --steps 1 --cohort 4 --iterations 1 2"
    flags += " --image-size 8 --widths 4 8 8 --conv transposed --eval-examples 500"
    flags += f" --data-dir {_cifar10()} --workdir {tmp_path / 'run'}"
    assert main(["run", *flags.split()]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_examples"] == 50000
    assert summary["test_examples"] == 500
