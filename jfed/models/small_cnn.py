"""The small convolutional network that federated-learning simulators are benchmarked with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jfed.errors import ConfigError
from jfed.models.convolutions.convolution import conv
from jfed.models.model import Model, Params

_he_normal = jax.nn.initializers.he_normal()


def cnn(*, classes: int = 10, channels: int = 3, size: int = 32, form: str = "auto") -> Model:
    """Two 3x3 VALID convolutions (32, 64), 2x2 max pooling, dense 128, dense `classes`.

    With the defaults it has the 1,626,442 parameters of pfl-research's CIFAR-10 benchmark
    (arXiv 2404.06430). Written without Flax: an example of a model as two pure functions.

    Args:
      classes: how many logits.
      channels: of the images.
      size: height and width of the images, at least 6.
      form: the convolutions' form, see `jfed.models.convolutions.convolution.conv`.
    """
    if size < 6:
        raise ConfigError(f"the CNN needs images of at least 6x6 pixels, got {size}x{size}.")
    pooled = (size - 4) // 2
    shapes = {
        "conv1": (3, 3, channels, 32),
        "conv2": (3, 3, 32, 64),
        "dense1": (pooled * pooled * 64, 128),
        "dense2": (128, classes),
    }

    def init(key: Array) -> Params:
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {
            name: {"kernel": _he_normal(keys[name], shape), "bias": jnp.zeros(shape[-1])}
            for name, shape in shapes.items()
        }

    def apply(params: Params, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        x = images
        for name in ("conv1", "conv2"):
            x = conv(x, params[name]["kernel"], padding="VALID", form=form)
            x = jax.nn.relu(x + params[name]["bias"][None, None, None])
        x = x[:, : 2 * pooled, : 2 * pooled]
        x = x.reshape(x.shape[0], pooled, 2, pooled, 2, x.shape[-1])
        # Not `x.max((2, 4))`, whose gradient counts ties at twice the cost.
        x = jnp.maximum(
            jnp.maximum(x[:, :, 0, :, 0], x[:, :, 0, :, 1]),
            jnp.maximum(x[:, :, 1, :, 0], x[:, :, 1, :, 1]),
        ).reshape(x.shape[0], -1)
        x = jax.nn.relu(x @ params["dense1"]["kernel"] + params["dense1"]["bias"][None])
        return x @ params["dense2"]["kernel"] + params["dense2"]["bias"][None]

    return Model(init, apply)
