"""A user's own data, from files: a folder of pictures, or arrays in an `.npz`.

A folder holds `train/CLASS/PICTURE` and `test/CLASS/PICTURE`, or `CLASS/PICTURE` alone, of which a
share is kept for the test. Where the examples belong to clients by nature (cameras, writers,
hospitals), the training pictures are in `train/CLIENT/CLASS/PICTURE`.

An `.npz` has the arrays `train_images`, `train_labels`, `test_images` and `test_labels`, or
`images` and `labels` alone; and if there are any `class_names` (texts, by label) and the client of
each training example, `train_clients` or `clients` (numbers or texts).
"""

import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from jfed.data.preprocessing import ModelInputs
from jfed.data.splits import Dataset, Split
from jfed.errors import ConfigError, DataError, DataNotFoundError
from jfed.seeds import generator

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_JUNK = ("thumbs.db", "desktop.ini")  # which file managers leave behind
# What a picture is read as, by Pillow's mode.
_MODES = {"1": "L", "L": "L", "LA": "L", "F": "F"}
_MODES |= dict.fromkeys(("I", "I;16", "I;16B", "I;16L"), "I;16")


class _Picture(NamedTuple):
    """A file, its class and its client ("" where clients are not told)."""

    path: pathlib.Path
    label: str
    client: str


class Arrays(NamedTuple):
    """Examples as read; `clients` are names `[N]`, or None where they are not told."""

    images: np.ndarray
    labels: np.ndarray
    clients: np.ndarray | None = None


def is_path(name: str) -> bool:
    """Whether a data set is given as a path, not by its name."""
    path = pathlib.Path(name)
    return path.suffix == ".npz" or "/" in name or os.sep in name or path.is_dir()


def load_path(name: str, *, image_size: int | None, test_share: float | None, seed: int) -> Dataset:
    """Reads a folder of pictures or an `.npz`.

    Args:
      name: the path; its last part names the data set.
      image_size: height and width that pictures are resized to; by default they stay as they are.
      test_share: of each class, kept for the test where the data have no test examples.
      seed: of their choice.

    Raises:
      DataNotFoundError: there is no such folder or file.
      DataError: naming the file, folder, key or row that is damaged or does not fit.
      ConfigError: a share is missing, or given where there are test examples.
    """
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        raise DataNotFoundError(f"there is no data set at {str(path)!r}.")
    if path.is_dir():
        train, test, names = _read_folder(path, image_size)
    else:
        if image_size is not None:
            raise ConfigError(f"image_size {image_size} is for pictures; {path.name} has arrays.")
        train, test, names = _read_npz(path)
    if (test is None) != (test_share is not None):
        what = "no test examples: set test_share" if test is None else "test examples"
        raise ConfigError(f"{str(path)!r} has {what}, got test_share {test_share!r}.")
    if test is None:
        assert test_share is not None
        train, test = _divide(train, names, test_share, seed)
    _check_classes(train.labels, test.labels, names)
    clients, client_names = None, tuple[str, ...]()
    if train.clients is not None:
        found, clients = np.unique(train.clients, return_inverse=True)
        client_names = tuple(map(str, found))
    splits = Split(train.images, train.labels), Split(test.images, test.labels)
    return Dataset(path.stem, *splits, names, clients, client_names)


def _rows(split: Split, rows: np.ndarray) -> Split:
    return Split(split.images[rows], split.labels[rows])


def subset(dataset: Dataset, train: np.ndarray, test: np.ndarray) -> Dataset:
    """The data set with some of its examples; clients that are left without one are gone."""
    clients, names = None, tuple[str, ...]()
    if dataset.clients is not None:
        there, clients = np.unique(dataset.clients[train], return_inverse=True)
        names = tuple(dataset.client_names[i] for i in there)
    return Dataset(
        dataset.name,
        _rows(dataset.train, train),
        _rows(dataset.test, test),
        dataset.class_names,
        clients,
        names,
    )


def _read_folder(
    path: pathlib.Path, image_size: int | None
) -> tuple[Arrays, Arrays | None, tuple[str, ...]]:
    parts = [path / part for part in ("train", "test")]
    there = [part.is_dir() for part in parts]
    if any(there) and not all(there):
        raise DataError(f"{str(path)!r} has {parts[there.index(True)].name}/ alone; expected both.")
    listed = [_list(part) for part in parts] if all(there) else [_list(path)]
    names = tuple(sorted({picture.label for picture in listed[0]}))
    kind = _kind([picture.path for part in listed for picture in part], image_size)
    train, *test = (_decode(part, names, kind) for part in listed)
    return train, test[0] if test else None, names


def _list(folder: pathlib.Path) -> list[_Picture]:
    """The pictures of `folder/CLASS` or `folder/CLIENT/CLASS`, in the order of their paths."""
    found = []
    for inner in _folders(folder):
        deeper = _folders(inner)
        for leaf in deeper or [inner]:
            pictures = _pictures(leaf)
            if not pictures:
                raise DataError(f"the folder {str(leaf)!r} has no pictures; expected some.")
            client = inner.name if deeper else ""
            found += [_Picture(path, leaf.name, client) for path in pictures]
        if deeper and (stray := _pictures(inner)):
            raise DataError(f"{str(stray[0])!r} lies beside folders of pictures.")
    if not found:
        raise DataError(f"the folder {str(folder)!r} has no folders of pictures; expected classes.")
    if len({bool(picture.client) for picture in found}) > 1:
        odd = next(p for p in found if bool(p.client) != bool(found[0].client))
        raise DataError(
            f"{str(odd.path)!r} is in another depth than {str(found[0].path)!r}; expected CLASS or "
            "CLIENT/CLASS throughout."
        )
    return found


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.name.lower() in _JUNK:
            continue
        if path.suffix.lower() not in _SUFFIXES:
            raise DataError(f"{str(path)!r} is no picture; expected {', '.join(_SUFFIXES)}.")
        found.append(path)
    return found


class _Kind(NamedTuple):
    """What all pictures are read as: Pillow's mode, and width and height."""

    mode: str
    size: tuple[int, int]


def _kind(paths: Sequence[pathlib.Path], image_size: int | None) -> _Kind:
    """What pictures have in common; grey ones among coloured ones are read as coloured."""
    heads = _each(_head, paths)
    modes = {mode for mode, _ in heads}
    if len(modes) > 1 and modes != {"L", "RGB"}:
        other = next(i for i, (mode, _) in enumerate(heads) if mode != heads[0][0])
        raise DataError(
            f"{str(paths[0])!r} is read as {heads[0][0]} and {str(paths[other])!r} as "
            f"{heads[other][0]}; expected one kind of pixels."
        )
    mode = "RGB" if "RGB" in modes else modes.pop()
    if image_size is not None:
        return _Kind(mode, (image_size, image_size))
    for path, (_, size) in zip(paths, heads, strict=True):
        if size != heads[0][1]:
            raise DataError(
                f"{str(paths[0])!r} has {heads[0][1]} pixels, {str(path)!r} {size}; expected the "
                "same, or an image_size that pictures are resized to."
            )
    return _Kind(mode, heads[0][1])


def _head(path: pathlib.Path) -> tuple[str, tuple[int, int]]:
    """What a picture is read as, and its width and height; its pixels are not read yet."""
    with _opened(path) as picture:
        return _MODES.get(picture.mode, "RGB"), picture.size


def _opened(path: pathlib.Path) -> PIL.Image.Image:
    with _reading(path):
        return PIL.Image.open(path)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Raises DataError for whatever the parser of a damaged file raises."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{str(path)!r} cannot be read ({why}).") from error


def _decode(pictures: Sequence[_Picture], names: Sequence[str], kind: _Kind) -> Arrays:
    places = {name: i for i, name in enumerate(names)}
    for picture in pictures:
        if picture.label not in places:
            raise DataError(
                f"{str(picture.path.parent)!r} is of a class that the training pictures lack; they "
                f"have {list(names)}."
            )
    images = np.stack(_each(lambda picture: _pixels(picture.path, kind), pictures))
    labels = np.asarray([places[picture.label] for picture in pictures], np.int32)
    clients = np.asarray([p.client for p in pictures]) if pictures[0].client else None
    return Arrays(images, labels, clients)


def read_pictures(paths: Sequence[pathlib.Path], inputs: ModelInputs) -> np.ndarray:
    """Reads pictures as a model takes them, `[N, H, W, C]`, resized.

    Raises:
      ConfigError: the model takes no pictures.
      DataError: a file that is not there, no picture or damaged.
    """
    modes = {("uint8", 1): "L", ("uint8", 3): "RGB", ("uint16", 1): "I;16", ("float32", 1): "F"}
    mode = modes.get((inputs.pixels, inputs.shape[-1]))
    if mode is None or len(inputs.shape) != 3:
        raise ConfigError(f"the model takes {inputs.pixels} of shape {inputs.shape}, no pictures.")
    kind = _Kind(mode, (inputs.shape[1], inputs.shape[0]))
    return np.stack(_each(lambda path: _pixels(path, kind), paths))


def _pixels(path: pathlib.Path, kind: _Kind) -> np.ndarray:
    """The pixels of a picture, `[H, W, C]`, resized where it has another size."""
    with _opened(path) as opened, _reading(path):
        image = opened if opened.mode.startswith("I") else opened.convert(kind.mode)
        if image.size != kind.size:
            image = image.resize(kind.size, PIL.Image.Resampling.BILINEAR)
        found = np.asarray(image)
    if (kind.mode == "I;16") != opened.mode.startswith("I"):
        raise DataError(
            f"{str(path)!r} has pixels of Pillow's mode {opened.mode}, not {kind.mode}."
        )
    if kind.mode == "I;16":
        if found.min() < 0 or found.max() > np.iinfo(np.uint16).max:
            raise DataError(f"{str(path)!r} has pixels that do not fit 16 bits.")
        found = found.astype(np.uint16)
    return found.reshape(*found.shape[:2], -1)


def _each(function: Any, items: Sequence[Any]) -> list[Any]:
    """The function of each item, on several threads; decoding leaves the interpreter free."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))


_KEYS = ("images", "labels", "clients")


def _read_npz(path: pathlib.Path) -> tuple[Arrays, Arrays | None, tuple[str, ...]]:
    with _reading(path), np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    known = {f"{part}{key}" for part in ("", "train_", "test_") for key in _KEYS} | {"class_names"}
    if unknown := sorted(set(arrays) - known):
        raise DataError(f"{str(path)!r} has the key {unknown[0]!r}; expected {sorted(known)}.")
    is_divided = "train_images" in arrays
    train = _arrays(path, arrays, "train_" if is_divided else "")
    test = _arrays(path, arrays, "test_") if is_divided else None
    if "class_names" in arrays:
        return train, test, tuple(map(str, arrays["class_names"].tolist()))
    return train, test, tuple(map(str, range(int(train.labels.max()) + 1)))


def _arrays(path: pathlib.Path, arrays: Mapping[str, Any], part: str) -> Arrays:
    for key in ("images", "labels"):
        if part + key not in arrays:
            raise DataError(f"{str(path)!r} has no {part + key!r}; it has {sorted(arrays)}.")
    split = Split(arrays[f"{part}images"], arrays[f"{part}labels"])  # which checks them
    clients = arrays.get(f"{part}clients")
    if clients is not None and clients.shape != split.labels.shape:
        raise DataError(
            f"{part}clients have shape {clients.shape}, labels {split.labels.shape}; expected the "
            "same."
        )
    return Arrays(split.images, split.labels, clients)


def _divide(train: Arrays, names: Sequence[str], share: float, seed: int) -> tuple[Arrays, Arrays]:
    """Keeps a share of each class for the test, at least one example of each for training."""
    rng, chosen = generator(seed, "test share"), []
    for label in range(len(names)):
        rows = rng.permutation(np.flatnonzero(train.labels == label))
        chosen += rows[: min(round(share * len(rows)), len(rows) - 1)].tolist()
    if not chosen:
        raise ConfigError(f"test_share {share!r} keeps none of {len(train.labels)} examples.")
    is_test = np.zeros(len(train.labels), bool)
    is_test[chosen] = True
    train, test = (
        Arrays(*(None if column is None else column[rows] for column in train))  # type: ignore[arg-type]
        for rows in (~is_test, is_test)
    )
    return train, test


def _check_classes(train: np.ndarray, test: np.ndarray, names: Sequence[str]) -> None:
    """DataError for a class that is tested but not trained."""
    for label in sorted(set(test.tolist()) - set(train.tolist())):
        name = repr(names[label]) if 0 <= label < len(names) else "without a name"
        raise DataError(f"label {label} ({name}) is in the test, but not in training.")
