"""`jfed run`: trains a federation and writes a run folder, or goes on with the one there."""

import dataclasses
import functools
import itertools
import pathlib
import sys
import time

from etils import epath

from jfed import files
from jfed.cli import flags
from jfed.cli.process import start_devices, terminable
from jfed.cli.progress import Progress
from jfed.engine import hosts
from jfed.engine.hosts import HostsConfig
from jfed.errors import JfedError, optional
from jfed.reports.summary import format_local, format_table
from jfed.runs import folder, running as runs
from jfed.runs.assembly import set_up
from jfed.runs.checkpoints import CheckpointConfig
from jfed.runs.compiled import keep_compiled
from jfed.runs.config import RUN_PRESETS, RunConfig, run_preset, short_name
from jfed.runs.writers import TensorBoardWriter, WandbWriter
from jfed.settings import as_json
from jfed.simulation.records import Writer


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Where and how a run is done; what comes out does not depend on it.

    Attributes:
      preset: where settings start from: digits, cifar10-flexible, cifar10-resnet, cifar10-small
        (minutes on two cores), cifar10-medium (ten minutes), cifar10-32 (hours) or smoke
        (seconds).
      workdir: the run folder, local or gs://; runs/PRESET-DATE-TIME where not given. A run that is
        there already goes on, if its settings are the same.
      checkpoints: when the run saves.
      tensorboard: write event files too, into the run folder.
      wandb: log to this project of Weights & Biases too.
      cache: keep compiled programs for later runs.
      cache_dir: where they are kept; JAX's own setting, or ~/.cache/jfed, where not given.
      huge_pages: on a CPU, start again with huge pages where the system gives them only to who
        asks, see `jfed.runs.huge_pages`.
      hosts: which of several processes this one is.
    """

    preset: str = RUN_PRESETS[0]
    workdir: str | None = None
    checkpoints: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    tensorboard: bool = False
    wandb: str | None = None
    cache: bool = True
    cache_dir: pathlib.Path | None = None
    huge_pages: bool = True  # read by `jfed.cli.commands`, before anything is imported
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)


@dataclasses.dataclass(frozen=True)
class Command:
    """All that can be given to `jfed run`.

    Attributes:
      run: of the run as a whole.
      launch: where and how it is done; what comes out does not depend on it.
    """

    run: RunConfig
    launch: LaunchConfig


def parse(args: list[str]) -> Command:
    """Reads the flags; --preset first, which decides the defaults of all others."""
    return flags.parse(
        Command(starting(args), LaunchConfig()),
        args,
        names=_flag,
        prog="jfed run",
        description="Trains a federation and writes a run folder, or goes on with the one there.",
    )


def starting(args: list[str]) -> RunConfig:
    """What the settings are before flags change them: those of the preset that is asked for."""
    return for_method(run_preset(_given(args, "--preset") or LaunchConfig.preset), args)


def for_method(begin: RunConfig, args: list[str]) -> RunConfig:
    """The settings without iterations, which are those of the preset's method, for another one."""
    other = (_given(args, "--method") or "ode") != "ode"
    return begin.replace(iterations=None) if other else begin


def _given(args: list[str], flag: str) -> str | None:
    """The value of a flag that is one word; of one that is given twice, the last."""
    found = None
    for arg, after in itertools.zip_longest(args, args[1:]):
        if arg == flag:
            found = after
        elif arg.startswith(f"{flag}="):
            found = arg.partition("=")[2]
    return found


def _flag(path: str) -> str:
    part, _, field = path.rpartition(".")
    return f"checkpoint_{field}" if part == "checkpoints" else short_name(path)


def execute(args: list[str]) -> None:
    """The command; see `jfed.cli.commands.main` for how it ends."""
    given = _parse_or_tell(args)
    config, launch = given.run, given.launch
    start_devices(launch.hosts)
    if launch.cache:
        keep_compiled(launch.cache_dir)
    workdir = hosts.gather("the command line", lambda: _check(launch))[0]
    finished = hosts.agree("the command line", lambda: _finished(workdir, config))
    print("reading data and compiling ...", file=sys.stderr)
    progress, began = Progress(config.rounds), time.perf_counter()
    with terminable(launch.hosts.distributed, lambda: progress.began) as stop:
        result, table = runs.run(
            workdir,
            as_json(config),
            functools.partial(set_up, config, files.absolute(workdir) / "memory"),
            writers=functools.partial(_writers, config, launch, workdir, progress, began),
            checkpoints=launch.checkpoints,
            stop=stop,
        )
    if not hosts.is_first():
        return
    print(f"\n{format_table(table)}")
    print("Bytes and training FLOPs are of one client in one round, memory is its peak.\n")
    if (simulated := result.history[-1].simulated_seconds) is not None:
        print(f"{simulated:,.4g} simulated seconds on the devices of the clients.\n")
    if (epsilon := result.history[-1].epsilon) is not None:
        noise = "" if result.noise is None else f", with noise {result.noise:.4g}"
        private = f"({epsilon:.3g}, {config.privacy.delta:g})-differentially private"
        print(f"Clients are {private}{noise}.\n")
    if (local := result.history[-1].local) is not None:
        print(f"{format_local(local, result.client_names)}\n")
    if finished:
        print(f"The run in {workdir} had finished already; nothing was changed.")
        return
    print(
        f"{result.history[-1].seconds:.1f} s for rounds 1 to {config.rounds} in all, after "
        f"{result.compile_seconds:.1f} s of compiling. Run folder: {workdir}"
    )


def _writers(
    config: RunConfig,
    launch: LaunchConfig,
    workdir: str,
    progress: Progress,
    began: float,
    done: int,
) -> list[Writer]:
    """The writers that were asked for, the progress bar last; made once all is compiled."""
    print(f"read and compiled in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    writers: list[Writer] = []
    if launch.tensorboard:
        writers.append(TensorBoardWriter(epath.Path(workdir) / "tensorboard", done))
    if launch.wandb is not None:
        writers.append(WandbWriter(launch.wandb, workdir, as_json(config)))
    return [*writers, progress.begin(done)]


def _check(launch: LaunchConfig) -> str:
    """The run folder; ConfigError if what a writer needs is not installed."""
    if launch.tensorboard:
        optional("tensorboardX", "tensorboard")
    if launch.wandb is not None:
        optional("wandb", "wandb")
    return launch.workdir or f"runs/{launch.preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def _finished(workdir: str, config: RunConfig) -> bool:
    """Whether nothing is left to do, as the first host sees it."""
    settings = as_json(config)
    return hosts.is_first() and folder.inspect(epath.Path(workdir), settings) == "finished"


def _parse_or_tell(args: list[str]) -> Command:
    """Reads the flags; other hosts hear of it, if there are any, when that is not possible."""
    try:
        return parse(args)
    except (SystemExit, JfedError) as error:
        if "--distributed" in args and "--help" not in args:
            own, _ = flags.cli(HostsConfig, args=args, return_unknown_args=True)
            start_devices(own)
            hosts.agree("the command line", functools.partial(_raise, error))
        raise


def _raise(error: BaseException) -> None:
    raise error
