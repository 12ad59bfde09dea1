"""What makes a compiled program slower than it need be, as far as its text tells."""

import dataclasses
from collections.abc import Iterator, Mapping

from jfed.planning.counting import Visit, Walk
from jfed.planning.hlo import Computation, Instruction, parse
from jfed.planning.kernels import CONTROL, Kernels
from jfed.planning.products import groups, product_dtype, product_flops


@dataclasses.dataclass
class Finding:
    """Something that costs time.

    Attributes:
      what: it is, in words.
      op_name: where JAX's program has it: transformations, named scopes and the primitive.
      source: the line of Python, "file:line", or "".
      times: how many kernels of the kind are run.
      bytes: that all of them together read and write in the device's main memory.
    """

    what: str
    op_name: str
    source: str
    times: float
    bytes: float


def find(
    text: str, lengths: Mapping[str, int | float], *, lanes: int = 1, share: float = 0.01
) -> list[Finding]:
    """The findings in a program, those that move most bytes first.

    They are: convolutions in as many groups as there are lanes, which `vmap` makes of ordinary ones
    (groups of the model's own are left alone); copies within loops; arrays that are written anew in
    another layout; products at a precision above the default; 64-bit floating point; gathers.

    Args:
      text: of the compiled program.
      lengths: see `jfed.planning.counting.count`.
      lanes: how many clients a device trains at a time by `vmap`.
      share: of the bytes that the program moves, the least that a finding moves.
    """
    walk = Walk(parse(text), lengths)
    found: dict[tuple[str, str, str], Finding] = {}
    total = 0.0
    for visit in walk.visits(walk.program.entry):
        if visit.instruction.opcode in CONTROL:
            continue
        moved = visit.times * walk.kernels.cost(visit.computation, visit.instruction).bytes
        total += moved
        for what, where in dict(_amiss(walk.kernels, visit, lanes)).items():
            key = (what, where.op_name, walk.program.source(where))
            finding = found.setdefault(key, Finding(*key, 0.0, 0.0))
            finding.times += visit.times
            finding.bytes += moved
    large = [finding for finding in found.values() if finding.bytes >= max(share * total, 1)]
    return sorted(large, key=lambda finding: -finding.bytes)


def _amiss(kernels: Kernels, visit: Visit, lanes: int) -> Iterator[tuple[str, Instruction]]:
    """What is amiss with a kernel, and the instruction that shows it."""
    kernel, computation = visit.instruction, visit.computation
    if moved := _mover(kernels, computation, kernel):
        before, mover = moved
        shown = next((one for one in (mover, kernel, *visit.loops[::-1]) if one.op_name), kernel)
        if mover.opcode != "copy" or _order(before) != _order(mover):
            yield "an array is written anew in another layout", shown
        elif visit.loops:
            yield "an array is copied in every pass of a loop", shown
    for inner, one in _inside(kernels, computation, kernel):
        operands = inner.operands(one)
        if product_flops(one, operands):
            dtype = product_dtype(one, operands)
            if lanes > 1 and groups(one) == lanes:
                yield f"a convolution in {lanes} groups, one a lane", one
            name, _, precision = dtype.partition("/")
            if precision:  # a jax.lax.Precision, or how many passes
                passes = (
                    f"in {precision} passes" if precision.isdigit() else f"at precision {precision}"
                )
                yield f"a {name} product {passes}", one
        if any(shape.dtype == "f64" for shape in one.shapes):
            yield "64-bit floating point", one
        if one.opcode == "gather":
            yield "a gather", one


def _inside(
    kernels: Kernels, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The instructions that a kernel consists of."""
    if instruction.opcode == "fusion":
        fused = kernels.fused(instruction)
        for inner in fused:
            yield from _inside(kernels, fused, inner)
    else:
        yield computation, instruction


# What a kernel that only moves an array consists of.
_MOVES = frozenset(["parameter", "copy", "transpose", "reshape", "bitcast"])


def _mover(
    kernels: Kernels, computation: Computation, kernel: Instruction
) -> tuple[Instruction, Instruction] | None:
    """Of a kernel that does no more than copy or transpose: what it moves, and what moves it."""
    inside = list(_inside(kernels, computation, kernel))
    movers = [pair for pair in inside if pair[1].opcode in ("copy", "transpose", "reshape")]
    if not movers or not all(one.opcode in _MOVES for _, one in inside):
        return None
    inner, mover = movers[-1]
    return inner.operands(mover)[0], mover


def _order(instruction: Instruction) -> tuple[int, ...]:
    """The axes of an array as they lie in memory, those of size 1 left out."""
    shape = instruction.shapes[0]
    return tuple(axis for axis in shape.order if shape.dims[axis] != 1)
