"""Tiers of iteration counts: one ODENet whose clients run different numbers of solver steps.

How many steps a tier takes is data, so one program serves all tiers, and tested counts too.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jfed.errors import ConfigError, check_number, one_of
from jfed.models.integration import step_size
from jfed.models.model import Model, Params, path_name
from jfed.models.ode_nets import (
    Depth,
    Iterations,
    ODENetConfig,
    is_norm,
    is_step,
    odenet,
    per_stage,
)
from jfed.models.presets import ModelConfig
from jfed.tiers.distillation import teaching
from jfed.tiers.entries import Own
from jfed.tiers.tier import Tier, Tiers, everything


class Setting(NamedTuple):
    """What tells the tiers of a network apart.

    Attributes:
      steps: of each stage.
      row: the trained tier whose own entries are used, by its place.
      learned: 1 if the sizes of the steps are those that were learned, else 0.
    """

    steps: tuple[int, ...]
    row: int
    learned: int


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

    Every client counts once in the mean unless `ServerConfig.weights` says otherwise: where clients
    train for an epoch each, weighing them by examples too was 9.9 +- 5.0 points worse on CIFAR-10
    at 16x16 with Dirichlet 0.1 (27.5 against 17.6 %, preset `cifar10-small`, 5 seeds, p < 0.05),
    and level with Dirichlet 0.5 (0.3 +- 0.8).

    Args:
      config: the network; its own `iterations` are not used.
      iterations: one entry a tier: solver steps of each stage, or one number for all stages.
      sharing: what is everybody's. "all": every weight. "norms-per-depth": all but norm scales and
        offsets, of which each tier keeps its own. "steps-per-depth": all but learned step sizes
        (`config.learn_steps`), of which every depth has another number. "norms-and-steps-per-depth"
        (the inconsistent parameters of NeFL, arXiv 2308.07761). "classifier-per-depth": all but the
        classifier. What is kept per depth is one array with a row for each tier, so an optimizer
        that takes norms of whole arrays (LARS, LAMB) sees the rows of the others too.
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
    one_of("sharing", sharing, SHARING)
    if not isinstance(iterations, Sequence) or isinstance(iterations, str):
        raise ConfigError(
            f"iterations must be a sequence with an entry for each tier, got {iterations!r}."
        )
    counts = tuple(per_stage(c, len(config.widths)) for c in iterations)
    if not iterations:
        raise ConfigError("iterations must name at least one tier, got none.")
    if len(set(counts)) < len(counts):
        raise ConfigError(f"iterations must differ between tiers, got {iterations!r}.")
    _check_steps(config, sharing, len(iterations))
    _check_distillation(config, sharing, distillation)
    return _network(config, counts, sharing, float(distillation)).tiers


@functools.lru_cache(maxsize=32)
def _network(
    config: ODENetConfig, counts: tuple[tuple[int, ...], ...], sharing: str, distillation: float
) -> "_Network":
    return _Network(config, counts, sharing, distillation)


class _Network:
    """An ODENet that clients run at several counts; equal ones are the same object.

    Where tiers keep entries for themselves, the global variables are `{"shared": {name: array},
    "own": {name: [tiers, ...]}}`, else those of the network.
    """

    def __init__(
        self,
        config: ODENetConfig,
        counts: tuple[tuple[int, ...], ...],
        sharing: str,
        distillation: float,
    ) -> None:
        self.config, self.counts, self.own = config, counts, _OWN[sharing]
        self.common = sharing == "all" and not config.learn_steps
        self.distillation = distillation
        self.between = functools.cache(self._between)
        self.tier = functools.cache(self._tier)
        self.full = odenet(dataclasses.replace(config, iterations=_bounds(counts)[1]))

    @functools.cached_property
    def tiers(self) -> Tiers:
        """The tiers that clients run."""
        members = self.at(self.counts)
        if self.distillation:
            members = self._taught(members)
        return Tiers(self.init, members, self.at, kind="iterations", weights="count")

    def init(self, key: Array) -> Params:
        """The initial global variables; what a tier keeps for itself starts as in its own model."""
        params = self.full.init(key)
        if self.common:
            return params
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return {
            "shared": {path_name(path): leaf for path, leaf in leaves if not self.own(path)},
            "own": {
                path_name(path): self._rows(path, leaf) for path, leaf in leaves if self.own(path)
            },
        }

    def _rows(self, path: Any, leaf: Array) -> Array:
        if not is_step(path):
            return jnp.stack([leaf] * len(self.counts))
        stage = _stage(path)
        sizes = [step_size(self.config.horizon, max(c[stage], 1)) for c in self.counts]
        return jnp.stack([jnp.full_like(leaf, size) for size in sizes])

    def at(self, counts: Sequence[Iterations], solver: str | None = None) -> tuple[Tier, ...]:
        """See `Tiers.at`."""
        solver = self.config.solver if solver is None else solver
        found = list(dict.fromkeys(per_stage(c, len(self.config.widths)) for c in counts))
        if not found:
            return ()
        model = self.between(*_bounds((*found, *self.counts)), solver)
        return tuple(self.tier(steps, solver, model) for steps in found)

    def _tier(self, steps: tuple[int, ...], solver: str, model: Callable[..., Model]) -> Tier:
        title = tier_name(steps)
        if solver != self.config.solver:
            title = f"{title} {solver}"
        learned = self.config.learn_steps and steps in self.counts
        setting = Setting(steps, _nearest(steps, self.counts), int(learned))
        mask = None if self.common else self.mask
        if not self.config.unroll:
            return Tier(title, model, everything, setting, mask, steps, solver)
        own = None if mask is None else (lambda like, _: self.mask(like, setting))
        return Tier(title, model(setting, None), everything, (), own, steps, solver)

    def _between(
        self, least: tuple[int, ...], most: tuple[int, ...], solver: str
    ) -> Callable[[Any, Any], Model]:
        """Models of all counts from `least` to `most`, by setting."""
        config = dataclasses.replace(self.config, iterations=most, solver=solver)

        def at(setting: Setting, largest: Setting | None) -> Model:
            far: Any = None if largest is None else largest.steps
            learned = setting.learned
            learned = bool(learned) if isinstance(learned, int) else learned > 0
            model = odenet(config, Depth(setting.steps, learned, far, least))
            if self.common:
                return model

            def apply(variables: Params, *args: Any) -> Array:
                return model.apply(self._select(variables, setting.row, most), *args)

            def measure(variables: Params, *args: Any) -> Any:
                assert model.measure is not None
                return model.measure(self._select(variables, setting.row, most), *args)

            return Model(self.init, apply, None if model.measure is None else measure)

        return at

    def _select(self, variables: Params, row: Any, most: tuple[int, ...]) -> Params:
        """A tier's parameters: what is shared, and its row of what is not."""
        shapes = jax.eval_shape(self.full.init, jax.random.key(0))
        found, structure = jax.tree_util.tree_flatten_with_path(shapes)

        def entry(path: Any) -> Array:
            if not self.own(path):
                return variables["shared"][path_name(path)]
            own = variables["own"][path_name(path)][row]
            return jnp.pad(own, (0, most[_stage(path)] - len(own))) if is_step(path) else own

        return jax.tree.unflatten(structure, [entry(path) for path, _ in found])

    def mask(self, like: Params, setting: Setting) -> Params:
        """1 for what a tier owns: what is shared, its row, of learned step sizes those it takes."""

        def row(title: str, leaf: Any) -> Array:
            along = lambda axis: jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis)  # noqa: E731
            mine = along(0) == setting.row
            if title.startswith("steps/"):
                mine &= along(1) < setting.steps[int(title.removeprefix("steps/"))]
                mine &= jnp.asarray(setting.learned) > 0
            return mine.astype(leaf.dtype)

        return {
            "shared": {n: jnp.ones(x.shape, x.dtype) for n, x in like["shared"].items()},
            "own": {n: row(n, x) for n, x in like["own"].items()},
        }

    def _taught(self, tiers: Sequence[Tier]) -> tuple[Tier, ...]:
        """The tiers, each trained so that those with fewer iterations in total learn from it."""
        students = [(sum(c), tier.bound()) for c, tier in zip(self.counts, tiers, strict=True)]

        def teach(model: Model, total: Any) -> Model:
            return teaching(model, [(of < total, s) for of, s in students], self.distillation)

        def at(setting: Setting, largest: Setting | None) -> Model:
            return teach(tiers[0].bound(setting, largest), sum(setting.steps))

        def taught(tier: Tier, steps: tuple[int, ...]) -> Tier:
            static = isinstance(tier.model, Model)
            return dataclasses.replace(
                tier, model=teach(tier.bound(), sum(steps)) if static else at
            )

        return tuple(taught(tier, steps) for tier, steps in zip(tiers, self.counts, strict=True))


def _bounds(counts: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The smallest and the largest count of each stage."""
    stages = list(zip(*counts, strict=True))
    return tuple(map(min, stages)), tuple(map(max, stages))


def _stage(path: Any) -> int:
    """Which stage's step sizes an entry holds."""
    return int(path_name(path).removeprefix("steps/"))


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
