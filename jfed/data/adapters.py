"""Data sets of other libraries, read into memory."""

import dataclasses
import functools
import io
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from jfed.data import pictures
from jfed.data.examples import Labelled, assemble
from jfed.data.splits import Dataset
from jfed.errors import ConfigError, DataError, one_of

_AT_ONCE = 1000  # rows that are asked for together


def from_huggingface(
    dataset: Any,
    *,
    image: str,
    label: str,
    client: str | None = None,
    image_size: int | None = None,
    test_share: float | None = None,
    name: str = "huggingface",
    seed: int = 0,
) -> Dataset:
    """A data set of Hugging Face's `datasets` (`pip install 'jfed[huggingface]'`).

    FEMNIST by writer is `from_huggingface(datasets.load_dataset("flwrlabs/femnist"), image="image",
    label="character", client="writer_id", test_share=0.1)`.

    Args:
      dataset: a `datasets.Dataset` that is not streamed, or a `DatasetDict` of "train" and "test",
        or of "train" alone; other splits are not read.
      image: the column of pictures, or of arrays `[H, W, C]` uint8, uint16 or floats (of a model of
        the user's own `[..., C]`).
      label: the column of classes: a `ClassLabel`, or integers or texts, which are sorted.
      client: the column of the client that each training example belongs to by nature; see
        `jfed.data.by_client`.
      image_size: height and width that pictures are resized to; by default they stay as they are.
      test_share: of each class, kept for the test where there is no split "test".
      name: what reports call it.
      seed: of that share's choice.

    Raises:
      ConfigError: no such column (naming the close ones), or a share that is missing or too much.
      DataError: a picture that cannot be read, a label or client that is missing, naming its row.
    """
    splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    splits = {part: splits[part] for part in ("train", "test") if part in splits}
    if "train" not in splits:
        raise DataError(f"the data set has the splits {sorted(dataset)}; expected 'train'.")
    for part, rows in splits.items():
        if not (hasattr(rows, "column_names") and hasattr(rows, "__len__")):
            raise DataError(f"{part} must be a datasets.Dataset, not streamed; got {rows!r}.")
        for column in (image, label):
            one_of(f"column of {part}", column, tuple(rows.column_names))
    if client is not None:
        one_of("column of train", client, tuple(splits["train"].column_names))
    names = getattr(splits["train"].features[label], "names", None)
    told = {part: _column(rows, label, part) for part, rows in splits.items()}
    labels, names = _numbered(told, names)
    clients = None if client is None else np.asarray(_column(splits["train"], client, "train"))
    images = _images({part: _pixels(rows, image) for part, rows in splits.items()}, image_size)
    train = Labelled(images["train"], labels["train"], clients)
    test = Labelled(images["test"], labels["test"]) if "test" in splits else None
    return assemble(name, train, test, names, test_share=test_share, seed=seed)


def from_torchvision(
    train: Any,
    test: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    test_share: float | None = None,
    name: str = "torchvision",
    seed: int = 0,
) -> Dataset:
    """Data sets like torchvision's: `len(d)` and `d[i] -> (image, label)`.

    Leave out transforms that normalise or augment, since jfed does both.

    Args:
      train: pictures of Pillow, arrays `[H, W, C]` uint8, uint16 or floats, or PyTorch's tensors
        `[C, H, W]`; with integer labels.
      test: likewise; by default a share of `train`.
      class_names: by label; by default `train.classes`, else the labels themselves.
      image_size: height and width that pictures are resized to; by default they stay as they are.
      test_share: of each class, kept for the test where there is no `test`.
      name: what reports call it.
      seed: of that share's choice.

    Raises:
      ConfigError: a share that is missing or too much.
      DataError: an example that cannot be read, or is not like the others, naming its number.
    """
    parts = {"train": train} | ({} if test is None else {"test": test})
    pairs = {
        part: [_pair(examples, i, part) for i in range(_length(examples, part))]
        for part, examples in parts.items()
    }
    names = getattr(train, "classes", None) if class_names is None else class_names
    labels, names = _numbered({part: [y for _, y in found] for part, found in pairs.items()}, names)
    found = _images({part: [x for x, _ in found] for part, found in pairs.items()}, image_size)
    splits = {part: Labelled(found[part], labels[part]) for part in parts}
    ours, theirs = splits["train"], splits.get("test")
    return assemble(name, ours, theirs, names, test_share=test_share, seed=seed)


def _column(rows: Any, column: str, part: str) -> list[Any]:
    """All values of a column; DataError for the first that is missing."""
    found = list(rows.with_format(None)[column])
    missing = [i for i, value in enumerate(found) if value is None]
    if missing:
        raise DataError(f"row {missing[0]} of {part} has no {column!r}.")
    if found and not isinstance(found[0], str | int | float):
        raise DataError(f"{column!r} must hold numbers or texts, got {found[0]!r} in {part}.")
    return found


def _pixels(rows: Any, column: str) -> list[Any]:
    """Pictures, encoded still, or arrays; DataError for a column of neither."""
    feature = rows.features[column]
    if hasattr(feature, "decode"):  # a `datasets.Image`
        rows = rows.cast_column(column, dataclasses.replace(feature, decode=False))
        rows = rows.with_format(None)
    else:
        while hasattr(feature, "feature"):  # lists of lists
            feature = feature.feature
        kind = getattr(feature, "dtype", "")
        if not kind.startswith(("uint", "int", "float")):
            held = rows.features[column]
            raise DataError(f"{column!r} must hold pictures or arrays, got {held}.")
        rows = rows.with_format("numpy", dtype=np.dtype(kind))  # else integers are int64
    starts = range(0, len(rows), _AT_ONCE)
    return [value for start in starts for value in rows[start : start + _AT_ONCE][column]]


def _length(examples: Any, part: str) -> int:
    try:
        return len(examples)
    except TypeError:
        raise DataError(f"{part} must be examples with a length, got {examples!r}.") from None


def _pair(examples: Any, i: int, part: str) -> tuple[Any, Any]:
    with pictures.reading(f"example {i} of {part}"):
        image, label = examples[i]
        if isinstance(image, PIL.Image.Image):
            image.load()  # of one that is opened only the pixels are kept, not its file
        return image, operator.index(label)


def _numbered(
    labels: Mapping[str, Sequence[Any]], names: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels as numbers, and the class names: those given, else the training labels, sorted."""
    if isinstance(names, Sequence) and not isinstance(names, str):
        return {part: np.asarray(found) for part, found in labels.items()}, tuple(names)
    classes = sorted(set(labels["train"]))
    places = {value: i for i, value in enumerate(classes)}
    for i, value in enumerate(labels.get("test", ())):
        if value not in places:
            raise DataError(f"row {i} of test has label {value!r}, which training lacks.")
    numbers = {part: np.asarray([places[y] for y in found]) for part, found in labels.items()}
    return numbers, tuple(map(str, classes))


def _images(parts: Mapping[str, Sequence[Any]], image_size: int | None) -> dict[str, np.ndarray]:
    """Images of each split as one array, of pictures or of arrays."""
    for part, values in parts.items():
        if not values:
            raise DataError(f"{part} has no examples.")
    if not any(isinstance(x, Mapping | PIL.Image.Image) for x in parts["train"]):
        if image_size is not None:
            raise ConfigError(f"image_size {image_size} is for pictures; these are arrays.")
        return {part: _stacked(values, part) for part, values in parts.items()}
    named = {
        part: [_picture(value, f"picture {i} of {part}") for i, value in enumerate(values)]
        for part, values in parts.items()
    }
    kind = pictures.common_kind(
        [picture for part in named.values() for picture in part], image_size
    )
    return {part: pictures.read(found, kind) for part, found in named.items()}


def _picture(value: Any, title: str) -> pictures.Picture:
    """Of Pillow's, or of Hugging Face's, encoded."""
    if isinstance(value, Mapping):
        found = value.get("bytes")
        source = functools.partial(io.BytesIO, found) if found else lambda: value["path"]
        return pictures.Picture(title, lambda: PIL.Image.open(source()))
    if not isinstance(value, PIL.Image.Image):
        raise DataError(f"{title} is none, but {value!r}; expected pictures throughout.")
    return pictures.Picture(title, lambda: value)


def _stacked(values: Sequence[Any], part: str) -> np.ndarray:
    arrays: list[np.ndarray] = []
    for i, value in enumerate(values):
        array = np.asarray(value)
        if array.ndim == 3 and any(kind.__name__ == "Tensor" for kind in type(value).__mro__):
            array = np.moveaxis(array, 0, -1)
        if arrays and (array.shape, array.dtype) != (arrays[0].shape, arrays[0].dtype):
            raise DataError(
                f"example {i} of {part} has shape {array.shape} and type {array.dtype}, the first "
                f"one {arrays[0].shape} and {arrays[0].dtype}; expected the same."
            )
        arrays.append(array)
    return np.stack(arrays)
