"""The command line that the scripts of this folder share: run the arms, write the table."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tabulate import tabulate

from jfed import files
from jfed.cli import flags
from jfed.errors import ConfigError, JfedError, RunFolderError, one_of
from jfed.reports import tables as report
from jfed.reports.finished import FinishedRun
from jfed.reports.run_lines import to_lines
from jfed.runs import study
from jfed.runs.config import RunConfig
from jfed.runs.jobs import JobConfig
from jfed.settings import as_json, differences


def table_of(script: str, scale: str, output: pathlib.Path | None) -> pathlib.Path | None:
    """Where a script's table goes, in a folder that is there; nowhere for smoke by default."""
    if output is None:
        if scale == "smoke":
            return None
        own = pathlib.Path(script)
        output = own.parent / "results" / f"{own.stem}_{scale}.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def finish(
    rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], output: pathlib.Path | None
) -> None:
    """Prints what was measured, and writes it with what it was measured by."""
    print(tabulate(rows, headers="keys"))
    if output:
        files.write_csv([{**row, **about} for row in rows], output)


@dataclasses.dataclass(frozen=True)
class Command:
    """All that can be given to a script.

    Attributes:
      scale: cpu (two cores, an hour at most, but for algorithms.py), medium (two cores, hours; of
        some scripts), full (the published protocol, for an accelerator) or smoke (seconds, which
        only show that everything works).
      workdir: where the run folders go, the table so far, and the figures.
      seeds: how many.
      workers: processes at a time; on a CPU one for each core where not given.
      output: of the table when all is done; results/NAME_SCALE.csv beside the script where not
        given, but nowhere for smoke.
      submit: each run becomes a job of this cluster, and nothing waits for them: the same command
        again tells how they are, submits those anew that failed, and collects the table.
      jobs: what these ask for.
    """

    scale: Literal["cpu", "medium", "full", "smoke"] = "cpu"
    workdir: pathlib.Path = pathlib.Path("runs")
    seeds: int = 3
    workers: int | None = None
    output: pathlib.Path | None = None
    submit: Literal["slurm"] | None = None
    jobs: JobConfig = dataclasses.field(default_factory=JobConfig)

    def __post_init__(self) -> None:
        changed = differences(as_json(JobConfig()), as_json(self.jobs))
        if self.submit is None and changed:
            raise ConfigError(f"{changed[0].split()[0]} is of jobs; it goes with --submit slurm.")
        if self.submit is not None and self.workers is not None:
            raise ConfigError(f"workers {self.workers} is of runs on this machine, not of jobs.")


def run_arms(
    arms: study.Arms,
    folder: pathlib.Path,
    seeds: int | Sequence[int],
    given: Command,
    on_run: Callable[[Sequence[FinishedRun]], None] = lambda runs: None,
) -> tuple[list[FinishedRun], dict[tuple[str, int], str]]:
    """As `study.run_all`; where the runs are jobs, the process ends unless all are over."""
    if given.submit is None:
        return study.run_all(arms, folder, seeds=seeds, workers=given.workers, on_run=on_run)
    found, diverged, queued = study.submit_all(arms, folder, given.jobs, seeds=seeds)
    if found:
        on_run(found)
    if not queued:
        return found, diverged
    for (arm, seed), job in queued.items():
        anew = f" (the one before failed: {job.failed})" if job.failed else ""
        print(f"{arm}, seed {seed}: job {job.number} is {job.state}{anew}")
    print(f"{len(found)} runs have finished, {len(queued)} are jobs; the same command goes on.")
    sys.exit(0)


_SEARCH_SEED = 1000


def best_rates(
    arms: study.Arms,
    rates: Sequence[float],
    search: Mapping[str, Any],
    folder: pathlib.Path,
    given: Command,
) -> tuple[study.Arms, dict[str, dict[str, float | None]]]:
    """The arms, each with the best of the learning rates, and what to tell of that in the table."""
    tried = {
        f"{arm}, rate {rate:g}": config.replace(learning_rate=rate, **search)
        for arm, config in arms.items()
        for rate in rates
    }
    runs, _ = run_arms(tried, folder / "search", [_SEARCH_SEED], given)
    accuracy = {run.arm: run.average for run in runs}
    print("Learning rates tried, mean test accuracy of the tiers:")
    best: dict[str, RunConfig] = {}
    told: dict[str, dict[str, float | None]] = {}
    for arm, config in arms.items():
        found = {rate: accuracy.get(f"{arm}, rate {rate:g}") for rate in rates}
        rate = max(rates, key=lambda r, found=found: found[r] or 0.0)  # type: ignore[misc]
        best[arm] = config.replace(learning_rate=rate)
        told[arm] = {"learning_rate": rate}
        told[arm] |= {f"at_rate_{r:g}": a and round(a, 6) for r, a in found.items()}
        shown = [f"{'diverged' if a is None else f'{a:.2%}'} at {r:g}" for r, a in found.items()]
        print(f"  {arm}: {', '.join(shown)}")
    return best, told


def main(
    script: str,
    arms: Callable[[str], study.Arms],
    *,
    baseline: str | None = None,
    target: Mapping[str, float] | Callable[[FinishedRun], float] | None = None,
    rates: Sequence[float] = (),
    search: Mapping[str, Mapping[str, Any]] | None = None,
    scales: Sequence[str] = ("cpu", "full", "smoke"),
) -> None:
    """Runs an experiment.

    Args:
      script: its `__file__`.
      arms: by scale.
      baseline: see `jfed.reports.tables.arm_table`.
      target: likewise; or by scale.
      rates: learning rates that every arm is tried with first, each once, with a seed of their own;
        the table is of the best one, by the mean test accuracy of the trained tiers, which is told
        in the table. None are tried at the smoke scale.
      search: by scale, settings that are others while rates are tried, such as fewer rounds.
      scales: that the experiment has.
    """
    name = pathlib.Path(script).stem

    def command(given: Command) -> None:
        scale, seeds = one_of("scale", given.scale, scales), given.seeds
        folder = given.workdir / scale
        goal = target[scale] if isinstance(target, Mapping) else target
        end = table_of(script, scale, given.output)
        told = {"command": f"python experiments/{name}.py --scale {scale} --seeds {seeds}"}

        def write(done: Sequence[FinishedRun], table: pathlib.Path = folder / "runs.csv") -> None:
            found = to_lines(done)
            files.write_csv([x | told | chosen.get(x["arm"], {}) for x in found], table)

        every, chosen = arms(scale), dict[str, dict[str, float | None]]()
        if rates and scale != "smoke":
            every, chosen = best_rates(every, rates, (search or {}).get(scale, {}), folder, given)
        found, diverged = run_arms(every, folder, seeds, given, write)
        if found:
            print(report.text(found, baseline=baseline, target=goal))
            report.save_figures(found, folder)
        if diverged:
            lost = [f"{arm}, seed {seed}: {why}" for (arm, seed), why in diverged.items()]
            sys.exit("Diverged, and left out of the tables:\n" + "\n".join(lost))
        if end:
            write(found, end)

    try:
        command(
            flags.parse(
                Command(workdir=pathlib.Path("runs") / name),
                sys.argv[1:],
                names=lambda path: path.rpartition(".")[2],
                prog=f"{name}.py",
                description="Runs the experiment, or what is left of it.",
            )
        )
    except OSError as error:
        sys.exit(f"{name}: error: {RunFolderError(str(error))}")
    except JfedError as error:
        sys.exit(f"{name}: error: {error}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(130)
