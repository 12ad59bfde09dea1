"""Tiers of depth: clients that train some of a ResNet's residual blocks (DepthFL, NeFL-D)."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jfed.errors import ConfigError, check_integer, check_number
from jfed.models.exits import Exits, exit_resnet
from jfed.models.losses import Batch, Metrics, cross_entropy
from jfed.models.model import Model, Params
from jfed.models.ode_nets import is_norm, is_step
from jfed.models.resnets import ResNetConfig, resnet
from jfed.tiers.distillation import batch_mean, divergence, mask_absent
from jfed.tiers.entries import Origin, Path, init_of, name, select
from jfed.tiers.tier import Tiers, check_ratio

Blocks = Sequence[Sequence[int]]  # the kept blocks of each stage, by index
Loss = Callable[[Params, Batch, Array], tuple[Float[Array, ""], Metrics]]


def depthfl(
    config: ResNetConfig,
    depths: Sequence[int] | None = None,
    *,
    distillation: float = 1.0,
    temperature: float = 1.0,
) -> Tiers:
    """DepthFL (Kim et al., ICLR 2023): clients train the first stages, with an exit after each.

    A tier is tested by its deepest exit, as in the paper's tables of submodels; beside the tiers,
    "ensemble" tests the deepest one by the mean logits of its exits, the paper's global model. The
    paper raises the weight of distillation over the first 300 rounds; here it is constant.

    Args:
      config: the network.
      depths: how many stages each tier trains; every number of them by default. Stages after the
        deepest tier's are left out.
      distillation: the weight of self-distillation, see `exits_loss`; 0 for none.
      temperature: that softens the exits' probabilities for it.

    Raises:
      ConfigError: no or repeated depths, or ones that the network does not have.
    """
    check_network("depthfl", config)
    check_number("distillation", distillation, least=0.0)
    check_number("temperature", temperature, above=0.0)
    stages = len(config.widths)
    depths = range(1, stages + 1) if depths is None else depths
    depths = [check_integer("depths", depth, least=1, most=stages) for depth in depths]
    if not depths:
        raise ConfigError("depths must name at least one tier, got none.")

    def exits(depth: int, *, ensemble: bool = False) -> Exits:
        cut = dataclasses.replace(
            config, widths=config.widths[:depth], blocks=config.blocks[:depth]
        )
        return exit_resnet(cut, ensemble=ensemble)

    def model(depth: int) -> Model:
        found = exits(depth)
        return dataclasses.replace(found.model, loss=exits_loss(found, distillation, temperature))

    members = tuple(select(str(depth), model(depth), _nothing) for depth in depths)
    ensemble = select("ensemble", exits(max(depths), ensemble=True).model, _nothing)
    full = model(max(depths))
    return Tiers(init_of(full, (), _nothing), members, tested=(ensemble,), kind="stages")


def _nothing(path: Path) -> bool:
    del path
    return False


def exits_loss(exits: Exits, weight: float, temperature: float) -> Loss:
    """The training loss of a network with exits (DepthFL, section 3).

    The sum over exits i of the cross-entropy and of `weight` times the mean over the other exits j
    of KL(p_j || p_i), with p softened by the temperature T and the term scaled by T^2. Nothing is
    learned through p_j, so the gradient is that of learning from the mean of the others' p_j.
    """

    def loss(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Metrics]:
        del key
        logits = mask_absent(exits.logits(params, batch.images, batch.mask), batch)
        found = [cross_entropy(exit_, batch) for exit_ in logits]
        total, metrics = jnp.stack([loss for loss, _ in found]).sum(), found[-1][1]
        if weight and len(logits) > 1:
            total += weight * batch_mean(mutual_divergence(logits, temperature), batch).sum()
        return total, metrics._replace(loss=total * metrics.examples)

    return loss


def mutual_divergence(
    logits: Float[Array, "exits B classes"], temperature: float
) -> Float[Array, "exits B"]:
    """For each exit and example the mean KL divergence from the other exits, times T^2."""
    # KL(p_j || p_i) is 0 for j = i, so the sum may run over all j.
    return divergence(logits[None], logits[:, None], temperature).sum(1) / (len(logits) - 1)


def nefl_d(config: ResNetConfig, tiers: Sequence[float | Blocks]) -> Tiers:
    """NeFL-D (Kang et al., arXiv 2308.07761): clients train some blocks of every stage.

    A block k is z <- relu(shortcut(z) + s_k f_k(z)) with a learned s_k that starts at 1 in every
    tier. Norms and s_k are the tier's own (the paper's inconsistent parameters), all else is
    averaged over the clients whose tier has the block.

    Args:
      config: the network.
      tiers: one entry a tier: the indices of the kept blocks of each stage, such as
        `((0, 1), (0,), (0,))`, or a ratio of the network's parameters, see `blocks_for`.

    Raises:
      ConfigError: blocks that the network does not have, or a first block left out that changes the
        shape; ratios that are out of reach.
    """
    check_network("nefl-d", config)
    if not isinstance(tiers, Sequence) or not tiers or isinstance(tiers, str):
        raise ConfigError(f"nefl-d needs an entry for each tier, got {tiers!r}.")
    config = dataclasses.replace(config, learn_steps=True)
    kept = {}
    for entry in tiers:
        if isinstance(entry, int | float):
            blocks, title = blocks_for(config, entry), f"{entry:g}"
        else:
            blocks = check_blocks(config, entry)
            title = "-".join(str(len(stage)) for stage in blocks)
        if title in kept:
            raise ConfigError(f"nefl-d tiers must have different names, got {title!r} twice.")
        kept[title] = blocks
    models = {
        title: resnet(dataclasses.replace(config, blocks=tuple(map(len, blocks))))
        for title, blocks in kept.items()
    }
    members = tuple(
        select(title, models[title], is_inconsistent, origin=_origin(blocks))
        for title, blocks in kept.items()
    )
    init = init_of(resnet(config), list(models.items()), is_inconsistent)
    return Tiers(init, members, kind="tier")


def is_inconsistent(path: Path) -> bool:
    """Whether a parameter is each tier's own in NeFL: norms and step sizes."""
    return is_norm(path) or is_step(path)


def _origin(blocks: Blocks) -> Origin:
    """Block i of a stage of the tier's network -> the block of the full one that it is."""

    def origin(entry: str) -> str:
        room, *rest = entry.split("/")
        if room != "stages":
            return entry
        stage, block, *inner = rest
        return "/".join([room, stage, str(blocks[int(stage)][int(block)]), *inner])

    return origin


def check_blocks(config: ResNetConfig, blocks: Blocks) -> tuple[tuple[int, ...], ...]:
    """Blocks as tuples; ConfigError unless the network has them and can do without the others."""
    if not isinstance(blocks, Sequence) or len(blocks) != len(config.blocks):
        raise ConfigError(
            f"blocks must list those of each of the {len(config.blocks)} stages, got {blocks!r}."
        )
    for stage, (kept, count) in enumerate(zip(blocks, config.blocks, strict=True)):
        for block in kept:
            check_integer(f"blocks of stage {stage}", block, least=0, most=count - 1)
        if not kept or any(a >= b for a, b in itertools.pairwise(kept)):
            raise ConfigError(
                f"blocks of stage {stage} must be one or more in ascending order, got {kept!r}."
            )
        if kept[0] != 0 and (stage > 0 or (config.stem or config.widths[0]) != config.widths[0]):
            raise ConfigError(
                f"blocks of stage {stage} must include block 0, which changes the shape, "
                f"got {kept!r}."
            )
    return tuple(tuple(kept) for kept in blocks)


def blocks_for(config: ResNetConfig, ratio: float) -> tuple[tuple[int, ...], ...]:
    """The first blocks of each stage that hold about `ratio` of the network's parameters.

    Among the choices within 0.02 of the nearest one, that which thins all stages most evenly.
    """
    check_ratio(ratio)
    fixed, sizes = _block_sizes(config)
    total = fixed + sum(map(sum, sizes))
    prefixes = [[sum(stage[: n + 1]) for n in range(len(stage))] for stage in sizes]
    choices = []
    for counts in itertools.product(*(range(1, len(stage) + 1) for stage in sizes)):
        held = fixed + sum(prefix[n - 1] for prefix, n in zip(prefixes, counts, strict=True))
        uneven = sum(abs(n / len(s) - ratio) for n, s in zip(counts, sizes, strict=True))
        choices.append((abs(held / total - ratio), uneven, counts))
    nearest = min(choices)[0]
    if nearest > 0.1:
        raise ConfigError(
            f"ratio {ratio!r} is out of reach of the network's blocks; the nearest is "
            f"{nearest:.2f} off."
        )
    counts = min((c for c in choices if c[0] <= nearest + 0.02), key=lambda c: c[1])[2]
    return tuple(tuple(range(n)) for n in counts)


@functools.cache
def _block_sizes(config: ResNetConfig) -> tuple[int, list[list[int]]]:
    """Parameters outside of all blocks, and of each block of each stage."""
    fixed, sizes = 0, [[0] * count for count in config.blocks]
    shapes = jax.eval_shape(resnet(config).init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        parts = name(path).split("/")
        if parts[0] == "stages":
            sizes[int(parts[1])][int(parts[2])] += math.prod(leaf.shape)
        else:
            fixed += math.prod(leaf.shape)
    return fixed, sizes


def check_network(method: str, config: Any) -> None:
    """Raises ConfigError unless the network is a ResNet."""
    if not isinstance(config, ResNetConfig):
        raise ConfigError(f"{method} needs a ResNet, got {type(config).__name__}.")
