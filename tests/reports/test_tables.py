"""Tables of runs against figures worked out by hand."""

import dataclasses
import json
import shutil

import pytest

from jfed.cli import main
from jfed.errors import ConfigError, RunFolderError
from jfed.reports import finished, run_lines, tables as report

# Accuracies at 1 and 2 iterations by arm and seed.
ACCURACIES = {
    "mixed": {0: (0.50, 0.60), 1: (0.52, 0.64), 2: (0.48, 0.62)},
    "deep": {0: (0.40, 0.61), 1: (0.42, 0.63), 2: (0.39, 0.65)},
}


def tier(name, accuracy, trained=True):
    return {
        "kind": "iterations",
        "tier": name,
        "iterations": [int(name)],
        "solver": "Euler",
        "trained": trained,
        "accuracy": accuracy,
        "loss": 1.0,
        "parameters": 100,
        "flops": 10**6 * int(name),
        "bytes_down": 400,
        "bytes_up": 400,
    }


def write(folder, arm, seed):
    """A finished run of two evaluated rounds of 1 MB each, the first at half of the accuracy."""
    folder.mkdir(parents=True)
    accuracies = dict(zip(("1", "2"), ACCURACIES[arm][seed], strict=True))
    trained = {"1": arm == "mixed", "2": True}
    summary = {
        "rounds": 2,
        "tiers": [tier(n, a, trained[n]) for n, a in accuracies.items()],
        "bytes_down_total": 10**6,
        "bytes_up_total": 10**6,
        "hardware": {"machine": "a CPU", "devices": ["cpu"], "jax": "0.10", "commit": "abc"},
    }
    iterations = [1, 2] if arm == "mixed" else [2]
    config = {
        "seed": seed,
        "tiers": {"iterations": iterations},
        "rounds": 2,
        "data": {"data_dir": str(folder)},
        "inputs": {"partition": {"digest": f"{arm} {seed}"}, "tiers": {"members": {arm: {}}}},
        "made_with": {"jfed": arm},
    }
    lines = ["round,bytes_down_total,bytes_up_total,test_accuracy_1,test_accuracy_2"]
    one, two = accuracies.values()
    lines += [f"1,500000,500000,{one / 2},{two / 2}", f"2,1000000,1000000,{one},{two}"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folders(tmp_path):
    found = []
    for arm, seeds in ACCURACIES.items():
        for seed in seeds:
            found.append(tmp_path / arm / str(seed))
            write(found[-1], arm, seed)
    return found


@pytest.fixture
def runs(folders):
    return [finished.read(path, path.parent.name) for path in folders]


def _rows(table):
    lines = table.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("---")) + 1 :]


def cells(table):
    """Rows of a table by their first two columns."""
    rows = [line.split("  ") for line in _rows(table)]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in rows}


def test_arms_are_averaged_over_seeds(runs):
    found = cells(report.arm_table(runs, baseline="mixed", target=0.55))
    # The mixed arm's tiers have means of 55, 58 and 55 %, deep has one tier of 61, 63 and 65 %.
    assert found["mixed"][:4] == ["3", "2", "50.00 ± 2.00", "56.00 ± 1.73"]
    assert found["deep"][:4] == ["3", "1", "63.00 ± 2.00", "63.00 ± 2.00"]
    assert found["mixed"][4:7] == ["1.5", "0.4", "2.0"]
    assert found["mixed"][7:9] == ["2.00 ± 0.00", "2.00 ± 0.00"]  # rounds and MB
    assert len(found["deep"]) == 9  # one tier is not compared with the mean of two


def test_arms_of_as_many_tiers_are_compared(runs):
    """6, 5 and 10 points: t = 7 / (2.646 / sqrt(3)) = 4.58, beyond the 4.30 of two degrees."""
    others = [
        dataclasses.replace(run, arm="other", summary=run.summary | {"tiers": [deep, deep]})
        for run in runs
        if run.arm == "deep"
        for deep in run.trained
    ]
    found = cells(report.arm_table([*runs, *others], baseline="mixed"))
    assert found["other"][7] == "+7.00 ± 2.65 *"
    # The worst tiers: 61 - 50, 63 - 52 and 65 - 48.
    assert found["other"][8] == "+13.00 ± 3.46 *"


def test_a_difference_within_the_noise_has_no_star(runs):
    rows = report.tier_table(runs, baseline="mixed").splitlines()
    deep = [row for row in rows if row.strip().startswith("deep")]
    # At 1 iteration -10, -10 and -9 points; at 2 iterations +1, -1 and +3.
    assert "-9.67 ± 0.58 *" in deep[0]
    assert "1 (not trained)" in deep[0]
    assert deep[1].endswith("+1.00 ± 2.00")


def test_further_metrics_have_columns_where_runs_have_them(runs):
    """The deep arm's runs have none; one of the mixed arm's has no value."""
    assert "F1 [%]" not in report.tier_table(runs)
    values = {0: 0.5, 1: 0.6, 2: None}

    def measured(run):
        tiers = [tier | {"metrics": {"f1": values[run.seed]}} for tier in run.tiers]
        return dataclasses.replace(run, summary=run.summary | {"tiers": tiers})

    runs = [measured(run) if run.arm == "mixed" else run for run in runs]
    table = report.tier_table(runs, style="github").splitlines()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    place = rows[0].index("F1 [%]")
    assert "AUC [%]" not in rows[0]
    assert [row[place] for row in rows[2:]] == ["55.00 ± 7.07"] * 2 + [""] * 2


def test_bytes_to_a_target_that_was_not_reached(runs):
    found = cells(report.arm_table(runs, target=0.62))
    assert found["mixed"][7] == "reached by 0 of 3"
    assert found["deep"][7] == "reached by 2 of 3"
    assert runs[0].reaching(0.25).bytes_total == 10**6


def _timed(run):
    """The run with 10 simulated seconds a round, and one more for each seed."""
    history = [
        dataclasses.replace(point, seconds=(10.0 + run.seed) * point.round) for point in run.history
    ]
    summary = run.summary | {"simulated_seconds": history[-1].seconds}
    return dataclasses.replace(run, history=tuple(history), summary=summary)


def test_simulated_seconds_of_arms_that_have_some(runs):
    some = [_timed(run) if run.arm == "mixed" else run for run in runs]
    # The mixed arm reaches 55 % after two rounds, which last 20, 22 and 24 s.
    table = report.arm_table(some, target=0.55)
    assert table.splitlines()[0].split("  ")[-1].strip() == "s to 55 %"
    mixed, deep = _rows(table)
    assert "22 " in mixed
    assert mixed.endswith("22.00 ± 2.00")
    assert "nan" not in deep
    (curve,) = report.figures(some)["accuracy_by_time"].axes[0].lines
    assert curve.get_xdata().tolist() == [11, 22]
    assert curve.get_ydata().tolist() == pytest.approx([0.28, 0.56])
    assert "accuracy_by_time" not in report.figures(runs)
    assert "simulated" not in report.arm_table(runs, target=0.55)


def test_seconds_are_read_from_the_metrics(folders):
    path = folders[0] / "metrics.csv"
    rows = path.read_text().splitlines()
    ends = ["simulated_seconds", "1.5", "3.25"]
    path.write_text("\n".join(f"{row},{end}" for row, end in zip(rows, ends, strict=True)))
    run = finished.read(folders[0])
    assert [point.seconds for point in run.history] == [1.5, 3.25]
    assert [point.seconds for point in finished.read(folders[1]).history] == [None, None]
    assert run.reaching(0.25).seconds == 1.5


def test_one_seed_has_no_deviation():
    assert report.spread([0.5]) == "50.00"


def test_tiers_of_another_kind_are_not_compared(runs):
    """A width called 1 is no iteration count."""
    widths = [
        dataclasses.replace(
            run,
            arm="widths",
            summary=run.summary | {"tiers": [tier | {"kind": "ratio"} for tier in run.tiers]},
        )
        for run in runs
        if run.arm == "deep"
    ]
    rows = report.tier_table([*runs, *widths], baseline="mixed").splitlines()
    assert all(not row.endswith("*") for row in rows if "widths" in row)


def test_a_seed_that_is_there_twice_is_refused_with_both_folders(folders, tmp_path, capsys):
    other = tmp_path / "again"
    shutil.copytree(folders[0], other)
    assert main(["report", str(folders[0]), str(folders[1]), str(other)]) == 2
    told = f"seed 0 is there twice of the runs 'all': in {str(folders[0])!r} and in {str(other)!r}"
    assert told in capsys.readouterr().err
    table = tmp_path / "out" / "runs.csv"
    assert main(["report", str(folders[0]), "--output", str(table.parent)]) == 0
    with pytest.raises(ConfigError, match=rf"in '{table}' and in '{other}'"):
        report.text([*run_lines.read_lines(table), finished.read(other, "all")])


def test_tables_are_of_limited_width_whatever_the_arms(runs):
    """Words of long names are all there, in the column of arms and in those of differences."""
    words = [f"a_long_setting_{i} {i}," for i in range(10)]
    long = {"mixed": " ".join(words), "deep": " ".join(reversed(words))}
    named = [dataclasses.replace(run, arm=long[run.arm]) for run in runs]
    found = report.tier_table(named, baseline=long["mixed"])
    assert max(map(len, found.splitlines())) <= 160
    assert all(found.count(word.split()[0]) == 2 * 2 + 1 for word in words)
    assert long["deep"] in report.tier_table(named, style="github")


def test_sections_are_reported_apart(folders):
    runs = [finished.read(path, f"{path.name}/{path.parent.name}") for path in folders]
    assert list(report.sections(runs)) == ["0", "1", "2"]
    text = report.text(runs, baseline="mixed", style="github")
    assert text.count("|---") > 6
    assert text.count("mean vs mixed") == 3
    assert text.count(report.NOTE) == 1


def test_the_command_names_arms_by_their_settings(folders, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    output = tmp_path / "out"
    args = ["report", *map(str, folders), str(unfinished), "--output", str(output)]
    assert main([*args, "--baseline", "iterations 2"]) == 0
    told = capsys.readouterr()
    assert "iterations 1 2 " in told.out
    assert "unfinished' holds no finished run" in told.err
    assert len((output / "runs.csv").read_text().splitlines()) == 1 + 24
    figures = {path.name for path in output.glob("*.png")}
    assert figures == {
        "accuracy.png",
        "accuracy_by_bytes.png",
        "accuracy_by_flops.png",
        "accuracy_by_iterations.png",
    }


def test_what_cannot_be_reported_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown baseline 'mxed'. Did you mean 'mixed'"):
        report.arm_table(runs, baseline="mxed")
    with pytest.raises(ConfigError, match=r"target must be above 0 and at most 1, got 40"):
        report.arm_table(runs, target=40.0)
    with pytest.raises(ConfigError, match="unknown style 'markdown'"):
        report.tier_table(runs, style="markdown")
    with pytest.raises(RunFolderError, match="holds no run"):
        finished.read(tmp_path)
    with pytest.raises(RunFolderError, match="no finished run among"):
        finished.read_all([tmp_path / "nowhere"], {})


def test_a_run_of_an_older_version_is_named_as_such(folders):
    (folders[0] / "config.json").write_text('{"seed": 0, "iterations": [1, 2], "rounds": 2}')
    with pytest.raises(RunFolderError, match="is of an older version of jfed"):
        finished.read(folders[0])


@pytest.mark.parametrize(
    ("name", "there", "instead"),
    [
        ("summary.json", '"flops"', '"operations"'),
        ("summary.json", '"commit"', '"version"'),
        ("metrics.csv", "500000", "5\0"),
        ("metrics.csv", "test_accuracy_2", "test_accuracy_3"),
    ],
)
def test_a_damaged_run_is_refused(folders, name, there, instead):
    path = folders[0] / name
    path.write_text(path.read_text().replace(there, instead))
    with pytest.raises(RunFolderError, match="is damaged, or of another version of jfed"):
        finished.read(folders[0])


def test_output_that_cannot_be_written_is_told(folders, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", str(folders[0]), "--output", str(tmp_path / "file")]) == 2
    assert "error: cannot write to" in capsys.readouterr().err
