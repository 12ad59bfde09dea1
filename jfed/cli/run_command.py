"""`jfed run`: trains a federation and writes a run folder, or goes on with the one there."""

import dataclasses
import functools
import pathlib
import sys
import time

import jax
from etils import epath

from jfed.cli import flags
from jfed.cli.process import start_devices, terminable
from jfed.cli.progress import Progress
from jfed.reports.summary import format_table
from jfed.runs import folder, huge_pages
from jfed.runs import running as runs
from jfed.runs.checkpoints import CheckpointConfig
from jfed.runs.compiled import keep_compiled
from jfed.runs.config import RUN_PRESETS, RunConfig, run_preset, short_name
from jfed.runs.writers import TensorBoardWriter, WandbWriter, optional
from jfed.simulation.records import Writer


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Where and how a run is done; what comes out does not depend on it.

    Attributes:
      preset: where settings start from: digits, cifar10-flexible,
        cifar10-resnet, cifar10-small (minutes on two cores) or smoke (seconds).
      workdir: the run folder, local or gs://; runs/PRESET-DATE-TIME where not given. A run that is
        there already goes on, if its settings are the same.
      checkpoints: when the run saves.
      tensorboard: write event files too, into the run folder.
      wandb: log to this project of Weights & Biases too.
      cache: keep compiled programs for later runs.
      cache_dir: where they are kept; JAX's own setting, or ~/.cache/jfed, where not given.
      huge_pages: on a CPU, start again with huge pages where the system gives them only to who
        asks, see `jfed.runs.huge_pages`.
      distributed: this is one of several processes, on as many hosts, that run the same command
        and share the work, see `jax.distributed.initialize`. The first one writes.
      coordinator_address: host:port of the first process; found out on TPUs, Slurm and Open MPI.
      num_processes: how many; likewise.
      process_id: which of them this is, from 0; likewise.
    """

    preset: str = RUN_PRESETS[0]
    workdir: str | None = None
    checkpoints: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    tensorboard: bool = False
    wandb: str | None = None
    cache: bool = True
    cache_dir: pathlib.Path | None = None
    huge_pages: bool = True
    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


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
    preset = LaunchConfig.preset
    for i, arg in enumerate(args):
        if arg == "--preset" and i + 1 < len(args):
            preset = args[i + 1]
        elif arg.startswith("--preset="):
            preset = arg.partition("=")[2]
    return flags.parse(
        Command(run_preset(preset), LaunchConfig()),
        args,
        names=_flag,
        prog="jfed run",
        description="Trains a federation and writes a run folder, or goes on with the one there.",
    )


def _flag(path: str) -> str:
    part, _, field = path.rpartition(".")
    return f"checkpoint_{field}" if part == "checkpoints" else short_name(path)


def execute(args: list[str], *, restart: bool = False) -> None:
    """The command; see `jfed.cli.commands.main` for how it ends.

    Args:
      args: after the command.
      restart: the process is this command's own and may be started again, see
        `jfed.runs.huge_pages`.
    """
    given = parse(args)
    config, launch = given.run, given.launch
    if restart and launch.huge_pages:
        huge_pages.restart()
    workdir = launch.workdir
    if workdir is None:
        workdir = f"runs/{launch.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    start_devices(
        launch.distributed,
        coordinator_address=launch.coordinator_address,
        num_processes=launch.num_processes,
        process_id=launch.process_id,
    )
    if launch.cache:
        keep_compiled(launch.cache_dir)
    _check_writers(launch)
    finished = folder.inspect(epath.Path(workdir), folder.as_json(config)) == "finished"
    print("reading data and compiling ...", file=sys.stderr)
    progress, began = Progress(config.rounds), time.perf_counter()
    with terminable(launch.distributed, lambda: progress.began) as stop:
        result, table = runs.run(
            config,
            workdir,
            writers=functools.partial(_writers, config, launch, workdir, progress, began),
            checkpoints=launch.checkpoints,
            stop=stop,
        )
    if jax.process_index() > 0:
        return
    print(f"\n{format_table(table)}\nBytes are of one client in one round.\n")
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
        writers.append(WandbWriter(launch.wandb, workdir, folder.as_json(config)))
    return [*writers, progress.begin(done)]


def _check_writers(launch: LaunchConfig) -> None:
    """Raises ConfigError before anything is done if what a writer needs is not installed."""
    if launch.tensorboard:
        optional("tensorboardX", "tensorboard")
    if launch.wandb is not None:
        optional("wandb", "wandb")
