"""Records for TensorBoard and Weights & Biases: optional `jfed.simulation.records.Writer`s."""

import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from jfed.errors import optional
from jfed.files import write_text
from jfed.simulation.records import Record


class TensorBoardWriter:
    """Event files for TensorBoard, by tensorboardX; no TensorFlow.

    Args:
      folder: of the event files.
      done: rounds that were done before; what an earlier process wrote of later ones is hidden.
    """

    def __init__(self, folder: epath.PathLike, done: int) -> None:
        tensorboard = optional("tensorboardX", "tensorboard")
        self._writer = tensorboard.SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, record: Record) -> None:
        """Adds one step."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record.round)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WandbWriter:
    """A run in Weights & Biases, one for each run folder, which keeps its id in `wandb.txt`.

    Args:
      project: its name.
      folder: the run folder; its name is the run's.
      config: the run's settings.
    """

    def __init__(self, project: str, folder: epath.PathLike, config: Mapping[str, Any]) -> None:
        path = epath.Path(folder)
        known = path / "wandb.txt"
        if not known.exists():
            write_text(known, uuid.uuid4().hex)
        self._run = optional("wandb", "wandb").init(
            project=project,
            name=path.name,
            id=known.read_text(),
            resume="allow",
            config=dict(config),
        )

    def write(self, record: Record) -> None:
        """Adds one step. Rounds that were logged before the run was killed are not doubled."""
        self._run.log(_numbers(record), step=record.round)

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


def _numbers(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.row().items() if name != "round"}
