"""Figures of a run, as matplotlib figures that the caller shows or saves."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jfed.simulation.records import LocalEvaluation, Record

TIME = "simulated time [s]"
_NAMED = 40  # clients whose names have room below the axes
_LINE = 60  # characters of small text within the width of a figure


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


def _legend(figure: Figure, title: str | None = None) -> None:
    """The labels below the axes, which keep their size: the figure grows by what these take."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if not labels:
        return
    texts = [textwrap.fill(label, _LINE) for label in labels]
    columns = max(1, _LINE // (max(map(len, texts)) + 6))  # a line before each text, and space
    legend = figure.legend(
        handles, texts, title=title, ncols=columns, fontsize="small", loc="outside lower center"
    )
    figure.set_figheight(
        figure.get_figheight() + legend.get_window_extent().height / figure.get_dpi()
    )


def _of_accuracies(figure: Figure, title: str | None = None) -> Figure:
    """The figure with a legend, accuracies in %, and no ticks between whole numbers."""
    (axes,) = figure.axes
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if all(np.all(np.asarray(line.get_xdata(), float) % 1 == 0) for line in axes.lines):
        axes.xaxis.set_major_locator(_whole())
    _legend(figure, title)
    return figure


def _whole() -> MaxNLocator:
    """Ticks at whole numbers, also where only one of them is on the axis."""
    return MaxNLocator(integer=True, min_n_ticks=1)


def _curves(history: Sequence[Record]) -> dict[str, list[tuple[Record, float]]]:
    curves: dict[str, list[tuple[Record, float]]] = {}
    for record in history:
        for name, evaluation in record.evaluations.items():
            curves.setdefault(name, []).append((record, evaluation.accuracy))
    return curves


def accuracy(history: Sequence[Record], kind: str = "tier") -> Figure:
    """Test accuracy over rounds, one line a tier; `kind` tells what the tiers' names are."""
    return _accuracy_by("round", history, lambda record: record.round, kind)


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
    return _of_accuracies(figure, kind)


class Reached(NamedTuple):
    """What a tier reached: accuracies from 0 to 1, one for each seed, at a place on an x axis."""

    x: float
    accuracies: Sequence[float]
    trained: bool


def accuracy_curves(
    xlabel: str, curves: Mapping[str, Sequence[Reached]], kind: str | None = None
) -> Figure:
    """Test accuracy of tiers, a line for each label: mean, and standard deviation over seeds.

    Full markers are tiers that clients trained, hollow ones were only evaluated. `kind` tells
    what the labels are; a line without one is not in the legend.
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
        spread = deviation if any(several) else None
        axes.errorbar(x, mean, spread, color=colour, capsize=2, label=label)
        for p, y in zip(found, mean, strict=True):
            axes.plot(p.x, y, "o", color=colour, markerfacecolor=colour if p.trained else "white")
    return _of_accuracies(figure, kind)


def accuracy_over(
    xlabel: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """Test accuracy over rounds, bytes or time: x and y for each label."""
    figure, axes = _axes(xlabel, "test accuracy")
    for label, (x, y) in curves.items():
        axes.plot(x, y, marker=".", label=label)
    return _of_accuracies(figure)


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
    if len(client_names) <= _NAMED and not all(name.isdigit() for name in client_names):
        _name_clients(axes, client_names)
    else:
        axes.xaxis.set_major_locator(_whole())
    if len(class_names) <= 20:
        _legend(figure)
    return figure


def _bars(axes: Axes, tops: np.ndarray, below: Any, **options: Any) -> None:
    """A bar at each of 0, 1, ..., drawn as one shape, however many they are."""
    edges = np.arange(len(tops) + 1) - 0.5
    low, high = (np.append(x, x[-1]) for x in (below, tops))
    axes.fill_between(edges, low, high, step="post", linewidth=0, **options)


def _name_clients(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")


def local_accuracy(
    local: LocalEvaluation, kind: str = "tier", client_names: Sequence[str] = ()
) -> Figure:
    """Accuracy of every client on examples of its own, sorted, a colour for each tier.

    Args:
      local: of some clients or all.
      kind: what the tiers' names are.
      client_names: of all, by number; by default their numbers. Many clients are not told apart.
    """
    figure, axes = _axes("clients, by accuracy", "local accuracy")
    order = np.argsort(local.accuracies, kind="stable")
    values, tiers = np.asarray(local.accuracies)[order], np.asarray(local.tiers)[order]
    clients = [local.clients[i] for i in order] if len(order) <= _NAMED else []
    for name in local.by_tier:
        places = np.flatnonzero(tiers == name)
        axes.plot(places, values[places], "o", markersize=4 if clients else 2, label=name)
    axes.axhline(values.mean(), color="black", linewidth=1, linestyle="--", label="mean")
    _of_accuracies(figure, kind)
    _name_clients(axes, [client_names[c] if client_names else str(c) for c in clients])
    return figure


def save(figure: Figure, path: epath.PathLike) -> None:
    """Writes a figure as PNG."""
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=150)
