"""Downloading and preparing data sets with TFDS, without TensorFlow.

TFDS reads a prepared data set without TensorFlow, but its CIFAR and MNIST builders need TensorFlow
to prepare one: for opening and extracting files, and for encoding arrays as PNG. Here the same
builders, with the same names, versions, checksums and example order, read the official files with
the standard library and hand over PIL images. What they write is what TFDS itself would, so
`tfds.data_source(name, data_dir=...)` and `jfed.data.load` both find it.
"""

import contextlib
import gzip
import os
import pathlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from jfed.errors import DataError, DataNotFoundError, one_of

_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_OFFICIAL_FILES = {
    "cifar10": ("cifar-10-binary.tar.gz",),
    "cifar100": ("cifar-100-binary.tar.gz",),
    "fashion_mnist": _IDX_FILES,
    "mnist": _IDX_FILES,
}
PREPARED = tuple(_OFFICIAL_FILES)
"""The names of the data sets that `prepare` prepares and `load` reads from files."""

_Example = tuple[int, dict[str, Any]]


def data_folder(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns the TFDS folder: as given, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    archive: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Prepares a data set for `load`; one that is prepared already stays as it is.

    Args:
      name: `cifar10`, `cifar100`, `fashion_mnist` or `mnist`.
      data_dir: the TFDS folder to write to; by default the environment's `TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.
      archive: where the official files lie if they are downloaded already: the folder that holds
        them, or for CIFAR the `.tar.gz` itself. By default TFDS downloads them to
        `data_dir/downloads` and verifies their checksums.

    Returns:
      The folder of the prepared data set, such as `data_dir/cifar10/3.0.2`.

    Raises:
      ConfigError: for an unknown name.
      DataNotFoundError: if `archive` lacks an official file.
      DataError: if a file cannot be downloaded, or is truncated or another one than its name says.
        Nothing half prepared stays behind.
    """
    one_of("data set to prepare", name, PREPARED)
    folder = data_folder(data_dir)
    files = None if archive is None else _find(name, pathlib.Path(archive).expanduser())
    builder = _builder(name, folder, files)
    try:
        builder.download_and_prepare(file_format="array_record")
    finally:
        # TFDS removes its half-written version folder, but not the empty one around it.
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
    return pathlib.Path(builder.data_path)


def _find(name: str, archive: pathlib.Path) -> list[pathlib.Path]:
    """Returns the paths of a data set's official files in, or at, `archive`."""
    names = _OFFICIAL_FILES[name]
    if len(names) == 1 and not archive.is_dir():
        paths = [archive]
    else:
        paths = [archive / file for file in names]
    for path in paths:
        if not path.is_file():
            raise DataNotFoundError(f"there is no file {path}; {name} needs {', '.join(names)}.")
    return paths


def _builder(name: str, folder: pathlib.Path, files: Sequence[pathlib.Path] | None) -> Any:
    """Returns TFDS's builder of `name`, made to read `files` (downloaded if None) by itself."""
    import tensorflow_datasets as tfds  # takes 0.6 s, which `import jfed` need not wait for

    parent: Any = tfds.builder_cls(name)
    splits = _cifar_splits if name.startswith("cifar") else _mnist_splits

    # Unregistered, so that TFDS keeps finding its own class by this name.
    class Builder(parent, skip_registration=True):  # type: ignore[call-arg]
        def _split_generators(self, manager: Any) -> dict[str, Iterator[_Example]]:
            return splits(self, files or _download(manager, _urls(self)))

        def _generate_examples(self) -> None:
            raise NotImplementedError("_split_generators already returns the examples")

    # TFDS finds the checksums, and records where the data set comes from, by name and module.
    # The module is set only now because TFDS lists the classes of each module at their creation.
    Builder.name = parent.name
    Builder.__module__ = parent.__module__
    return Builder(data_dir=folder)


def _urls(builder: Any) -> list[str]:
    """Returns TFDS's own addresses of the official files, by which it knows their checksums."""
    if hasattr(builder, "_cifar_info"):
        return [builder._cifar_info.url]
    return [builder.URL + file for file in _IDX_FILES]


def _download(manager: Any, urls: list[str]) -> list[pathlib.Path]:
    try:
        return [pathlib.Path(path) for path in manager.download(urls)]
    # The connection, the server and the checksum each fail with an exception of their own.
    except Exception as error:
        raise DataError(
            f"cannot download {', '.join(urls)} ({type(error).__name__}: {error}). "
            "Download by other means, then give the folder of the files as `archive`."
        ) from error


@contextlib.contextmanager
def _official(path: pathlib.Path) -> Iterator[None]:
    """Turns what the standard library raises for a damaged file into a DataError."""
    try:
        yield
    except (OSError, EOFError, LookupError, ValueError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} is truncated or not the official file ({error}).") from error


def _cifar_splits(builder: Any, files: Sequence[pathlib.Path]) -> dict[str, Iterator[_Example]]:
    """Reads the binary version of CIFAR (https://www.cs.toronto.edu/~kriz/cifar.html)."""
    info = builder._cifar_info
    (archive,) = files
    with _official(archive):
        # Read in memory: nothing is extracted, so an archive cannot write outside its folder.
        with tarfile.open(archive) as tar:
            members = {m.name: file.read() for m in tar if (file := tar.extractfile(m))}
        for key, file in zip(info.label_keys, info.label_files, strict=True):
            builder.info.features[key].names = members[info.prefix + file].decode().split()
        records = {
            split: [_cifar_records(members[info.prefix + file], builder) for file in names]
            for split, names in (("train", info.train_files), ("test", info.test_files))
        }
    return {
        split: _cifar_examples(split, np.concatenate(batches), info.label_keys)
        for split, batches in records.items()
    }


def _cifar_records(raw: bytes, builder: Any) -> np.ndarray:
    """Returns one file's records `[N, labels + 3072]`: the labels, then the planes R, G and B."""
    keys = builder._cifar_info.label_keys
    records = np.frombuffer(raw, np.uint8).reshape(-1, len(keys) + 3 * 32 * 32)
    for column, key in enumerate(keys):
        classes = builder.info.features[key].num_classes
        if (records[:, column] >= classes).any():
            raise ValueError(f"{key} {records[:, column].max()} is outside [0, {classes})")
    return records


def _cifar_examples(split: str, records: np.ndarray, keys: list[str]) -> Iterator[_Example]:
    for index, record in enumerate(records):
        image = record[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
        yield (
            index,
            {
                **dict(zip(keys, record[: len(keys)], strict=True)),
                "id": f"{split}_{index:05d}",
                "image": PIL.Image.fromarray(np.ascontiguousarray(image)),
            },
        )


def _mnist_splits(builder: Any, files: Sequence[pathlib.Path]) -> dict[str, Iterator[_Example]]:
    """Reads MNIST and the data sets in its format, as gzipped IDX files."""
    classes = builder.info.features["label"].num_classes
    splits = {}
    for split, (images_file, labels_file) in {"train": files[:2], "test": files[2:]}.items():
        images = _read_idx(images_file, (28, 28))
        labels = _read_idx(labels_file, ())
        if len(images) != len(labels) or (labels >= classes).any():
            raise DataError(
                f"{images_file} holds {len(images)} images, {labels_file} {len(labels)} labels up "
                f"to {labels.max(initial=0)}; expected equal counts and labels below {classes}."
            )
        splits[split] = _mnist_examples(images, labels)
    return splits


def _read_idx(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the items `[N, *shape]` uint8 of a gzipped IDX file.

    The format (LeCun et al., http://yann.lecun.com/exdb/mnist): two zero bytes, the type (8 for
    uint8), the rank, each dimension as a big-endian int32, the values in C order.
    """
    with _official(path):
        raw = gzip.decompress(path.read_bytes())
        rank = 1 + len(shape)
        if raw[:4] != bytes([0, 0, 8, rank]):
            raise ValueError(f"the header is {raw[:4].hex()}, expected 000008{rank:02x}")
        dimensions = np.frombuffer(raw, ">i4", rank, offset=4)
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
        return values.reshape(dimensions[0], *shape)


def _mnist_examples(images: np.ndarray, labels: np.ndarray) -> Iterator[_Example]:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": PIL.Image.fromarray(image), "label": label}
