"""The text of a compiled program, `compiled.as_text()`, as computations and instructions.

It is XLA's optimised HLO, as its compilers for CPUs, GPUs and TPUs print it. Sources:
https://openxla.org/xla/operation_semantics, https://openxla.org/xla/shapes (layouts),
https://openxla.org/xla/tiled_layout (tiles).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jfed.errors import ConfigError


class Shape(NamedTuple):
    """Of an array.

    Attributes:
      dtype: as HLO calls it: f32, bf16, s32, pred, ...
      dims: sizes of its axes.
      order: its axes from the one that varies fastest in memory.
      tile: sizes of a tile of its fastest axes, slowest first; () where it is not tiled. Memory
        holds whole tiles.
      space: memory space: 0 is the device's main memory, 1 a TPU's vector memory (VMEM).
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """In memory, with what fills up tiles."""
        dims = [self.dims[axis] for axis in reversed(self.order)]
        dims = [1] * (len(self.tile) - len(dims)) + dims
        for i, size in enumerate(self.tile, start=len(dims) - len(self.tile)):
            dims[i] = -(-dims[i] // size) * size
        return math.ceil(math.prod(dims) * bits(self.dtype) / 8)


def bits(dtype: str) -> int:
    """Of one element; 0 of what is no array, such as a token."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8 * (dtype == "pred")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: unique in its computation.
      opcode: such as "dot", "fusion", "while".
      shapes: of the arrays that it makes, those of nested tuples in a row.
      operands: names of instructions of the same computation.
      literal: of a constant its value, of a parameter its number, as printed.
      tail: its attributes, as printed.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    tail: str

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """As printed, by name."""
        pairs = (part.strip().partition("=") for part in _split(self.tail))
        return {name: value for name, _, value in pairs if name}

    @property
    def op_name(self) -> str:
        """Where JAX's program has it: transformations, named scopes and the primitive."""
        return _metadata(self, "op_name")

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute holds."""
        return re.findall(r"[^\s%{},]+", self.attributes.get(attribute, ""))

    def axes(self, attribute: str) -> tuple[int, ...]:
        """An attribute such as `lhs_contracting_dims={1,2}`."""
        return tuple(map(int, re.findall(r"\d+", self.attributes.get(attribute, ""))))

    def number(self, attribute: str, default: int) -> int:
        return int(self.attributes.get(attribute, default))


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program.

    Attributes:
      name: unique in the program.
      instructions: by name, operands before those that use them.
      root: the instruction whose value it returns.
    """

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the one that is run.
      frames: "file:line" of each stack frame that instructions name by number.
    """

    computations: Mapping[str, Computation]
    entry: Computation
    frames: Mapping[str, str]

    def computation(self, name: str) -> Computation:
        if name not in self.computations:
            raise ConfigError(f"the compiled program calls {name!r}, which its text does not have.")
        return self.computations[name]

    def source(self, instruction: Instruction) -> str:
        """The line of Python that an instruction comes from, "file:line"; "" if it is not told."""
        file, line = (_metadata(instruction, key) for key in ("source_file", "source_line"))
        if file:
            return f"{file}:{line}"
        return self.frames.get(_metadata(instruction, "stack_frame_id"), "")


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """Reads the text of a compiled program; ConfigError if it is none."""
    if not text.startswith("HloModule"):
        raise ConfigError(
            f"the text of a compiled program begins with HloModule, got {text[:60]!r}."
        )
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[str, str]] = {}
    table: dict[str, str] = {}
    entry = None
    lines = iter(text.splitlines()[1:])
    for line in lines:
        head = re.fullmatch(r"(ENTRY\s+)?%?([^\s({]+)\s.*\{\s*", line)
        if head:
            found = _computation(head[2], lines)
            computations[found.name] = found
            entry = found if head[1] else entry
        elif line.strip() in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line.strip(), {})
        elif row := re.fullmatch(r"(\d+) (.*)", line):
            table[row[1]] = row[2]
    if entry is None:
        raise ConfigError("the text of the compiled program has no ENTRY computation.")
    return Program(computations, entry, _frames(tables))


def _frames(tables: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    files, places = tables.get("FileNames", {}), tables.get("FileLocations", {})
    found = {}
    for number, frame in tables.get("StackFrames", {}).items():
        place = dict(re.findall(r"(\w+)=(\d+)", frame)).get("file_location_id", "")
        at = dict(re.findall(r"(\w+)=(\d+)", places.get(place, "")))
        if file := files.get(at.get("file_name_id", "")):
            found[number] = file.strip('"') + ":" + at.get("line", "")
    return found


def _computation(name: str, lines: Iterator[str]) -> Computation:
    """The computation whose first line has just been read from `lines`."""
    instructions: dict[str, Instruction] = {}
    root = None
    for line in lines:
        if line.startswith("}"):
            if root is None:
                raise ConfigError(f"the computation {name!r} of the compiled program has no ROOT.")
            return Computation(name, instructions, root)
        if not line.strip():
            continue
        found = _instruction(line)
        unknown = [operand for operand in found.operands if operand not in instructions]
        if unknown:
            raise ConfigError(f"{found.name} in {name} uses {unknown[0]!r}, which is not above it.")
        found = _started(found, [instructions[operand] for operand in found.operands])
        instructions[found.name] = found
        if line.lstrip().startswith("ROOT "):
            root = found
    raise ConfigError(f"the text of the compiled program ends within its computation {name!r}.")


def _instruction(line: str) -> Instruction:
    """`[ROOT] %name = shape opcode(operands), attribute=value, ...`."""
    line = re.sub(r"/\*index=\d+\*/", "", line)
    head = re.match(r"\s*(?:ROOT\s+)?%?(\S+) = ", line)
    try:
        assert head
        end = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
        opcode = re.compile(r"\s*([\w-]+)(?=\()").match(line, end)
        assert opcode
        close = _closing(line, opcode.end())
        shapes = _shapes(line[head.end() : end])
    except (AssertionError, ValueError, IndexError) as error:
        shown = line.strip()[:120]
        raise ConfigError(f"cannot read this line of a compiled program: {shown!r}.") from error
    inside = line[opcode.end() + 1 : close - 1]
    operands: tuple[str, ...] = ()
    if opcode[1] not in ("constant", "parameter"):
        parts = (part.split() for part in _split(inside))
        operands = tuple(part[-1].lstrip("%") for part in parts if part)
    literal = "" if operands else inside
    return Instruction(head[1], opcode[1], shapes, operands, literal, line[close:])


def _started(instruction: Instruction, operands: list[Instruction]) -> Instruction:
    """Of `X-start`, the X that it starts, with its results alone.

    XLA prints operands before them, and contexts or semaphores after them; but of an all-reduce
    the results only, of a copy its result first. A copy's start stays one, for it need not wait.
    """
    opcode, shapes = instruction.opcode.removesuffix("-start"), instruction.shapes
    if opcode in (instruction.opcode, "async"):
        return instruction
    if opcode == "copy":
        return dataclasses.replace(instruction, shapes=shapes[:1])
    if opcode != "all-reduce":
        results = shapes[sum(len(operand.shapes) for operand in operands) :]
        shapes = tuple(
            s for s in results if s.space != _SEMAPHORES and (s.dtype, s.dims) != _CONTEXT
        )
    return dataclasses.replace(instruction, opcode=opcode, shapes=shapes)


_SEMAPHORES = 2  # a TPU's memory space
_CONTEXT = ("u32", ())
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')


def _closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if depth == 0:
            return token.end()
    raise ValueError("an open bracket")


def _split(text: str) -> list[str]:
    """At the commas that are outside brackets and quotes."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if token[0] == "," and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [*parts, text[start:]]


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")


@functools.lru_cache(maxsize=4096)
def _shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape, which may be a tuple: `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`."""
    shapes = []
    for dtype, sizes, order, more in _ARRAY.findall(text):
        dims = tuple(int(size.strip("<= ")) for size in sizes.split(",") if size)
        axes = tuple(map(int, order.split(","))) if order else tuple(reversed(range(len(dims))))
        tile, space = re.search(r"T\(([\d,]+)\)", more), re.search(r"S\((\d+)\)", more)
        sides = tuple(map(int, tile[1].split(","))) if tile else ()
        shapes.append(Shape(dtype, dims, axes, sides, int(space[1]) if space else 0))
    if not shapes and text != "()":
        raise ValueError(text)
    return tuple(shapes)


def _metadata(instruction: Instruction, key: str) -> str:
    found = re.search(
        rf'\b{key}=(?:"((?:[^"\\]|\\.)*)"|(\w+))', instruction.attributes.get("metadata", "")
    )
    return (found[1] or found[2] or "") if found else ""
