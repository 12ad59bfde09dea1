"""`jfed predict`: what a trained run says of pictures."""

import pathlib

import numpy as np
import tyro
from tabulate import tabulate

from jfed import files
from jfed.cli import finished_runs, flags
from jfed.data import pictures as pictures_lib
from jfed.errors import ConfigError, RunFolderError


def execute(args: list[str]) -> None:
    """The command."""

    def command(
        folder: tyro.conf.Positional[str],
        pictures: tyro.conf.Positional[tuple[pathlib.Path, ...]],
        tier: str | None = None,
        iterations: str | None = None,
        solver: str | None = None,
        output: pathlib.Path | None = None,
    ) -> None:
        """Classifies pictures by the model of a finished run of `jfed run`.

        Args:
          folder: of the run.
          pictures: PNG, JPEG or TIFF, resized to what the model takes.
          tier: an evaluated tier by its name; by default the last that clients ran.
          iterations: in place of it a tested iteration count, such as 4 or 3-2-2.
          solver: that takes them; by default the one that was trained.
          output: a CSV file for the probabilities of all classes, in place of a table of the best.
        """
        if not pictures:
            raise ConfigError("no pictures were given; name at least one.")
        result = finished_runs.load(folder)
        inputs = result.predictor().inputs
        kind = pictures_lib.model_kind(inputs)
        images = pictures_lib.read(list(map(pictures_lib.of_file, pictures)), kind)
        counts = None if iterations is None else flags.parse_iterations(iterations)
        found = result.predict(images, tier=tier, iterations=counts, solver=solver)
        names = inputs.class_names
        if output is None:
            print(_table(pictures, found, names))
            return
        rows = [
            {"picture": str(picture)} | dict(zip(names, map(float, row), strict=True))
            for picture, row in zip(pictures, found, strict=True)
        ]
        try:
            files.write_csv(rows, output)
        except OSError as error:
            raise RunFolderError(f"cannot write to {str(output)!r}: {error}.") from error
        print(f"Written to {output}")

    flags.call(command, prog="jfed predict", args=args)


def _table(
    pictures: tuple[pathlib.Path, ...], probabilities: np.ndarray, names: tuple[str, ...]
) -> str:
    best = probabilities.argmax(1)
    rows = [
        (str(picture), names[k], f"{row[k]:.1%}")
        for picture, row, k in zip(pictures, probabilities, best, strict=True)
    ]
    return tabulate(rows, headers=("picture", "class", "probability"), disable_numparse=True)
