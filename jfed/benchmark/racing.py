"""A run of the benchmark: its sections one after another, and the folder they are written to."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from jfed import provenance
from jfed.benchmark import figures, results
from jfed.benchmark.sections import Group, Machine, groups
from jfed.benchmark.settings import Settings, check_output
from jfed.benchmark.turns import Measured, Progress, race
from jfed.benchmark.workers import hardware
from jfed.errors import ConfigError
from jfed.files import write_json
from jfed.reports import plots
from jfed.runs import huge_pages

FILE = "benchmark.json"


def race_all(
    settings: Settings,
    output: pathlib.Path,
    *,
    show: Callable[[str], None] = print,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Runs the sections and writes `benchmark.json` and a figure of each to a folder.

    What is measured is written after every table, so that an interrupted run keeps it.

    Args:
      settings: what to run.
      output: the folder, which must not exist, or be empty.
      show: called with each table as text.
      progress: called with what is being done.

    Returns:
      What `benchmark.json` holds.

    Raises:
      ConfigError: settings or a folder that cannot be used; nothing was written.
    """
    check_output(output)
    where = hardware()
    machine = Machine(where["platform"], where["cpus"], len(where["devices"]))
    plan = {name: groups(name, settings, machine) for name in settings.chosen(machine.platform)}
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to the output folder {str(output)!r}: {error}.") from error
    record: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "rounds": settings.rounds,
        "hardware": where,
        "glibc_tunables": _tunables(),
        "load_average": _load(machine, show),
        "commit": provenance.commit(),
        "began": time.strftime("%Y-%m-%d %H:%M:%S"),
        "sections": {},
    }
    for section, tables in plan.items():
        done: list[tuple[Group, list[Measured]]] = []
        for group in tables:
            progress(f"{section}: {group.title}")
            measured = _race(group, settings, machine, progress)
            done.append((group, measured))
            record["sections"].setdefault(section, []).append(_entry(section, group, measured))
            write_json(output / FILE, record)
            text = [f"{section}: {group.title}", "", results.table(section, measured)]
            show("\n".join([*text, *results.notes(section, measured), ""]))
        plots.save(figures.draw(section, done), output / f"{section}.png")
    return record


def _tunables() -> str | None:
    """What the contenders' processes are told of huge pages."""
    with huge_pages.for_children():
        return os.environ.get(huge_pages.VARIABLE)


def _load(machine: Machine, show: Callable[[str], None]) -> float | None:
    """The load average that the machine starts with, and a warning if it is not idle."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > machine.cores / 4:
        show(
            f"The machine is not idle: load average {load:.1f} on {machine.cores} cores. All times "
            "are longer for it, PyTorch's the most.\n"
        )
    return load


def _race(group: Group, settings: Settings, machine: Machine, progress: Progress) -> list[Measured]:
    lots = [group.contenders] if group.together else [(c,) for c in group.contenders]
    found = []
    for lot in lots:
        # Contenders of different cohorts do different rounds.
        compare = group.together and len({c.task.cohort for c in lot if c.task}) == 1
        found += race(
            lot,
            platform=machine.platform,
            repeats=settings.rounds,
            pause=settings.pause,
            compare=compare,
            host_rounds=group.host_rounds,
            progress=progress,
        )
    return found


def _entry(section: str, group: Group, measured: list[Measured]) -> dict[str, Any]:
    return {
        "title": group.title,
        "peak_flops_per_second": results.peak_flops(measured),
        "notes": results.notes(section, measured),
        "contenders": [results.as_json(m) for m in measured],
    }
