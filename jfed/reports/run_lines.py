"""Finished runs as lines of a CSV table and back, which is what `experiments/results/` holds.

A line is of one run, one evaluation and one tier. Lines of a run's last evaluation tell all that
tables and figures are made of; those of earlier ones only accuracies, and what they had cost.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jfed import files
from jfed.errors import RunFolderError
from jfed.reports.finished import FinishedRun, Point
from jfed.simulation.scores import METRICS, column

LOCAL = ("mean", "weighted", "worst", "p10", "std")
_INTEGERS = ("parameters", "flops", "bytes_up")
_COSTS = ("bytes_down", "training_flops", "peak_bytes")
_HARDWARE = {"machine": "hardware", "jax": "jax", "commit": "commit"}  # and what columns call it


def to_lines(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """The lines of runs, of any arms and seeds."""
    return [line for run in runs for line in (*_earlier(run), *_last(run))]


def _about(run: FinishedRun, point: Point, tier: Mapping[str, Any]) -> dict[str, Any]:
    found = {"arm": run.arm, "seed": run.seed, "round": point.round, "tier": tier["tier"]}
    found |= {"accuracy": round(point.accuracies[tier["tier"]], 6)}
    found |= {"bytes_total": point.bytes_total}
    found |= {} if point.local is None else {"local_mean": round(point.local, 6)}
    return found | ({} if point.seconds is None else {"simulated_seconds": point.seconds})


def _earlier(run: FinishedRun) -> list[dict[str, Any]]:
    return [_about(run, point, tier) for point in run.history[:-1] for tier in run.tiers]


def _last(run: FinishedRun) -> list[dict[str, Any]]:
    hardware, found = run.summary["hardware"], []
    about: dict[str, Any] = {name: hardware[key] for key, name in _HARDWARE.items()}
    about |= {"devices": " + ".join(hardware["devices"])}
    about |= {} if run.epsilon is None else {"epsilon": run.epsilon}
    if run.local is not None:
        about |= {f"local_{name}": round(run.local[name], 6) for name in LOCAL}
    for tier in run.tiers:
        own = _about(run, run.history[-1], tier)
        own |= {name: tier[name] for name in ("kind", "solver", "trained")}
        own |= {"iterations": " ".join(map(str, tier["iterations"] or ()))}
        own |= {"loss": round(tier["loss"], 6)}
        metrics = {name: x and round(x, 6) for name, x in tier.get("metrics", {}).items()}
        own |= {name: x for name, x in metrics.items() if name not in own}
        own |= {name: tier[name] for name in _INTEGERS} | {name: tier.get(name) for name in _COSTS}
        found.append(own | about)
    return found


def read_lines(path: epath.PathLike) -> list[FinishedRun]:
    """The runs whose lines a table holds; RunFolderError if it is none, or damaged.

    Of their settings they know the seed alone.
    """
    where, groups = files.absolute(path), dict[tuple[str, str], list[Mapping[str, str]]]()
    try:
        for line in csv.DictReader(io.StringIO(where.read_text())):
            groups.setdefault((line["arm"], line["seed"]), []).append(line)
        runs = [_run(lines, str(path)) for lines in groups.values()]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{str(path)!r} is no table of runs, damaged, or of another version of jfed: {error!r}."
        ) from error
    if not runs:
        raise RunFolderError(f"{str(path)!r} is a table without runs.")
    return runs


def _run(lines: Sequence[Mapping[str, str]], source: str) -> FinishedRun:
    """The run of such lines."""
    evaluations: dict[int, list[Mapping[str, str]]] = {}
    for line in lines:
        evaluations.setdefault(int(line["round"]), []).append(line)
    history, last = tuple(map(_point, evaluations.values())), evaluations[max(evaluations)]
    about, names = last[0], {key: last[0][name] for key, name in _HARDWARE.items()}
    summary = {
        "rounds": history[-1].round,
        "tiers": [_tier(line) for line in last],
        "hardware": names | {"devices": about["devices"].split(" + ")},
        "simulated_seconds": history[-1].seconds,
        "epsilon": _number(about.get("epsilon")),
        "local": {name: float(about[f"local_{name}"]) for name in LOCAL}
        if about.get("local_worst")
        else None,
    }
    return FinishedRun(about["arm"], {"seed": int(about["seed"])}, summary, history, source)


def _point(lines: Sequence[Mapping[str, str]]) -> Point:
    first, accuracies = lines[0], {line["tier"]: float(line["accuracy"]) for line in lines}
    others = _number(first.get("local_mean")), _number(first.get("simulated_seconds"))
    return Point(int(first["round"]), int(first["bytes_total"]), accuracies, *others)


def _tier(line: Mapping[str, str]) -> dict[str, Any]:
    metrics = [column(name) for name in METRICS if column(name) in line]
    return {
        "kind": line["kind"],
        "tier": line["tier"],
        "iterations": [int(n) for n in line["iterations"].split()] or None,
        "solver": line["solver"] or None,
        "trained": {"True": True, "False": False}[line["trained"]],
        "accuracy": float(line["accuracy"]),
        "loss": float(line["loss"]),
        "metrics": {name: _number(line[name]) for name in metrics},
        **{name: int(line[name]) for name in _INTEGERS},
        **{name: _number(line.get(name)) for name in _COSTS},
    }


def _number(text: str | None) -> float | None:
    return float(text) if text else None
