"""`jfed export`: one tier of a trained run as a file for a device."""

import tyro

from jfed import files
from jfed.cli import finished_runs, flags
from jfed.simulation import exports


def execute(args: list[str]) -> None:
    """The command."""

    def command(
        folder: tyro.conf.Positional[str],
        format: str,
        tier: str | None = None,
        iterations: str | None = None,
        solver: str | None = None,
        batch_size: int | None = None,
        output: str | None = None,
    ) -> None:
        """Writes the model of one tier of a finished run of `jfed run` into a file.

        Args:
          folder: of the run.
          format: safetensors (parameters alone), or stablehlo or onnx (a program that maps pixels,
            as they are stored, to logits); onnx needs `pip install 'jfed[onnx]'`.
          tier: an evaluated tier by its name; by default the last that clients ran.
          iterations: in place of it a tested iteration count, such as 4 or 3-2-2.
          solver: that takes them; by default the one that was trained.
          batch_size: images at a time; by default any number.
          output: the file, replaced if it is there; by default RUN-TIER.FORMAT here.
        """
        predictor = finished_runs.load(folder).predictor()
        counts = None if iterations is None else flags.parse_iterations(iterations)
        chosen = predictor.choose(tier, counts, solver)
        title = f"{files.absolute(folder).name}-{chosen.name}".replace(" ", "-")
        path = output or f"{title}.{format}"
        count = exports.write(predictor, chosen, path, format=format, batch_size=batch_size)
        print(f"Written to {path}: tier {chosen.name}, {count:,} bytes")

    flags.call(command, prog="jfed export", args=args)
