"""Where training images lie: all of them on the devices, or on the host.

Those on the host are sent as they are needed: each device gets, before a round, the rows that its
clients train on. Since the next round is prepared while the devices do this one, sending does not
keep them waiting; but tests of clients on examples of their own do, each call of which gets its
own images. What is computed is the same, bit for bit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jfed.data.preprocessing import Images, in_rows
from jfed.data.splits import Split
from jfed.engine.devices import EVERYWHERE, SPREAD, put

# Indices of examples, `[D * n, ..., B]`, a device's next to each other, and how many of each batch
# count, `[D * n, ...]`.
Batches = tuple[np.ndarray, np.ndarray]


class Needed(NamedTuple):
    """Which rows each device needs, and indices among them in place of those among all.

    Attributes:
      rows: of each device, ascending; () where the devices have all images.
      indices: in the shapes of those that were asked for.
    """

    rows: Sequence[np.ndarray]
    indices: list[np.ndarray]


class Resident:
    """All images on every device.

    Attributes:
      whole: the images, wherever they are.
    """

    def __init__(self, split: Split, moments: Any, mesh: Mesh) -> None:
        self.whole = Images(*put((in_rows(split.images), split.labels, *moments), mesh, EVERYWHERE))

    def needed(self, *batches: Batches) -> Needed:
        """What the devices need for batches whose first axis is spread over them."""
        return Needed((), [indices for indices, _ in batches])

    def send(self, needed: Needed, room: int) -> Images:
        """Those images for each device, padded to so many."""
        return self.whole

    def some(self, chosen: np.ndarray) -> tuple[Images, np.ndarray]:
        """Images that hold the chosen ones, on every device, and where among them they are."""
        return self.whole, chosen


class Streamed:
    """All images on the host, those of an `np.memmap` too; as `Resident` otherwise."""

    def __init__(self, split: Split, moments: Any, mesh: Mesh) -> None:
        self._mesh, self._moments, self._split = mesh, put(moments, mesh, EVERYWHERE), split
        self.whole = Images(split.images, split.labels, *self._moments)  # type: ignore[arg-type]

    def needed(self, *batches: Batches) -> Needed:
        devices, rows = self._mesh.size, []
        found = [np.zeros_like(indices) for indices, _ in batches]
        for d in range(devices):
            counts = [_part(real, d, devices) > 0 for _, real in batches]
            asked = [_part(x, d, devices)[c] for (x, _), c in zip(batches, counts, strict=True)]
            rows.append(np.unique(np.concatenate([x.ravel() for x in asked])))
            for x, c, new in zip(asked, counts, found, strict=True):
                _part(new, d, devices)[c] = np.searchsorted(rows[-1], x)
        return Needed(rows, found)

    def send(self, needed: Needed, room: int) -> Images:
        shape = len(needed.rows) * room
        pixels = np.zeros((shape, *self._split.images.shape[1:]), self._split.images.dtype)
        labels = np.zeros(shape, np.int32)
        for d, rows in enumerate(needed.rows):
            at = slice(d * room, d * room + len(rows))
            pixels[at], labels[at] = self._split.images[rows], self._split.labels[rows]
        return Images(*put((in_rows(pixels), labels), self._mesh, SPREAD), *self._moments)

    def some(self, chosen: np.ndarray) -> tuple[Images, np.ndarray]:
        rows = np.sort(chosen)
        parts = in_rows(self._split.images[rows]), self._split.labels[rows]
        images = Images(*put(parts, self._mesh, EVERYWHERE), *self._moments)
        return images, np.searchsorted(rows, chosen)


TrainingImages = Resident | Streamed


def _part(array: np.ndarray, device: int, devices: int) -> np.ndarray:
    """A device's part of an array, a view."""
    each = len(array) // devices
    return array[device * each : (device + 1) * each]
