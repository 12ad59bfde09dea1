"""What one kernel of a compiled program does: arithmetic, and bytes of the device's main memory.

A kernel is an instruction of a computation that is run as such: a fusion with all that is inside, a
call of a library, a copy, a single operation that is in no fusion.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from jfed.planning.hlo import Computation, Instruction, Program, Shape
from jfed.planning.products import product_dtype, product_flops, target


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Instructions that pass control on to other computations; see `jfed.planning.counting`.
CONTROL = _words("while conditional call async-start")

_FREE = _words(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency domain"
)
_FREE_CALLS = _words("AllocateBuffer ConcatBitcast AssumeGatherIndicesInBound Sharding")
_COLLECTIVES = _words(
    "all-reduce all-gather reduce-scatter all-to-all ragged-all-to-all collective-permute "
    "collective-broadcast"
)
_ELEMENTWISE = _words(
    "abs add and atan2 cbrt ceil clamp compare cosine divide erf exponential "
    "exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply "
    "negate not or popcnt power remainder round-nearest-afz round-nearest-even rsqrt select sign "
    "sine sqrt subtract tan tanh xor"
)
_FLOATS = _words("f16 bf16 f32 f64")


@dataclasses.dataclass
class Cost:
    """Of one kernel.

    Attributes:
      flops: of matrix products and convolutions, by dtype, see `Counts`.
      vector_flops: of floating-point operations element by element, and of reductions.
      bytes: read and written in the device's main memory.
      collectives: the kind and the bytes of each.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    vector_flops: float = 0.0
    bytes: float = 0.0
    collectives: list[tuple[str, int]] = dataclasses.field(default_factory=list)


class _Use(NamedTuple):
    """Shares, 0 to 1: of each parameter of a fusion that is read, of each result written."""

    reads: tuple[float, ...]
    writes: tuple[float, ...]


class Kernels:
    """The kernels of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._arithmetic: dict[str, Cost] = {}
        self._uses: dict[str, _Use] = {}

    def fused(self, instruction: Instruction) -> Computation:
        """What is inside a fusion."""
        return self.program.computation(instruction.called("calls")[0])

    def cost(self, computation: Computation, instruction: Instruction) -> Cost:
        """Of a kernel: an instruction of a computation that is no fusion."""
        cost = Cost()
        self._add_arithmetic(cost, computation, instruction)
        cost.bytes = self._bytes(computation, instruction)
        return cost

    def _inside(self, fused: Computation) -> Cost:
        if fused.name not in self._arithmetic:
            cost = self._arithmetic[fused.name] = Cost()
            for instruction in fused:
                self._add_arithmetic(cost, fused, instruction)
        return self._arithmetic[fused.name]

    def _add_arithmetic(self, cost: Cost, computation: Computation, of: Instruction) -> None:
        operands = computation.operands(of)
        if of.opcode == "fusion":
            inside = self._inside(self.fused(of))
            add(cost.flops, inside.flops)
            cost.vector_flops += inside.vector_flops
            cost.collectives += inside.collectives
        elif flops := product_flops(of, operands):
            add(cost.flops, {product_dtype(of, operands): flops})
        elif of.opcode in _ELEMENTWISE and of.shapes[0].dtype in _FLOATS:
            cost.vector_flops += of.shapes[0].elements
        elif of.opcode in ("reduce", "scatter"):
            counted = operands[0] if of.opcode == "reduce" else operands[-1]
            cost.vector_flops += counted.shapes[0].elements
        elif of.opcode == "reduce-window":
            cost.vector_flops += of.shapes[0].elements * _window(of)
        elif of.opcode in _COLLECTIVES and (sent := _sent(of, operands)):
            cost.collectives.append((of.opcode, sent))

    def _bytes(self, computation: Computation, instruction: Instruction) -> float:
        operands = computation.operands(instruction)
        results = _results(instruction)
        if instruction.opcode == "fusion":
            reads, writes = self._use(self.fused(instruction))
        else:
            in_place = _updates(instruction, operands)
            reads = self._reads(instruction, operands, 1.0, in_place is not None)
            writes = (1.0 if in_place is None else in_place,) * len(results)
        shares: dict[str, float] = defaultdict(float)
        for operand, share in zip(operands, reads, strict=True):
            shares[operand.name] = min(1.0, shares[operand.name] + share)
        # Single constants are part of a kernel's code.
        stored = {o.name: o for o in operands if o.opcode != "constant" or o.shapes[0].dims}
        read = sum(shares[name] * _memory(operand.shapes) for name, operand in stored.items())
        return read + sum(w * _memory([shape]) for w, shape in zip(writes, results, strict=True))

    def _use(self, fused: Computation) -> _Use:
        """What a fusion reads and writes, from its results back to its parameters.

        Kernels compute only what is asked for: of what is sliced or gathered, the slices. An update
        of a part of a parameter that is a result is done in place (XLA has copied it elsewhere if
        it is still needed).
        """
        if fused.name in self._uses:
            return self._uses[fused.name]
        wanted: dict[str, float] = defaultdict(float)
        in_place, writes = set(), []
        ends = fused.operands(fused.root) if fused.root.opcode == "tuple" else [fused.root]
        for end in ends:
            wanted[end.name] = 1.0
            source = _behind(fused, end)
            share = _updates(source, fused.operands(source))
            if source.opcode == "fusion" and len(source.shapes) == 1:
                writes.append(self._use(self.fused(source)).writes[0])
            elif share and _behind(fused, fused.operands(source)[0]).opcode == "parameter":
                in_place.add(source.name)
                writes.append(share)
            else:
                writes += [1.0] * len(end.shapes)
        reads: dict[int, float] = defaultdict(float)
        for instruction in reversed(list(fused)):
            share = min(1.0, wanted[instruction.name])
            if instruction.opcode == "parameter":
                reads[int(instruction.literal)] = share
            elif share > 0:
                operands = fused.operands(instruction)
                parts = self._reads(instruction, operands, share, instruction.name in in_place)
                for name, part in zip(instruction.operands, parts, strict=True):
                    wanted[name] += part
        use = _Use(tuple(reads[i] for i in range(len(reads))), tuple(writes))
        return self._uses.setdefault(fused.name, use)

    def _reads(
        self, instruction: Instruction, operands: list[Instruction], share: float, in_place: bool
    ) -> tuple[float, ...]:
        """The share of each operand that is read for a share of an instruction's result."""
        if instruction.opcode == "fusion":
            return tuple(share * part for part in self._use(self.fused(instruction)).reads)
        if not operands:
            return ()
        made = share * sum(s.elements for s in _results(instruction))
        ratios = [made / max(1, sum(s.elements for s in operand.shapes)) for operand in operands]
        opcode = instruction.opcode
        if opcode in ("slice", "dynamic-slice", "gather"):
            return (min(1.0, ratios[0]), *(1.0 for _ in ratios[1:]))
        if opcode == "dynamic-update-slice":
            return (0.0 if in_place else share, *(1.0 for _ in ratios[1:]))
        if opcode == "scatter" and in_place:
            targets = len(instruction.shapes)
            updated = _updates(instruction, operands) or 0.0
            return (*(updated for _ in range(targets)), *(1.0 for _ in ratios[targets:]))
        # Element by element, or broadcast: a part of the result needs a part of the operand. Of
        # what is reduced, all of it.
        return tuple(min(1.0, ratio) if ratio >= share else 1.0 for ratio in ratios)


def add(total: dict[str, float], more: Mapping[str, float], times: float = 1.0) -> None:
    """Adds numbers to those of the same name."""
    for key, value in more.items():
        total[key] = total.get(key, 0.0) + times * value


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction outside fusions is a kernel, a copy or a collective of its own."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode in CONTROL or opcode.endswith(("-done", "-update")):
        return False
    return target(instruction) not in _FREE_CALLS


def _results(instruction: Instruction) -> tuple[Shape, ...]:
    """What an instruction makes, without the scratch memory of cuBLAS and cuDNN."""
    shapes = instruction.shapes
    if target(instruction).startswith(("__cublas$", "__cudnn$")):
        return shapes[:1] + tuple(s for s in shapes[1:] if s.dtype not in ("s8", "u8"))
    return shapes


def _window(instruction: Instruction) -> int:
    """How many elements a window has: `window={size=1x2x2x1 stride=...}`."""
    size = re.search(r"size=([\dx]+)", instruction.attributes.get("window", ""))
    return math.prod(map(int, size[1].split("x"))) if size else 1


def _sent(collective: Instruction, operands: list[Instruction]) -> int:
    """Bytes that a device sends at least, or receives if that is more; 0 if it is alone.

    The whole array, where it is reduced or sent on; of what is gathered, scattered or exchanged,
    all but the device's own share.
    """
    groups = collective.attributes.get("replica_groups", "")
    listed = re.search(r"\[\d+,(\d+)\]<=", groups) or re.search(r"\{([\d,\s]+)\}", groups)
    size = 0  # of a group; 0: all devices
    if listed:
        size = int(listed[1]) if "<=" in groups else len(listed[1].split(","))
    moved = sum(shape.bytes for operand in operands for shape in operand.shapes)
    made = sum(shape.bytes for shape in _results(collective))
    largest = max(moved, made)
    if size == 1:
        return 0
    shared = ("all-gather", "reduce-scatter", "all-to-all")
    return largest - largest // size if size and collective.opcode in shared else largest


def _memory(shapes: tuple[Shape, ...] | list[Shape]) -> int:
    """Bytes in the device's main memory."""
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _updates(instruction: Instruction, operands: list[Instruction]) -> float | None:
    """The share of an array that an instruction writes to, if it updates a part of it."""
    if instruction.opcode == "dynamic-update-slice":
        update = operands[1]
    elif instruction.opcode == "scatter":
        update = operands[-1]
    else:
        return None
    return min(1.0, update.shapes[0].elements / max(1, instruction.shapes[0].elements))


def _behind(computation: Computation, instruction: Instruction) -> Instruction:
    """What a bitcast, or a row of them, is of."""
    while instruction.opcode == "bitcast":
        (instruction,) = computation.operands(instruction)
    return instruction
