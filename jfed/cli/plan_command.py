"""`jfed plan`: what a run needs of a GPU or TPU, from its compiler, which runs on any machine."""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

from jfed import files
from jfed.cli import flags, run_command
from jfed.engine.devices import use_cores
from jfed.errors import ConfigError, RunFolderError, one_of
from jfed.planning import tables
from jfed.planning.compiling import plan_federation
from jfed.planning.plans import ProgramPlan, RunPlan
from jfed.planning.targets import open_target, parse
from jfed.runs.assembly import set_up
from jfed.runs.config import RUN_PRESETS, RunConfig, settings, short_name


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What is planned for.

    Attributes:
      preset: where settings start from, as of `jfed run`.
      target: h100, h200, a100, l4, t4, v4-8, v5e:2x2, v5p:2x2x1, v6e:2x2, ...; GPUs of a cluster as
        h100:1x2x8 (slices x hosts x GPUs of a host); cpu is this machine's own.
      compare: settings to vary, such as lanes=8,32 or dtype=float32,bfloat16; every combination is
        compiled.
      json: a file for all of it.
    """

    preset: str = RUN_PRESETS[0]
    target: str = "h100"
    compare: tuple[str, ...] = ()
    json: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Command:
    """All that can be given to `jfed plan`.

    Attributes:
      run: of the run as a whole.
      plan: what is planned for.
    """

    run: RunConfig
    plan: PlanConfig


def execute(args: list[str]) -> None:
    """The command."""
    given: Command = flags.parse(
        Command(run_command.starting(args), PlanConfig()),
        args,
        names=short_name,
        prog="jfed plan",
        description="Compiles a run for a GPU or TPU, and tells what it needs there.",
    )
    _check(given.plan)
    variants = dict(_variants(given.run, given.plan.compare))
    use_cores()
    target = open_target(given.plan.target)
    print("reading data ...", file=sys.stderr)
    ready = {n: set_up(c, devices=target.devices).federation for n, c in variants.items()}
    plans: dict[str, RunPlan] = {}
    try:
        for name, federation in ready.items():
            print(f"compiling {name}, which may take minutes ...", file=sys.stderr)
            plans[name] = plan_federation(federation, target, on_program=_tell)
            _write(given.plan.json, plans)
    finally:  # what is done, if it is not all
        if len(ready) > 1 and plans:
            print(tables.comparison(plans))
    if len(ready) == 1:
        (plan,) = plans.values()
        print(tables.text(plan))


def _tell(program: ProgramPlan) -> None:
    done = "failed" if program.error else "compiled"
    print(f"  {program.name}: {done} after {program.seconds:.1f} s", file=sys.stderr)


def _write(path: pathlib.Path | None, plans: Mapping[str, RunPlan]) -> None:
    """The plans that are done so far."""
    if path is None:
        return
    try:
        files.write_json(path, {name: tables.as_json(plan) for name, plan in plans.items()})
    except OSError as error:
        raise RunFolderError(f"cannot write {str(path)!r}: {error}.") from error


def _check(plan: PlanConfig) -> None:
    """Checks what can be before anything is loaded."""
    parse(plan.target)
    if plan.json is not None and not plan.json.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for {str(plan.json)!r}.")


def _variants(run: RunConfig, compare: Sequence[str]) -> Iterator[tuple[str, RunConfig]]:
    """The settings to plan, by what is different in them."""
    axes = [[(name, value) for value in values] for name, values in map(_axis, compare)]
    for chosen in itertools.product(*axes):
        name = " ".join("=".join(pair) for pair in chosen) or "the run"
        given = [word for n, v in chosen for word in (f"--{n.replace('_', '-')}", v)]
        try:
            found: Command = flags.parse(
                Command(run_command.for_method(run, given), PlanConfig()),
                given,
                names=short_name,
                prog="jfed plan",
                description="",
            )
        except ConfigError as error:
            raise ConfigError(f"--compare, {name}: {error}") from error
        yield name, found.run


def _axis(text: str) -> tuple[str, list[str]]:
    """Reads lanes=8,32 as a setting and its values."""
    name, _, values = text.partition("=")
    if name == "target":
        raise ConfigError("compare is of settings of the run; plan each target by itself.")
    found = [value for value in values.split(",") if value]
    if not found:
        raise ConfigError(f"compare must look like lanes=8,32, got {text!r}.")
    return one_of("setting", name.replace("-", "_"), tuple(settings())), found
