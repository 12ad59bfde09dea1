"""A user's own data, from files: a folder of pictures, or arrays in an `.npz`.

A folder holds `train/CLASS/PICTURE` and `test/CLASS/PICTURE`; or the first of these alone, or
`CLASS/PICTURE`, of which a share is kept for the test. Where the examples belong to clients by
nature (cameras, writers, hospitals), the training pictures are in `train/CLIENT/CLASS/PICTURE`.

An `.npz` has the arrays `train_images`, `train_labels`, `test_images` and `test_labels`, or
`images` and `labels` alone; and if there are any `class_names` (texts, by label) and the client of
each training example, `train_clients` or `clients` (numbers or texts).
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jfed.data import pictures
from jfed.data.examples import Labelled, assemble
from jfed.data.splits import Dataset, Split
from jfed.errors import ConfigError, DataError, DataNotFoundError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_JUNK = ("thumbs.db", "desktop.ini")  # which file managers leave behind


class _File(NamedTuple):
    """A file, its class and its client ("" where clients are not told)."""

    path: pathlib.Path
    label: str
    client: str


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
    return assemble(path.stem, train, test, names, test_share=test_share, seed=seed)


def _read_folder(
    path: pathlib.Path, image_size: int | None
) -> tuple[Labelled, Labelled | None, tuple[str, ...]]:
    parts = [path / part for part in ("train", "test")]
    there = [part.is_dir() for part in parts]
    if there == [False, True]:
        raise DataError(f"{str(path)!r} has test/ alone; expected train/ too.")
    listed = [_list(part) for part in parts if part.is_dir()] or [_list(path)]
    names = tuple(sorted({file.label for file in listed[0]}))
    every = [pictures.of_file(file.path) for part in listed for file in part]
    kind = pictures.common_kind(every, image_size)
    train, *test = (_read_files(part, names, kind) for part in listed)
    return train, test[0] if test else None, names


def _list(folder: pathlib.Path) -> list[_File]:
    """The pictures of `folder/CLASS` or `folder/CLIENT/CLASS`, in the order of their paths."""
    found = []
    for inner in _folders(folder):
        deeper = _folders(inner)
        for leaf in deeper or [inner]:
            paths = _files(leaf)
            if not paths:
                raise DataError(f"the folder {str(leaf)!r} has no pictures; expected some.")
            client = inner.name if deeper else ""
            found += [_File(path, leaf.name, client) for path in paths]
        if deeper and (stray := _files(inner)):
            raise DataError(f"{str(stray[0])!r} lies beside folders of pictures.")
    if not found:
        raise DataError(f"the folder {str(folder)!r} has no folders of pictures; expected classes.")
    if len({bool(file.client) for file in found}) > 1:
        odd = next(file for file in found if bool(file.client) != bool(found[0].client))
        raise DataError(
            f"{str(odd.path)!r} is in another depth than {str(found[0].path)!r}; expected CLASS or "
            "CLIENT/CLASS throughout."
        )
    return found


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.name.lower() in _JUNK:
            continue
        if path.suffix.lower() not in _SUFFIXES:
            raise DataError(f"{str(path)!r} is no picture; expected {', '.join(_SUFFIXES)}.")
        found.append(path)
    return found


def _read_files(files: Sequence[_File], names: Sequence[str], kind: pictures.Kind) -> Labelled:
    places = {name: i for i, name in enumerate(names)}
    for file in files:
        if file.label not in places:
            raise DataError(
                f"{str(file.path.parent)!r} is of a class that the training pictures lack; they "
                f"have {list(names)}."
            )
    images = pictures.read([pictures.of_file(file.path) for file in files], kind)
    labels = np.asarray([places[file.label] for file in files], np.int32)
    clients = np.asarray([file.client for file in files]) if files[0].client else None
    return Labelled(images, labels, clients)


_KEYS = ("images", "labels", "clients")


def _read_npz(path: pathlib.Path) -> tuple[Labelled, Labelled | None, tuple[str, ...]]:
    with pictures.reading(repr(str(path))), np.load(path, allow_pickle=False) as file:
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


def _arrays(path: pathlib.Path, arrays: Mapping[str, Any], part: str) -> Labelled:
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
    return Labelled(split.images, split.labels, clients)
