"""FjORD (Horvath et al., NeurIPS 2021, arXiv 2102.13451): channels by ordered dropout."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jfed.errors import check_number
from jfed.models.losses import Batch, Loss, Metrics, cross_entropy, training_logits
from jfed.models.model import Model, Params
from jfed.models.presets import ModelConfig, build
from jfed.tiers.distillation import batch_mean, mask_absent
from jfed.tiers.entries import first
from jfed.tiers.tier import Tier, Tiers
from jfed.tiers.width import check_ratios, narrow, width_tiers


def fjord(config: ModelConfig, ratios: Sequence[float], *, distillation: float = 0.0) -> Tiers:
    """FjORD: a client trains, on each batch, one width of those that it affords.

    A tier is the first channels of every layer, a share p of them rounded up. On each batch a
    client draws one of the ratios up to its tier's, all alike, and trains the first channels of
    that ratio alone, so that the smaller networks are good by themselves. With distillation it
    trains its own width on the labels, and besides the drawn one on what that predicts:
    CE(f_max, y) + distillation CE(softmax(f_max), f_p). An entry is averaged over its owners,
    weighted by their examples.

    The protocol of the authors' code: CIFAR-10, ResNet-18 with projections, ratios 0.2 to 1.0, 100
    clients, 10 a round, one epoch, batches of 32, SGD of rate 0.1, weight decay 1e-4.

    Differs from the authors' code (Flower's baseline `fjord`) in: batch norms are tested with
    statistics measured on training images of the server, of each width by itself, not with averages
    of the clients' running ones; the recorded loss is that of the whole objective; convolutions
    start from He's normal and the classifier from LeCun's, theirs from PyTorch's defaults.

    Where clients train under one `vmap`, as on accelerators, every width of a tier is computed on
    each batch and one of them taken: with five ratios 2.5 times the work of the widest, 3.5 with
    distillation. `EngineConfig(mapping="map")` computes the drawn one alone.

    Args:
      config: the network.
      ratios: one entry a tier, the share of the channels that it keeps.
      distillation: its weight, 1 in the authors' code; 0 for none.

    Raises:
      ConfigError: no or repeated ratios, or one outside (0, 1].
    """
    check_number("distillation", distillation, least=0.0)
    tiers = width_tiers(config, check_ratios(ratios), scaler=False)
    drawn = sorted(check_ratios(ratios))

    def with_loss(tier: Tier, ratio: float) -> Tier:
        assert isinstance(tier.model, Model)
        widths = [build(narrow(config, p)) for p in drawn if p <= ratio]
        loss = dropout_loss(widths, distillation)
        return dataclasses.replace(tier, model=dataclasses.replace(tier.model, loss=loss))

    members = tuple(map(with_loss, tiers, check_ratios(ratios)))
    return Tiers(build(config).init, members, kind="ratio")


def dropout_loss(widths: Sequence[Model], distillation: float) -> Loss:
    """The training loss of a client that affords networks of several widths, the last the widest.

    `params` are those of the widest; the others have the first entries of its arrays.
    """
    shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in widths]

    def logits(i: int, params: Params, batch: Batch) -> Float[Array, "B classes"]:
        cut = jax.tree.map(lambda leaf, small: first(leaf, small.shape), params, shapes[i])
        return training_logits(widths[i], cut, batch)

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        one = jax.random.randint(key, (), 0, len(widths))
        branches = [lambda p, i=i: logits(i, p, batch) for i in range(len(widths))]
        drawn = jax.lax.switch(one, branches, params)
        if not distillation:
            return cross_entropy(drawn, batch)
        widest = logits(len(widths) - 1, params, batch)
        total, metrics = cross_entropy(widest, batch)
        teacher, student = mask_absent(jnp.stack([widest, drawn]), batch)
        target = jax.lax.stop_gradient(jax.nn.softmax(teacher))
        learned = -(target * jax.nn.log_softmax(student)).sum(-1)
        total += distillation * batch_mean(learned[None], batch)[0]
        return total, metrics._replace(loss=total * metrics.examples)

    return loss
