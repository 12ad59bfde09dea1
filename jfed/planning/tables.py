"""Plans as text, and as values that JSON can hold."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from jfed.planning.counting import Counts
from jfed.planning.kernels import add
from jfed.planning.plans import Floor, ProgramPlan, RunPlan, peak

_MOST_FINDINGS = 8  # that are shown of a program; the JSON has all


def text(plan: RunPlan) -> str:
    """What a user should know of a plan before a machine is booked."""
    parts = [_heading(plan), _programs(plan), _memory(plan), _round(plan), _products(plan)]
    parts += [_findings(program) for program in plan.programs if program.findings]
    parts += _failures(plan)
    parts += [
        f"A loop of {p.name!r} counts as one pass, its length is not known: {loop.op_name}"
        for p in plan.programs
        for loop in p.counts.unknown
    ]
    return "\n\n".join(part for part in parts if part)


def comparison(plans: Mapping[str, RunPlan]) -> str:
    """Plans of one run with different settings, a line each."""
    table = tabulate([_line(name, plan) for name, plan in plans.items()], headers="keys")
    told = [f"{name}: {failure}" for name, plan in plans.items() for failure in _failures(plan)]
    return "\n\n".join([_machine(next(iter(plans.values()))), table, *told])


def _failures(plan: RunPlan) -> list[str]:
    """Programs that were not made, or cannot be counted, and why."""
    found = [f"{p.name!r} cannot be compiled: {p.error}" for p in plan.programs if p.error]
    return found + [
        f"{p.name!r} is compiled, but what it does cannot be read: {p.unread}. Please report it."
        for p in plan.programs
        if p.unread
    ]


def _machine(plan: RunPlan) -> str:
    chip, what = plan.chip, f"{plan.devices} device(s) on {plan.hosts} host(s)"
    known = "" if chip is None else f", {_bytes(chip.memory)} and {_rate(chip.bandwidth)} each"
    peaks = {} if chip is None else chip.peak
    rates = "".join(f", {name} {value / 1e12:.3g} TFLOP/s" for name, value in peaks.items())
    return f"{plan.target}: {what}{known}{rates}"


def _heading(plan: RunPlan) -> str:
    engine, lanes = plan.engine, (plan.engine.lanes or 1) * plan.devices
    idle = max(lanes - plan.cohort, 0)
    unused = f" ({idle} of {lanes} lanes have none)" if idle else ""
    return (
        f"{_machine(plan)}\n"
        f"{engine.lanes} lane(s) a device, mapping {engine.mapping!r}, images on the "
        f"{engine.images}; {plan.rounds} rounds of {plan.cohort} clients{unused}. All figures are "
        "of one device."
    )


def _programs(plan: RunPlan) -> str:
    """Each program, of a call."""
    rows = []
    for program in plan.programs:
        row: dict[str, Any] = {"program": program.name, "compiled in": f"{program.seconds:.1f} s"}
        row["calls"] = f"{program.calls:,}"
        if program.error is None and program.unread is None:
            row |= _told(plan, program.counts)
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
    if plan.chip is not None and plan.chip.platform == "gpu":
        line += " On top comes what cuDNN asks for, which is only chosen there."
    line += {True: " It fits.", False: f" {_lower(plan)}", None: ""}[plan.fits]
    if plan.most_lanes is not None:
        line += f" There is room for about {plan.most_lanes:,} lanes"
        enough = plan.most_lanes == plan.lanes_in_use
        line += ", one for each client of a round." if enough else "."
    return line


def _lower(plan: RunPlan) -> str:
    """What to do about a run that does not fit."""
    failed = next((p for p in plan.programs if p.is_too_large), None)
    largest = failed or max(plan.programs, key=lambda p: p.memory)
    settings = []
    if plan.engine.images == "device" and plan.held["images"] > plan.memory / 4:
        settings.append("take --images host")
    if largest.kind == "train" and plan.engine.mapping == "vmap" and (plan.engine.lanes or 1) > 1:
        settings.append(f"lower --lanes (now {plan.engine.lanes})")
    is_test = largest.kind in ("evaluate", "local", "norms")
    settings.append(f"lower {'--eval-batch-size' if is_test else '--batch-size'}")
    if not largest.counts.flops or largest.counts.flops.keys() - {"bfloat16"}:
        settings.append("take --dtype bfloat16")
    return f"It does NOT fit: {', or '.join(settings)}."


def _round(plan: RunPlan) -> str:
    """What a round, and the run, take at best."""
    one = plan.least_seconds(plan.of_round, calls=False)
    whole = plan.least_seconds(plan.programs, calls=True)
    if one is None:
        return ""
    floors = [floor for p in plan.of_round if (floor := plan.floor(p.counts)) is not None]
    launches = sum(floor.launches for floor in floors)
    line = f"A round takes {_seconds(one)} on the devices at best"
    line += "." if whole is None else f", the run with its evaluations {_seconds(whole)}."
    if launches:
        line += f" Launching a round's kernels one by one takes {_seconds(launches)}."
    waits = sum(p.counts.host_waits for p in plan.of_round)
    if waits and plan.chip is not None and plan.chip.platform == "gpu":
        line += f" The host waits {waits:,.0f} times a round to decide whether a loop goes on."
    return f"{line} What it takes beyond that, no compiler tells."


def _products(plan: RunPlan) -> str:
    """Types of the products of a round, and in which the units of the chip multiply float32."""
    flops: dict[str, float] = {}
    for program in plan.of_round:
        add(flops, program.counts.flops)
    total = sum(flops.values())
    if not total:
        return ""
    shares = ", ".join(f"{n / total:.0%} in {dtype}" for dtype, n in flops.items())
    line = f"FLOPs are of matrix products and convolutions, of a round {shares}."
    chip = plan.chip
    if chip is not None and "float32" in flops and chip.float32_default != "float32":
        line += (
            f" JAX's default precision multiplies float32 as {chip.float32_default} here; "
            "JAX_DEFAULT_MATMUL_PRECISION=highest keeps it float32."
        )
    return line


def _findings(program: ProgramPlan) -> str:
    rows = [
        {
            "amiss": finding.what,
            "times": f"{finding.times:,.0f}",
            "moves": _bytes(finding.bytes),
            "where": _end(finding.op_name),
            "line": "/".join(finding.source.split("/")[-2:]),
        }
        for finding in program.findings[:_MOST_FINDINGS]
    ]
    rest = len(program.findings) - len(rows)
    more = f"\n... and {rest} more, see --json." if rest > 0 else ""
    table = tabulate(rows, headers="keys", disable_numparse=True)
    return f"What is amiss in {program.name!r}, in a call:\n{table}{more}"


def _end(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"


def _line(name: str, plan: RunPlan) -> dict[str, Any]:
    one = plan.least_seconds(plan.of_round, calls=False)
    whole = plan.least_seconds(plan.programs, calls=True)
    amiss = {f.what for p in plan.programs for f in p.findings}
    return {
        "settings": name,
        "memory": _bytes(plan.memory),
        "fits": {True: "yes", False: "NO", None: "?"}[plan.fits],
        "FLOPs a round": _amount(sum(sum(p.counts.flops.values()) for p in plan.of_round)),
        "moved": _bytes(sum(p.counts.bytes for p in plan.of_round)),
        "sent": _bytes(sum(p.counts.sent for p in plan.of_round) if plan.devices > 1 else 0),
        "kernels a round": _amount(sum(p.counts.kernels for p in plan.of_round)),
        "a round at best": "" if one is None else _seconds(one),
        "the run": "" if whole is None else _seconds(whole),
        "lanes at most": "" if plan.most_lanes is None else plan.most_lanes,
        "grouped convolutions": "yes" if any("groups" in what for what in amiss) else "no",
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
            peaks = {dtype: peak(plan.chip, dtype) for dtype in program.counts.flops}
            told["peaks"] = {d: p if math.isfinite(p) else None for d, p in peaks.items()}
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
