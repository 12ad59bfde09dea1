"""The command line: `jfed run | report | models | prepare | benchmark`."""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tyro
from tabulate import tabulate

import jfed
from jfed import files
from jfed import tiers as tiers_lib
from jfed.cli import launch
from jfed.errors import (
    DeviceMemoryError,
    DivergedError,
    JfedError,
    PreemptedError,
    RunFolderError,
    check_integer,
)
from jfed.models.flops import forward_flops
from jfed.models.presets import PRESETS, ModelConfig, ODENetConfig, build, twin
from jfed.reports import finished
from jfed.reports import tables as report
from jfed.tiers.communication import tree_bytes, tree_size

_USAGE = """usage: jfed COMMAND [options]

Federated learning of Neural ODE image classifiers with different iteration counts.

commands:
  run        train a federation and write a run folder
  report     tables and figures of several finished runs
  models     list the model presets: parameters, bytes, FLOPs
  prepare    download and prepare a data set with TFDS
  benchmark  time jfed and other libraries side by side on the same work

`jfed COMMAND --help` documents every option."""


def command() -> int:
    """The console script: `main` in a process of its own."""
    return main(own_process=True)


def main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Runs the command line; returns the exit status.

    With `own_process` the process may be started again, see `jfed.runs.huge_pages`.

    0: done. 1: the run diverged or ran out of memory; what it recorded is kept. 2: a setting, a
    data set or a run folder that cannot be used; nothing is lost. 130: interrupted twice, or
    before the first round. 143: interrupted (Ctrl-C), terminated (SIGTERM) or preempted; the last
    recorded round is saved, and the same command goes on from there.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": functools.partial(launch.run, restart=own_process),
        "report": _report,
        "models": _models,
        "prepare": _prepare,
        "benchmark": _benchmark,
    }
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if args[0] == "--version":
        print(jfed.__version__)
        return 0
    try:
        jfed.errors.one_of("command", args[0], tuple(commands))
        commands[args[0]](args[1:])
    except KeyboardInterrupt:
        print("jfed: interrupted; what was saved is kept.", file=sys.stderr)
        return 130
    except PreemptedError as error:
        print(f"jfed: {error}", file=sys.stderr)
        return 143
    except (DivergedError, DeviceMemoryError) as error:
        print(f"jfed: {error}", file=sys.stderr)
        return 1
    except JfedError as error:
        print(f"jfed: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(command: Any, prog: str, args: list[str]) -> Any:
    return tyro.cli(command, prog=prog, args=args)


def _report(args: list[str]) -> None:
    def command(
        folders: tyro.conf.Positional[tuple[str, ...]],
        baseline: str | None = None,
        target: float | None = None,
        style: str = report.STYLES[0],
        output: pathlib.Path | None = None,
    ) -> None:
        """Tables of finished runs: mean and standard deviation over those that differ in the seed.

        Args:
          folders: run folders.
          baseline: compare all others with the runs of this name, as the table calls them.
          target: accuracy from 0 to 1; tells how many bytes were sent until it was reached.
          style: of the tables: simple, github or latex_booktabs.
          output: a folder for runs.csv and figures.
        """
        found, left_out = finished.read_all(folders)
        for why in left_out:
            print(f"jfed: left out: {why}", file=sys.stderr)
        print(report.text(found, baseline=baseline, target=target, style=style))
        if output is not None:
            try:
                report.save_figures(found, output)
                files.write_csv(report.lines(found, target), output / "runs.csv")
            except OSError as error:
                raise RunFolderError(f"cannot write to {str(output)!r}: {error}.") from error
            print(f"Written to {output}")

    _parse(command, "jfed report", args)


def _models(args: list[str]) -> None:
    def command(size: int = 32, iterations: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[int, Any]:
        """Lists the model presets for 10 classes.

        Args:
          size: height and width of the images; FLOPs depend on it.
          iterations: counts, the same in every stage, to give the FLOPs of ODENets at.
        """
        return size, iterations

    size, iterations = _parse(command, "jfed models", args)
    check_integer("size", size, least=1)
    print(model_table(size, iterations))


def model_table(size: int, iterations: Sequence[int]) -> str:
    """Parameters, bytes of one upload, forward FLOPs an image, reduction, of every preset."""
    rows = []
    for name, config in PRESETS.items():
        shapes = _shapes(config)
        row: dict[str, str] = {
            "model": name,
            "parameters": f"{tree_size(shapes):,}",
            "upload bytes": f"{tree_bytes(shapes):,}",
            "MFLOPs": f"{_flops(config, size) / 1e6:,.1f}",
        }
        if isinstance(config, ODENetConfig):
            row["iterations"] = tiers_lib.tier_name(config.iterations)
            for count in iterations:
                at = dataclasses.replace(config, iterations=count)
                row[f"MFLOPs at {count}"] = f"{_flops(at, size) / 1e6:,.1f}"
            row["twin"], twin_config = twin(name, config)
            row["reduction"] = f"{1 - tree_bytes(shapes) / tree_bytes(_shapes(twin_config)):.1%}"
        rows.append(row)
    order = ["model", "iterations", "parameters", "upload bytes", "MFLOPs"]
    order += [f"MFLOPs at {count}" for count in iterations] + ["twin", "reduction"]
    table = [[row.get(key, "") for key in order] for row in rows]
    return tabulate(table, headers=order, disable_numparse=True, stralign="right")


_model = functools.cache(build)  # building traces the whole network


def _shapes(config: ModelConfig) -> Any:
    if isinstance(config, ODENetConfig):
        config = dataclasses.replace(config, iterations=0)  # many presets differ in no more
    return _shapes_of(config)


@functools.cache
def _shapes_of(config: ModelConfig) -> Any:
    return jax.eval_shape(_model(config).init, jax.random.key(0))


@functools.cache
def _flops(config: ModelConfig, size: int) -> int:
    if isinstance(config, ODENetConfig):
        config = dataclasses.replace(config, unroll=False)
    return forward_flops(_model(config), _shapes(config), (size, size, config.channels))


def _prepare(args: list[str]) -> None:
    def command(
        name: tyro.conf.Positional[str],
        data_dir: pathlib.Path | None = None,
        archive: pathlib.Path | None = None,
    ) -> tuple[str, pathlib.Path | None, pathlib.Path | None]:
        """Downloads a data set and prepares it with TFDS; TensorFlow is not needed.

        Args:
          name: cifar10, cifar100, mnist or fashion_mnist.
          data_dir: where to; the variable TFDS_DATA_DIR, or TFDS's own default, if not given.
          archive: the official archive, or the folder of official files, downloaded before.
        """
        return name, data_dir, archive

    name, data_dir, archive = _parse(command, "jfed prepare", args)
    print(f"{name} is prepared in {jfed.data.prepare(name, data_dir=data_dir, archive=archive)}")


def _benchmark(args: list[str]) -> None:
    from jfed.benchmark.racing import run
    from jfed.benchmark.settings import Settings

    def command(
        sections: tyro.conf.Positional[tuple[str, ...]] = (),
        scale: str = "full",
        repeats: int | None = None,
        slow: bool = False,
        force: bool = False,
        only: tuple[str, ...] = (),
        seed: int = 0,
        output: pathlib.Path | None = None,
    ) -> tuple[Settings, pathlib.Path | None]:
        """Times jfed and other libraries side by side on the same work.

        Args:
          sections: some of cnn, ode, scaling and accelerator; those that suit JAX's backend if none
            is given.
          scale: full, or smoke for seconds that only show that everything works.
          repeats: timed rounds of each contender; 5, or 1 at smoke scale, where not given.
          slow: also time vmap over clients with XLA's convolution, one round of minutes on a CPU.
          force: run the accelerator section without an accelerator.
          only: leave out contenders whose name contains none of these texts.
          seed: of data, weights and orders.
          output: the folder for benchmark.json and figures; benchmarks/DATE-TIME where not given.
        """
        return Settings(sections, scale, repeats, slow, force, only, seed), output

    settings, output = _parse(command, "jfed benchmark", args)
    output = output or pathlib.Path("benchmarks") / time.strftime("%Y%m%d-%H%M%S")
    run(settings, output, progress=lambda text: print(text, file=sys.stderr))
    print(f"Written to {output}")
