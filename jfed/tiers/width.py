"""Tiers of width: clients that train some channels of every layer (HeteroFL, FedRolex).

A tier's network is the full one with fewer channels. Its arrays are cut from the full ones along
every axis whose size differs; the channels of the images and the classes keep theirs.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jfed.errors import ConfigError
from jfed.models.model import Params
from jfed.models.presets import ModelConfig, build
from jfed.models.resnets import ResNetConfig
from jfed.tiers.entries import check_resnet, first
from jfed.tiers.tier import Round, Tier, Tiers, check_ratio

_Config = TypeVar("_Config", bound=ModelConfig)
Cut = Callable[[Array, tuple[int, ...], Round], Array]  # an array -> its part of another shape
# Which `kept` of `channels` channels belong to a tier: `window(channels, kept, round)`.
Window = Callable[[int, int, Round], Int[Array, " kept"]]


def heterofl(config: ModelConfig, ratios: Sequence[float], *, scaler: bool = True) -> Tiers:
    """HeteroFL (Diao et al., ICLR 2021): clients train the first channels of every layer.

    Static batch norm is how all batch norms of jfed work: they train on batch statistics, which do
    not travel, and are measured for evaluation. The masked cross-entropy is a setting of
    `ClientConfig`. An entry is averaged over its owners, each counting once. The authors' networks
    are `preresnet-18` and such, and `heterofl-conv`; their numbers of parameters are the same.

    The protocol of the authors' code (CIFAR-10): 100 clients, 10 a round, 5 epochs, batches of 10,
    SGD of rate 0.1, momentum 0.9 and weight decay 5e-4, gradients clipped to a norm of 1, 400
    rounds (800 where not IID: two classes a client, `shards`), the masked cross-entropy.

    Differs from the authors' code (diaoenmao/HeteroFL) in: it averages the classifier's weights of
    a class over clients with examples of it only, jfed over all owners; theirs measures the norms'
    statistics on all training images, jfed on some of them (`calibration_examples`); theirs deals
    tiers to clients by their numbers, or in each round anew, jfed at random and once
    (`--draw-tiers`); convolutions start from He's normal and the classifier from LeCun's, where
    theirs start from PyTorch's defaults. Their rate falls to a tenth after rounds 150 and 250 (300
    and 500 where not IID).

    Args:
      config: the network, a ResNet, an ODENet, or HeteroFL's own convolutional one.
      ratios: one entry a tier, the share of the channels that it keeps, rounded up.
      scaler: a tier divides its norms' inputs by its ratio while it trains, see
        `jfed.models.layers.Norm`: between each convolution and its norm, and in networks with
        preactivation before each norm, as theirs.

    Raises:
      ConfigError: no or repeated ratios, or one outside (0, 1].
    """
    members = width_tiers(config, ratios, scaler=scaler)
    return Tiers(build(config).init, members, kind="ratio", weights="count")


def fedrolex(config: ModelConfig, ratios: Sequence[float], *, scaler: bool = True) -> Tiers:
    """FedRolex (Alam et al., NeurIPS 2022): clients train a window of channels that rolls on.

    In round j a tier keeps, of K channels, those from j mod K on, wrapping around (section 3),
    rounded up in number. The server's whole model is always evaluated, as tier "1"; smaller tiers
    are evaluated where they are in round 0.

    Where shortcuts pad with zeros, channel c of a stage is channel c of the next one, and a window
    that wraps around at another place in each would add up different channels. So there the window
    rolls separately among the channels that a stage adds. An entry is averaged over its owners,
    each counting once.

    The protocol of the paper (CIFAR-10): 100 clients, 10 a round, one epoch, rate 2e-4, 2,500
    rounds; gradients clipped to a norm of 1, as in HeteroFL, whose networks it has.

    Differs from the authors' code (AIoT-MLSys-Lab/FedRolex) in: theirs rolls backwards, by
    `torch.roll(arange(K), j)`, where the paper's formula and jfed roll forwards; with `--overlap`
    it also orders the channels of each layer anew in almost every round, which the paper does not
    (512 rounds between two orders were meant); it averages the classifier's weights of a class over
    clients with examples of it only; it tests norms with the moments of each test batch, jfed with
    statistics measured on training images; its tiers are dealt to clients by their numbers, jfed's
    at random; and in initialisation, as HeteroFL.

    Args:
      config: the network.
      ratios: one entry a tier, the share of the channels that it keeps.
      scaler: see `heterofl`.

    Raises:
      ConfigError: no or repeated ratios, or one outside (0, 1].
    """
    config = check_resnet("fedrolex", config)
    full = width_tiers(config, (1.0,), _rolling(config, config), scaler=scaler)
    members: list[Tier] = []
    for ratio in check_ratios(ratios):
        rolling = _rolling(config, narrow(config, ratio))
        members += width_tiers(config, (ratio,), rolling, scaler=scaler)
    tested = () if any(tier.name == full[0].name for tier in members) else full
    return Tiers(build(config).init, tuple(members), tested=tested, kind="ratio", weights="count")


def first_channels(leaf: Array, shape: tuple[int, ...], round_: Round) -> Array:
    """The cut of HeteroFL: the first entries along each axis."""
    del round_
    return first(leaf, shape)


def width_tiers(
    config: ModelConfig, ratios: Sequence[float], cut: Cut = first_channels, *, scaler: bool
) -> tuple[Tier, ...]:
    """A tier for each ratio of the channels, with the entries that `cut` takes."""
    members = []
    for ratio in check_ratios(ratios):
        gain = 1 / ratio if scaler else 1.0
        model = build(dataclasses.replace(narrow(config, ratio), gain=gain))
        shapes = jax.eval_shape(model.init, jax.random.key(0))

        def extract(variables: Params, round_: Round, shapes: Params = shapes) -> Params:
            return jax.tree.map(lambda x, small: cut(x, small.shape, round_), variables, shapes)

        members.append(Tier(f"{ratio:g}", model, extract))
    return tuple(members)


def narrow(config: _Config, ratio: float) -> _Config:
    """The network with `ratio` of its channels, rounded up; of a bottleneck, its inner ones."""
    check_ratio(ratio)

    def kept(channels: int, unit: int = 1) -> int:
        # Less a bit, so that 0.2 of 5, which is 1.0000000000000002, is 1.
        return unit * math.ceil(ratio * channels / unit - 1e-9)

    if not isinstance(config, ResNetConfig):
        return dataclasses.replace(config, widths=tuple(map(kept, config.widths)))
    unit = 4 if config.bottleneck else 1
    widths = tuple(kept(width, unit) for width in config.widths)
    stem = None if config.stem is None else kept(config.stem)
    if stem is not None and (stem == widths[0]) != (config.stem == config.widths[0]):
        raise ConfigError(
            f"ratio {ratio!r} of a stem of {config.stem} and a first stage of {config.widths[0]} "
            f"channels leaves {stem} and {widths[0]}: the shortcut between them would change."
        )
    return dataclasses.replace(config, widths=widths, stem=stem)


def _rolling(config: ResNetConfig, small: ResNetConfig) -> Cut:
    window = window_of(config, small)

    def cut(leaf: Array, shape: tuple[int, ...], round_: Round) -> Array:
        for axis, (channels, kept) in enumerate(zip(leaf.shape, shape, strict=True)):
            if channels != kept:
                at = window(channels, kept, round_)
                leaf = jnp.take(leaf, at, axis=axis, unique_indices=True, mode="clip")
        return leaf

    return cut


def rolling_window(channels: int, kept: int, round_: Round) -> Int[Array, " kept"]:
    """The channels of FedRolex: `kept` of them from round mod channels on, wrapping around."""
    return (jnp.arange(kept, dtype=jnp.int32) + round_ % channels) % channels


def window_of(config: ResNetConfig, small: ResNetConfig) -> Window:
    """The rolling window of a network whose narrow version is `small`.

    With shortcuts that pad, the window of a stage's channels is put together of one window for each
    group: the stem's channels, and those that each stage adds.
    """
    if config.shortcut != "pad":
        return rolling_window
    wide = (config.stem or config.widths[0], *config.widths)
    thin = (small.stem or small.widths[0], *small.widths)

    def window(channels: int, kept: int, round_: Round) -> Int[Array, " kept"]:
        if (channels, kept) not in zip(wide, thin, strict=True):
            return rolling_window(channels, kept, round_)  # between a block's own convolutions
        end = list(zip(wide, thin, strict=True)).index((channels, kept)) + 1
        parts, pairs = [], [(0, 0), *zip(wide[:end], thin[:end], strict=True)]
        for (before, kept_before), (after, kept_after) in itertools.pairwise(pairs):
            size, some = after - before, kept_after - kept_before
            if some:
                # Whole groups stay in their order, as arrays that are not cut do.
                at = rolling_window(size, some, 0 if some == size else round_)
                parts.append(before + at)
        return jnp.concatenate(parts)

    return window


def check_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """Ratios as floats; ConfigError unless there are some, all different and in (0, 1]."""
    if not isinstance(ratios, Sequence) or not ratios:
        raise ConfigError(f"ratios must name one for each tier, got {ratios!r}.")
    checked = tuple(map(check_ratio, ratios))
    if len(set(checked)) < len(checked):
        raise ConfigError(f"ratios must differ, got {ratios!r}.")
    return checked
