"""Tiers of iteration counts: one ODENet whose clients run different numbers of solver steps."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jfed.errors import ConfigError, check_number, one_of
from jfed.models.model import Model
from jfed.models.ode_nets import Iterations, ODENetConfig, is_norm, is_step, odenet, per_stage
from jfed.models.presets import ModelConfig
from jfed.tiers.distillation import teaching
from jfed.tiers.entries import Own, init_of, select
from jfed.tiers.tier import Tier, Tiers


def _is_classifier(path: tuple[Any, ...]) -> bool:
    return getattr(path[0], "key", None) == "classifier"


# What each tier keeps for itself, under each policy.
_OWN: dict[str, Own] = {
    "all": lambda path: False,
    "norms-per-depth": is_norm,
    "steps-per-depth": is_step,
    "norms-and-steps-per-depth": lambda path: is_norm(path) or is_step(path),
    "classifier-per-depth": _is_classifier,
}
SHARING = tuple(_OWN)
_WITH_STEPS = ("steps-per-depth", "norms-and-steps-per-depth")


def ode(
    config: ModelConfig,
    iterations: Sequence[Iterations],
    *,
    sharing: str = "all",
    distillation: float = 0.0,
) -> Tiers:
    """Tiers of an ODENet that differ in how many iterations their ODE blocks run.

    An iteration count that no client runs takes what is kept per depth from the nearest tier (in
    total iterations, the shallower of two), but the solver's fixed step sizes. Another solver takes
    the step sizes that were learned with the trained one.

    Args:
      config: the network; its own `iterations` are not used.
      iterations: one entry a tier: solver steps of each stage, or one number for all stages.
      sharing: what is everybody's. "all": every weight. "norms-per-depth": all but norm scales and
        offsets, of which each tier keeps its own. "steps-per-depth": all but learned step sizes
        (`config.learn_steps`), of which every depth has another number. "norms-and-steps-per-depth"
        (the inconsistent parameters of NeFL, arXiv 2308.07761). "classifier-per-depth": all but the
        classifier.
      distillation: the weight of self-distillation, see `distillation.teaching`: a client also runs
        the counts of the shallower tiers (fewer iterations in total) on each batch, which learn
        from the count that it affords. Only where every weight is shared; 0 for none.

    Raises:
      ConfigError: no or repeated iteration counts, or ones that do not fit the network; step sizes
        that are learned but shared, or kept per depth but not learned; distillation among tiers
        that keep something for themselves.
    """
    if not isinstance(config, ODENetConfig):
        raise ConfigError(f"method 'ode' needs an ODENet, got {type(config).__name__}.")
    own = _OWN[one_of("sharing", sharing, SHARING)]
    if not isinstance(iterations, Sequence) or isinstance(iterations, str):
        raise ConfigError(
            f"iterations must be a sequence with an entry for each tier, got {iterations!r}."
        )
    stages = len(config.widths)
    counts = [per_stage(c, stages) for c in iterations]
    if not iterations:
        raise ConfigError("iterations must name at least one tier, got none.")
    _check_steps(config, sharing, len(iterations))
    _check_distillation(config, sharing, distillation)
    common = sharing == "all" and not config.learn_steps

    def at(count: Iterations, solver: str | None = None) -> Tier:
        steps = per_stage(count, stages)
        solver = config.solver if solver is None else solver
        learned = config.learn_steps and steps in counts
        model = odenet(
            dataclasses.replace(config, iterations=steps, solver=solver, learn_steps=learned)
        )
        title = tier_name(steps) if solver == config.solver else f"{tier_name(steps)} {solver}"
        owner = tier_name(counts[_nearest(steps, counts)])
        tier = Tier(title, model) if common else select(title, model, own, owner=owner)
        return dataclasses.replace(tier, iterations=steps, solver=solver)

    members = [at(count) for count in counts]
    named = [(tier.name, tier.model) for tier in members]
    full = named[0][1]
    init = full.init if common else init_of(full, named, own)
    return Tiers(init, _taught(members, counts, distillation), at, kind="iterations")


def _taught(
    tiers: Sequence[Tier], counts: Sequence[tuple[int, ...]], weight: float
) -> tuple[Tier, ...]:
    """The tiers, each trained so that those with fewer iterations in total learn from it."""

    def shallower(than: tuple[int, ...]) -> list[Model]:
        return [t.model for t, c in zip(tiers, counts, strict=True) if sum(c) < sum(than)]

    return tuple(
        dataclasses.replace(tier, model=teaching(tier.model, shallower(count), weight))
        for tier, count in zip(tiers, counts, strict=True)
    )


def _check_distillation(config: ODENetConfig, sharing: str, weight: float) -> None:
    if not check_number("distillation", weight, least=0.0):
        return
    if sharing != "all" or config.learn_steps:
        raise ConfigError(
            "distillation among iteration counts needs every weight shared, sharing 'all' and "
            f"learn_steps=False; got distillation {weight!r} with sharing {sharing!r} and "
            f"learn_steps={config.learn_steps}."
        )


def _check_steps(config: ODENetConfig, sharing: str, tiers: int) -> None:
    if sharing in _WITH_STEPS and not config.learn_steps:
        raise ConfigError(f"sharing {sharing!r} needs learned step sizes, got learn_steps=False.")
    if config.learn_steps and sharing not in _WITH_STEPS and tiers > 1:
        raise ConfigError(
            "learned step sizes have another number for each depth and cannot be shared; use "
            f"sharing {' or '.join(map(repr, _WITH_STEPS))}, got {sharing!r}."
        )


def _nearest(count: tuple[int, ...], trained: Sequence[tuple[int, ...]]) -> int:
    """The index of the same count, else of that with the nearest total, the shallower of two."""
    total = sum(count)
    return min(
        range(len(trained)),
        key=lambda i: (count != trained[i], abs(total - sum(trained[i])), sum(trained[i])),
    )


def tier_name(iterations: Iterations) -> str:
    """Writes 4 iterations in every stage as 4, counts per stage as 3-2-2."""
    if isinstance(iterations, tuple) and len(set(iterations)) > 1:
        return "-".join(map(str, iterations))
    return str(iterations[0] if isinstance(iterations, tuple) else iterations)
