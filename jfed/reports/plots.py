"""Figures of a run, as matplotlib figures that the caller shows or saves."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jfed.simulation.records import LocalEvaluation, Record

TIME = "simulated time [s]"
_NAMED = 40  # clients whose names have room below their bars


class ShownFigure(Figure):
    """A figure that notebooks show, without pyplot and its backends."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=100)
        return picture.getvalue()


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = ShownFigure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _curves(history: Sequence[Record]) -> dict[str, list[tuple[Record, float]]]:
    curves: dict[str, list[tuple[Record, float]]] = {}
    for record in history:
        for name, evaluation in record.evaluations.items():
            curves.setdefault(name, []).append((record, evaluation.accuracy))
    return curves


def accuracy(history: Sequence[Record], kind: str = "tier") -> Figure:
    """Test accuracy over rounds, one line a tier; `kind` tells what the tiers' names are."""
    figure, axes = _axes("round", "test accuracy")
    for name, points in _curves(history).items():
        axes.plot([r.round for r, _ in points], [a for _, a in points], marker=".", label=name)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title=kind)
    return figure


def accuracy_by_bytes(history: Sequence[Record], kind: str = "tier") -> Figure:
    """Test accuracy against all bytes sent so far in both directions, one line a tier."""

    def sent(record: Record) -> float:
        return (record.bytes_down_total + record.bytes_up_total) / 1e6

    return _accuracy_by("communication [MB]", history, sent, kind)


def accuracy_by_time(history: Sequence[Record], kind: str = "tier") -> Figure:
    """Test accuracy over simulated seconds, one line a tier; every record has some."""
    return _accuracy_by(TIME, history, lambda record: record.simulated_seconds or 0.0, kind)


def _accuracy_by(
    xlabel: str, history: Sequence[Record], place: Callable[[Record], float], kind: str
) -> Figure:
    figure, axes = _axes(xlabel, "test accuracy")
    for name, points in _curves(history).items():
        x, y = [place(record) for record, _ in points], [value for _, value in points]
        axes.plot(x, y, marker=".", label=name)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(title=kind)
    return figure


class Reached(NamedTuple):
    """What a tier reached: accuracies from 0 to 1, one for each seed, at a place on an x axis."""

    x: float
    accuracies: Sequence[float]
    trained: bool


def accuracy_curves(xlabel: str, curves: Mapping[str, Sequence[Reached]]) -> Figure:
    """Test accuracy of tiers, a line for each label: mean, and standard deviation over seeds.

    Full markers are tiers that clients trained, hollow ones were only evaluated.
    """
    figure, axes = _axes(xlabel, "test accuracy")
    for number, (label, points) in enumerate(curves.items()):
        found, colour = sorted(points), f"C{number % 10}"
        x, mean = [p.x for p in found], [float(np.mean(p.accuracies)) for p in found]
        several = [len(p.accuracies) > 1 for p in found]
        deviation = [
            float(np.std(p.accuracies, ddof=1)) if many else 0.0
            for p, many in zip(found, several, strict=True)
        ]
        axes.errorbar(x, mean, deviation, color=colour, capsize=2, label=label)
        for p, y in zip(found, mean, strict=True):
            axes.plot(p.x, y, "o", color=colour, markerfacecolor=colour if p.trained else "white")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if all(p.x.is_integer() for points in curves.values() for p in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small")
    return figure


def accuracy_over(
    xlabel: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """Test accuracy over rounds, bytes or time: x and y for each label."""
    figure, axes = _axes(xlabel, "test accuracy")
    for label, (x, y) in curves.items():
        axes.plot(x, y, marker=".", label=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(fontsize="small")
    return figure


def classes_by_client(
    counts: np.ndarray, class_names: Sequence[str], client_names: Sequence[str] = ()
) -> Figure:
    """How many examples of each class each client holds, `counts` `[clients, classes]`."""
    figure, axes = _axes("client", "examples")
    tops = np.cumsum(counts, 1)
    for label, name in enumerate(class_names):
        colour = f"C{label}" if len(class_names) <= 10 else None
        below = tops[:, label] - counts[:, label]
        _bars(axes, tops[:, label], below, color=colour, label=name)
    _name_clients(axes, client_names)
    if len(class_names) <= 20:
        figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _bars(axes: Axes, tops: np.ndarray, below: Any = 0, **options: Any) -> None:
    """A bar at each of 0, 1, ..., drawn as one shape, however many they are."""
    edges = np.arange(len(tops) + 1) - 0.5
    low, high = (np.append(x, x[-1]) for x in np.broadcast_arrays(below, tops))
    axes.fill_between(edges, low, high, step="post", linewidth=0, **options)


def _name_clients(axes: Axes, names: Sequence[str]) -> None:
    """Names below the bars of clients, if they have some and there is room for them."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) <= _NAMED and not all(name.isdigit() for name in names):
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")


def local_accuracy(
    local: LocalEvaluation, kind: str = "tier", client_names: Sequence[str] = ()
) -> Figure:
    """Accuracy of every client on examples of its own, sorted, a colour for each tier.

    Args:
      local: of some clients or all.
      kind: what the tiers' names are.
      client_names: of all, by number, if they are to be told.
    """
    figure, axes = _axes("clients, by accuracy", "local accuracy")
    order = np.argsort(local.accuracies, kind="stable")
    values, tiers = np.asarray(local.accuracies)[order], np.asarray(local.tiers)[order]
    for number, name in enumerate(sorted(set(local.tiers))):
        own = np.where(tiers == name, values, 0)
        _bars(axes, own, color=f"C{number % 10}", label=name)
    _name_clients(axes, [client_names[local.clients[i]] for i in order] if client_names else [])
    axes.axhline(values.mean(), color="black", linewidth=1, linestyle="--", label="mean")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(title=kind, fontsize="small")
    return figure


def save(figure: Figure, path: epath.PathLike) -> None:
    """Writes a figure as PNG."""
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=150)
