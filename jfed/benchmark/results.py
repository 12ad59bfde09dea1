"""Tables and JSON of what was measured."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from jfed.benchmark.sections import JFED, LOOP
from jfed.benchmark.turns import Measured

MB = 1e6


def peak_flops(measured: Sequence[Measured]) -> float | None:
    """The fastest of the matrix products, in FLOP/s."""
    rates = [
        m.work.flops / min(m.seconds)
        for m in measured
        if m.contender.is_peak and m.work and m.seconds
    ]
    return max(rates, default=None)


def ratio(measured: Measured, reference: Measured) -> float | None:
    """Median over repeats of the time a round, relative to the reference's in the same turn."""
    pairs = zip(measured.seconds, reference.seconds, strict=False)  # slow ones have one turn
    ratios = [mine / theirs for mine, theirs in pairs]
    return statistics.median(ratios) if ratios else None


def table(section: str, measured: Sequence[Measured]) -> str:
    """The table of one group, with a line for each contender that was not timed."""
    columns = _COLUMNS[section]
    peak = peak_flops(measured)
    rows = [
        {name: column(m, measured, peak) for name, column in columns.items()}
        for m in measured
        if m.seconds
    ]
    # A column that says nothing, such as the accelerator's memory on the CPU, is left out.
    empty = [name for name in columns if not any(row[name] for row in rows)]
    rows = [{n: cell for n, cell in row.items() if n not in empty} for row in rows]
    lines = [tabulate(rows, headers="keys", disable_numparse=True, stralign="right")]
    for m in measured:
        if m.skipped is not None:
            lines.append(f"{m.contender.name}: skipped, {m.skipped}")
        elif m.out_of_memory:
            lines.append(f"{m.contender.name}: out of memory, {m.error}")
        elif m.error is not None:
            lines.append(f"{m.contender.name}: failed, {m.error}")
    return "\n".join(filter(None, lines))


Column = Callable[[Measured, Sequence[Measured], float | None], str]


def _seconds(pick: Callable[[list[float]], float]) -> Column:
    return lambda m, others, peak: f"{pick(m.seconds):.3f}"


def _times(name: str) -> Column:
    """The time a round relative to another contender's."""

    def column(m: Measured, others: Sequence[Measured], peak: float | None) -> str:
        found = [other for other in others if other.contender.name == name]
        value = ratio(m, found[0]) if found and not m.contender.is_peak else None
        return "" if value is None else f"{value:.2f}"

    return column


def _rate(m: Measured, others: Sequence[Measured], peak: float | None) -> str:
    rate = m.flops_per_second
    return "" if rate is None else f"{rate / 1e9:,.3g}" if rate < 1e12 else f"{rate / 1e9:,.0f}"


def _share(m: Measured, others: Sequence[Measured], peak: float | None) -> str:
    rate = m.flops_per_second
    return "" if rate is None or peak is None else f"{rate / peak:.1%}"


def _clients(m: Measured, others: Sequence[Measured], peak: float | None) -> str:
    return f"{m.work.clients / m.median:,.1f}" if m.work and m.median and m.work.clients else ""


def _bytes(which: str) -> Column:
    def column(m: Measured, others: Sequence[Measured], peak: float | None) -> str:
        found = getattr(m.memory, which, None)
        return "" if found is None else f"{found / MB:,.0f}"

    return column


def _cpu(m: Measured, others: Sequence[Measured], peak: float | None) -> str:
    return f"{statistics.median(m.cpu_seconds):.2f}" if m.cpu_seconds else ""


def _host(m: Measured, others: Sequence[Measured], peak: float | None) -> str:
    return f"{1e3 * statistics.median(m.host_seconds):.2f}" if m.host_seconds else ""


def _host_share(m: Measured, others: Sequence[Measured], peak: float | None) -> str:
    if not m.host_seconds or not m.median:
        return ""
    return f"{statistics.median(m.host_seconds) / m.median:.2%}"


_TIMES: dict[str, Column] = {
    "contender": lambda m, others, peak: m.contender.name,
    "s a round": _seconds(statistics.median),
    "min": _seconds(min),
    "max": _seconds(max),
}
_RATES: dict[str, Column] = {"GFLOP/s": _rate, "of the peak": _share}
_COLUMNS: dict[str, dict[str, Column]] = {
    "cnn": _TIMES | {"times jfed's": _times(JFED), "CPU s": _cpu} | _RATES,
    "ode": _TIMES | {"times jfed's": _times(JFED), "CPU s": _cpu} | _RATES,
    "scaling": _TIMES
    | {
        "clients/s": _clients,
        "peak MB": _bytes("host"),
        "device MB": _bytes("device"),
        "host ms": _host,
        "of a round": _host_share,
    },
    "accelerator": _TIMES | {"clients/s": _clients} | _RATES | {"device MB": _bytes("device")},
}


def notes(section: str, measured: Sequence[Measured]) -> list[str]:
    """What the numbers say about what jfed promises, in words."""
    by_name = {m.contender.name: m for m in measured if m.seconds}
    said = []
    if section == "ode" and JFED in by_name:
        jfed = by_name[JFED]
        rivals = [m for m in by_name.values() if m.contender.kind == "torch"]
        for goal, others in (("1.1", [by_name.get(LOOP)]), ("1", rivals)):
            found = [o for o in others if o is not None]
            if found:
                fastest = min(found, key=lambda m: m.median or 0)
                said.append(
                    f"jfed takes {ratio(jfed, fastest):.2f} times as long as "
                    f"{fastest.contender.name} (goal: {goal} at most)."
                )
    few, many = by_name.get("10 clients"), by_name.get("1,000 clients")
    if section == "scaling" and few and many and few.memory and many.memory:
        which = "device" if many.memory.device else "host"
        growth = getattr(many.memory, which) / getattr(few.memory, which) - 1
        said.append(
            f"Peak memory of 1,000 clients a round is {growth:+.1%} of that of 10 "
            "(goal: within 10 %)."
        )
    return said


def as_json(measured: Measured) -> dict[str, Any]:
    """All that is known of a contender."""
    values = {
        "median_seconds": measured.median,
        "flops_per_second": measured.flops_per_second,
        "out_of_memory": measured.out_of_memory,
    }
    for field in dataclasses.fields(measured):
        value = getattr(measured, field.name)
        if field.name == "contender":
            value = dataclasses.asdict(value)
        values[field.name] = value._asdict() if hasattr(value, "_asdict") else value
    return values
