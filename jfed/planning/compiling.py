"""A run's programs, compiled for a machine that is not there, and counted.

What programs compute, read, write and send is counted in what the target's compiler made of them,
with loops as long as the run's own schedules have them. Seconds cannot be known from that: only
how long the arithmetic takes at the peak of the matrix units, and the bytes at the memory's
bandwidth. Left out: deadlines, the trainings that measure the bytes of codecs, copies for saving.
"""

import dataclasses
import math
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from jfed.errors import ConfigError
from jfed.planning import workload
from jfed.planning.counting import count, count_body
from jfed.planning.findings import find
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


def plan_federation(federation: Federation, target: Target) -> RunPlan:
    """Compiles every program of a run, and counts what they do.

    A program that the compiler fails on is told with its error, and the others go on.

    Args:
      federation: set up on the target's devices.
      target: see `jfed.planning.targets.open_target`.
    """
    if federation.engine.mapping == "debug":
        raise ConfigError("mapping 'debug' is a plain loop: there is no program to plan.")
    arguments = federation.arguments()
    lengths, held = _lengths(federation, arguments), _held(federation, arguments)
    there = {id(x) for arrays in held.values() for x in arrays}
    programs = []
    for program, lowered in federation.lower(arguments).items():
        own = [x for x in jax.tree.leaves(arguments[program]) if id(x) not in there]
        plan = ProgramPlan(program.kind, program.title, _calls(federation, program), 0.0)
        programs.append(
            _compiled(plan, federation, lowered, lengths[program], bytes_on_device(own))
        )
    return RunPlan(
        target=target.name,
        chip=target.chip,
        devices=federation.engine.devices or 1,
        hosts=target.hosts,
        engine=federation.engine,
        rounds=federation.rounds,
        held={what: bytes_on_device(arrays) for what, arrays in held.items()},
        programs=programs,
    )


def _compiled(
    plan: ProgramPlan,
    federation: Federation,
    lowered: jax.stages.Lowered,
    lengths: Lengths,
    arguments: int,
) -> ProgramPlan:
    """The plan with what the compiler made of its program."""
    lanes, began = federation.engine.lanes or 1, time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options(federation.platform))
        seconds, text = time.perf_counter() - began, compiled.as_text() or ""
        memory: Any = compiled.memory_analysis()
        return dataclasses.replace(
            plan,
            seconds=seconds,
            arguments=arguments,
            outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            counts=count(text, lengths),
            step=count_body(text, "steps", lengths) if plan.kind == "train" else None,
            findings=find(text, lengths, lanes=lanes if federation.engine.mapping == "vmap" else 1),
        )
    except Exception as error:  # whatever a compiler raises
        return dataclasses.replace(plan, seconds=time.perf_counter() - began, error=str(error))


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


def bytes_on_device(arrays: Sequence[Any]) -> int:
    """Of arrays, or of shapes that tell where they lie; each counts once."""
    each = {id(x): x for x in arrays}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in each)
