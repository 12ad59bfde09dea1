"""What a run needs of a machine: bytes, arithmetic, traffic, and the time of these at best."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jfed.engine.devices import EngineConfig
from jfed.planning.counting import Counts
from jfed.planning.findings import Finding
from jfed.planning.hardware import TPU_PASSES, Chip

_GPU_SHARE = 0.75  # of its memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program of a run.

    Attributes:
      kind: "train", "server", "evaluate", "local" (tests of clients) or "norms" (for them).
      name: its kind, and the tiers that it serves.
      calls: of it in the whole run.
      seconds: that compiling took on this machine.
      error: what the compiler said; None if it made the program.
      unread: why its text cannot be counted, so that `counts` are empty; None if it can.
      arguments: bytes on a device, beside those that are there for the whole run.
      outputs: likewise, of results that do not take an argument's place.
      temporary: likewise, of what is there while the program runs.
      counts: of a call, the mean over the run, on the device that has most to do.
      step: of training, of one step of a device's lanes.
      findings: what is amiss.
    """

    kind: str
    name: str
    calls: int
    seconds: float = 0.0
    error: str | None = None
    unread: str | None = None
    arguments: int = 0
    outputs: int = 0
    temporary: int = 0
    counts: Counts = dataclasses.field(default_factory=Counts)
    step: Counts | None = None
    findings: Sequence[Finding] = ()

    @property
    def memory(self) -> int:
        """Bytes on a device, beside those that are there for the whole run."""
        return self.arguments + self.outputs + self.temporary

    @property
    def is_too_large(self) -> bool:
        """Whether the compiler found no room for it, as those of TPUs do."""
        return self.error is not None and "RESOURCE_EXHAUSTED" in self.error


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds that something takes at best, by what takes them.

    A device may compute, load and send at the same time, so that the longest of these counts;
    starting kernels one by one costs the more the smaller they are.

    Attributes:
      arithmetic: products of matrices at the peak of the units that do them.
      memory: bytes at the bandwidth of the device's memory. A cache may save some of them, most of
        programs whose arrays are small.
      links: bytes between devices at the bandwidth of a device's links; between hosts, of whose
        network nothing is known, too.
      launches: starting kernels.
    """

    arithmetic: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    launches: float = 0.0

    @property
    def seconds(self) -> float:
        """The longest of arithmetic, memory and links."""
        return max(self.arithmetic, self.memory, self.links)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A run on a target.

    Attributes:
      target: its name.
      chip: what a device is; None of this machine's own CPU.
      devices: how many.
      hosts: that they are spread over.
      engine: how clients are spread over them.
      cohort: clients of a round.
      rounds: of the run.
      held: bytes on a device for the whole run, by what they are.
      programs: all that the run compiles.
    """

    target: str
    chip: Chip | None
    devices: int
    hosts: int
    engine: EngineConfig
    cohort: int
    rounds: int
    held: Mapping[str, int]
    programs: Sequence[ProgramPlan]

    @property
    def memory(self) -> int:
        """About the most bytes that a device needs at a time, by what compiled."""
        return sum(self.held.values()) + max((p.memory for p in self.programs), default=0)

    @property
    def room(self) -> int | None:
        """Bytes that JAX takes of a device; None where that is not known."""
        if self.chip is None:
            return None
        return int(self.chip.memory * (_GPU_SHARE if self.chip.platform == "gpu" else 1))

    @property
    def fits(self) -> bool | None:
        """Whether there is room; None where that is not known."""
        if any(program.is_too_large for program in self.programs):
            return False
        if self.room is None or any(program.error for program in self.programs):
            return None
        return self.memory <= self.room

    @property
    def lanes_in_use(self) -> int:
        """Lanes of a device that a round has clients for."""
        return -(-self.cohort // self.devices)

    @property
    def most_lanes(self) -> int | None:
        """About how many lanes a device has room for, up to a lane for each client of a round.

        As if each took its share of what all these take: what is there once, however many lanes
        there are, counts with it. None where lanes run one after another, or a device's memory is
        not known.
        """
        training = [p.memory for p in self.training if p.error is None]
        if self.room is None or self.engine.mapping != "vmap" or not any(training):
            return None
        each = max(training) / (self.engine.lanes or 1)
        most = int((self.room - sum(self.held.values())) / each)
        return min(max(most, 0), self.lanes_in_use)

    @property
    def training(self) -> list[ProgramPlan]:
        """The programs that train clients."""
        return [p for p in self.programs if p.kind == "train"]

    @property
    def of_round(self) -> list[ProgramPlan]:
        """The programs that every round calls."""
        return [p for p in self.programs if p.kind in ("train", "server")]

    def floor(self, counts: Counts) -> Floor | None:
        """Of what a device does; None where the device is not known."""
        chip = self.chip
        if chip is None:
            return None
        return Floor(
            arithmetic=sum((n / peak(chip, t) for t, n in counts.flops.items()), start=0.0),
            memory=counts.bytes / chip.bandwidth,
            links=counts.sent / chip.link if self.devices > 1 else 0.0,
            launches=counts.kernels * chip.launch,
        )

    def least_seconds(self, programs: Sequence[ProgramPlan], *, calls: bool) -> float | None:
        """What the programs take at best one after another, called once each or as in the run.

        The host's work, compiling, reading data and saving come on top.
        """
        floors = [self.floor(p.counts) for p in programs]
        if any(floor is None for floor in floors) or any(p.error or p.unread for p in programs):
            return None
        times = [p.calls if calls else 1.0 for p in programs]
        seconds = [f.seconds * n for f, n in zip(floors, times, strict=True) if f is not None]
        return sum(seconds, start=0.0)


def peak(chip: Chip, dtype: str) -> float:
    """FLOP/s of a chip's matrix units for products of a type, as `Counts.flops` names it.

    What there are no units for is done in float32; of a type that is not known there is no bound.
    """
    name, _, precision = dtype.partition("/")
    if precision.isdigit():
        return peak(chip, name) / int(precision)
    if name == "float32" and precision != "highest":
        passes = TPU_PASSES["high"] if precision == "high" and chip.platform == "tpu" else 1
        return chip.peak[chip.float32_default] / passes
    return chip.peak.get(name, chip.peak["float32"] if "float" in name else math.inf)
