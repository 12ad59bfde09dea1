"""Tables of runs as CSV: what is read back gives the tables and figures that the folders gave."""

import csv
import dataclasses

import numpy as np
import pytest

from jfed import files
from jfed.cli import main
from jfed.errors import RunFolderError
from jfed.reports import tables
from jfed.reports.finished import FinishedRun, Point
from jfed.reports.run_lines import LOCAL, read_lines, to_lines


def _tier(name, accuracy, **more):
    own = {"kind": "iterations", "tier": name, "iterations": [int(name)] * 2, "solver": "Euler"}
    own |= {"trained": name != "4", "accuracy": accuracy, "loss": 1.25, "parameters": 100}
    own |= {"flops": 10**6 * int(name), "bytes_down": 400, "bytes_up": 300}
    return own | {"training_flops": 2.5e9, "peak_bytes": 10**6} | more


def _run(arm, seed, accuracies, **summary):
    """Two evaluations, the first at half of the accuracies and half of the bytes."""
    half = {name: value / 2 for name, value in accuracies.items()}
    history = (Point(10, 10**6, half), Point(20, 2 * 10**6, accuracies))
    hardware = {"machine": "a CPU", "devices": ["cpu", "cpu"], "jax": "0.10", "commit": "abc"}
    tiers = [_tier(name, value) for name, value in accuracies.items()]
    summary = {"rounds": 20, "tiers": tiers, "hardware": hardware} | summary
    return FinishedRun(arm, {"seed": seed}, summary, history)


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    return [
        _run(f"{section}/{arm}", seed, dict(zip("124", rng.uniform(0.4, 0.8, 3), strict=True)))
        for section in ("IID", "Dirichlet, 0.5")
        for arm in ("mixed", 'only "4"')
        for seed in (0, 1, 2)
    ]


def _written(runs, path):
    files.write_csv(to_lines(runs), path)
    return read_lines(path)


def test_tables_and_figures_are_those_of_the_runs(runs, tmp_path):
    found = _written(runs, tmp_path / "table.csv")
    asked = {"baseline": "mixed", "target": 0.3}
    assert tables.text(found, **asked) == tables.text(runs, **asked)
    assert [run.seed for run in found] == [run.seed for run in runs]
    for name, figure in tables.figures(runs[:6]).items():
        again = tables.figures(found[:6])[name]
        for ours, theirs in zip(figure.axes[0].lines, again.axes[0].lines, strict=True):
            np.testing.assert_allclose(ours.get_xydata(), theirs.get_xydata(), atol=1e-6)


def test_what_only_some_runs_have(runs, tmp_path):
    """Metrics, of which one has no value, tests of clients, privacy, simulated time, a nan."""
    own = dict.fromkeys(LOCAL, 0.25)
    history = tuple(
        Point(p.round, p.bytes_total, {"1": float("nan")}, p.round / 80, 1.5 * p.round)
        for p in runs[0].history
    )
    tiers = [_tier("1", float("nan"), metrics={"f1": 0.5, "auc": None}, peak_bytes=None)]
    summary = runs[0].summary | {"local": own, "epsilon": 3.5, "tiers": tiers}
    summary |= {"simulated_seconds": 30.0}
    one = dataclasses.replace(runs[0], history=history, summary=summary)
    first, second = _written([one, runs[1]], tmp_path / "table.csv")
    assert (first.local, first.epsilon, first.seconds) == (own, 3.5, 30.0)
    assert [(p.local, p.seconds) for p in first.history] == [(0.125, 15.0), (0.25, 30.0)]
    assert first.tiers[0]["metrics"] == {"f1": 0.5, "auc": None}
    assert np.isnan(first.average)
    assert first.tiers[0]["peak_bytes"] is None
    assert (second.local, second.epsilon, second.seconds) == (None, None, None)
    assert tables.text([one, runs[1]]) == tables.text([first, second])


def test_the_command_reads_what_it_wrote(runs, tmp_path, capsys):
    files.write_csv(to_lines(runs), tmp_path / "first.csv")
    assert main(["report", str(tmp_path / "first.csv"), "--output", str(tmp_path / "out")]) == 0
    first = capsys.readouterr().out
    assert main(["report", str(tmp_path / "out" / "runs.csv")]) == 0
    assert first.startswith(capsys.readouterr().out.rstrip())
    assert (tmp_path / "out" / "IID_accuracy_by_iterations.png").exists()


def test_what_is_no_table_of_runs_is_refused(runs, tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(RunFolderError, match=r"table\.csv' is no table of runs"):
        read_lines(path)
    path.write_text("arm,seed,accuracy\nmixed,0,0.5\n")
    with pytest.raises(RunFolderError, match=r"no table of runs.*'round'"):
        read_lines(path)
    path.write_text("arm,seed,round\n")
    with pytest.raises(RunFolderError, match="without runs"):
        read_lines(path)
    lines = to_lines(runs)
    for name, value in (("accuracy", "much"), ("trained", "perhaps"), ("iterations", "1.5")):
        files.write_csv([*lines[:-1], lines[-1] | {name: value}], path)
        with pytest.raises(RunFolderError, match=value):
            read_lines(path)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(RunFolderError, match="damaged"):
        read_lines(path)


def test_a_line_is_of_one_evaluation_and_tier(runs, tmp_path):
    files.write_csv(to_lines(runs[:1]), tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(line["round"], line["tier"]) for line in found] == [
        (round_, tier) for round_ in ("10", "20") for tier in "124"
    ]
    assert [line["trained"] for line in found] == ["", "", "", "True", "True", "False"]
