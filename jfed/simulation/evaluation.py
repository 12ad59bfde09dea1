"""Test accuracy of a tier, with batch-norm statistics measured for that tier."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jfed.data.preprocessing import Images, gather
from jfed.engine.devices import AXIS, EVERYWHERE, SPREAD
from jfed.errors import ConfigError, check_integer, check_number, check_sequence, one_of
from jfed.models.integration import check_solver
from jfed.models.losses import Batch, Metrics, cross_entropy, tested_logits
from jfed.models.model import Model, Moments, Params, Statistics
from jfed.simulation.scores import METRICS
from jfed.tiers import Iterations, Tier, Tiers

# Sums over the examples that count, by name.
Measure = Callable[[Float[Array, "B classes"], Batch], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how the global model is tested.

    Attributes:
      every: rounds between evaluations; the last round is always evaluated. 0: only the last.
      iterations: iteration counts to test beside those that clients run.
      solvers: by diffrax's name, such as "Midpoint": each of these counts, those that clients run
        included, is tested with each of them too, beside the solver that it is trained with.
      batch_size: examples in a batch.
      calibration_examples: training examples that batch-norm statistics are measured on.
      metrics: further ones of every evaluation: "balanced-accuracy", "f1" (macro), "auc" (macro, of
        each class against the rest) and "ece" (calibration error). The host computes them, exactly,
        from the probabilities of all test examples, see `jfed.simulation.scores`.
      measure: metrics of your own, `measure(logits, batch) -> {name: sum over the examples that
        count}`, float32 scalars, recorded as means over the test set.
      local_test: share of each client's examples that it does not train on, and is tested on itself
        at every evaluation: its personal model where the algorithm has such, else the global one.
        0: none.
      finetune_epochs: that each client's model is trained on its own examples before these tests,
        by the clients' optimizer at the first round's learning rate; what comes of it is not kept.
    """

    every: int = 1
    iterations: tuple[Iterations, ...] = ()
    solvers: tuple[str, ...] = ()
    batch_size: int = 250
    calibration_examples: int = 2000
    metrics: tuple[str, ...] = ()
    measure: Measure | None = None
    local_test: float = 0.0
    finetune_epochs: int = 0

    def __post_init__(self) -> None:
        check_sequence("eval_iterations", self.iterations)
        for solver in check_sequence("eval_solvers", self.solvers):
            check_solver(solver)
        for metric in check_sequence("evaluation metrics", self.metrics):
            one_of("metric", metric, tuple(METRICS))
        check_integer("eval_every", self.every, least=0)
        check_integer("eval_batch_size", self.batch_size, least=1, most=10**6)
        check_integer("evaluation calibration_examples", self.calibration_examples, least=1)
        if check_number("local_test", self.local_test, least=0.0) >= 1:
            raise ConfigError(f"local_test must be below 1, got {self.local_test!r}.")
        if check_integer("finetune_epochs", self.finetune_epochs, least=0) and not self.local_test:
            raise ConfigError(
                f"finetune_epochs {self.finetune_epochs} need examples to test on: set local_test."
            )


def evaluated_tiers(tiers: Tiers, evaluation: EvaluationConfig) -> tuple[Tier, ...]:
    """The tiers that clients run, then others: those to be tested, other counts, other solvers."""
    if tiers.at is None:
        for name in ("iterations", "solvers"):
            if given := getattr(evaluation, name):
                raise ConfigError(f"eval_{name} {given!r} need tiers of iteration counts.")
        return (*tiers.members, *tiers.tested)
    run = [tier.iterations for tier in tiers.members if tier.iterations is not None]
    found = list(tiers.at([*run, *evaluation.iterations]))
    counts = list(dict.fromkeys(tier.iterations for tier in found if any(tier.iterations or ())))
    for solver in evaluation.solvers:
        found += tiers.at(counts, solver)
    first: dict[str, Tier] = {}
    for tier in (*found, *tiers.tested):
        first.setdefault(tier.name, tier)
    return tuple(first.values())


class Examples(NamedTuple):
    """Examples on the devices, cut into batches.

    Attributes:
      images: all of the split.
      batches: `[K, B]` int32 indices.
      real: `[K]` how many of a batch count, the first ones.
    """

    images: Images
    batches: Int[Array, "K B"]
    real: Int[Array, " K"]


# How they are spread over devices: each has all images, and batches of its own.
SPREAD_EXAMPLES = Examples(EVERYWHERE, SPREAD, SPREAD)  # type: ignore[arg-type]


def in_batches(
    chosen: Int[np.ndarray, " N"], size: int, multiple: int = 1
) -> tuple[Int[np.ndarray, "K B"], Int[np.ndarray, " K"]]:
    """Cuts indices into batches of `size`, a multiple of so many, and tells how many of each count.

    What does not count is the last of the chosen examples once more.
    """
    count = -(-len(chosen) // size)
    batches = np.full((-(-count // multiple) * multiple, size), chosen[-1], np.int32)
    batches.reshape(-1)[: len(chosen)] = chosen
    real = np.clip(len(chosen) - size * np.arange(len(batches)), 0, size)
    return batches, real.astype(np.int32)


def batch_of(images: Images, indices: Array, real: Array, *augmented: Any) -> Batch:
    """The batch of indices of which the first ones count; `augmented` as of `gather`."""
    mask = (jnp.arange(indices.shape[0]) < real).astype(jnp.float32)
    return gather(images, indices, mask, *augmented)


def pool(measured: Statistics, counts: Float[Array, " K"], axis: str | None = None) -> Statistics:
    """Mean and variance over all examples from those of K batches, `[K, ...]` each.

    The variance is the mean of the batches' variances plus the variance of their means (Chan et
    al. 1979).

    Args:
      measured: of each batch; finite also for a batch without examples.
      counts: examples of each batch.
      axis: of the mesh that the batches are spread over, inside `shard_map`.
    """

    def total(x: Array) -> Array:
        return x if axis is None else jax.lax.psum(x, axis)

    share = counts / total(counts.sum())

    def mean(x: Array) -> Array:
        return total(jnp.tensordot(share, x, axes=1, precision=jax.lax.Precision.HIGHEST))

    def pooled(moments: Moments) -> Moments:
        centre = mean(moments.mean)
        spread = jnp.square(moments.mean - centre[None])
        return Moments(centre, mean(moments.var) + mean(spread))

    return jax.tree.map(pooled, measured, is_leaf=lambda x: isinstance(x, Moments))


def recalibrate(
    model: Model, params: Params, calibration: Examples, axis: str | None = None
) -> Statistics | None:
    """Batch-norm statistics for evaluation, or None for a model without batch norm.

    One pass over the calibration examples, each batch normalised by its own statistics as in
    training. Works for any iteration count and solver, also ones that no client trained. `axis` as
    in `pool`.
    """
    measure = model.measure
    if measure is None:
        return None

    def one(_: None, at: tuple[Array, Array]) -> tuple[None, tuple[Statistics, Array]]:
        batch = batch_of(calibration.images, *at)
        return None, (measure(params, batch.images, batch.mask), batch.mask.sum())

    batches = (calibration.batches, calibration.real)
    _, (measured, counts) = jax.lax.scan(one, None, batches)
    return pool(measured, counts, axis)


class Tested(NamedTuple):
    """What testing a tier gives, on every device.

    Attributes:
      metrics: sums over the test set, of which `correct` and `examples` are int32, since float32
        counts to 2^24 only.
      statistics: of the norms that it was tested with; None for a model without.
      probabilities: `[N, classes]` of the test set's examples in their order, float32, where they
        were asked for; the last rows are padding.
    """

    metrics: Metrics
    statistics: Statistics | None
    probabilities: Float[Array, "N classes"] | None


def make_evaluator(
    tier: Tier, mesh: Mesh, measure: Measure | None = None, *, keep: bool = False
) -> jax.stages.Wrapped:
    """The program that tests all tiers which differ from this one in their setting only.

    Batches are spread over the mesh's devices, so their number must be a multiple of them. A tier
    whose part of the variables moves over rounds (FedRolex) is tested where it starts, as of round
    0: for its full tier that is the server's whole model, what the paper reports.

    Args:
      tier: one of them.
      mesh: of the devices.
      measure: see `EvaluationConfig`.
      keep: give the probabilities of all examples.

    Returns:
      A jitted `evaluate(variables, setting, calibration, test) -> Tested`.
    """

    def evaluate(variables: Params, setting: Any, calibration: Examples, test: Examples) -> Tested:
        model, params = tier.bound(setting), tier.extract(variables, 0)
        statistics = recalibrate(model, params, calibration, AXIS)

        def count(indices: Array, real: Array) -> tuple[Metrics, Array | None]:
            batch = batch_of(test.images, indices, real)
            logits = tested_logits(model, params, batch.images, statistics)
            _, found = cross_entropy(logits, batch)
            found = found._replace(
                correct=found.correct.astype(jnp.int32), examples=found.examples.astype(jnp.int32)
            )
            if measure is not None:
                found = found._replace(others=measure(logits, batch))
            return found, jax.nn.softmax(logits, -1) if keep else None

        def add(total: Metrics, at: tuple[Array, Array]) -> tuple[Metrics, Array | None]:
            found, probabilities = count(*at)
            return jax.tree.map(jnp.add, total, found), probabilities

        like, _ = jax.eval_shape(count, test.batches[0], test.real[0])
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        total, rows = jax.lax.scan(add, nothing, (test.batches, test.real))
        if rows is not None:
            rows = jax.lax.all_gather(rows.reshape(-1, rows.shape[-1]), AXIS, tiled=True)
        return Tested(jax.lax.psum(total, AXIS), statistics, rows)

    specs = (EVERYWHERE, EVERYWHERE, SPREAD_EXAMPLES, SPREAD_EXAMPLES)
    # Unchecked for the reason given in `make_trainer`.
    return jax.jit(
        jax.shard_map(evaluate, mesh=mesh, in_specs=specs, out_specs=EVERYWHERE, check_vma=False)
    )
