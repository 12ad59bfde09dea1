"""A run's programs, compiled for a machine that is not there, and counted.

What programs compute, read, write and send is counted in what the target's compiler made of them,
with loops as long as the run's own schedules have them. Seconds cannot be known from that: only
how long the arithmetic takes at the peak of the matrix units, and the bytes at the memory's
bandwidth. Left out: deadlines, the trainings that measure the bytes of codecs, copies for saving.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
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
from jfed.simulation.programs import compiler_options

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
    arguments, lengths = federation.arguments(), _lengths(federation)
    held = _held(federation, arguments)
    there = {id(x) for arrays in held.values() for x in arrays}
    programs = []
    for name, lowered in federation.lower(arguments).items():
        own = [x for x in jax.tree.leaves(arguments[name]) if id(x) not in there]
        programs.append(_compiled(federation, name, lowered, lengths[name], bytes_on_device(own)))
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
    federation: Federation,
    name: str,
    lowered: jax.stages.Lowered,
    lengths: Lengths,
    arguments: int,
) -> ProgramPlan:
    (kind, _), lanes = _parts(name), federation.engine.lanes or 1
    plan = ProgramPlan(kind, _title(federation, name), _calls(federation, name), 0.0)
    began = time.perf_counter()
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
            step=count_body(text, "steps", lengths) if kind == "train" else None,
            findings=find(text, lengths, lanes=lanes if federation.engine.mapping == "vmap" else 1),
        )
    except Exception as error:  # whatever a compiler raises
        return dataclasses.replace(plan, seconds=time.perf_counter() - began, error=str(error))


def _lengths(federation: Federation) -> dict[str, Lengths]:
    """How often loops run whose lengths are data, by program."""
    chosen = np.unique(np.linspace(0, federation.rounds - 1, _ROUNDS).astype(int)).tolist()
    rounds = [federation.schedules(number) for number in chosen]
    found: dict[str, Lengths] = {"server": {}}
    for i, tiers in enumerate(federation.training_tiers):
        own = [schedules[i] for schedules in rounds]
        found[f"train {i}"] = workload.of_training(own, tiers, federation.engine.mapping)
    for i, tiers in enumerate(federation.tested_tiers):
        found[f"evaluate {i}"] = workload.of_testing(tiers)
    for i, chunks in enumerate(federation.local_calls):
        tiers = federation.training_tiers[i]
        found[f"local {i}"] = workload.of_clients_tests(chunks, tiers)
        found[f"norms {i}"] = workload.of_testing(tiers)
    return found


def _parts(name: str) -> tuple[str, int]:
    """The kind of a program, and which of its kind it is."""
    kind, _, number = name.partition(" ")
    return kind, int(number or 0)


def _calls(federation: Federation, name: str) -> int:
    """How often a run calls a program."""
    (kind, i), every = _parts(name), federation.evaluation.every
    evaluations = -(-federation.rounds // every) if every else 1
    if kind == "evaluate":
        return evaluations * len(federation.tested_tiers[i])
    if kind == "local":
        return evaluations * len(federation.local_calls[i])
    return evaluations if kind == "norms" else federation.rounds


def _title(federation: Federation, name: str) -> str:
    """A program's kind, and the tiers that it serves."""
    kind, i = _parts(name)
    if kind == "server":
        return kind
    groups = federation.tested_tiers if kind == "evaluate" else federation.training_tiers
    return f"{kind} {', '.join(tier.name for tier in groups[i])}"


def _held(federation: Federation, arguments: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The arrays that devices hold from round to round, by what they are."""
    *_, calibration, test = arguments["evaluate 0"]
    inputs, *_ = arguments["train 0"]
    images = [calibration, test] + [inputs.images] * (federation.engine.images == "device")
    return {
        "images": jax.tree.leaves(images),
        "variables": jax.tree.leaves(inputs.server.variables),
        "server's state": jax.tree.leaves(inputs.server.state),
        "client memory": jax.tree.leaves([a[2] for n, a in arguments.items() if n[:5] == "train"]),
    }


def bytes_on_device(arrays: Sequence[Any]) -> int:
    """Of arrays, or of shapes that tell where they lie; each counts once."""
    each = {id(x): x for x in arrays}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in each)
