"""What a run needs of a machine: bytes, arithmetic, traffic, and what no machine can go below."""

import dataclasses
from collections.abc import Mapping, Sequence

from jfed.engine.devices import EngineConfig
from jfed.planning.counting import Counts
from jfed.planning.findings import Finding
from jfed.planning.hardware import Chip


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program of a run.

    Attributes:
      name: "train", "server", "evaluate", ... and the tiers that it serves.
      calls: of it in the whole run.
      seconds: that compiling took on this machine.
      error: what the compiler said; None if it made the program.
      arguments: bytes on a device, beside those that are there for the whole run.
      outputs: likewise, of results that do not take an argument's place.
      temporary: likewise, of what is there while the program runs.
      counts: of a call, the mean over the run, on the device that has most to do.
      step: of training, of one step of a device's lanes.
      findings: what is amiss.
    """

    name: str
    calls: int
    seconds: float
    error: str | None = None
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
    def sent(self) -> float:
        """Bytes that collectives take from a device in a call."""
        return sum(one.bytes * one.times for one in self.counts.collectives)


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds that something takes at the least, by what takes them.

    A device may compute, load and send at the same time, so that the longest of these is the least;
    starting kernels one by one costs the more the smaller they are.

    Attributes:
      arithmetic: products of matrices at the peak of the units that do them.
      memory: bytes at the bandwidth of the device's memory.
      links: bytes between devices at the bandwidth of a device's links.
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
class Plan:
    """A run on a target.

    Attributes:
      target: its name.
      chip: what a device is; None of this machine's own CPU.
      devices: how many.
      hosts: that they are spread over.
      engine: how clients are spread over them.
      rounds: of the run.
      held: bytes on a device for the whole run, by what they are.
      programs: all that the run compiles.
    """

    target: str
    chip: Chip | None
    devices: int
    hosts: int
    engine: EngineConfig
    rounds: int
    held: Mapping[str, int]
    programs: Sequence[ProgramPlan]

    @property
    def memory(self) -> int:
        """The most bytes that a device needs at a time, by what compiled."""
        return sum(self.held.values()) + max((p.memory for p in self.programs), default=0)

    @property
    def fits(self) -> bool | None:
        """Whether a device has that much; None where that is not known."""
        return None if self.chip is None else self.memory <= self.chip.memory

    @property
    def most_lanes(self) -> int | None:
        """About how many lanes a device has memory for, if each takes as much as these do.

        None where lanes run one after another, or a device's memory is not known.
        """
        training = [p.memory for p in self.training if p.error is None]
        if self.chip is None or self.engine.mapping != "vmap" or not any(training):
            return None
        each = max(training) / (self.engine.lanes or 1)
        return max(int((self.chip.memory - sum(self.held.values())) / each), 0)

    @property
    def training(self) -> list[ProgramPlan]:
        """The programs that train clients."""
        return [p for p in self.programs if p.name.startswith("train ")]

    @property
    def of_round(self) -> list[ProgramPlan]:
        """The programs that every round calls."""
        return [p for p in self.programs if p.name == "server" or p in self.training]

    def floor(self, counts: Counts) -> Floor | None:
        """Of what a device does; None where the device is not known."""
        chip = self.chip
        if chip is None:
            return None
        sent = sum(one.bytes * one.times for one in counts.collectives)
        return Floor(
            arithmetic=sum(n / peak(chip, dtype) for dtype, n in counts.flops.items()),
            memory=counts.bytes / chip.bandwidth,
            links=sent / chip.link if self.devices > 1 else 0.0,
            launches=counts.kernels * chip.launch,
        )

    def least_seconds(self, programs: Sequence[ProgramPlan], *, calls: bool) -> float | None:
        """Below which the programs cannot go one after another, called once each or as in the run.

        The host's work, compiling, reading data and saving come on top.
        """
        floors = [self.floor(p.counts) for p in programs]
        if any(floor is None for floor in floors) or any(p.error for p in programs):
            return None
        times = [p.calls if calls else 1.0 for p in programs]
        return sum(f.seconds * n for f, n in zip(floors, times, strict=True) if f is not None)


def peak(chip: Chip, dtype: str) -> float:
    """FLOP/s of a chip's matrix units for products of a type, as `Counts.flops` names it.

    What there are no units for is done in float32.
    """
    name, _, precision = dtype.partition("/")
    if name == "float32" and precision != "highest":
        passes = 3 if precision == "high" else 1
        return chip.peak[chip.float32_default] / passes
    return chip.peak.get(name, chip.peak["float32"])
