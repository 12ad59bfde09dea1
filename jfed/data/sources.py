"""Image classification data sets as NumPy arrays in memory."""

import dataclasses
import importlib.util
import io
import os
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from jfed.data import examples, own
from jfed.data.preparation import PREPARED, data_folder
from jfed.data.splits import Dataset, Split
from jfed.errors import (
    ConfigError,
    DataError,
    DataNotFoundError,
    JfedError,
    check_integer,
    one_of,
)
from jfed.seeds import generator

_SYNTHETIC_EXAMPLES = {"train": 2000, "test": 500}
_DIGITS_ORDER = pathlib.Path(__file__).parent / "digits_split.npy"  # training examples first


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data set, and how much of it.

    `cifar10`, `cifar100`, `fashion_mnist` and `mnist` are read from where `jfed.data.prepare` or
    TFDS itself put them, without TensorFlow. `digits` (scikit-learn, 8x8x1, a fixed stratified
    80/20 split) and `synthetic` (32x32x3, generated from the seed) need no files. A path is of data
    of the user's own, a folder of pictures or an `.npz`, see `jfed.data.own`.

    Attributes:
      name: `cifar10`, `cifar100`, `fashion_mnist`, `mnist`, `digits` or `synthetic`; or a path.
      data_dir: the TFDS folder; by default the environment's `TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.
      image_size: the wanted height and width in pixels; by default images stay as they are. It
        divides the data set's own, and blocks of pixels are averaged; pictures of the user's own
        are resized, whatever they are.
      train_examples: how many random training examples to keep; by default all.
      test_examples: the same for the test split. `synthetic` generates as many as are asked for,
        by default 2000 and 500.
      test_share: of each class of the user's own data, kept for the test where there is no test
        split.
    """

    name: str = "digits"
    data_dir: str | os.PathLike[str] | None = None
    image_size: int | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    test_share: float | None = None

    def __post_init__(self) -> None:
        is_own = isinstance(self.name, str) and own.is_path(self.name)
        if not is_own:
            one_of("data set (nor is it a path)", self.name, (*PREPARED, "digits", "synthetic"))
        if self.test_share is not None:
            if not is_own:
                raise ConfigError(f"{self.name!r} has test examples; leave test_share out.")
            examples.check_test_share(self.test_share)
        for name in ("image_size", "train_examples", "test_examples"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)


def load(name: str | DataConfig, *, seed: int = 0, **settings: Any) -> Dataset:
    """Loads a data set into memory.

    Args:
      name: of the data set, or all of its settings.
      seed: of the random subsets, and of the synthetic images.
      **settings: the other fields of `DataConfig`, such as `data_dir` and `train_examples`.

    Returns:
      The data set; equal arguments give equal arrays.

    Raises:
      ConfigError: for an unknown name, or a size that cannot be had.
      DataNotFoundError: if the data set is not prepared in `data_dir`.
      DataError: if the prepared files cannot be read.
    """
    if isinstance(name, DataConfig):
        config = dataclasses.replace(name, **settings)
    else:
        config = DataConfig(name, **settings)
    wanted = {"train": config.train_examples, "test": config.test_examples}
    if config.name == "synthetic":
        dataset = _synthetic(wanted, seed)
    elif config.name == "digits":
        dataset = _digits(wanted, seed)
    elif own.is_path(config.name):
        dataset = own.load_path(
            config.name, image_size=config.image_size, test_share=config.test_share, seed=seed
        )
        if config.train_examples is None and config.test_examples is None:
            return dataset
        sizes = {"train": len(dataset.train), "test": len(dataset.test)}
        return examples.subset(
            dataset, **{name: _subset(name, sizes[name], wanted[name], seed) for name in sizes}
        )
    else:
        dataset = _prepared(config.name, data_folder(config.data_dir), wanted, seed)
    if config.image_size is None:
        return dataset
    return dataclasses.replace(
        dataset,
        train=_shrink(dataset.train, config.image_size),
        test=_shrink(dataset.test, config.image_size),
    )


def _subset(split: str, available: int, wanted: int | None, seed: int) -> np.ndarray:
    """Returns the sorted indices `[wanted]` of a random subset of one split."""
    if wanted is None:
        return np.arange(available)
    if wanted > available:
        raise ConfigError(f"{split}_examples is {wanted}; there are only {available}.")
    rng = generator(seed, f"subset of {split}")
    return np.sort(rng.choice(available, wanted, replace=False))


def _shrink(split: Split, size: int) -> Split:
    """Averages square blocks of pixels, so that the images become `size` pixels high and wide."""
    count, height, width, channels = split.images.shape
    if height != width or height % size:
        raise ConfigError(
            f"image_size is {size}; expected a divisor of {height} (images are {height} x {width})."
        )
    factor = height // size
    blocks = split.images.reshape(count, size, factor, size, factor, channels)
    total = blocks.sum(axis=(2, 4), dtype=np.uint32)
    # Adding half the divisor rounds to nearest without a float copy of every image.
    mean = (total + factor**2 // 2) // factor**2
    return Split(mean.astype(np.uint8), split.labels)


def _prepared(name: str, folder: pathlib.Path, wanted: dict[str, int | None], seed: int) -> Dataset:
    """Reads a data set that TFDS prepared in `folder`."""
    import tensorflow_datasets as tfds  # takes 0.6 s, which `synthetic` need not wait for

    try:
        builder = tfds.builder(name, data_dir=folder)
        if not builder.info.splits:
            raise DataNotFoundError(
                f"{name} is not prepared: looked for {builder.data_path}. Either prepare it, with "
                f"`jfed prepare {name} --data-dir {folder}` or in Python with "
                f"jfed.data.prepare({name!r}, data_dir={str(folder)!r}); or point data_dir or the "
                "environment's TFDS_DATA_DIR to the folder that holds it."
            )
        splits = {}
        for split, count in wanted.items():
            # Decoding here takes half the time of TFDS's own, which also asks for OpenCV.
            source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            indices = _subset(split, len(source), count, seed)
            splits[split] = _decode(source, indices, builder.info.features["image"].shape)
        class_names = tuple(builder.info.features["label"].names)
    except JfedError:
        raise
    # A damaged file surfaces as whatever its parser raises: json, protobuf, array_record or PIL.
    except Exception as error:
        raise DataError(
            f"{name} in {folder / name} cannot be read ({type(error).__name__}: {error}). "
            "Delete that folder and prepare the data set again."
        ) from error
    return Dataset(name, splits["train"], splits["test"], class_names)


def _decode(source: Any, indices: np.ndarray, shape: tuple[int, int, int]) -> Split:
    """Decodes the PNG images of the given examples."""
    images = np.empty((len(indices), *shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for start in range(0, len(indices), 1000):  # reading one by one is slower by a fifth
        examples = source.__getitems__(indices[start : start + 1000].tolist())
        for row, example in enumerate(examples, start):
            image = PIL.Image.open(io.BytesIO(example["image"]), formats=("PNG",))
            images[row] = np.asarray(image).reshape(shape)  # a grey image decodes to [H, W]
            labels[row] = example["label"]
    return Split(images, labels)


def _digits(wanted: dict[str, int | None], seed: int) -> Dataset:
    """Returns the 1797 handwritten digits of 8x8 pixels that come with scikit-learn.

    Split as its `train_test_split(..., test_size=0.2, stratify=labels, random_state=0)` does, whose
    order is in a file beside this one: importing scikit-learn takes seconds.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None  # it is a dependency
    file = pathlib.Path(package.origin or "").parent / "datasets/data/digits.csv.gz"
    table = np.loadtxt(file, int, delimiter=",")
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels, order = table[:, -1].astype(np.int32), np.load(_DIGITS_ORDER).astype(np.int64)
    splits = {}
    for part, (split, count) in zip((order[:-360], order[-360:]), wanted.items(), strict=True):
        rows = part[_subset(split, len(part), count, seed)]
        splits[split] = Split(images[rows], labels[rows])
    return Dataset("digits", splits["train"], splits["test"], tuple("0123456789"))


def _synthetic(wanted: dict[str, int | None], seed: int) -> Dataset:
    """Generates one random pattern per class, shifted at random and fainter than the noise.

    The shifts of up to 8 pixels keep a linear classifier near 70 % test accuracy, where a matched
    filter that tries all of them makes no mistake.
    """
    rng = generator(seed, "synthetic patterns")
    patterns = rng.standard_normal((10, 8, 8, 3), dtype=np.float32)
    patterns = patterns.repeat(4, axis=1).repeat(4, axis=2)
    splits = {}
    for split, count in wanted.items():
        # A stream of its own for each, so that the size of one does not change the other.
        rng = generator(seed, f"synthetic {split}")
        splits[split] = _draw(patterns, count or _SYNTHETIC_EXAMPLES[split], rng)
    names = tuple(f"pattern {k}" for k in range(10))
    return Dataset("synthetic", splits["train"], splits["test"], names)


def _draw(patterns: np.ndarray, count: int, rng: np.random.Generator) -> Split:
    """Draws `count` noisy, cyclically shifted copies of `patterns` `[classes, H, W, C]`."""
    classes, height, width, _ = patterns.shape
    labels = rng.permutation(np.arange(count, dtype=np.int32) % classes)
    rows = (np.arange(height) + rng.integers(-8, 9, (count, 1))) % height
    columns = (np.arange(width) + rng.integers(-8, 9, (count, 1))) % width
    clean = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
    images = 127.5 + 20 * clean + 60 * rng.standard_normal(clean.shape, dtype=np.float32)
    return Split(np.clip(np.rint(images), 0, 255).astype(np.uint8), labels)
