"""Client memory on the host: a row for each client and round in which it changed.

Rows are never changed, only superseded, so the memory after any round is told by which round's row
each client has (`latest`), which is what a checkpoint holds of it. Rows lie in RAM, or as files
in a folder where they are many; only the cohort's are ever on the devices.
"""

import concurrent.futures
import contextlib
import tempfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from jfed.errors import RunFolderError

IN_RAM = 2**30  # bytes of all clients' rows that are kept in RAM, where no folder is given
NEVER = -1  # the round of the row that a client begins with


class ClientMemory:
    """The rows of all clients.

    Args:
      first: the row that every client begins with, a pytree of NumPy arrays.
      clients: how many there are.
      folder: where rows lie as files; None for RAM, or for a folder that ends with the process if
        they would not fit (`IN_RAM`).
    """

    def __init__(self, first: Any, clients: int, folder: epath.Path | None = None) -> None:
        leaves, self._structure = jax.tree.flatten(first)
        self._first = [np.asarray(leaf) for leaf in leaves]
        self.row_bytes = sum(leaf.nbytes for leaf in self._first)
        self._temporary: tempfile.TemporaryDirectory | None = None
        if folder is None and self.row_bytes * clients > IN_RAM:
            self._temporary = tempfile.TemporaryDirectory(prefix="jfed-memory-")
            folder = epath.Path(self._temporary.name)
        self._folder = folder
        self._ram: dict[tuple[int, int], list[np.ndarray]] = {}
        self._rounds: dict[int, list[int]] = {}
        if folder is not None and folder.exists():
            for path in folder.glob("*.row"):
                client, round_ = map(int, path.stem.split("-"))
                self._rounds.setdefault(client, []).append(round_)

    @staticmethod
    def begin(clients: int) -> Int[np.ndarray, " clients"]:
        """Which rows the clients have before the first round."""
        return np.full(clients, NEVER, np.int32)

    def rows(self, clients: Sequence[int], latest: Int[np.ndarray, " clients"], places: Any) -> Any:
        """The rows of some clients, stacked.

        Args:
          clients: their numbers.
          latest: which round's row each client of the federation has.
          places: of these clients in the stack, and its length: `([places], length)`.

        Returns:
          A pytree of arrays `[length, ...]`; zeros in places of nobody.
        """
        at, length = places
        stacks = [np.zeros((length, *leaf.shape), leaf.dtype) for leaf in self._first]

        def read(client: int, place: int) -> None:
            for stack, leaf in zip(stacks, self._row(client, int(latest[client])), strict=True):
                stack[place] = leaf

        self._each(read, list(zip(clients, at, strict=True)))
        return jax.tree.unflatten(self._structure, stacks)

    def keep(self, rows: Sequence[tuple[int, int, Any]]) -> None:
        """Keeps the rows that clients have after rounds: `(client, round, row)` each."""
        self._each(self._put, rows)

    def _each(self, do: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
        """Does something for each row; of files in threads, which mostly wait for the disk."""
        if self._folder is None:
            for arguments in calls:
                do(*arguments)
        else:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda arguments: do(*arguments), calls))

    def _put(self, client: int, round_: int, row: Any) -> None:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(row)]
        rounds = self._rounds.setdefault(client, [])
        if round_ not in rounds:
            rounds.append(round_)
        if self._folder is None:
            self._ram[client, round_] = [leaf.copy() for leaf in leaves]
        else:
            flat = (np.ascontiguousarray(leaf).reshape(-1) for leaf in leaves)
            parts: list[Any] = [leaf.view(np.uint8) for leaf in flat]
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._path(client, round_)
            partial = path.with_suffix(".partial")
            partial.write_bytes(b"".join([_checksum(parts), *parts]))
            partial.replace(path)

    def forget(self, latest: Int[np.ndarray, " clients"]) -> None:
        """Drops the rows that were superseded by the time that clients had the `latest` ones."""
        for client, rounds in self._rounds.items():
            for round_ in [r for r in rounds if r < latest[client]]:
                rounds.remove(round_)
                if self._folder is None:
                    del self._ram[client, round_]
                else:
                    with contextlib.suppress(FileNotFoundError):
                        self._path(client, round_).unlink()

    def _path(self, client: int, round_: int) -> epath.Path:
        assert self._folder is not None
        return self._folder / f"{client}-{round_}.row"

    def _row(self, client: int, round_: int) -> list[np.ndarray]:
        if round_ == NEVER:
            return self._first
        if self._folder is None:
            return self._ram[client, round_]
        path = self._path(client, round_)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunFolderError(f"the memory of client {client} is gone: {error}.") from error
        check, row = content[:4], memoryview(content)[4:]
        if _checksum([row]) != check or len(row) != self.row_bytes:
            raise RunFolderError(
                f"{str(path)!r} is damaged; the memory of client {client} after round "
                f"{round_ + 1} cannot be had back. Remove the run folder to start anew."
            )
        ends = np.cumsum([leaf.nbytes for leaf in self._first])
        return [
            np.frombuffer(row[end - leaf.nbytes : end], leaf.dtype).reshape(leaf.shape)
            for leaf, end in zip(self._first, ends.tolist(), strict=True)
        ]


def _checksum(parts: Sequence[Any]) -> bytes:
    """CRC-32 of buffers, one after another."""
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return check.to_bytes(4, "little")
