"""NeFL (Kang et al., arXiv 2308.07761): clients train some blocks or channels of a ResNet.

Norms and step sizes are each tier's own (the paper's inconsistent parameters), all else is shared.
"""

import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jfed.errors import ConfigError
from jfed.models.model import Params, path_name
from jfed.models.ode_nets import is_norm, is_step
from jfed.models.presets import ModelConfig
from jfed.models.resnets import Blocks, ResNetConfig, resnet
from jfed.tiers.entries import Path, check_resnet, init_of, select
from jfed.tiers.published_submodels import DEPTHS, WIDTHS_AND_DEPTHS
from jfed.tiers.tier import Tiers, check_ratio
from jfed.tiers.width import narrow

Submodel = tuple[float, Blocks | None]
"""A share of the channels, and the kept blocks of each stage by number; None: all."""

RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the parameters, in the paper


def nefl(config: ModelConfig, submodels: Mapping[str, Submodel]) -> Tiers:
    """Tiers of a ResNet with some of its channels and blocks, by their names.

    A block is z <- relu(shortcut(z) + s f(z)) with a learned s that starts at 1 in every tier. Of a
    block that is left out the shortcut stays, which is nothing but where the shape changes. Each
    layer keeps its first channels. An entry is averaged over its owners, each counting once; in
    each round a client of the paper draws a tier within two of its own (`--draw-tiers 2`).

    The paper's protocol: 100 clients, 10 a round, 500 rounds of 5 epochs, batches of 32, SGD of
    rate 0.1, a tenth of it after half and three quarters of the rounds; not IID:
    `dirichlet-balanced` with alpha 0.5. Its ResNet-18 and 34 have the entry "3x3-pool", its
    ResNet-56 and 110 projection shortcuts.

    As in the authors' code, the projection of a block that is left out is trained by the tier, but
    not averaged: it is that of the tiers which have the block.

    Differs from the authors' code (honggkang/nested-federated-learning) in: a block that no client
    of a round trained keeps its value, where theirs becomes zero (channels that nobody trained keep
    theirs in both); a block that is left out does not exist, where theirs is computed and
    multiplied by zero; batch norms are tested with statistics measured on training images of the
    server, not with averages of the clients' running ones; convolutions start from He's normal by
    fan-in and the classifier from LeCun's, where theirs start from PyTorch's defaults, and all
    layers of ResNet-56 and 110 from He's.

    Args:
      config: the network.
      submodels: a tier's name, and the share of the channels that it has, and the kept blocks of
        each stage by number, or None for all.

    Raises:
      ConfigError: channels or blocks that the network does not have.
    """
    config = dataclasses.replace(check_resnet("nefl", config), kept=None, learn_steps=True)
    networks = {title: _network(config, title, one) for title, one in _named(submodels)}
    models = {title: resnet(network) for title, network in networks.items()}
    members = tuple(
        dataclasses.replace(
            select(title, model, is_inconsistent), mask=_without_lone_projections(networks[title])
        )
        for title, model in models.items()
    )
    init = init_of(resnet(config), list(models.items()), is_inconsistent)
    return Tiers(init, members, kind="tier", weights="count")


def _named(submodels: Mapping[str, Submodel]) -> list[tuple[str, Submodel]]:
    if not isinstance(submodels, Mapping) or not submodels:
        raise ConfigError(f"nefl needs a submodel for each tier by its name, got {submodels!r}.")
    return list(submodels.items())


def _network(config: ResNetConfig, title: str, submodel: Submodel) -> ResNetConfig:
    """The network of a tier, without the channels and the blocks that it lacks."""
    if not isinstance(submodel, tuple | list) or len(submodel) != 2:
        raise ConfigError(f"tier {title!r} needs a share and blocks, got {submodel!r}.")
    width, kept = submodel
    return dataclasses.replace(narrow(config, width), kept=kept)


def _without_lone_projections(
    config: ResNetConfig,
) -> Callable[[Params, Any], Params] | None:
    """The mask of a tier that trains shortcuts of blocks it lacks; None where there are none."""
    alone = {
        f"stages/{k}/block{i}/projection/conv/kernel"
        for (k, i), shape in config.shapes().items()
        if shape.changes and not config.keeps(k, i)
    }
    if not alone or config.shortcut != "projection":
        return None

    def mask(like: Params, setting: Any) -> Params:
        del setting
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.full(leaf.shape, path_name(path) not in alone, leaf.dtype), like
        )

    return mask


def nefl_d(config: ModelConfig, ratios: Sequence[float | Blocks] | None = None) -> Tiers:
    """NeFL-D: tiers have all channels, but not all blocks; see `nefl`.

    Args:
      config: the network.
      ratios: one entry a tier: a ratio of the network's parameters, for which the submodel is that
        of the authors' code where it has one of the network (ResNet-18, 34, 56, 110), else that of
        `blocks_for`; or the indices of the kept blocks of each stage, such as `((0, 1), (0,), ())`.
        By default the five of the paper.

    Raises:
      ConfigError: blocks that the network does not have; ratios that are out of reach, with those
        that are not; no ratios for a network of which the paper has no submodels.
    """
    config = dataclasses.replace(check_resnet("nefl-d", config), kept=None)
    published = _published(config, DEPTHS)
    given = _entries("nefl-d", config, ratios, RATIOS if published else None)
    found: dict[str, Submodel] = {}
    for entry in given:
        if isinstance(entry, numbers.Real):
            ratio = check_ratio(float(entry))
            blocks: Any = published.get(round(ratio, 6)) or blocks_for(config, ratio)
            _add(found, f"{entry:g}", (1.0, blocks))
        else:
            kept = dataclasses.replace(config, kept=entry).kept
            assert kept is not None
            _add(found, "-".join(str(len(stage)) for stage in kept), (1.0, kept))
    return nefl(config, found)


def nefl_w(config: ModelConfig, ratios: Sequence[float] = RATIOS) -> Tiers:
    """NeFL-W: tiers have all blocks, but the square root of `ratio` of the channels; see `nefl`.

    Args:
      config: the network.
      ratios: of the network's parameters, about; one a tier.
    """
    config = dataclasses.replace(check_resnet("nefl-w", config), kept=None)
    found: dict[str, Submodel] = {}
    for ratio in _entries("nefl-w", config, ratios, None):
        share = math.sqrt(check_ratio(ratio))
        _add(found, f"{ratio:g}", (share, None))
    return nefl(config, found)


def nefl_wd(config: ModelConfig, ratios: Sequence[float] = RATIOS) -> Tiers:
    """NeFL-WD: tiers lack channels and blocks; see `nefl`, which takes any others.

    Args:
      config: ResNet-18, 34, 56 or 110.
      ratios: of the network's parameters, of those that the authors' code has submodels for.
    """
    config = dataclasses.replace(check_resnet("nefl-wd", config), kept=None)
    published = _published(config, WIDTHS_AND_DEPTHS)
    found: dict[str, Submodel] = {}
    for ratio in _entries("nefl-wd", config, ratios, None):
        submodel = published.get(round(check_ratio(ratio), 6))
        if submodel is None:
            raise ConfigError(
                f"NeFL-WD has no submodel of ratio {ratio!r} of a network of {config.blocks} "
                f"blocks; the paper's have {tuple(published) or 'none'}. Name its channels and "
                "blocks by jfed.tiers.nefl(config, {name: (width, blocks)})."
            )
        _add(found, f"{ratio:g}", submodel)
    return nefl(config, found)


def is_inconsistent(path: Path) -> bool:
    """Whether a parameter is each tier's own in NeFL: norms and step sizes."""
    return is_norm(path) or is_step(path)


def _published(config: ResNetConfig, submodels: Mapping[tuple[int, ...], Any]) -> dict[float, Any]:
    """The authors' submodels of a network by ratio; none of a network that they do not have."""
    if config.bottleneck or config.preactivation:
        return {}
    return dict(submodels.get(config.blocks, {}))


def _entries(method: str, config: ResNetConfig, given: Any, default: Any) -> Sequence[Any]:
    """An entry for each tier."""
    entries = default if given is None else given
    if entries is None:
        raise ConfigError(
            f"{method} needs ratios for a network of {config.blocks} blocks, of which the paper "
            "has no submodels, got none."
        )
    if not isinstance(entries, Sequence) or not entries or isinstance(entries, str):
        raise ConfigError(f"{method} needs an entry for each tier, got {given!r}.")
    return entries


def _add(found: dict[str, Submodel], title: str, submodel: Submodel) -> None:
    if title in found:
        raise ConfigError(f"tiers of NeFL must have different names, got {title!r} twice.")
    found[title] = submodel


def blocks_for(config: ResNetConfig, ratio: float) -> Blocks:
    """The first blocks of each stage that hold about `ratio` of the network's parameters.

    Among the choices within 0.02 of the nearest one, that which thins all stages most evenly.

    Raises:
      ConfigError: none is within 0.1 of the ratio, with the least and the nearest that there are.
    """
    check_ratio(ratio)
    fixed, sizes = _block_sizes(config)
    total = fixed + sum(map(sum, sizes))
    prefixes = [[sum(stage[: n + 1]) for n in range(len(stage))] for stage in sizes]
    choices = []
    for counts in itertools.product(*(range(1, len(stage) + 1) for stage in sizes)):
        held = fixed + sum(prefix[n - 1] for prefix, n in zip(prefixes, counts, strict=True))
        uneven = sum(abs(n / len(s) - ratio) for n, s in zip(counts, sizes, strict=True))
        choices.append((abs(held / total - ratio), uneven, counts, held / total))
    nearest = min(choices)
    if nearest[0] > 0.1:
        raise ConfigError(
            f"ratio {ratio!r} is out of reach of the first blocks of a network of {config.blocks}: "
            f"they hold {min(c[3] for c in choices):.2f} to 1 of its parameters, the nearest "
            f"{nearest[3]:.2f}."
        )
    counts = min((c for c in choices if c[0] <= nearest[0] + 0.02), key=lambda c: c[1])[2]
    return tuple(tuple(range(n)) for n in counts)


@functools.cache
def _block_sizes(config: ResNetConfig) -> tuple[int, list[list[int]]]:
    """Parameters outside of all blocks, and of each block of each stage."""
    fixed, sizes = 0, [[0] * count for count in config.blocks]
    shapes = jax.eval_shape(resnet(config).init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        parts = path_name(path).split("/")
        if parts[0] == "stages":
            sizes[int(parts[1])][int(parts[2].removeprefix("block"))] += math.prod(leaf.shape)
        else:
            fixed += math.prod(leaf.shape)
    return fixed, sizes
