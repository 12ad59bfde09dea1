"""Checkpoints of a run: the server's state and the records so far, saved by Orbax."""

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jfed.errors import RunFolderError, check_integer
from jfed.files import absolute, is_local
from jfed.seeds import is_key
from jfed.simulation.federation import State
from jfed.simulation.records import Record

_UNFINISHED, _FINISHED = ".orbax-checkpoint-tmp", "commit_success.txt"  # Orbax's own names


class Checkpoint(NamedTuple):
    """A run after `len(history)` rounds.

    Attributes:
      state: the server's `State`, or as it is stored; NumPy arrays, except typed PRNG keys.
        Keys of rounds and the order of examples follow from the seed and the round's number; what
        clients remember are files, of which the state names the latest.
      history: the records of all rounds so far.
      made_with: what saved it, see `jfed.provenance.made_with`.
    """

    state: Any
    history: tuple[Record, ...]
    made_with: Mapping[str, Any] = MappingProxyType({})


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

    Only one process may save, of several hosts the first one; any number may read meanwhile.
    (Orbax's managers of checkpoints make hosts wait for each other, in vain once one has failed.)

    Args:
      folder: local, or of any kind that etils knows (`gs://` too).
      config: when to save.
      made_with: what saves, kept with each checkpoint.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        config: CheckpointConfig,
        made_with: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._folder, self._config = absolute(folder), config
        self._made_with = dict(made_with)
        host = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=host, active_processes={host} if jax.process_count() > 1 else None
        )
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
            multiprocessing_options=alone,
            # Made in the background, a folder that cannot be made is noticed after 20 minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._saving = False

    @property
    def every(self) -> int:
        """Rounds between checkpoints."""
        return self._config.every

    @property
    def keep(self) -> int:
        """How many of the latest ones stay."""
        return self._config.keep

    def save(self, state: State, history: Sequence[Record]) -> None:
        """Copies the state and writes it in the background; waits for the save before.

        Raises:
          RunFolderError: this save could not begin, or the one before failed.
        """
        text = json.dumps([dataclasses.asdict(record) for record in history]).encode()
        # The records are an array too, which may be longer than Orbax expects of metadata.
        content = {"state": jax.tree.map(_as_numpy, state), "history": np.frombuffer(text, "u1")}
        about = {"digest": _digest(_named(content)), "keys": _keys(state)}
        about["made_with"] = self._made_with
        self.wait()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            place, args = self._folder / str(len(history)), ocp.args.PyTreeSave(content)
            for left in self._unfinished():
                left.rmtree()
            self._orbax.save(place, args=args, custom_metadata=about)
            self._saving = True
        except Exception as error:
            raise RunFolderError(self._cannot_save(error)) from error

    def wait(self) -> None:
        """Waits until all saves are on disk, the oldest gone; RunFolderError if one failed."""
        if not self._saving:
            return
        self._saving = False
        try:
            self._orbax.wait_until_finished()
            for old in self._rounds()[: -self._config.keep]:
                (self._folder / str(old)).rmtree()
        except Exception as error:
            raise RunFolderError(self._cannot_save(error)) from error

    def close(self) -> None:
        """Waits, and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # the failed save's again, which `wait` told
                self._orbax.close()

    def latest(self, like: State | None, *, repair: bool = True) -> Checkpoint | None:
        """The latest checkpoint that is intact, or None if none was ever saved.

        Damaged ones are named in a warning, and passed over.

        Args:
          like: shapes and dtypes of the state. None: the state is what is stored, dictionaries and
            lists whose keys are texts.
          repair: whether damaged ones are renamed to `damaged-N`; only for the process that saves.

        Raises:
          RunFolderError: there are checkpoints, but none is intact.
        """
        damaged = []
        for round_ in reversed(self._rounds()):
            try:
                checkpoint = self.load(round_, like)
            except (MemoryError, PermissionError, TimeoutError):
                raise  # nothing is wrong with the checkpoint
            except Exception as error:  # whatever Orbax, Zarr or JSON find wrong
                reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
                damaged.append((round_, f"that of round {round_}: {reason}"))
                continue
            for bad, why in damaged:
                warnings.warn(f"{self._folder}: damaged checkpoint set aside, {why}", stacklevel=2)
                if repair:
                    aside = self._folder / f"damaged-{bad}"
                    if aside.exists():  # of the last time
                        aside.rmtree()
                    (self._folder / str(bad)).rename(aside)
            return checkpoint
        if damaged:
            raise RunFolderError(
                f"no checkpoint in {str(self._folder)!r} is intact: "
                f"{'; '.join(why for _, why in damaged)}. Remove the run folder to start anew."
            )
        return None

    def load(self, round_: int, like: State | None) -> Checkpoint:
        """The checkpoint of a round; `like` as of `latest`. Raises whatever is wrong with it."""
        path = self._folder / str(round_)
        about, content = self._orbax.metadata(path).custom_metadata, self._orbax.restore(path)
        if _digest(_named(content)) != about["digest"]:
            raise ValueError("its contents are not those that were saved (SHA-256 differs)")
        history = tuple(map(Record.from_dict, json.loads(content["history"].tobytes())))
        state = _with_keys(content["state"], about["keys"])
        state = state if like is None else in_tree_of(like, state)
        return Checkpoint(state, history, about.get("made_with", {}))

    def _rounds(self) -> list[int]:
        """Those that have a checkpoint, in order."""
        found = self._folder.iterdir() if self._folder.exists() else ()
        # A remote folder cannot be renamed when it is complete; Orbax marks it instead.
        return sorted(
            int(path.name)
            for path in found
            if path.name.isdigit() and (is_local(path) or (path / _FINISHED).exists())
        )

    def _unfinished(self) -> list[epath.Path]:
        """What a process left that was killed while it saved; while nothing is being saved."""
        done = set(map(str, self._rounds()))
        return [
            path
            for path in self._folder.iterdir()
            if _UNFINISHED in path.name or (path.name.isdigit() and path.name not in done)
        ]

    def _cannot_save(self, error: Exception) -> str:
        return (
            f"cannot save a checkpoint in {str(self._folder)!r}: {error}. What was saved before is "
            "kept; the same command goes on from there."
        )


def stored(path: epath.Path) -> Checkpoint:
    """The latest intact checkpoint of the run in a folder, its state as it is stored.

    That is `{"server": {"variables": ...}, ...}`: dictionaries and lists, with texts for keys.

    Raises:
      RunFolderError: there is no run in the folder, or it saved nothing so far, or is damaged.
    """
    if not (path / "config.json").exists():
        raise RunFolderError(f"{str(path)!r} holds no run: it has no config.json.")
    with contextlib.closing(Checkpoints(path / "checkpoints", CheckpointConfig())) as checkpoints:
        saved = checkpoints.latest(None, repair=False)
    if saved is None:
        raise RunFolderError(f"the run in {str(path)!r} has not saved any round yet.")
    return saved


def _as_numpy(x: Any) -> np.ndarray:
    """An array on the host, all of it; of typed PRNG keys their data."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = x.addressable_data(0)  # every device of every host has all of it
    return np.asarray(jax.random.key_data(x) if is_key(x) else x)


def _keys(tree: Any) -> dict[str, str]:
    """The implementations of the typed PRNG keys in a tree, by name."""
    return {n: str(jax.random.key_impl(leaf)) for n, leaf in _named(tree).items() if is_key(leaf)}


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the texts that Orbax stores instead of the keys on their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="\n"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _with_keys(stored: Any, keys: Mapping[str, str]) -> Any:
    """What is stored, with typed PRNG keys in place of their data."""
    leaves = [
        jax.random.wrap_key_data(leaf, impl=keys[name]) if name in keys else leaf
        for name, leaf in _named(stored).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(stored), leaves)


def in_tree_of(like: Any, stored: Any) -> Any:
    """What is stored, in the tree of `like`; ValueError unless shapes and dtypes are the same."""
    arrays, expected = _named(stored), _named(like)
    for name in sorted(arrays.keys() | expected.keys()):
        here, there = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing"
            for tree in (arrays, expected)
        )
        if here != there:
            raise ValueError(f"it holds {here} at {name.split()}, where the run expects {there}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays and their names, in the order of these."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
