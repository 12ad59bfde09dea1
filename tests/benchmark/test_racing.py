"""`jfed benchmark`, run as a user runs it."""

import importlib.util
import json

import pytest

from jfed.benchmark.sections import Machine, groups
from jfed.benchmark.settings import SECTIONS, Settings
from jfed.cli import main


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    flags = ["--scale", "smoke", "--slow", "--force", "--seed", "3", "--output", str(folder)]
    # Enough of the contenders to see each section through.
    flags += ["--only", "one device", "vmap over", "channels last", "FedJAX"]
    flags += ["clients", "one client", "2 lanes, map"]
    with pytest.MonkeyPatch.context() as patch:
        # How fast the processes run does not matter here; how fast they compile does.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(["benchmark", *SECTIONS, *flags]) == 0
    return folder


@pytest.mark.slow
def test_every_section_runs_at_smoke_scale(output):
    record = json.loads((output / "benchmark.json").read_text())
    assert list(record["sections"]) == list(SECTIONS)
    assert record["settings"]["seed"] == 3
    assert record["hardware"]["platform"] == "cpu"
    contenders = [c for s in record["sections"].values() for g in s for c in g["contenders"]]
    for contender in contenders:
        assert contender["error"] is None, contender["contender"]["name"]
        if contender["skipped"] is None:
            assert len(contender["seconds"]) == 1
            assert contender["median_seconds"] == contender["seconds"][0]
            assert contender["memory"]["host"] > 1e8
        else:
            library = {"fedjax": "fedjax"}.get(contender["contender"]["kind"], "torch")
            assert importlib.util.find_spec(library) is None
            assert library in contender["skipped"]
    for section in SECTIONS:
        assert (output / f"{section}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_contenders_are_compared(output):
    record = json.loads((output / "benchmark.json").read_text())
    for section in ("cnn", "ode"):
        (group,) = record["sections"][section]
        trained = [c for c in group["contenders"] if c["contender"]["task"] and c["seconds"]]
        assert len(trained) >= 1
        assert all(c["disagreement"] < 1e-3 for c in trained)
        assert group["peak_flops_per_second"] > 1e8
    clients = record["sections"]["scaling"][0]["contenders"]
    assert [c["work"]["clients"] for c in clients] == [1, 8]
    assert all(0 < seconds < 1 for c in clients for seconds in c["host_seconds"])


@pytest.mark.slow
def test_an_output_folder_is_never_overwritten(output, capsys):
    before = (output / "benchmark.json").read_bytes()
    assert main(["benchmark", "cnn", "--output", str(output)]) == 2
    assert f"the output folder '{output}' exists already" in capsys.readouterr().err
    assert (output / "benchmark.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["cn"], "unknown benchmark section 'cn'. Did you mean 'cnn'"),
        (["cnn", "--scale", "fll"], "unknown scale 'fll'. Did you mean 'full'"),
        (["cnn", "--repeats", "0"], "repeats must be 1 or more, got 0"),
        (["cnn", "--seed", "-1"], "got -1"),
        (["cnn", "--only", "Tensor"], "only ['Tensor'] leaves no contender in section 'cnn'"),
        (["accelerator"], "section 'accelerator' needs a GPU or TPU"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_settings_touch_no_folder(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *flags, "--output", "out"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_names_the_sections_suit_the_backend():
    assert Settings().chosen("cpu") == ("cnn", "ode", "scaling")
    assert Settings().chosen("gpu") == ("scaling", "accelerator")
    assert Settings(("accelerator", "accelerator"), force=True).chosen("cpu") == ("accelerator",)


def test_full_scale_has_the_sizes_that_it_promises():
    machine = Machine("gpu", cores=16, devices=1)
    lanes = [
        (c.engine.lanes or 1) for c in groups("accelerator", Settings(), machine)[0].contenders
    ]
    assert lanes[:8] == [1, 1, 2, 4, 8, 16, 32, 64]
    (cnn,) = groups("cnn", Settings(slow=True), Machine("cpu", cores=2, devices=1))
    names = [c.name for c in cnn.contenders]
    assert len(names) == len(set(names))
    assert "1,000 users with 50 each, 50 users a round, batch 10" in cnn.title
    sweeps = groups("scaling", Settings(), machine)
    assert [c.task.cohort for c in sweeps[0].contenders] == [1, 10, 100, 1000]
    assert [c.engine.devices for c in sweeps[2].contenders] == [1]  # there are no more
