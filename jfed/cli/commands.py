"""The command line: `jfed COMMAND`, see `_USAGE`."""

import importlib
import sys
from collections.abc import Sequence

import jfed
from jfed.errors import DeviceMemoryError, DivergedError, JfedError, PreemptedError, one_of
from jfed.runs import huge_pages

_COMMANDS = ("run", "plan", "report", "predict", "export", "models", "prepare", "benchmark")
_USAGE = """usage: jfed COMMAND [options]

Federated learning of Neural ODE image classifiers with different iteration counts.

commands:
  run        train a federation and write a run folder
  plan       what a run needs of a GPU or TPU: memory, FLOPs, bytes, what is amiss
  report     tables and figures of several finished runs
  predict    classify pictures by a trained model
  export     a trained model as a file for a device: safetensors, StableHLO, ONNX
  models     list the model presets: parameters, bytes, FLOPs
  prepare    download and prepare a data set with TFDS
  benchmark  time jfed and other libraries side by side on the same work

`jfed COMMAND --help` documents every option."""


def command() -> int:
    """The console script: `main` in a process of its own."""
    return main(own_process=True)


def main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Runs the command line; returns the exit status.

    With `own_process` the process may be started again, see `jfed.runs.huge_pages`, before what a
    command needs is imported.

    0: done. 1: the run diverged or ran out of memory; what it recorded is kept. 2: a setting, a
    data set or a run folder that cannot be used; nothing is lost. 130: interrupted twice, or
    before the first round. 143: interrupted (Ctrl-C), terminated (SIGTERM) or preempted; the last
    recorded round is saved, and the same command goes on from there.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if args[0] == "--version":
        print(jfed.__version__)
        return 0
    try:
        name = one_of("command", args[0], _COMMANDS)
        if own_process and name == "run" and not _without_huge_pages(args):
            huge_pages.restart()
        importlib.import_module(f"jfed.cli.{name}_command").execute(args[1:])
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


def _without_huge_pages(args: Sequence[str]) -> bool:
    """What `LaunchConfig.huge_pages` says, the last of its flags counting.

    Reading flags properly takes the imports that this is to save.
    """
    flags = [arg.replace("_", "-") for arg in args]
    given = [flag for flag in flags if flag in ("--huge-pages", "--no-huge-pages")]
    return given[-1:] == ["--no-huge-pages"]
