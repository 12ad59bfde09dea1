"""The compiled programs of a federation, shared by all federations of a process that are alike.

A program is decided by a `Specification` and the shapes of its arguments. Seeds, data and
partitions are arguments, so another seed compiles nothing anew.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jfed.algorithms.aggregators import Aggregator
from jfed.algorithms.algorithm import Algorithm, Merged, Server
from jfed.engine.devices import EVERYWHERE, platform_of
from jfed.engine.lanes import Inputs, Training, make_trainer, without
from jfed.engine.merging import Delivered, Group, merge, owned
from jfed.engine.packing import Schedule
from jfed.errors import calling
from jfed.models.model import Params
from jfed.platforms import made_for
from jfed.simulation.evaluation import Examples, Measure, make_evaluator
from jfed.simulation.local_tests import LocalTesting, make_local_tester, make_measurer
from jfed.tiers.tier import Tier

_SERVER_KEY = np.uint32(2**32 - 5)  # folded into a round's key: the server's own


class Program(NamedTuple):
    """Which of a federation's programs.

    Attributes:
      kind: "train", "server", "evaluate", "local" (tests of clients) or "norms" (for them).
      tiers: that share it; () of the server's, which there is one of.
    """

    kind: str
    tiers: tuple[Tier, ...] = ()

    @property
    def title(self) -> str:
        """Its kind, and the tiers that it serves."""
        return f"{self.kind} {', '.join(tier.name for tier in self.tiers)}".strip()


SERVER = Program("server")


class TrainArguments(NamedTuple):
    """Of a program that trains, see `jfed.engine.lanes.make_trainer`."""

    inputs: Inputs
    schedule: Schedule
    memory: Any


class EvaluateArguments(NamedTuple):
    """Of a program that tests the global model, see `jfed.simulation.evaluation.make_evaluator`."""

    variables: Params
    setting: Any
    calibration: Examples
    test: Examples


# Of programs; those of the other kinds are plain tuples.
Arguments = Mapping[Program, tuple[Any, ...]]
# Gives a compiled program.
Compiled = Callable[[Program], jax.stages.Compiled]


class RoundStart(NamedTuple):
    """What a round begins with.

    Attributes:
      number: from 0.
      inputs: of programs, with all training images in place of those that each gets.
      latest: which round's row of memory each client has, see `jfed.engine.memory.ClientMemory`.
    """

    number: int
    inputs: Inputs
    latest: Any


@dataclasses.dataclass(frozen=True)
class Specification:
    """What decides the programs of a federation.

    Attributes:
      trainings: one for each group of tiers that share a program.
      evaluated: the groups of tiers that are tested, likewise.
      aggregator: in place of the weighted mean.
      population: how many clients of the federation are in each tier, by training.
      clients: how many there are, with or without a tier.
      measure: metrics of the user's own in the evaluation.
      keep: whether the evaluation gives the probabilities of all examples.
      local: how clients are tested on examples of their own, by training; () where they are not.
    """

    trainings: tuple[Training, ...]
    evaluated: tuple[tuple[Tier, ...], ...]
    aggregator: Aggregator | None
    population: tuple[tuple[int, ...], ...]
    clients: int
    measure: Measure | None
    keep: bool = False
    local: tuple[LocalTesting, ...] = ()

    @property
    def algorithm(self) -> Algorithm:
        """Of the clients, and of the server."""
        return self.trainings[0].algorithm

    @property
    def mesh(self) -> Mesh:
        """Of the devices."""
        return self.trainings[0].mesh


def _tracing(program: Program) -> contextlib.AbstractContextManager[None]:
    """What a user's function cannot do under `vmap` or in a loop, the checks before do not see."""
    return calling(f"a function that the program {program.title!r} calls")


class Programs:
    """The jitted programs of a specification, compiled once for each shape of their arguments."""

    def __init__(self, spec: Specification) -> None:
        self._mesh, self._platform = spec.mesh, platform_of(spec.mesh)
        self._jitted: dict[Program, Callable[..., Any]] = {SERVER: make_server(spec)}
        for training in spec.trainings:
            self._jitted[Program("train", training.tiers)] = make_trainer(training)
        for tiers in spec.evaluated:
            evaluator = make_evaluator(tiers[0], spec.mesh, spec.measure, keep=spec.keep)
            self._jitted[Program("evaluate", tiers)] = evaluator
        for testing in spec.local:
            self._jitted[Program("local", testing.tiers)] = make_local_tester(testing)
            self._jitted[Program("norms", testing.tiers)] = make_measurer(testing)
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def shapes(self, program: Program, *args: Any) -> Any:
        """Shapes of what a program returns, of arrays that lie on every device."""
        with made_for(self._platform), _tracing(program):
            found = jax.eval_shape(self._jitted[program], *args)
        there = NamedSharding(self._mesh, EVERYWHERE)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), found)

    def lower(self, arguments: Arguments) -> dict[Program, jax.stages.Lowered]:
        """The programs for such arguments, traced but not compiled."""
        with made_for(self._platform):
            return {p: self._lowered(p, args) for p, args in arguments.items()}

    def _lowered(self, program: Program, args: tuple[Any, ...]) -> jax.stages.Lowered:
        with _tracing(program):
            return self._jitted[program].lower(*args)  # type: ignore[attr-defined]

    def compile(self, arguments: Arguments) -> dict[Program, jax.stages.Compiled]:
        """The programs for such arguments; those that are new are compiled side by side."""
        keys = {program: (program, _signature(args)) for program, args in arguments.items()}
        new = {p: args for p, args in arguments.items() if keys[p] not in self._compiled}
        lowered, options = self.lower(new), compiler_options(self._platform)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda one: one.compile(options), lowered.values())
            self._compiled |= zip((keys[program] for program in lowered), compiled, strict=True)
        return {program: self._compiled[key] for program, key in keys.items()}


@functools.lru_cache(maxsize=8)
def programs(spec: Specification) -> Programs:
    """The programs of a specification, the same object for equal ones."""
    return Programs(spec)


def compiler_options(platform: str) -> dict[str, Any] | None:
    """On a CPU XLA's first level of optimisation: it compiles faster, and nothing runs slower."""
    if platform != "cpu" or jax.config.values["jax_disable_most_optimizations"]:
        return None
    return {"xla_backend_optimization_level": 1}


def _signature(args: Any) -> Any:
    """What a compiled program depends on of its arguments."""
    leaves, structure = jax.tree.flatten(args)
    told = [(jnp.shape(x), str(x.dtype), getattr(x, "sharding", None)) for x in leaves]
    return structure, tuple(told)


def make_server(spec: Specification) -> jax.stages.Wrapped:
    """The jitted end of a round: merge what was delivered, and take the server's step.

    Returns:
      `step(server, delivered, tiers, round, key) -> (server, finite)`, with what each program
      delivered, the tier of each slot, and the key of the run; `finite` tells whether all variables
      are. The server's state is donated; if nobody delivered it stays as it was.
    """

    def step(
        server: Server,
        delivered: Sequence[Delivered],
        tiers: Sequence[Array],
        round_: Array,
        key: Array,
    ) -> tuple[Server, Array]:
        groups = [
            Group(training.tiers, told, tier)
            for training, told, tier in zip(spec.trainings, delivered, tiers, strict=True)
        ]
        message, owners = merge(server.variables, groups, spec.aggregator, round_)
        clients = jnp.concatenate([d.report.delivered for d in delivered]).sum()
        merged = make_merged(spec, server.variables, key, round_, message, owners, clients)
        after = spec.algorithm.server_step(server, merged)
        if not spec.algorithm.is_private:
            after = jax.tree.map(lambda new, old: jnp.where(clients > 0, new, old), after, server)
        return after, all_finite(after.variables)

    return jax.jit(step, donate_argnums=0)


def all_finite(variables: Params) -> Array:
    """Whether all variables are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)]).all()


def make_merged(
    spec: Specification,
    variables: Params,
    key: Array,
    round_: Array,
    message: dict[str, Any],
    owners: Params,
    clients: Any,
) -> Merged:
    """What an algorithm's server gets; `key` belongs to the run."""
    tiers, personal = [training.tiers for training in spec.trainings], spec.algorithm.personal
    population = owned(variables, tiers, [jnp.float32(n) for n in spec.population], round_)
    if personal is not None:  # the server has none of these
        owners, population = (without(personal, tree) for tree in (owners, population))
    own_key = jax.random.fold_in(jax.random.fold_in(key, round_), _SERVER_KEY)
    everyone = jnp.float32(spec.clients)
    return Merged(message, owners, jnp.float32(clients), population, round_, own_key, everyone)
