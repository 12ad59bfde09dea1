"""Plans as text, and as values that JSON can hold."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from jfed.planning.counting import Counts
from jfed.planning.plans import Floor, ProgramPlan, RunPlan, peak

_MOST_FINDINGS = 8  # that are shown of a program; the JSON has all


def text(plan: RunPlan) -> str:
    """What a user should know of a plan before a machine is booked."""
    parts = [_heading(plan), _programs(plan), _memory(plan), _round(plan)]
    parts += [_findings(program) for program in plan.programs if program.findings]
    parts += [f"{p.name!r} cannot be compiled: {p.error}" for p in plan.programs if p.error]
    parts += [
        f"A loop of {p.name!r} counts as one pass, its length is not known: {loop.op_name}"
        for p in plan.programs
        for loop in p.counts.unknown
    ]
    return "\n\n".join(part for part in parts if part)


def comparison(plans: Mapping[str, RunPlan]) -> str:
    """Plans of one run with different settings, a line each."""
    return tabulate([_line(name, plan) for name, plan in plans.items()], headers="keys")


def _heading(plan: RunPlan) -> str:
    engine, chip = plan.engine, plan.chip
    what = f"{plan.devices} device(s) on {plan.hosts} host(s)"
    known = "" if chip is None else f", {_bytes(chip.memory)} and {_rate(chip.bandwidth)} each"
    peaks = {} if chip is None else chip.peak
    rates = "".join(f", {name} {value / 1e12:.3g} TFLOP/s" for name, value in peaks.items())
    return (
        f"{plan.target}: {what}{known}{rates}\n"
        f"{engine.lanes} lane(s) a device, mapping {engine.mapping!r}, images on the "
        f"{engine.images}; {plan.rounds} rounds"
    )


def _programs(plan: RunPlan) -> str:
    """Each program, of a call."""
    rows = []
    for program in plan.programs:
        row: dict[str, Any] = {"program": program.name, "compiled in": f"{program.seconds:.1f} s"}
        row |= {"calls": f"{program.calls:,}"} | _told(plan, program.counts)
        row["temporary"] = _bytes(program.temporary)
        rows.append(row if program.error is None else {**row, "compiled in": "failed"})
        if program.step is not None:
            rows.append({"program": "  a step of its lanes"} | _told(plan, program.step))
    return tabulate(rows, headers="keys", disable_numparse=True)


def _told(plan: RunPlan, counts: Counts) -> dict[str, str]:
    found = {
        "FLOPs": _amount(sum(counts.flops.values())),
        "moved": _bytes(counts.bytes),
        "sent": _bytes(counts.sent if plan.devices > 1 else 0),
        "kernels": _amount(counts.kernels),
    }
    if (floor := plan.floor(counts)) is not None:
        found["at best"] = f"{_seconds(floor.seconds)} ({_longest(floor)})"
        found["launches"] = _seconds(floor.launches) if floor.launches else ""
    return found


def _longest(floor: Floor) -> str:
    names = ("arithmetic", "memory", "links")
    return max(names, key=lambda name: getattr(floor, name))


def _memory(plan: RunPlan) -> str:
    """Bytes a device, against what it has."""
    compiled = [p for p in plan.programs if p.error is None]
    if not compiled:
        return _lower(plan) if plan.fits is False else ""
    largest = max(compiled, key=lambda p: p.memory)
    parts = [f"{what} {_bytes(size)}" for what, size in plan.held.items() if size]
    parts.append(
        f"{largest.name!r} {_bytes(largest.memory)} (arguments {_bytes(largest.arguments)}, "
        f"results {_bytes(largest.outputs)}, temporary {_bytes(largest.temporary)})"
    )
    line = f"Memory of a device: about {_bytes(plan.memory)}: {', '.join(parts)}."
    if plan.room is not None:
        line += f" JAX has {_bytes(plan.room)}."
    line += {True: " It fits.", False: f" {_lower(plan)}", None: ""}[plan.fits]
    if plan.most_lanes is not None:
        line += f" In proportion, about {plan.most_lanes:,} lanes have room."
    return line


def _lower(plan: RunPlan) -> str:
    """What to do about a run that does not fit."""
    settings = []
    if plan.engine.mapping == "vmap" and (plan.engine.lanes or 1) > 1:
        settings.append(f"--lanes (now {plan.engine.lanes})")
    settings += ["--batch-size", "--eval-batch-size", "--dtype bfloat16"]
    if plan.engine.images == "device" and plan.held["images"] > plan.memory / 4:
        settings.insert(0, "--images host")
    return f"It does NOT fit; lower {', '.join(settings[:-1])} or {settings[-1]}."


def _round(plan: RunPlan) -> str:
    """What a round, and the run, take at best."""
    one = plan.least_seconds(plan.of_round, calls=False)
    whole = plan.least_seconds(plan.programs, calls=True)
    if one is None or whole is None:
        return ""
    floors = [floor for p in plan.of_round if (floor := plan.floor(p.counts)) is not None]
    launches = sum(floor.launches for floor in floors)
    line = f"A round takes {_seconds(one)} on the devices at best, "
    line += f"the run with its evaluations {_seconds(whole)}."
    if launches:
        line += f" Launching a round's kernels one by one takes {_seconds(launches)}."
    waits = sum(p.counts.host_waits for p in plan.of_round)
    if waits and plan.chip is not None and plan.chip.platform == "gpu":
        line += f" The host waits {waits:,.0f} times a round to decide whether a loop goes on."
    return f"{line} What it takes beyond that, no compiler tells."


def _findings(program: ProgramPlan) -> str:
    rows = [
        {
            "amiss": finding.what,
            "times": f"{finding.times:,.0f}",
            "moves": _bytes(finding.bytes),
            "where": finding.op_name[-60:],
            "line": finding.source,
        }
        for finding in program.findings[:_MOST_FINDINGS]
    ]
    rest = len(program.findings) - len(rows)
    more = f"\n... and {rest} more, see --json." if rest > 0 else ""
    table = tabulate(rows, headers="keys", disable_numparse=True)
    return f"What is amiss in {program.name!r}, in a call:\n{table}{more}"


def _line(name: str, plan: RunPlan) -> dict[str, Any]:
    steps = [p.step for p in plan.training if p.step is not None]
    one = plan.least_seconds(plan.of_round, calls=False)
    amiss = {f.what for p in plan.programs for f in p.findings}
    return {
        "settings": name,
        "memory": _bytes(plan.memory),
        "fits": {True: "yes", False: "NO", None: "?"}[plan.fits],
        "FLOPs a round": _amount(sum(sum(p.counts.flops.values()) for p in plan.of_round)),
        "moved": _bytes(sum(p.counts.bytes for p in plan.of_round)),
        "sent": _bytes(sum(p.counts.sent for p in plan.of_round) if plan.devices > 1 else 0),
        "kernels a step": _amount(sum(step.kernels for step in steps)),
        "a round at best": "" if one is None else _seconds(one),
        "grouped convolutions": "yes" if any("groups" in what for what in amiss) else "no",
        "failed": ", ".join(p.name for p in plan.programs if p.error),
    }


def as_json(plan: RunPlan) -> dict[str, Any]:
    """All of a plan: bytes, FLOP, seconds."""
    found: dict[str, Any] = dataclasses.asdict(plan)
    found |= {
        "memory": plan.memory,
        "fits": plan.fits,
        "most_lanes": plan.most_lanes,
        "least_seconds_of_a_round": plan.least_seconds(plan.of_round, calls=False),
        "least_seconds_of_the_run": plan.least_seconds(plan.programs, calls=True),
    }
    for program, told in zip(plan.programs, found["programs"], strict=True):
        floor = plan.floor(program.counts)
        told["floor"] = None if floor is None else dataclasses.asdict(floor)
        if plan.chip is not None:
            told["peaks"] = {d: peak(plan.chip, d) for d in program.counts.flops}
    return found


def _amount(value: int | float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _bytes(value: int | float) -> str:
    return f"{_amount(value)}B" if value >= 1e3 else f"{value:.0f} B"


def _rate(value: int | float) -> str:
    return f"{_bytes(value)}/s"


def _seconds(value: int | float) -> str:
    for size, unit in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"
