"""`jfed run`: its options, the devices it takes, the signals it hears, the progress it shows."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import jax
import tyro
from etils import epath
from tqdm import tqdm

from jfed.errors import JfedError
from jfed.provenance import cores
from jfed.reports.summary import format_table
from jfed.runs import folder, hosts, huge_pages
from jfed.runs import running as runs
from jfed.runs.assembly import set_up
from jfed.runs.checkpoints import CheckpointConfig
from jfed.runs.compiled import keep_compiled
from jfed.runs.config import RUN_PRESETS, RunConfig, run_preset
from jfed.runs.hosts import HostsConfig
from jfed.runs.writers import TensorBoardWriter, WandbWriter, optional
from jfed.simulation.records import Record, Writer

_MOST_CPU_DEVICES = 8  # each holds a copy of the images


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Where and how a run is done; what comes out does not depend on it.

    Attributes:
      preset: where settings start from: digits, cifar10-flexible,
        cifar10-resnet, cifar10-small (minutes on two cores) or smoke (seconds).
      workdir: the run folder, local or gs://; runs/PRESET-DATE-TIME where not given. A run that is
        there already goes on, if its settings are the same.
      checkpoint_every: rounds between checkpoints; the last round always has one.
      checkpoint_keep: how many of the latest checkpoints stay.
      tensorboard: write event files too, into the run folder.
      wandb: log to this project of Weights & Biases too.
      cache: keep compiled programs for later runs.
      cache_dir: where they are kept; JAX's own setting, or ~/.cache/jfed, where not given.
    """

    preset: str = next(iter(RUN_PRESETS))
    workdir: str | None = None
    checkpoint_every: int = CheckpointConfig.every
    checkpoint_keep: int = CheckpointConfig.keep
    tensorboard: bool = False
    wandb: str | None = None
    cache: bool = True
    cache_dir: pathlib.Path | None = None


def run(args: list[str], *, restart: bool = False) -> None:
    """The command `jfed run`; see `jfed.cli.commands.main` for how it ends.

    Args:
      args: after the command.
      restart: the process is this command's own and may be started again, see
        `jfed.runs.huge_pages`.
    """
    config, launch, together = _parse_or_tell(args)
    if restart:
        huge_pages.restart()
    checkpoints = CheckpointConfig(every=launch.checkpoint_every, keep=launch.checkpoint_keep)
    _start_devices(together)
    if launch.cache:
        keep_compiled(launch.cache_dir)
    workdir = hosts.gather("the command line", lambda: _check(launch))[0]
    finished = hosts.agree("the command line", lambda: _finished(workdir, config))
    print("reading data and compiling ...", file=sys.stderr)
    progress, began = _Progress(config.rounds), time.perf_counter()
    with _terminable(together.distributed, lambda: progress.began) as stop:
        result, table = runs.run(
            workdir,
            dataclasses.asdict(config),
            functools.partial(set_up, config),
            writers=functools.partial(_writers, config, launch, workdir, progress, began),
            checkpoints=checkpoints,
            stop=stop,
        )
    if not hosts.is_first():
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
    progress: "_Progress",
    began: float,
    done: int,
) -> list[Writer]:
    """The writers that were asked for, the progress bar last; made once all is compiled."""
    print(f"read and compiled in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    writers: list[Writer] = []
    if launch.tensorboard:
        writers.append(TensorBoardWriter(epath.Path(workdir) / "tensorboard", done))
    if launch.wandb is not None:
        writers.append(WandbWriter(launch.wandb, workdir, dataclasses.asdict(config)))
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
    settings = dataclasses.asdict(config)
    return hosts.is_first() and folder.inspect(epath.Path(workdir), settings) == "finished"


def _parse_or_tell(args: list[str]) -> tuple[RunConfig, LaunchConfig, HostsConfig]:
    """Reads the options; other hosts hear of it, if there are any, when that is not possible."""
    try:
        return _parse(args)
    except (SystemExit, JfedError) as error:
        if "--distributed" in args and "--help" not in args:
            own, _ = tyro.cli(HostsConfig, args=args, return_unknown_args=True)
            _start_devices(own)
            hosts.agree("the command line", functools.partial(_raise, error))
        raise


def _raise(error: BaseException) -> None:
    raise error


def _parse(args: list[str]) -> tuple[RunConfig, LaunchConfig, HostsConfig]:
    """Reads the options; --preset first, which decides the defaults of all others."""
    preset = LaunchConfig.preset
    for i, arg in enumerate(args):
        if arg == "--preset" and i + 1 < len(args):
            preset = args[i + 1]
        elif arg.startswith("--preset="):
            preset = arg.partition("=")[2]

    def command(
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = run_preset(preset),  # noqa: B008
        launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = LaunchConfig(),
        together: Annotated[HostsConfig, tyro.conf.arg(name="")] = HostsConfig(),  # noqa: B008
    ) -> tuple[RunConfig, LaunchConfig, HostsConfig]:
        """Trains a federation and writes a run folder, or goes on with the run that is in it."""
        return config, launch, together

    return tyro.cli(command, prog="jfed run", args=args)


def _start_devices(together: HostsConfig) -> None:
    """Joins the other hosts, and makes a device of each core of a CPU, before JAX starts."""
    if jax.config.values["jax_num_cpu_devices"] < 0:
        with contextlib.suppress(RuntimeError):  # JAX has started, in a program that calls `main`
            jax.config.update("jax_num_cpu_devices", min(len(cores()), _MOST_CPU_DEVICES))
    hosts.join(together)


@contextlib.contextmanager
def _terminable(distributed: bool, begun: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM or Ctrl-C has come.

    Before rounds begin there is nothing to save, and they end the process at once.

    Of several hosts each hears of it through JAX's preemption service, which lets all of them stop
    after the same round.
    """
    heard = False

    def hear(signal_: int, _: object) -> None:
        nonlocal heard
        heard = True
        if signal_ == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once
            if not begun():
                raise KeyboardInterrupt
        elif not begun():
            print("jfed: terminated before any round began.", file=sys.stderr, flush=True)
            os._exit(143)  # no exception: threads that compile cannot be stopped

    if distributed:
        yield lambda: False
        return
    try:
        before = {s: signal.signal(s, hear) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: heard
    finally:
        for signal_, handler in before.items():
            signal.signal(signal_, handler)


class _Progress:
    """A progress bar of rounds, with the latest loss and accuracies: a `records.Writer`."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._tested = rounds, ""
        self._bar: tqdm | None = None

    @property
    def began(self) -> bool:
        """Whether any rounds were left to do."""
        return self._bar is not None

    def begin(self, done: int) -> "_Progress":
        """Shows the bar, some rounds done already."""
        self._bar = tqdm(
            total=self._rounds, initial=done, unit="round", dynamic_ncols=True, smoothing=0.1
        )
        return self

    def write(self, record: Record) -> None:
        parts = [f"loss {record.train_loss:.3f}", f"train {record.train_accuracy:.1%}"]
        parts = parts if record.examples else ["nobody delivered"]
        parts += [f"{record.rejected} rejected"] if record.rejected else []
        if record.evaluations:
            tested = [f"{name}: {e.accuracy:.1%}" for name, e in record.evaluations.items()]
            self._tested = "test " + " ".join(tested)
        parts += [self._tested] if self._tested else []
        assert self._bar is not None
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
