"""What a run of a compiled program does: arithmetic, memory traffic, kernels, collectives.

XLA's own count (`compiled.cost_analysis()`) takes every loop for one pass, and GPU programs have
none. Here the kernels of loops are multiplied by how often they run.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jfed.errors import ConfigError, check_number
from jfed.planning.hlo import Computation, Instruction, Program, parse
from jfed.planning.kernels import CONTROL, Kernels, add, is_kernel


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
      kind: such as "all-reduce".
      bytes: that a device sends at least, or receives if that is more, each time.
      times: that it runs.
    """

    kind: str
    bytes: int
    times: float


class Unknown(NamedTuple):
    """A loop whose length is not known: its instruction's name, and where JAX's program has it."""

    name: str
    op_name: str


@dataclasses.dataclass
class Counts:
    """Of a run, on one device.

    Attributes:
      flops: of matrix products and convolutions, by the dtype of their operands: "bfloat16",
        "float16", "float32", "float64", ... "float32" is at XLA's default precision: TF32 on GPUs
        that have it, one pass in bfloat16 on TPUs. "float32/high" and "float32/highest" are those
        of a `jax.lax.Precision`, "tensorfloat32" where the program asks for it, "bfloat16/6" what
        takes six passes.
      vector_flops: other floating-point operations, one an output element; reductions: one an
        element that is reduced.
      bytes: that kernels read and write in the device's main memory, with what fills up a TPU's
        tiles. Each kernel reads all it needs anew: what caches save is not taken off.
      kernels: how many are launched, with copies and collectives.
      host_waits: how often a GPU's host waits for a value to decide whether a loop goes on, or
        which branch is taken.
      collectives: of the devices.
      unknown: loops of unknown length, counted as one pass.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    vector_flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    host_waits: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown: list[Unknown] = dataclasses.field(default_factory=list)

    @property
    def sent(self) -> float:
        """Bytes that collectives take from a device."""
        return sum((one.bytes * one.times for one in self.collectives), start=0.0)


class Visit(NamedTuple):
    """A kernel, or a loop or conditional that waits for a value.

    Attributes:
      computation: that has it.
      instruction: the kernel.
      times: that it runs.
      loops: around it, the innermost last.
    """

    computation: Computation
    instruction: Instruction
    times: float
    loops: tuple[Instruction, ...]


def count(text: str, lengths: Mapping[str, int | float]) -> Counts:
    """Of one run of a program.

    Args:
      text: of the compiled program, `compiled.as_text()`.
      lengths: by the name of a `jax.named_scope`: how many passes a loop in it makes each time,
        where its length is data (lengths that XLA knows go before these). A scope does not reach
        into the loops and branches within it: those have scopes of their own, or are unknown. Of
        branches the costliest counts.
    """
    walk = Walk(parse(text), lengths)
    return walk.total(walk.visits(walk.program.entry))


def count_body(text: str, scope: str, lengths: Mapping[str, int | float]) -> Counts:
    """Of one pass through each loop of a scope, and of its condition; see `count`."""
    walk = Walk(parse(text), lengths)
    all_ = (one for computation in walk.program.computations.values() for one in computation)
    found = [one for one in all_ if one.opcode == "while" and scope in walk.scopes(one)]
    if not found:
        raise ConfigError(f"the compiled program has no loop in a scope {scope!r}.")
    return walk.total(visit for loop in found for visit in walk.passes(loop, 1.0, 1.0))


class Walk:
    """A program, walked as it runs."""

    def __init__(self, program: Program, lengths: Mapping[str, int | float]) -> None:
        self.program = program
        self.lengths = {
            name: check_number(f"the length of {name!r}", length, least=0.0)
            for name, length in lengths.items()
        }
        self.kernels = Kernels(program)
        self.unknown: dict[str, Unknown] = {}

    def total(self, visits: Iterator[Visit]) -> Counts:
        """Of all that is visited."""
        counts = Counts()
        for computation, instruction, times, _ in visits:
            if instruction.opcode in CONTROL:
                counts.host_waits += times * (instruction.opcode in ("while", "conditional"))
                continue
            cost = self.kernels.cost(computation, instruction)
            add(counts.flops, cost.flops, times)
            counts.vector_flops += times * cost.vector_flops
            counts.bytes += times * cost.bytes
            counts.kernels += times
            counts.collectives += [Collective(*one, times) for one in cost.collectives]
        counts.unknown = list(self.unknown.values())
        return counts

    def visits(
        self, computation: Computation, times: float = 1.0, loops: tuple[Instruction, ...] = ()
    ) -> Iterator[Visit]:
        """Every kernel that runs, and each decision that waits for a value."""
        for one in computation:
            if is_kernel(one):
                yield Visit(computation, one, times, loops)
            elif one.opcode == "while":
                known = trip_count(self.program, computation, one)
                passes = self._length(one) if known is None else known
                checks = times * (passes + 1) if known is None else 0.0
                if known is None:
                    yield Visit(computation, one, checks, loops)
                yield from self.passes(one, times * passes, checks, loops)
            elif one.opcode == "conditional":
                yield Visit(computation, one, times, loops)
                yield from self.visits(self._costliest(one), times, loops)
            elif one.opcode in CONTROL:
                for name in one.called("to_apply") + one.called("calls"):
                    yield from self.visits(self.program.computation(name), times, loops)

    def passes(
        self, loop: Instruction, times: float, checks: float, loops: tuple[Instruction, ...] = ()
    ) -> Iterator[Visit]:
        """A loop's body and its condition, so many times each."""
        for attribute, each in (("body", times), ("condition", checks)):
            for name in loop.called(attribute) if each else ():
                yield from self.visits(self.program.computation(name), each, (*loops, loop))

    def scopes(self, loop: Instruction) -> list[str]:
        """Names of the scopes around a loop, the innermost first."""
        return _scopes(self._op_name(loop))

    def _op_name(self, loop: Instruction) -> str:
        """Of a loop: its own, or else what its body was made from."""
        if loop.op_name:
            return loop.op_name
        inside = "/while/body/"
        (body,) = loop.called("body")
        names = [one.op_name for one in self.program.computation(body)]
        found = Counter(name.rpartition(inside)[0] for name in names if inside in name)
        return f"{found.most_common(1)[0][0]}/while" if found else ""

    def _length(self, loop: Instruction) -> float:
        for scope in self.scopes(loop):
            if scope in self.lengths:
                return self.lengths[scope]
        self.unknown[loop.name] = Unknown(loop.name, self._op_name(loop))
        return 1.0

    def _costliest(self, conditional: Instruction) -> Computation:
        kinds = ("branch_computations", "false_computation", "true_computation")
        names = [name for kind in kinds for name in conditional.called(kind)]
        return max(map(self.program.computation, names), key=self._weight)

    def _weight(self, computation: Computation) -> float:
        apart = Walk(self.program, self.lengths)  # with unknown loops of its own
        counts = apart.total(apart.visits(computation))
        return sum(counts.flops.values()) + counts.vector_flops + counts.bytes


# What JAX puts between a scope's name and a loop in it.
_BETWEEN = re.compile(
    r"(shard_map|checkpoint|rematted_computation|closed_call|core_call|remat2?|"
    r"custom_(jvp|vjp)_call(_jaxpr)?|)"
)


def _scopes(op_name: str) -> list[str]:
    """`a/while/body/transpose(jvp(ode0))/while` -> ["ode0"]: those within the loop around it."""
    parts = op_name.split("/")
    if "while" not in parts:
        return []
    end = len(parts) - 1 - parts[::-1].index("while")
    found = []
    for i in range(end - 1, -1, -1):
        before = parts[i - 1] if i else ""
        if before == "while" and parts[i] in ("body", "cond"):
            break
        if before == "cond" and re.fullmatch(r"branch_\d+_fun", parts[i]):
            break
        wrapped = re.fullmatch(r"((?:[\w.\-<>]+\()*)(.*?)\)*", parts[i])
        if wrapped and "jit(" not in wrapped[1] and not _BETWEEN.fullmatch(wrapped[2]):
            found.append(wrapped[2])
    return found


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How many passes a loop makes, if the program tells.

    XLA notes it for CPUs and GPUs. For TPUs it does not; then it follows from a condition `i < n`
    of constants, i growing by one, as JAX's loops of fixed lengths have it.
    """
    noted = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes.get("backend_config", ""))
    if noted:
        return int(noted[1])
    condition, body = (program.computation(loop.called(of)[0]) for of in ("condition", "body"))
    test = condition.root
    if test.opcode != "compare" or test.attributes.get("direction") != "LT":
        return None
    counter, bound = condition.operands(test)
    (given,) = computation.operands(loop)
    position = int(counter.attributes.get("index", -1))
    if given.opcode != "tuple" or body.root.opcode != "tuple" or position < 0:
        return None
    outer = computation.operands(given)
    limit = _integer(condition, bound)
    after = body.operands(body.root)
    if limit is None and bound.opcode == "get-tuple-element":
        index = bound.number("index", 0)
        if _is_carried(body, after[index], index):
            limit = _integer(computation, outer[index])
    first, following = _integer(computation, outer[position]), after[position]
    if limit is None or first is None or following.opcode != "add":
        return None
    parts = body.operands(following)
    by_one = any(_integer(body, one) == 1 for one in parts)
    if not by_one or not any(_is_carried(body, one, position) for one in parts):
        return None
    return max(0, limit - first)


def _is_carried(body: Computation, instruction: Instruction, index: int) -> bool:
    """Whether something in a loop's body is what the pass began with at that index."""
    instruction = _copied(body, instruction)
    return instruction.opcode == "get-tuple-element" and instruction.number("index", -1) == index


def _integer(computation: Computation, instruction: Instruction) -> int | None:
    """The value of a constant, or of a copy of one."""
    instruction = _copied(computation, instruction)
    is_number = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
    return int(instruction.literal) if is_number else None


def _copied(computation: Computation, instruction: Instruction) -> Instruction:
    """What a copy, or a row of them, is of."""
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        (instruction,) = computation.operands(instruction)
    return instruction
