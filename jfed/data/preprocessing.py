"""From images as they are stored to what a model sees: gathered, standardised, augmented."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jfed.errors import check_integer
from jfed.models.losses import Batch


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


Preprocess = Callable[[Array, Array | None], Float[Array, "B H W C"]]


def make_preprocess(
    mean: tuple[float, ...], std: tuple[float, ...], *, pad: int, flip: bool
) -> Preprocess:
    """uint8 images -> standardised float32 images, augmented if a key is given.

    Args:
      mean: of each channel, in units of 0 to 255.
      std: of each channel, likewise.
      pad: zeros (the mean colour) around a standardised image before a random crop of its old
        size; 0 for no crop.
      flip: mirror half of the images left to right.

    Returns:
      `preprocess(images, key)`; the key is consumed; without one nothing is augmented.
    """
    centre, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def preprocess(images: Array, key: Array | None) -> Float[Array, "B H W C"]:
        x = (images.astype(jnp.float32) - centre[None, None, None]) / scale[None, None, None]
        if key is None:
            return x
        crop_key, flip_key = jax.random.split(key)
        if pad:
            x = _random_crop(x, pad, crop_key)
        if flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(x.shape[0], 1, 1, 1))
            x = jnp.where(mirrored, x[:, :, ::-1], x)
        return x

    return preprocess


def _random_crop(x: Float[Array, "B H W C"], pad: int, key: Array) -> Float[Array, "B H W C"]:
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.random.randint(key, (x.shape[0], 2), 0, 2 * pad + 1)
    return jax.vmap(lambda image, o: jax.lax.dynamic_slice(image, (o[0], o[1], 0), x.shape[1:]))(
        padded, offsets
    )


def gather(
    images: Array,
    labels: Array,
    examples: Int[Array, " B"],
    preprocess: Preprocess,
    key: Array | None,
) -> Batch:
    """The batch of the given examples; -1 stands for padding."""
    at = jnp.maximum(examples, 0)
    mask = (examples >= 0).astype(jnp.float32)
    return Batch(preprocess(images[at], key), labels[at], mask)
