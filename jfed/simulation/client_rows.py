"""Rows of client memory on their way between the host and the devices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jfed.engine import hosts
from jfed.engine.devices import SPREAD, put, rows_here, to_host
from jfed.engine.memory import ClientMemory
from jfed.engine.packing import Packing, Schedule, Work
from jfed.errors import ConfigError, check_integer


class Trained(NamedTuple):
    """Clients that a program trained, what they were packed on, and their rows after it."""

    work: Sequence[Work]
    schedule: Schedule
    packing: Packing
    rows: Any


class ClientRows:
    """The rows of a federation's clients; of one whose clients remember nothing, no rows.

    Args:
      shapes: of a row, as `Algorithm.memory_init` makes it.
      first: makes the row that every client begins with.
      clients: how many there are.
      folder: where rows lie, see `ClientMemory`.
      mesh: of the devices.
    """

    def __init__(
        self,
        shapes: Any,
        first: Callable[[], Any],
        clients: int,
        folder: epath.Path | None,
        mesh: Mesh,
    ) -> None:
        self.remember = bool(jax.tree.leaves(shapes))
        if self.remember and folder is None and jax.process_count() > 1:
            raise ConfigError(
                "client memory on several hosts needs a workdir that all of them see."
            )
        self._shapes, self._first, self._clients = shapes, first, clients
        self._folder, self._mesh = folder, mesh

    @functools.cached_property
    def memory(self) -> ClientMemory | None:
        """The rows on the host; None where clients remember nothing."""
        if not self.remember:
            return None
        return ClientMemory(to_host(self._first()), self._clients, self._folder)

    def begin(self) -> Any:
        """Which round's row each client has before the first round; () without any."""
        return ClientMemory.begin(self._clients) if self.remember else ()

    def row(self, client: int, latest: Any) -> Any:
        """What one client remembers, on the host."""
        if self.memory is None:
            return self._shapes  # which has no leaves
        rows = self.memory.rows([client], latest, ([0], 1))
        return jax.tree.map(lambda x: x[0], rows)

    def recall(self, latest: Any) -> Callable[[int], Any] | None:
        """`row` by a client's number; None where clients remember nothing."""
        if self.memory is None:
            return None

        def of(client: int) -> Any:
            check_integer("client", client, least=0, most=self._clients - 1)
            return self.row(client, latest)

        return of

    def some(self, clients: Sequence[int], length: int, latest: Any) -> Any:
        """Rows of clients in their order, on the devices, padded to a length."""
        return self._put(clients, range(len(clients)), length, latest)

    def packed(
        self, work: Sequence[Work], schedule: Schedule, packing: Packing, latest: Any
    ) -> Any:
        """The cohort's rows, each on the device that trains its client."""
        if self.memory is None:
            return self._shapes
        clients, length = [item.client for item in work], packing.rows * packing.devices
        return self._put(clients, _places(work, schedule, packing), length, latest)

    def _put(self, clients: Sequence[int], places: Sequence[int], length: int, latest: Any) -> Any:
        if self.memory is None:
            return self._shapes
        return put(self.memory.rows(clients, latest, (places, length)), self._mesh, SPREAD)

    def keep(self, number: int, latest: Any, trained: Sequence[Trained]) -> Any:
        """Keeps the rows that a round's clients have after it; which rows are the latest now."""
        if self.memory is None:
            return latest
        # Another host may need these rows in the next round.
        hosts.agree("remembering", lambda: self._keep_here(number, trained))
        return self._renewed(number, latest, [w.client for one in trained for w in one.work])

    def keep_rows(self, number: int, latest: Any, rows: dict[int, Any]) -> Any:
        """As `keep`, of rows by client."""
        if self.memory is None:
            return latest
        self.memory.keep([(client, number, row) for client, row in rows.items()])
        return self._renewed(number, latest, list(rows))

    def _renewed(self, number: int, latest: Any, clients: list[int]) -> Any:
        assert self.memory is not None
        if self._folder is None:  # no checkpoint needs what the round began with
            self.memory.forget(latest)
        renewed = latest.copy()
        renewed[clients] = number
        return renewed

    def _keep_here(self, number: int, trained: Sequence[Trained]) -> None:
        """Keeps the rows that this host's devices have trained."""
        memory = self.memory
        assert memory is not None
        kept: list[tuple[int, int, list[np.ndarray]]] = []
        for work, schedule, packing, rows in trained:
            hosts.wait_for(rows)
            here = [rows_here(leaf) for leaf in jax.tree.leaves(rows)]
            for item, place in zip(work, _places(work, schedule, packing), strict=True):
                if place in here[0]:
                    kept.append((item.client, number, [leaf[place] for leaf in here]))
        memory.keep(kept)


def _places(work: Sequence[Work], schedule: Schedule, packing: Packing) -> list[int]:
    """Where the rows of clients lie in the array that is spread over devices."""
    found, lane_of = [], {}
    for lane, slots in enumerate(np.asarray(schedule.lanes.slot)):
        lane_of.update(dict.fromkeys(slots.tolist(), lane))
    for slot in range(len(work)):
        device = lane_of[slot] // (packing.lanes // packing.devices)
        found.append(device * packing.rows + int(schedule.cohort.row[slot]))
    return found
