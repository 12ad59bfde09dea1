"""`jfed report`: tables and figures of several finished runs."""

import pathlib
import sys
from collections.abc import Sequence

import tyro

from jfed import files
from jfed.cli import flags
from jfed.errors import RunFolderError
from jfed.reports import finished, run_lines, tables
from jfed.reports.finished import FinishedRun
from jfed.runs.config import RunConfig, settings
from jfed.settings import as_json, flat


def _read(paths: Sequence[str]) -> list[FinishedRun]:
    """The runs of tables and of folders, whose arms are called by the settings that differ."""
    found = [run for p in paths if p.endswith(".csv") for run in run_lines.read_lines(p)]
    folders = [path for path in paths if not path.endswith(".csv")]
    if folders or not paths:
        names = {path: name for name, path in settings().items()}
        defaults = {names[path]: value for path, value in flat(as_json(RunConfig())).items()}
        others, left_out = finished.read_all(folders, names, defaults)
        for why in left_out:
            print(f"jfed: left out: {why}", file=sys.stderr)
        found += others
    return found


def execute(args: list[str]) -> None:
    """The command."""

    def command(
        runs: tyro.conf.Positional[tuple[str, ...]],
        baseline: str | None = None,
        target: float | None = None,
        style: str = tables.STYLES[0],
        output: pathlib.Path | None = None,
    ) -> None:
        """Tables of finished runs: mean and standard deviation over those that differ in the seed.

        Args:
          runs: run folders, and tables of runs (.csv) that this command or an experiment wrote.
          baseline: compare all others with the runs of this name, as the table calls them.
          target: accuracy from 0 to 1; tells how many rounds, bytes and simulated
            seconds it took.
          style: of the tables: simple, github or latex_booktabs.
          output: a folder for runs.csv and figures.
        """
        found = _read(runs)
        print(tables.text(found, baseline=baseline, target=target, style=style))
        if output is not None:
            try:
                tables.save_figures(found, output)
                files.write_csv(run_lines.to_lines(found), output / "runs.csv")
            except OSError as error:
                raise RunFolderError(f"cannot write to {str(output)!r}: {error}.") from error
            print(f"Written to {output}")

    flags.call(command, prog="jfed report", args=args)
