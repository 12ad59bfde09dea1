"""Pictures read with Pillow: what they have in common, their pixels, resized where asked."""

import concurrent.futures
import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import PIL.Image

from jfed.data.preprocessing import ModelInputs
from jfed.errors import ConfigError, DataError, check_integer

_A = TypeVar("_A")
_B = TypeVar("_B")

# What a picture is read as, by Pillow's mode.
_MODES = {"1": "L", "L": "L", "LA": "L", "F": "F"}
_MODES |= dict.fromkeys(("I", "I;16", "I;16B", "I;16L"), "I;16")


class Picture(NamedTuple):
    """A picture that is not read yet.

    Attributes:
      title: what messages call it.
      open: reads its head; called anew for each reading.
    """

    title: str
    open: Callable[[], PIL.Image.Image]


class Kind(NamedTuple):
    """What all pictures of a data set are read as: Pillow's mode, and width and height."""

    mode: str
    size: tuple[int, int]


def of_file(path: pathlib.Path) -> Picture:
    """The picture in a file."""
    return Picture(repr(str(path)), lambda: PIL.Image.open(path))


def common_kind(pictures: Sequence[Picture], image_size: int | None) -> Kind:
    """What pictures have in common; grey ones among coloured ones are read as coloured.

    Args:
      pictures: one or more; their heads alone are read.
      image_size: height and width that they are resized to.

    Raises:
      ConfigError: an image_size below 1.
      DataError: one is damaged, or they differ in pixels, or in size where none is given.
    """
    if image_size is not None:
        check_integer("image_size", image_size, least=1)
    heads = _each(_head, pictures)
    modes = {mode for mode, _ in heads}
    if len(modes) > 1 and modes != {"L", "RGB"}:
        other = next(i for i, (mode, _) in enumerate(heads) if mode != heads[0][0])
        raise DataError(
            f"{pictures[0].title} is read as {heads[0][0]} and {pictures[other].title} as "
            f"{heads[other][0]}; expected one kind of pixels."
        )
    mode = "RGB" if "RGB" in modes else modes.pop()
    if image_size is not None:
        return Kind(mode, (image_size, image_size))
    for picture, (_, size) in zip(pictures, heads, strict=True):
        if size != heads[0][1]:
            raise DataError(
                f"{pictures[0].title} has {heads[0][1]} pixels, {picture.title} {size}; expected "
                "the same, or an image_size that pictures are resized to."
            )
    return Kind(mode, heads[0][1])


def model_kind(inputs: ModelInputs) -> Kind:
    """What a model takes pictures as; ConfigError if it takes none."""
    modes = {("uint8", 1): "L", ("uint8", 3): "RGB", ("uint16", 1): "I;16", ("float32", 1): "F"}
    mode = modes.get((inputs.pixels, inputs.shape[-1]))
    if mode is None or len(inputs.shape) != 3:
        raise ConfigError(f"the model takes {inputs.pixels} of shape {inputs.shape}, no pictures.")
    return Kind(mode, (inputs.shape[1], inputs.shape[0]))


def read(pictures: Sequence[Picture], kind: Kind) -> np.ndarray:
    """The pixels of pictures, `[N, H, W, C]`; DataError names one that is damaged or another kind.

    Pictures of another size are resized.
    """
    return np.stack(_each(lambda picture: _pixels(picture, kind), pictures))


def _head(picture: Picture) -> tuple[str, tuple[int, int]]:
    """What a picture is read as, and its width and height; its pixels are not read yet."""
    with reading(picture.title), picture.open() as opened:
        return _MODES.get(opened.mode, "RGB"), opened.size


def _pixels(picture: Picture, kind: Kind) -> np.ndarray:
    """The pixels of a picture, `[H, W, C]`."""
    with reading(picture.title), picture.open() as opened:
        image = opened if opened.mode.startswith("I") else opened.convert(kind.mode)
        if image.size != kind.size:
            image = image.resize(kind.size, PIL.Image.Resampling.BILINEAR)
        found, mode = np.asarray(image), opened.mode
    if (kind.mode == "I;16") != mode.startswith("I"):
        raise DataError(f"{picture.title} has pixels of Pillow's mode {mode}, not {kind.mode}.")
    if kind.mode == "I;16":
        if found.min() < 0 or found.max() > np.iinfo(np.uint16).max:
            raise DataError(f"{picture.title} has pixels that do not fit 16 bits.")
        found = found.astype(np.uint16)
    return found.reshape(*found.shape[:2], -1)


@contextlib.contextmanager
def reading(title: str) -> Iterator[None]:
    """Raises DataError for whatever the parser of a damaged file raises."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{title} cannot be read ({why}).") from error


def _each(function: Callable[[_A], _B], items: Sequence[_A]) -> list[_B]:
    """The function of each item, on several threads; decoding leaves the interpreter free."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))
