"""`jfed plan` as a user calls it."""

import json

import pytest

from jfed.cli import main, plan_command
from jfed.planning.compiling import plan_federation

SMOKE = ["plan", "--preset", "smoke"]


@pytest.mark.slow
def test_a_plan_is_printed_and_written(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main([*SMOKE, "--target", "cpu", "--devices", "2", "--json", str(path)]) == 0
    told = capsys.readouterr().out
    assert "cpu: 2 device(s) on 1 host(s)" in told
    assert "train 1, 2" in told
    found = json.loads(path.read_text())["the run"]
    assert [p["name"] for p in found["programs"]] == ["evaluate 1, 2", "train 1, 2", "server"]
    assert all(p["error"] is None for p in found["programs"])
    sent = [one for p in found["programs"] for one in p["counts"]["collectives"]]
    assert {kind for kind, *_ in sent} == {"all-reduce"}


@pytest.mark.slow
def test_settings_are_lined_up(capsys):
    args = ["--target", "cpu", "--compare", "mapping=map,vmap", "lanes=1,2", "--iterations", "1"]
    assert main([*SMOKE, *args]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].startswith("cpu: ")
    assert told.err.count("train 1: compiled after") == 4
    assert [" ".join(line.split()[:2]) for line in lines[4:]] == [
        "mapping=map lanes=1",
        "mapping=map lanes=2",
        "mapping=vmap lanes=1",
        "mapping=vmap lanes=2",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "h1000"], "unknown target 'h1000'. Did you mean 'h100'"),
        (["--target", "v5e:2by2"], "whole numbers joined by 'x'"),
        (
            ["--target", "cpu", "--compare", "lans=1,2"],
            "unknown setting 'lans'. Did you mean 'lanes'",
        ),
        (["--target", "cpu", "--compare", "lanes"], "must look like lanes=8,32, got 'lanes'"),
        (["--target", "cpu", "--compare", "lanes=0"], "lanes must be 1 or more, got 0"),
        (["--target", "cpu", "--compare", "lanes=2,a"], "--compare, lanes=a: --lanes: "),
        (["--target", "cpu", "--compare", "target=t4,l4"], "plan each target by itself"),
        (["--target", "cpu", "--devices", "99"], "devices must be at most the"),
    ],
)
def test_bad_input_is_told_before_anything_compiles(args, message, capsys):
    assert main([*SMOKE, *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_done_is_kept_where_a_comparison_is_stopped(tmp_path, capsys, monkeypatch):
    done = []

    def stopped(federation, target, on_program):
        if done:
            raise KeyboardInterrupt
        done.append(plan_federation(federation, target, on_program))
        return done[0]

    monkeypatch.setattr(plan_command, "plan_federation", stopped)
    path = tmp_path / "plan.json"
    args = ["--target", "cpu", "--compare", "lanes=1,2", "--iterations", "1", "--json", str(path)]
    assert main([*SMOKE, *args]) != 0
    told = capsys.readouterr().out
    assert "lanes=1" in told
    assert "lanes=2" not in told
    assert list(json.loads(path.read_text())) == ["lanes=1"]
