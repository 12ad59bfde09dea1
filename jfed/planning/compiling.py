"""A run's programs, compiled for a machine that is not there, and counted.

What programs compute, read, write and send is counted in what the target's compiler made of them,
with loops as long as the run's own schedules have them. Seconds cannot be known from that: only
how long the arithmetic takes at the peak of the matrix units, and the bytes at the memory's
bandwidth. Of branches that the data choose the costliest counts. Left out: deadlines, the trainings
that measure the bytes of codecs, copies for saving.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout

from jfed.errors import ConfigError
from jfed.planning import workload
from jfed.planning.counting import count, count_body
from jfed.planning.findings import find
from jfed.planning.hlo import Shape
from jfed.planning.plans import ProgramPlan, RunPlan
from jfed.planning.targets import Target
from jfed.planning.workload import Lengths
from jfed.simulation.federation import Federation
from jfed.simulation.programs import (
    SERVER,
    Arguments,
    EvaluateArguments,
    Program,
    TrainArguments,
    compiler_options,
)

_ROUNDS = 20  # that lengths of loops are means over


def plan_federation(
    federation: Federation,
    target: Target,
    on_program: Callable[[ProgramPlan], None] = lambda plan: None,
) -> RunPlan:
    """Compiles every program of a run, and counts what they do.

    A program that cannot be traced or compiled is told with its error, and the others go on.

    Args:
      federation: set up on the target's devices.
      target: see `jfed.planning.targets.open_target`.
      on_program: called with each program as it is done.
    """
    if federation.engine.mapping == "debug":
        raise ConfigError("mapping 'debug' is a plain loop: there is no program to plan.")
    arguments = federation.arguments()
    lengths, held = _lengths(federation, arguments), _held(federation, arguments)
    programs: dict[Program, ProgramPlan] = {}
    stored: dict[int, int] = {}  # bytes of arrays, by their id
    for program, given in arguments.items():
        plan = ProgramPlan(program.kind, program.title, _calls(federation, program))
        programs[program], formats = _compiled(plan, federation, program, given, lengths[program])
        on_program(programs[program])
        for x, layout in zip(jax.tree.leaves(given), formats, strict=False):
            stored[id(x)] = max(stored.get(id(x), 0), bytes_on_device(x, layout))

    def size(arrays: Sequence[Any]) -> int:
        each = {id(x): x for x in arrays}
        return sum(stored.get(i, bytes_on_device(x)) for i, x in each.items())

    there = {id(x) for arrays in held.values() for x in arrays}
    for program, given in arguments.items():
        own = size([x for x in jax.tree.leaves(given) if id(x) not in there])
        programs[program] = dataclasses.replace(programs[program], arguments=own)
    return RunPlan(
        target=target.name,
        chip=target.chip,
        devices=federation.engine.devices or 1,
        hosts=target.hosts,
        engine=federation.engine,
        cohort=federation.population.cohort,
        rounds=federation.rounds,
        held={what: size(arrays) for what, arrays in held.items()},
        programs=list(programs.values()),
    )


def _compiled(
    plan: ProgramPlan,
    federation: Federation,
    program: Program,
    given: tuple[Any, ...],
    lengths: Lengths,
) -> tuple[ProgramPlan, list[Format]]:
    """The plan with what the compiler made of its program, and how that stores its arguments."""
    began = time.perf_counter()
    try:
        lowered = federation.lower({program: given})[program]
        compiled = lowered.compile(compiler_options(federation.platform))
    except Exception as error:  # whatever a compiler raises
        seconds = time.perf_counter() - began
        return dataclasses.replace(plan, seconds=seconds, error=_told(error)), []
    memory: Any = compiled.memory_analysis()
    plan = dataclasses.replace(
        plan,
        seconds=time.perf_counter() - began,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
    )
    is_vmapped = plan.kind == "train" and federation.engine.mapping == "vmap"
    lanes = (federation.engine.lanes or 1) if is_vmapped else 1
    try:
        text = compiled.as_text() or ""
        plan = dataclasses.replace(
            plan,
            counts=count(text, lengths),
            step=count_body(text, "steps", lengths) if plan.kind == "train" else None,
            findings=find(text, lengths, lanes=lanes),
        )
    except Exception as error:  # of a text such as no version of XLA has printed so far
        plan = dataclasses.replace(plan, unread=f"{_told(error)} (JAX {jax.__version__})")
    return plan, jax.tree.leaves(compiled.input_formats)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _lengths(federation: Federation, programs: Collection[Program]) -> dict[Program, Lengths]:
    """How often loops run whose lengths are data, by program."""
    chosen = np.unique(np.linspace(0, federation.rounds - 1, _ROUNDS).astype(int)).tolist()
    rounds = [federation.schedules(number) for number in chosen]
    trained = [program for program in programs if program.kind == "train"]
    found: dict[Program, Lengths] = {SERVER: {}}
    for program, own in zip(trained, zip(*rounds, strict=True), strict=True):
        found[program] = workload.of_training(own, program.tiers, federation.engine.mapping)
    for program, chunks in federation.local_calls.items():
        found[program] = workload.of_clients_tests(chunks, program.tiers)
    return {p: found[p] if p in found else workload.of_testing(p.tiers) for p in programs}


def _calls(federation: Federation, program: Program) -> int:
    """How often a run calls a program."""
    every = federation.evaluation.every
    evaluations = -(-federation.rounds // every) if every else 1
    if program.kind == "evaluate":
        return evaluations * len(program.tiers)
    if program.kind == "local":
        return evaluations * len(federation.local_calls[program])
    return evaluations if program.kind == "norms" else federation.rounds


def _held(federation: Federation, arguments: Arguments) -> dict[str, list[Any]]:
    """The arrays that devices hold from round to round, by what they are."""
    trained = [given for given in arguments.values() if isinstance(given, TrainArguments)]
    tested = next(given for given in arguments.values() if isinstance(given, EvaluateArguments))
    inputs = trained[0].inputs
    images: list[Any] = [tested.calibration, tested.test]
    images += [inputs.images] * (federation.engine.images == "device")
    return {
        "images": jax.tree.leaves(images),
        "variables": jax.tree.leaves(inputs.server.variables),
        "server's state": jax.tree.leaves(inputs.server.state),
        "client memory": jax.tree.leaves([given.memory for given in trained]),
    }


def bytes_on_device(x: Any, stored: Format | None = None) -> int:
    """Of an array, or of a shape that tells where it lies; of TPUs with what fills up tiles."""
    dims, layout = x.sharding.shard_shape(x.shape), stored and stored.layout
    if not isinstance(layout, Layout) or len(layout.major_to_minor) != len(dims):  # unused; a key
        return math.prod(dims) * x.dtype.itemsize
    order, tile = tuple(reversed(layout.major_to_minor)), (layout.tiling or ((),))[0]
    return Shape(f"u{8 * x.dtype.itemsize}", dims, order, tile, 0).bytes
