"""DepthFL (Kim et al., ICLR 2023): clients train the first stages of a ResNet with exits."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jfed.errors import ConfigError, check_integer, check_number, check_sequence, one_of
from jfed.models.exits import EXITS, Exits, exit_resnet
from jfed.models.losses import Batch, Loss, Metrics, cross_entropy
from jfed.models.model import Model, Params
from jfed.models.presets import ModelConfig
from jfed.tiers.distillation import batch_mean, divergence, mask_absent
from jfed.tiers.entries import Path, check_resnet, init_of, select
from jfed.tiers.tier import Tiers

_ALPHA, _RAMP = 0.1, 300  # of FedDyn, and of distillation, in the authors' code


def depthfl(
    config: ModelConfig,
    depths: Sequence[int] | None = None,
    *,
    exits: str = "bottleneck",
    distillation: float = 1.0,
    ramp: int | None = None,
    temperature: float = 1.0,
) -> Tiers:
    """DepthFL: clients train the first stages, with an exit after each that learn from each other.

    The algorithm is FedDyn with alpha 0.1 and h over all clients, unless others are given; "DepthFL
    (FedAvg)" of the paper is `--algorithm fedavg --distillation 0`. An entry is averaged over its
    owners, each counting once. A tier is tested by its deepest exit, as in the paper's tables of
    submodels; beside the tiers, "ensemble" tests the deepest one by the mean logits of its exits,
    the paper's global model.

    With ResNet-18 and 100 classes the tiers have the parameters of the authors' code: 479,652;
    1,347,336; 3,838,316; 12,283,344. Their protocol (CIFAR-100): 100 clients, 10 a round, 1,000
    rounds of 5 epochs, batches of 50, SGD of rate 0.1 times 0.998^round, weight decay 1e-3; not
    IID: `dirichlet-balanced` with alpha 0.5.

    Differs from the authors' code (Flower's baseline `depthfl`) in: batch norms are tested with
    statistics measured on training images of the server, not with running averages that are
    averaged over clients; their target of the divergence has 1e-7 added to each probability;
    convolutions start from He's normal by fan-in and classifiers from LeCun's, theirs by
    fan-out and from PyTorch's default.

    Args:
      config: the network.
      depths: how many stages each tier trains; every number of them by default. Stages after the
        deepest tier's are left out.
      exits: "bottleneck", the authors', or "linear", see `exit_resnet`.
      distillation: the weight of self-distillation, see `exits_loss`; 0 for none.
      ramp: the rounds over which this weight rises to its full value, as exp(-5 (1 - r / ramp)^2)
        in round r from 0; 0: it is full from the beginning. By default the authors' 300, which are
        of 1,000 rounds.
      temperature: that softens the exits' probabilities for it.

    Raises:
      ConfigError: no or repeated depths, or ones that the network does not have; a ramp without
        distillation.
    """
    config = check_resnet("depthfl", config)
    if config.preactivation:
        raise ConfigError("depthfl needs a network without preactivation, got preactivation=True.")
    one_of("exits", exits, EXITS)
    check_number("distillation", distillation, least=0.0)
    if ramp is None:
        ramp = _RAMP
    elif not distillation:
        raise ConfigError(f"ramp {ramp} is of distillation, which is {distillation:g}.")
    check_integer("ramp", ramp, least=0)
    if config.kept is not None:
        raise ConfigError(f"depthfl needs a network with all its blocks, got kept {config.kept!r}.")
    check_number("temperature", temperature, above=0.0)
    stages = len(config.widths)
    depths = range(1, stages + 1) if depths is None else depths
    depths = [
        check_integer("depths", depth, least=1, most=stages)
        for depth in check_sequence("depths", depths)
    ]
    if not depths:
        raise ConfigError("depths must name at least one tier, got none.")
    most = max(depths)
    config = dataclasses.replace(config, widths=config.widths[:most], blocks=config.blocks[:most])

    def model(depth: int) -> Model:
        found = exit_resnet(config, depth, exits=exits)
        loss = exits_loss(found, distillation, ramp, temperature)
        return dataclasses.replace(found.model, loss=loss)

    members = tuple(select(str(depth), model(depth), _nothing) for depth in depths)
    whole = exit_resnet(config, exits=exits, ensemble=True).model
    ensemble = select("ensemble", whole, _nothing)
    return Tiers(
        init_of(whole, (), _nothing),
        members,
        tested=(ensemble,) if most > 1 else (),  # of one exit it is that exit
        kind="stages",
        weights="count",
        algorithm=(("name", "feddyn"), ("alpha", _ALPHA), ("h_over", "clients")),
    )


def _nothing(path: Path) -> bool:
    del path
    return False


def exits_loss(exits: Exits, weight: float, ramp: int, temperature: float) -> Loss:
    """The training loss of a network with exits (DepthFL, section 3).

    The sum over exits i of the cross-entropy and of `weight` times the mean over the other exits j
    of KL(p_j || p_i), with p softened by the temperature T and the term scaled by T^2. Nothing is
    learned through p_j, so the gradient is that of learning from the mean of the others' p_j. The
    weight rises over rounds, see `depthfl`.
    """

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        del key
        logits = mask_absent(exits.logits(params, batch.images, batch.mask), batch)
        found = [cross_entropy(exit_, batch) for exit_ in logits]
        total, metrics = jnp.stack([loss for loss, _ in found]).sum(), found[-1][1]
        if weight and len(logits) > 1:
            distilled = batch_mean(mutual_divergence(logits, temperature), batch).sum()
            total += weight * _risen(batch, ramp) * distilled
        return total, metrics._replace(loss=total * metrics.examples)

    return loss


def _risen(batch: Batch, ramp: int) -> Float[Array, ""] | float:
    """How far the weight of distillation has risen in the batch's round, up to 1."""
    if not ramp or batch.round is None:
        return 1.0
    missing = 1 - jnp.minimum(batch.round, ramp) / ramp
    return jnp.exp(-5 * missing**2)


def mutual_divergence(
    logits: Float[Array, "exits B classes"], temperature: float
) -> Float[Array, "exits B"]:
    """For each exit and example the mean KL divergence from the other exits, times T^2."""
    # KL(p_j || p_i) is 0 for j = i, so the sum may run over all j.
    return divergence(logits[None], logits[:, None], temperature).sum(1) / (len(logits) - 1)
