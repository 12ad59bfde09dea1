"""Checkpoints of a run: the server's state and the records so far, saved by Orbax."""

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from jfed.algorithms.servers import ServerState
from jfed.errors import RunFolderError, check_integer
from jfed.files import absolute
from jfed.simulation.records import Record


class Checkpoint(NamedTuple):
    """A run after `len(history)` rounds.

    Attributes:
      state: the server's, NumPy arrays. Keys and the order of examples follow from the seed and
        the round's number, and clients keep nothing from round to round.
      history: the records of all rounds so far.
    """

    state: ServerState
    history: tuple[Record, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves.

    Attributes:
      every: rounds between checkpoints; the last round always has one.
      keep: how many of the latest ones stay.
    """

    every: int = 10
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            check_integer(f"checkpoint_{name}", getattr(self, name), least=1)


class Checkpoints:
    """The checkpoints in a folder. Each is complete or not there at all.

    Args:
      folder: local, or of any kind that etils knows (`gs://` too).
      config: when to save.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig) -> None:
        self._folder, self.every = absolute(folder), config.every
        context = ocp.Context()
        # Made in the background, a folder that cannot be made is noticed after 20 minutes.
        context.asynchronous.create_directories_asynchronously = False
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None

    def save(self, state: ServerState, history: Sequence[Record]) -> None:
        """Copies the state and writes it in the background; waits for the save before.

        Raises:
          RunFolderError: this save could not begin, or the one before failed.
        """
        text = json.dumps([dataclasses.asdict(record) for record in history]).encode()
        # The records are an array too: Orbax would keep all metadata that it ever saw in memory.
        content = {"state": jax.tree.map(np.asarray, state), "history": np.frombuffer(text, "u1")}
        about = {"history_bytes": len(text), "digest": _digest(content)}
        self.wait()
        try:
            self._saving = self._checkpointer.save_async(
                len(history), content, custom_metadata=about
            )
        except Exception as error:
            raise RunFolderError(self._cannot_save(error)) from error

    def wait(self) -> None:
        """Waits until all saves are on disk; RunFolderError if one failed."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()  # which also frees the save's thread and files
        except Exception as error:
            raise RunFolderError(self._cannot_save(error)) from error

    def close(self) -> None:
        """Waits, and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # the failed save's again, which `wait` told
                self._checkpointer.close()

    def latest(self, like: ServerState) -> Checkpoint | None:
        """The latest checkpoint that is intact, or None if none was ever saved.

        Damaged ones are named in a warning, renamed to `damaged-N`, and passed over.

        Args:
          like: shapes and dtypes of the state.

        Raises:
          RunFolderError: there are checkpoints, but none is intact.
        """
        found = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)
        damaged = []
        for step in found:
            try:
                checkpoint = self._load(step, like)
            except (MemoryError, PermissionError, TimeoutError):
                raise  # nothing is wrong with the checkpoint
            except Exception as error:  # whatever Orbax, Zarr or JSON find wrong
                reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
                damaged.append((step, f"that of round {step}: {reason}"))
                continue
            for bad, why in damaged:
                warnings.warn(f"{self._folder}: damaged checkpoint set aside, {why}", stacklevel=2)
                if jax.process_index() == 0:
                    (self._folder / str(bad)).rename(self._folder / f"damaged-{bad}")
            if damaged:
                self._checkpointer.reload()
            return checkpoint
        if found:
            raise RunFolderError(
                f"no checkpoint in {str(self._folder)!r} is intact: "
                f"{'; '.join(why for _, why in damaged)}. Remove the run folder to start anew."
            )
        return None

    def _load(self, step: int, like: ServerState) -> Checkpoint:
        about = self._checkpointer.metadata(step).custom_metadata
        state = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        shapes = {"state": state, "history": np.empty(about["history_bytes"], "u1")}
        content = self._checkpointer.load(step, shapes)
        if _digest(content) != about["digest"]:
            raise ValueError("its contents are not those that were saved (SHA-256 differs)")
        history = json.loads(content["history"].tobytes())
        return Checkpoint(content["state"], tuple(map(Record.from_dict, history)))

    def _cannot_save(self, error: Exception) -> str:
        return (
            f"cannot save a checkpoint in {str(self._folder)!r}: {error}. What was saved before is "
            "kept; the same command goes on from there."
        )


def _digest(arrays: Any) -> str:
    """SHA-256 of all arrays, in the order of the tree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
