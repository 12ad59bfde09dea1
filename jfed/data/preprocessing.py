"""From images as they are stored to what a model sees: gathered, standardised, augmented."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jfed.errors import check_integer, check_type
from jfed.models.losses import Batch

AnyArray = np.ndarray | Array


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, on the device.

    Attributes:
      pad: zeros (the mean colour) around an image before a random crop of its old size; 0 for no
        crop.
      flip: mirror half of the images left to right.
    """

    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        check_integer("augmentation pad", self.pad, least=0)
        check_type("flip", self.flip, bool)

    def __bool__(self) -> bool:
        return bool(self.pad or self.flip)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays of one shape, each a flat row.

    An accelerator pads the last axis of an array, and of `[N, 32, 32, 3]` bytes its programs write
    a copy of their own at each call, in which that axis is another one; rows they take as they are.

    Attributes:
      flat: `[N, size]`.
      shape: of each.
    """

    flat: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, chosen: Int[AnyArray, " B"]) -> Array:
        """`[B, *shape]`, the chosen ones."""
        return self.flat[chosen].reshape(-1, *self.shape)


def in_rows(arrays: Shaped[AnyArray, "N ..."]) -> Rows:
    """`[N, *shape]` arrays as rows."""
    return Rows(arrays.reshape(len(arrays), -1), arrays.shape[1:])


class Images(NamedTuple):
    """A set of examples.

    Attributes:
      pixels: `[N, H, W, C]` uint8, uint16 or float32; on the devices, as rows.
      labels: `[N]` int32.
      mean: `[C]` of each channel, in units of the pixels.
      std: `[C]` likewise.
    """

    pixels: Rows | AnyArray
    labels: Int[Array, " N"]
    mean: Float[Array, " C"]
    std: Float[Array, " C"]


class ModelInputs(NamedTuple):
    """What a trained model takes, and what it tells.

    Attributes:
      shape: of an image, `[H, W, C]`.
      mean: `[C]` of each channel over the training images, in units of the pixels.
      std: `[C]` likewise.
      class_names: of each logit.
      pixels: the type of the pixels, such as "uint8".
    """

    shape: tuple[int, ...]
    mean: Float[np.ndarray, " C"]
    std: Float[np.ndarray, " C"]
    class_names: tuple[str, ...]
    pixels: str = "uint8"

    def standardise(self, pixels: Shaped[np.ndarray, "N ..."]) -> Float[np.ndarray, "N ..."]:
        """Images as the model takes them, float32."""
        return normalise(np.asarray(pixels), self.mean, self.std)


def normalise(
    pixels: Shaped[AnyArray, "*N C"], mean: Float[AnyArray, " C"], std: Float[AnyArray, " C"]
) -> Any:
    """Float32 images whose channels have mean 0 and deviation 1, of NumPy as of JAX."""
    along = (1,) * (pixels.ndim - 1) + (-1,)
    return (pixels.astype(np.float32) - mean.reshape(along)) / std.reshape(along)


def gather(
    images: Images,
    examples: Int[Array, " B"],
    mask: Float[Array, " B"],
    augmentation: Augmentation | None = None,
    key: Array | None = None,
) -> Batch:
    """The batch of the given examples: standardised float32 images, augmented if a key is given.

    Args:
      images: all of them.
      examples: which are in the batch.
      mask: 1 for those that count, 0 for padding.
      augmentation: what to do to them with the key.
      key: consumed.
    """
    x = normalise(images.pixels[examples], images.mean, images.std)
    if augmentation and key is not None:
        x = augment(x, augmentation, key)
    return Batch(x, images.labels[examples], mask)


def augment(
    x: Float[Array, "B H W C"], augmentation: Augmentation, key: Array
) -> Float[Array, "B H W C"]:
    """Standardised images, cropped and mirrored at random; the key is consumed."""
    crop_key, flip_key = jax.random.split(key)
    if augmentation.pad:
        x = _random_crop(x, augmentation.pad, crop_key)
    if augmentation.flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(x.shape[0], 1, 1, 1))
        x = jnp.where(mirrored, x[:, :, ::-1], x)
    return x


def channel_moments(
    images: Shaped[np.ndarray, "N ... C"],
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Mean and standard deviation of each channel over all images, in units of the pixels.

    The deviation is at least 1e-3 of integers, and of floats at least 1e-6 times the largest value.
    """
    is_float = images.dtype.kind == "f"
    means, stds = (_moments if is_float else _counted_moments)(images)
    tiny = float(np.finfo(np.float32).tiny)
    largest = max(float(np.abs(part).max()) for part in _parts(images)[1]) if is_float else 0.0
    least = max(1e-6 * largest, tiny) if is_float else 1e-3
    return means.astype(np.float32), np.maximum(stds, least).astype(np.float32)


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In two passes over parts of the images, in float64."""
    flat, parts = _parts(images)
    means = np.sum([part.sum(0, dtype=np.float64) for part in parts], 0) / len(flat)
    squares = np.sum([np.square(part - means).sum(0) for part in parts], 0)
    return means, np.sqrt(squares / len(flat))


def _counted_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of integers, by counting how often each value is there."""
    values = np.arange(np.iinfo(images.dtype).max + 1.0)
    flat, parts = _parts(images)
    counts = np.zeros((flat.shape[-1], len(values)), np.int64)
    for part in parts:
        for own, channel in zip(counts, part.T, strict=True):
            own += np.bincount(channel, minlength=len(values))
    means = counts @ values / len(flat)
    squares = [own @ np.square(values - mean) for own, mean in zip(counts, means, strict=True)]
    return means, np.sqrt(np.asarray(squares) / len(flat))


def _parts(images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """All pixels, `[..., C]`, and the same in parts that are read one after another."""
    flat = images.reshape(-1, images.shape[-1])
    return flat, np.array_split(flat, -(-len(flat) // 10**6))


def _random_crop(x: Float[Array, "B H W C"], pad: int, key: Array) -> Float[Array, "B H W C"]:
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.random.randint(key, (x.shape[0], 2), 0, 2 * pad + 1)
    return jax.vmap(lambda image, o: jax.lax.dynamic_slice(image, (o[0], o[1], 0), x.shape[1:]))(
        padded, offsets
    )
