"""Figures of the benchmark, one for each section."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from jfed.benchmark.sections import Group
from jfed.benchmark.turns import Measured

Measurements = Sequence[tuple[Group, Sequence[Measured]]]


def draw(section: str, measurements: Measurements) -> Figure:
    """The figure of a section."""
    return _FIGURES[section](measurements)


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels


def bars(measurements: Measurements) -> Figure:
    """Seconds a round of each contender: median, and a line from the fastest to the slowest."""
    figure, panels = _panels(len(measurements), 1, 8.0, 3.4)
    for axes, (group, measured) in zip(panels, measurements, strict=True):
        timed = [m for m in measured if m.seconds and not m.contender.is_peak][::-1]
        _bars(axes, timed)
        axes.set(xlabel="seconds a round")
        axes.set_title(group.title.partition(", ")[0], fontsize="medium")
    return figure


def _bars(axes: Axes, timed: Sequence[Measured]) -> None:
    middles = [m.median or 0.0 for m in timed]
    low = [mid - min(m.seconds) for mid, m in zip(middles, timed, strict=True)]
    high = [max(m.seconds) - mid for mid, m in zip(middles, timed, strict=True)]
    colours = ["C0" if m.contender.kind == "jfed" else "C7" for m in timed]
    axes.barh([m.contender.name for m in timed], middles, xerr=(low, high), color=colours)


def scaling(measurements: Measurements) -> Figure:
    """Seconds a round of each sweep, and below them the peak memory."""
    figure, panels = _panels(2, len(measurements), 4.2, 3.2)
    for i, (group, measured) in enumerate(measurements):
        above, below = panels[i], panels[i + len(measurements)]
        _bars(above, [m for m in measured if m.seconds][::-1])
        above.set(xlabel="seconds a round", title=group.title.partition(":")[0])
        known = [(m.contender.name, m.memory) for m in measured if m.memory][::-1]
        used = [(memory.device or memory.host) / 1e6 for _, memory in known]
        below.barh([name for name, _ in known], used, color="C1")
        below.set(xlabel="peak memory [MB]")
    return figure


def accelerator(measurements: Measurements) -> Figure:
    """Clients a second over lanes, and the other mappings and forms as points."""
    figure, panels = _panels(1, len(measurements), 4.8, 4.0)
    for axes, (group, measured) in zip(panels, measurements, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for m in measured:
            if m.contender.kind == "jfed" and m.median and m.work:
                lanes = m.contender.engine.lanes or 1
                rate = m.work.clients / m.median
                lines.setdefault(m.contender.name.partition(", ")[2], []).append((lanes, rate))
            elif m.contender.kind == "loop" and m.median and m.work:
                axes.axhline(m.work.clients / m.median, color="C7", ls="--", label="one at a time")
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel="lanes", ylabel="clients a second", ylim=(0, None))
        axes.set_title(group.title.partition(", ")[0], fontsize="medium")
        axes.legend(fontsize="small")
    return figure


_FIGURES: dict[str, Callable[[Measurements], Figure]] = {
    "cnn": bars,
    "ode": bars,
    "scaling": scaling,
    "accelerator": accelerator,
}
