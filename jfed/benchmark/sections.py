"""The sections: which contenders there are, and the sizes of what they train."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jfed.benchmark.contenders import Contender
from jfed.benchmark.settings import Settings
from jfed.benchmark.tasks import Task
from jfed.engine.devices import MAPPINGS, EngineConfig
from jfed.errors import ConfigError
from jfed.models.ode_nets import ODENetConfig

JFED = "jfed"
LOOP = "jitted step, XLA's convolution"
_QUICK = "im2col"  # the form that compiles fastest, for the smoke scale


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the benchmark runs.

    Attributes:
      platform: JAX's: "cpu", "gpu" or "tpu".
      cores: of the processor.
      devices: accelerators there are; on the CPU as many as are asked for.
    """

    platform: str
    cores: int
    devices: int

    @property
    def is_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.platform == "cpu"

    def jfed(self, name: str, task: Task, devices: int | None = None, **engine: Any) -> Contender:
        """Jfed on so many devices: by default one for each core, or all accelerators."""
        count = devices or (self.cores if self.is_cpu else self.devices)
        config = EngineConfig(devices=count, **engine)
        return Contender(name, "jfed", task, config, cpu_devices=count)


@dataclasses.dataclass(frozen=True)
class Group:
    """Contenders of one table.

    Attributes:
      title: of the table.
      contenders: the one that others are compared with first.
      together: their turns are interleaved and their first rounds compared; else they run one
        after another, each with the machine and its memory to itself.
      host_rounds: rounds to measure jfed's work on the host of.
    """

    title: str
    contenders: tuple[Contender, ...]
    together: bool = True
    host_rounds: int = 0


def groups(section: str, settings: Settings, machine: Machine) -> list[Group]:
    """A section's tables, without the contenders that `settings.only` leaves out."""
    make = {"cnn": _cnn, "ode": _ode, "scaling": _scaling, "accelerator": _accelerator}[section]
    kept = []
    for group in make(settings, machine):
        members = [c for c in group.contenders if _wanted(c, settings)]
        if not all(c.is_peak for c in members):
            kept.append(dataclasses.replace(group, contenders=tuple(members)))
    if not kept:
        names = sorted({c.name for g in make(settings, machine) for c in g.contenders})
        raise ConfigError(
            f"only {list(settings.only)} leaves no contender in section {section!r}; "
            f"there are {', '.join(map(repr, names))}."
        )
    return kept


def _wanted(contender: Contender, settings: Settings) -> bool:
    return (
        contender.is_peak
        or not settings.only
        or any(text in contender.name for text in settings.only)
    )


def describe(task: Task, cohort: str | None = None) -> str:
    """A task's sizes, in words; `cohort` instead of its own number of users a round."""
    network = "small CNN"
    if task.network is not None:
        kind = "dsODENet" if task.network.separable else "ODENet"
        widths = "/".join(map(str, task.network.widths))
        counts = ", ".join(map(str, task.iterations))
        network = f"{kind} {widths} at {counts} iterations"
    return (
        f"{network}, {task.size}x{task.size}x3 images, {task.users:,} users with {task.images} "
        f"each, {cohort or task.cohort} users a round, batch {task.batch_size}, 1 epoch "
        f"({task.images // task.batch_size} steps), SGD {task.learning_rate:g}"
    )


def peaks(machine: Machine, *dtypes: str, smoke: bool) -> list[Contender]:
    """Matrix products that tell the machine's peak."""
    matrix = 128 if smoke else (2048 if machine.is_cpu else 8192)
    found = [
        Contender(f"matrix products, XLA, {t}", "matmul-xla", matrix=matrix, dtype=t)
        for t in dtypes
    ]
    if machine.is_cpu and "float32" in dtypes and not smoke:
        found.append(Contender("matrix products, PyTorch", "matmul-torch", matrix=matrix))
    return found


# ------------------------------------------------------------------------------------- cnn


def _cnn(settings: Settings, machine: Machine) -> list[Group]:
    """The benchmark of pfl-research (arXiv 2404.06430)."""
    full = Task(users=1000, images=50, cohort=50, size=32, batch_size=10)
    smoke = Task(users=6, images=20, cohort=4, size=8, batch_size=10, conv=_QUICK)
    task = dataclasses.replace(full if settings.scale == "full" else smoke, seed=settings.seed)
    found = [machine.jfed(JFED, task), *_one_device(machine, task), *_rivals(task)]
    found.append(Contender("FedJAX", "fedjax", task))
    if settings.slow:
        found.append(Contender("vmap over clients, XLA's convolution", "vmap", task, once=True))
    found += peaks(machine, "float32", smoke=settings.scale == "smoke")
    return [Group(describe(task), tuple(found))]


def _one_device(machine: Machine, task: Task) -> list[Contender]:
    several = machine.cores if machine.is_cpu else machine.devices
    return [machine.jfed(f"{JFED}, one device", task, devices=1)] if several > 1 else []


def _rivals(task: Task) -> list[Contender]:
    return [
        Contender(LOOP, "loop", task),
        Contender("PyTorch", "torch", task),
        Contender("PyTorch, channels last", "torch", task, channels_last=True),
    ]


# ------------------------------------------------------------------------------------- ode


def _ode(settings: Settings, machine: Machine) -> list[Group]:
    """Mixed iteration counts in one federation."""
    made = []
    for task in _ode_tasks(settings):
        found = [machine.jfed(JFED, task)]
        if task.network is not None and task.network.unroll:
            scanned = dataclasses.replace(task.network, unroll=False)
            again = dataclasses.replace(task, network=scanned)
            found.append(machine.jfed(f"{JFED}, iterations scanned", again))
        found += [*_one_device(machine, task), *_rivals(task)]
        found += peaks(machine, "float32", smoke=settings.scale == "smoke")
        made.append(Group(describe(task), tuple(found)))
    return made


def _ode_tasks(settings: Settings) -> list[Task]:
    if settings.scale == "smoke":
        network = ODENetConfig(widths=(4,))
        small = Task(4, 8, 4, size=8, batch_size=4, network=network, iterations=(1, 2))
        return [dataclasses.replace(small, conv=_QUICK, seed=settings.seed)]
    return [
        Task(
            users=6,
            images=64,
            cohort=6,
            size=size,
            batch_size=32,
            network=ODENetConfig(widths=widths, separable=separable, unroll=True),
            iterations=(1, 2, 4),
            seed=settings.seed,
        )
        for separable in (False, True)
        for widths, size in (((16, 32, 64), 32), ((64, 128, 256), 16))
    ]


# --------------------------------------------------------------------------------- scaling


def _scaling(settings: Settings, machine: Machine) -> list[Group]:
    """One thing varied at a time: clients a round, lanes, devices, and the mapping of 4 lanes."""
    smoke = settings.scale == "smoke"
    full = Task(users=1000, images=50, cohort=64, size=16, batch_size=10)
    tiny = Task(users=8, images=20, cohort=4, size=8, batch_size=10, conv=_QUICK)
    base = dataclasses.replace(tiny if smoke else full, seed=settings.seed)
    cohorts = (1, 8) if smoke else (1, 10, 100, 1000)
    lanes = (2,) if smoke else (1, 2, 4, 8, 16)
    devices = (2,) if smoke else (1, 2, 4)
    mappings = ("map",) if smoke else tuple(m for m in MAPPINGS if m not in ("auto", "debug"))
    sweeps = {
        "clients a round": [
            machine.jfed(f"{n:,} clients", dataclasses.replace(base, cohort=n)) for n in cohorts
        ],
        "lanes, on one device": [
            machine.jfed(f"{n} lanes", base, devices=1, lanes=n) for n in lanes
        ],
        "devices": [
            machine.jfed(f"{n} devices", base, devices=n)
            for n in devices
            if machine.is_cpu or n <= machine.devices
        ],
        "mapping of 4 lanes, on one device": [
            machine.jfed(m, base, devices=1, lanes=4, mapping=m) for m in mappings
        ],
    }
    made = []
    for title, found in sweeps.items():
        sizes = describe(base, "1 or more" if title.startswith("clients") else None)
        made.append(Group(f"{title}: {sizes}", tuple(found), host_rounds=1 if smoke else 5))
    return made


# ----------------------------------------------------------------------------- accelerator


def _accelerator(settings: Settings, machine: Machine) -> list[Group]:
    """Lanes, mappings and convolution forms, in two precisions, on one device."""
    smoke = settings.scale == "smoke"
    made = []
    for base in _accelerator_tasks(settings):
        for dtype in ("bfloat16",) if smoke else ("float32", "bfloat16"):
            task = dataclasses.replace(base, dtype=dtype)
            found = [Contender("one client at a time, jitted step", "loop", task)]
            found += _sweep(task, machine, smoke=smoke)
            found += peaks(machine, dtype, smoke=smoke)[:1]
            made.append(Group(f"{dtype}: {describe(task)}", tuple(found), together=False))
    return made


def _accelerator_tasks(settings: Settings) -> Sequence[Task]:
    if settings.scale == "smoke":
        return [Task(8, 10, 4, size=8, batch_size=10, seed=settings.seed)]
    wide = ODENetConfig(widths=(64, 128, 256), unroll=True)
    return [
        Task(1000, 50, 256, size=32, batch_size=10, seed=settings.seed),
        Task(
            64, 128, 64, size=32, batch_size=32, network=wide, iterations=(4,), seed=settings.seed
        ),
    ]


def _sweep(task: Task, machine: Machine, *, smoke: bool) -> list[Contender]:
    """Lanes with the default mapping and form; then, at some lanes, the other ones."""

    def at(lanes: int, mapping: str = "vmap", form: str = "xla") -> Contender:
        name = f"{lanes} lanes, {mapping}, {form}"
        formed = dataclasses.replace(task, conv=form)
        return machine.jfed(name, formed, devices=1, lanes=lanes, mapping=mapping)

    some = 2 if smoke else 16
    forms = ["im2col"] if smoke else ["transposed", "im2col"]
    if task.dtype == "float32" and task.network is None:  # ODENets have strided ones as well
        forms += ["winograd2", "winograd4"]
    found = [at(n) for n in ((1,) if smoke else (1, 2, 4, 8, 16, 32, 64))]
    found += [at(some, mapping) for mapping in ("map", "unroll")]
    return found + [at(some, form=form) for form in forms]
