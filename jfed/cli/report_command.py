"""`jfed report`: tables and figures of several finished runs."""

import pathlib
import sys

import tyro

from jfed import files
from jfed.errors import RunFolderError
from jfed.reports import finished, tables
from jfed.runs.config import settings


def execute(args: list[str]) -> None:
    """The command."""

    def command(
        folders: tyro.conf.Positional[tuple[str, ...]],
        baseline: str | None = None,
        target: float | None = None,
        style: str = tables.STYLES[0],
        output: pathlib.Path | None = None,
    ) -> None:
        """Tables of finished runs: mean and standard deviation over those that differ in the seed.

        Args:
          folders: run folders.
          baseline: compare all others with the runs of this name, as the table calls them.
          target: accuracy from 0 to 1; tells how many rounds, bytes and simulated
            seconds it took.
          style: of the tables: simple, github or latex_booktabs.
          output: a folder for runs.csv and figures.
        """
        names = {path: name for name, path in settings().items()}
        found, left_out = finished.read_all(folders, names)
        for why in left_out:
            print(f"jfed: left out: {why}", file=sys.stderr)
        print(tables.text(found, baseline=baseline, target=target, style=style))
        if output is not None:
            try:
                tables.save_figures(found, output)
                files.write_csv(tables.lines(found, target), output / "runs.csv")
            except OSError as error:
                raise RunFolderError(f"cannot write to {str(output)!r}: {error}.") from error
            print(f"Written to {output}")

    tyro.cli(command, prog="jfed report", args=args)
