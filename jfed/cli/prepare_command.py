"""`jfed prepare`: downloads a data set and prepares it with TFDS."""

import pathlib

import tyro

from jfed import data
from jfed.cli import flags


def execute(args: list[str]) -> None:
    """The command."""

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

    name, data_dir, archive = flags.cli(command, prog="jfed prepare", args=args)
    print(f"{name} is prepared in {data.prepare(name, data_dir=data_dir, archive=archive)}")
