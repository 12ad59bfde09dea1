"""Finished runs as tables and figures: mean and standard deviation over seeds."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from tabulate import tabulate

from jfed import files
from jfed.errors import ConfigError, check_number, one_of
from jfed.reports import plots
from jfed.reports.comparisons import LEVEL, Difference, difference, told
from jfed.reports.finished import FinishedRun, Point
from jfed.reports.summary import in_units
from jfed.simulation.scores import METRICS, column

_ARM, _COLUMN = 36, 12  # characters of a line of an arm's name, and of a column's
STYLES = ("simple", "github", "latex_booktabs")  # Tabulate's names
NOTE = (
    "Accuracies: mean ± standard deviation over seeds; means of tiers are of the trained ones, "
    "however many clients each has. Differences are paired by seed, in points, * where two-sided "
    f"paired t-tests, corrected for all that are in the table (Holm), give p < {LEVEL:g}: so often "
    "noise alone gives a table any star. MFLOPs are of classifying an image; "
    "training GFLOPs are a client's in a round, memory is its peak while it trains."
)

Groups = Mapping[str, Sequence[FinishedRun]]
Measure = Callable[[FinishedRun], float | None]
# An accuracy from 0 to 1, for all runs or for each.
Target = float | Callable[[FinishedRun], float]
_MEASURES: dict[str, Measure] = {"mean": lambda run: run.average, "worst": lambda run: run.worst}


def goal_of(run: FinishedRun, target: Target) -> float:
    """The target of a run; ConfigError unless it is above 0 and at most 1."""
    goal = target(run) if callable(target) else target
    if check_number("target", goal, above=0.0) > 1:
        raise ConfigError(f"target must be above 0 and at most 1, got {goal!r}.")
    return goal


def by_arm(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """The runs of each arm, in their first order; ConfigError if an arm has a seed twice."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        group = groups.setdefault(run.arm, [])
        for other in group:
            if run.seed == other.seed:
                raise ConfigError(
                    f"seed {run.seed} is there twice of the runs {run.arm!r}: in {other.source!r} "
                    f"and in {run.source!r}; leave one of them out."
                )
        group.append(run)
    return groups


def arm_of(text: str, arms: Sequence[str]) -> str:
    """The arm of this name, or the only one with the text in its name; else ConfigError."""
    within = [arm for arm in arms if text in arm]
    return within[0] if len(within) == 1 else one_of("baseline", text, arms)


def _size(value: float) -> str:
    """A size in some unit, without decimals where it is not small."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of shares, in %; of a single one, itself."""
    return _spread(100 * np.asarray(values))


def _spread(values: np.ndarray) -> str:
    deviation = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():,.2f}{deviation}"


def arm_table(
    runs: Sequence[FinishedRun],
    *,
    baseline: str | None = None,
    target: Target | None = None,
    style: str = "simple",
) -> str:
    """One line for each arm.

    Args:
      runs: of any arms and seeds.
      baseline: the arm whose mean and worst tier others' are compared with, where they have as many
        tiers; none by default.
      target: adds the rounds, bytes and simulated seconds that it took to get there.
      style: one of `STYLES`.

    Raises:
      ConfigError: no such arm or style, a target outside of 0 to 1, an arm with a seed twice.
    """
    groups, rows, compared = by_arm(runs), [], _Compared()
    timed = any(run.seconds is not None for run in runs)
    for arm, group in groups.items():
        trained = [tier for run in group for tier in run.trained]
        row = {
            "arm": arm,
            "seeds": str(len(group)),
            "tiers": str(len(group[0].trained)),
            "worst tier [%]": spread([run.worst for run in group]),
            "mean of tiers [%]": spread([run.average for run in group]),
            "MFLOPs": f"{np.mean([tier['flops'] for tier in trained]) / 1e6:.1f}",
            "upload [kB]": _size(np.mean([tier["bytes_up"] for tier in trained]) / 1e3),
            "all traffic [MB]": f"{np.mean([run.bytes_total for run in group]) / 1e6:,.1f}",
        }
        if timed:
            lasted = [run.seconds for run in group if run.seconds is not None]
            row["simulated [s]"] = f"{np.mean(lasted):,.4g}" if lasted else ""
        local = [run.local for run in group if run.local is not None]
        if any(run.epsilon is not None for run in runs):
            spent = [run.epsilon for run in group if run.epsilon is not None]
            row["epsilon"] = f"{max(spent):.3g}" if spent else ""
        if any(run.local is not None for run in runs):
            for name in ("mean", "worst"):
                row[f"clients' {name} [%]"] = spread([own[name] for own in local]) if local else ""
        if target is not None:
            row |= _to_target(group, goal_of(group[0], target), timed)
        if baseline is not None:
            baseline = arm_of(baseline, tuple(groups))
            other = groups[baseline]
            same = len(other[0].trained) == len(group[0].trained)
            comparable = same and arm != baseline
            for title, measure in _MEASURES.items():
                found = _compare(group, other, measure) if comparable else None
                compared.add(row, f"{title} vs {baseline}", found)
        rows.append(row)
    compared.tell()
    return _format(rows, style)


def tier_table(
    runs: Sequence[FinishedRun], *, baseline: str | None = None, style: str = "simple"
) -> str:
    """One line for each arm and evaluated tier; arguments as of `arm_table`.

    A tier is compared with the one of the same name, if it is of the same kind: an iteration count
    with that count, not with a width.
    """
    groups, rows, compared = by_arm(runs), [], _Compared()
    there = {name for run in runs for tier in run.tiers for name in tier.get("metrics", {})}
    measured = [name for name in METRICS if column(name) in there]
    for arm, group in groups.items():
        for tier in group[0].tiers:
            key = tier["kind"], tier["tier"]

            def accuracy(run: FinishedRun, key: tuple[str, str] = key) -> float | None:
                found = {(t["kind"], t["tier"]): t["accuracy"] for t in run.tiers}
                return found.get(key)

            row = {
                "arm": arm,
                "tier": tier["tier"] if tier["trained"] else f"{tier['tier']} (not trained)",
                "accuracy [%]": spread([a for run in group if (a := accuracy(run)) is not None]),
                **{f"{METRICS[m].title} [%]": _metric(group, key, m) for m in measured},
                "MFLOPs": f"{tier['flops'] / 1e6:.1f}",
                "parameters": f"{tier['parameters']:,}",
                "upload [kB]": _size(tier["bytes_up"] / 1e3),
                "training GFLOPs": in_units(tier.get("training_flops"), 1e9),
                "memory [MB]": in_units(tier.get("peak_bytes"), 1e6),
            }
            if baseline is not None:
                baseline = arm_of(baseline, tuple(groups))
                other = groups[baseline]
                found = None if arm == baseline else _compare(group, other, accuracy)
                compared.add(row, f"vs {baseline}", found)
            rows.append(row)
    compared.tell()
    return _format(rows, style)


def _metric(group: Sequence[FinishedRun], key: tuple[str, str], name: str) -> str:
    """A further metric of a tier, where runs of the arm have it."""
    tiers = [tier for run in group for tier in run.tiers if (tier["kind"], tier["tier"]) == key]
    found = [tier.get("metrics", {}).get(column(name)) for tier in tiers]
    known = [value for value in found if value is not None]
    return spread(known) if known else ""


def _format(rows: Sequence[Mapping[str, str]], style: str) -> str:
    """A table; as text for people, with long names of arms and columns on several lines."""
    one_of("style", style, STYLES)
    names = list(rows[0])
    if style == "simple":
        titles = {n: textwrap.fill(n, _COLUMN, break_long_words=False) for n in names}
        rows = [{titles[n]: cell for n, cell in row.items()} for row in rows]
        rows = [{**row, "arm": textwrap.fill(row["arm"], _ARM)} for row in rows]
    return tabulate(
        rows,
        headers="keys",
        tablefmt=style,
        disable_numparse=True,
        colalign=("left", *["right"] * (len(names) - 1)),
    )


def _to_target(group: Sequence[FinishedRun], target: float, timed: bool) -> dict[str, str]:
    """Rounds and bytes that an arm took to a target, and simulated seconds, in columns."""
    reached = [point for run in group if (point := run.reaching(target)) is not None]
    places: dict[str, Callable[[Point], float | None]] = {
        "rounds": lambda point: point.round,
        "MB": lambda point: point.bytes_total / 1e6,
    }
    if timed:
        places["s"] = lambda point: point.seconds

    def cell(place: Callable[[Point], float | None]) -> str:
        if len(reached) < len(group):
            return f"reached by {len(reached)} of {len(group)}"
        values = [value for point in reached if (value := place(point)) is not None]
        return _spread(np.array(values)) if values else ""

    return {f"{name} to {100 * target:g} %": cell(place) for name, place in places.items()}


def _compare(
    group: Sequence[FinishedRun],
    other: Sequence[FinishedRun],
    measure: Measure,
) -> Difference | None:
    ours, theirs = (
        {run.seed: value for run in runs if (value := measure(run)) is not None}
        for runs in (group, other)
    )
    return difference(ours, theirs)


class _Compared:
    """Cells of a table whose stars depend on each other."""

    def __init__(self) -> None:
        self._cells: list[tuple[dict[str, str], str, Difference | None]] = []

    def add(self, row: dict[str, str], name: str, found: Difference | None) -> None:
        """A cell to be told once all are known."""
        row[name] = ""
        self._cells.append((row, name, found))

    def tell(self) -> None:
        """Writes all cells into their rows."""
        texts = told([found for *_, found in self._cells])
        for (row, name, _), text in zip(self._cells, texts, strict=True):
            row[name] = text


def sections(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs by section: what their arm's name says before a slash, which is taken off."""
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        section, _, arm = run.arm.rpartition("/")
        found.setdefault(section, []).append(dataclasses.replace(run, arm=arm))
    return found


def text(
    runs: Sequence[FinishedRun],
    *,
    baseline: str | None = None,
    target: Target | None = None,
    style: str = "simple",
) -> str:
    """Both tables of every section, and what they mean; arguments as of `arm_table`."""
    parts = []
    for section, members in sections(runs).items():
        parts += [section] if section else []
        parts.append(tier_table(members, baseline=baseline, style=style))
        parts.append(arm_table(members, baseline=baseline, target=target, style=style))
    return "\n\n".join([*parts, NOTE])


def figures(runs: Sequence[FinishedRun]) -> dict[str, Figure]:
    """Accuracy of each arm over rounds, bytes and time, against FLOPs and iterations, by name."""
    groups, found = by_arm(runs), {}
    if max(len(run.history) for run in runs) > 1:
        places: dict[str, tuple[str, Callable[[Point], float | None]]] = {
            "accuracy": ("round", lambda point: point.round),
            "accuracy_by_bytes": ("communication [MB]", lambda point: point.bytes_total / 1e6),
            "accuracy_by_time": (plots.TIME, lambda point: point.seconds),
        }
        for name, (title, where) in places.items():
            curves = {arm: _over(group, where) for arm, group in groups.items()}
            if there := {arm: curve for arm, curve in curves.items() if curve is not None}:
                found[name] = plots.accuracy_over(title, there)
    flops = _reached(groups, lambda tier: tier["flops"] / 1e6)
    found["accuracy_by_flops"] = plots.accuracy_curves("MFLOPs an image", flops)
    counts = _reached(groups, lambda tier: tier["iterations"] and np.mean(tier["iterations"]))
    if counts:
        title = "iterations of an ODE block"
        found["accuracy_by_iterations"] = plots.accuracy_curves(title, counts)
    return found


def _over(
    group: Sequence[FinishedRun], place: Callable[[Point], float | None]
) -> tuple[list[float], list[float]] | None:
    """Places and accuracies, the tiers' mean, averaged over an arm's runs; None without a place."""
    count = min(len(run.history) for run in group)
    x = [[place(point) for point in run.history[:count]] for run in group]
    if any(value is None for row in x for value in row):
        return None
    y = [[run.average_at(point) for point in run.history[:count]] for run in group]
    return np.mean(np.asarray(x, float), 0).tolist(), np.mean(y, 0).tolist()


def _reached(
    groups: Groups, place: Callable[[Mapping[str, Any]], float | None]
) -> dict[str, list[plots.Reached]]:
    """The tiers of each arm and solver, where they have a place on the x axis."""
    curves: dict[str, list[plots.Reached]] = {}
    for arm, group in groups.items():
        solvers = {tier["solver"] for tier in group[0].tiers}
        for i, tier in enumerate(group[0].tiers):
            if (x := place(tier)) is None:
                continue
            accuracies = [run.tiers[i]["accuracy"] for run in group]
            label = f"{arm}, {tier['solver']}" if len(solvers) > 1 else arm
            point = plots.Reached(float(x), accuracies, tier["trained"])
            curves.setdefault(label, []).append(point)
    return curves


def save_figures(runs: Sequence[FinishedRun], folder: epath.PathLike) -> None:
    """Writes the figures of every section as PNG."""
    path = files.absolute(folder)
    path.mkdir(parents=True, exist_ok=True)
    for section, members in sections(runs).items():
        for name, figure in figures(members).items():
            title = f"{section} {name}".strip().replace(" ", "_")
            plots.save(figure, path / f"{title}.png")
