"""Image classification data as NumPy arrays in memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jfed.errors import DataError


def as_array(name: str, values: Any) -> np.ndarray:
    """Anything that NumPy makes an array of; DataError if it cannot."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be an array: {error}.") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
      images: `[N, H, W, C]` uint8, uint16 or floats, kept as float32; for a model of the user's own
        any `[N, ..., C]`. Models get each of the C channels normalised by its mean and standard
        deviation over the training images.
      labels: `[N]` integers, kept as int32, the class of each image.

    Raises:
      DataError: a rank or type is another one, a value is not finite, or the two lengths differ.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = as_array("images", self.images), as_array("labels", self.labels)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels)
        if images.ndim < 2 or not all(images.shape[1:]):
            raise DataError(
                f"images have shape {images.shape} and type {images.dtype}; expected [N, H, W, C]."
            )
        if images.dtype.kind == "f":
            object.__setattr__(self, "images", _finite(images))
        elif images.dtype not in (np.uint8, np.uint16):
            raise DataError(
                f"images have shape {images.shape} and type {images.dtype}; "
                "expected [N, H, W, C] and uint8, uint16 or floats."
            )
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"labels have shape {labels.shape} and type {labels.dtype}; "
                "expected [N] and integers."
            )
        if not len(images):
            raise DataError(f"a split needs images, got shape {images.shape}.")
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images have {len(labels)} labels; expected one each.")

        kept = labels.astype(np.int32)
        if not np.array_equal(kept, labels):
            raise DataError(f"labels from {labels.min()} to {labels.max()} do not fit int32.")
        object.__setattr__(self, "labels", kept)

    def __len__(self) -> int:
        return len(self.labels)


def _finite(images: np.ndarray) -> np.ndarray:
    """Images as float32; DataError for the first that has a value which is none."""
    with np.errstate(over="ignore"):
        kept = images.astype(np.float32, copy=False)
    for start in range(0, len(kept), 1000):
        part = kept[start : start + 1000]
        if not np.isfinite(part).all():
            bad = start + int(np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(1))[0])
            raise DataError(f"image {bad} has values that are not finite in float32.")
    return kept


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A named training and test split. Any arrays will do, not only those of `load`.

    Attributes:
      name: what reports call the data set.
      train: the examples that are dealt out to the clients.
      test: the examples that the global model is evaluated on.
      class_names: `class_names[k]` is what label `k` stands for.
      clients: `[N]` integers, the client that each training example belongs to by nature (a camera,
        a writer, a hospital), for the partition "natural"; None where there are none.
      client_names: `client_names[i]` is what client `i` is called.

    Raises:
      DataError: a label has no class name, a training example no client or a client no name or
        example, or train and test images differ in shape.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    clients: np.ndarray | None = None
    client_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.class_names
        if isinstance(names, str) or not isinstance(names, Sequence) or len(names) < 2:
            raise DataError(f"class_names must be a sequence of 2 names or more, got {names!r}.")
        for part in (self.train, self.test):
            if not isinstance(part, Split):
                raise DataError(f"train and test must be of type Split, got {part!r}.")
        kinds = [
            (split.images.shape[1:], str(split.images.dtype)) for split in (self.train, self.test)
        ]
        if kinds[0] != kinds[1]:
            raise DataError(
                f"train images have shape {kinds[0][0]} and type {kinds[0][1]}, test images "
                f"{kinds[1][0]} and {kinds[1][1]}; expected the same."
            )
        for split_name, split in (("train", self.train), ("test", self.test)):
            bad = split.labels[(split.labels < 0) | (split.labels >= self.num_classes)]
            if bad.size:
                raise DataError(
                    f"{split_name} label {bad[0]} is outside [0, {self.num_classes}): "
                    f"{self.name!r} has {self.num_classes} class names."
                )

        self._check_clients()

    def _check_clients(self) -> None:
        if self.clients is None:
            if self.client_names:
                raise DataError(f"client_names {self.client_names[:3]} need clients, got none.")
            return
        clients = as_array("clients", self.clients)
        if clients.shape != (len(self.train),) or clients.dtype.kind not in "iu":
            raise DataError(
                f"clients have shape {clients.shape} and type {clients.dtype}; expected "
                f"[{len(self.train)}] and integers."
            )
        counts = np.bincount(clients[clients >= 0], minlength=len(self.client_names))
        if clients.min() < 0 or len(counts) > len(self.client_names) or not counts.all():
            raise DataError(
                f"clients from {clients.min()} to {clients.max()} do not fit the "
                f"{len(self.client_names)} client_names; expected some of each."
            )
        if len(set(self.client_names)) < len(self.client_names):
            twice = next(n for n in self.client_names if self.client_names.count(n) > 1)
            raise DataError(f"client_names must differ, got {twice!r} twice.")
        object.__setattr__(self, "clients", clients.astype(np.int32))

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are below it."""
        return len(self.class_names)

    def names_of(self, partition: Sequence[np.ndarray]) -> tuple[str, ...]:
        """What the clients of a partition are called: by nature if it is by these, else by number.

        Args:
          partition: row numbers of each client; a part of its examples will do.
        """
        found, clients = enumerate(partition), self.clients
        fits = clients is not None and len(partition) == len(self.client_names)
        if fits and all((clients[examples] == i).all() for i, examples in found):  # type: ignore[index]
            return self.client_names
        return tuple(map(str, range(len(partition))))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(H, W, C)` of every image."""
        return self.train.images.shape[1:]
