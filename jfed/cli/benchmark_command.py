"""`jfed benchmark`: jfed and other libraries side by side on the same work."""

import pathlib
import sys
import time
from typing import Annotated

import tyro


def execute(args: list[str]) -> None:
    """The command."""
    from jfed.benchmark.racing import race_all
    from jfed.benchmark.settings import Settings
    from jfed.cli import flags

    def command(
        settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),  # noqa: B008
        output: pathlib.Path | None = None,
    ) -> tuple[Settings, pathlib.Path | None]:
        """Times jfed and other libraries side by side on the same work.

        Args:
          settings: what to time.
          output: the folder for benchmark.json and figures; benchmarks/DATE-TIME where not given.
        """
        return settings, output

    settings, output = flags.cli(command, prog="jfed benchmark", args=args)
    output = output or pathlib.Path("benchmarks") / time.strftime("%Y%m%d-%H%M%S")
    race_all(settings, output, progress=lambda text: print(text, file=sys.stderr))
    print(f"Written to {output}")
