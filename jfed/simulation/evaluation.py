"""Test accuracy of a tier, with batch-norm statistics measured for that tier."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jfed.data.preprocessing import Preprocess, gather
from jfed.engine.devices import AXIS, EVERYWHERE, SPREAD
from jfed.errors import check_integer, check_sequence
from jfed.models.integration import check_solver
from jfed.models.losses import Metrics, cross_entropy
from jfed.models.model import Model, Moments, Params, Statistics
from jfed.tiers import Iterations, Tier


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
    """

    every: int = 1
    iterations: tuple[Iterations, ...] = ()
    solvers: tuple[str, ...] = ()
    batch_size: int = 250
    calibration_examples: int = 2000

    def __post_init__(self) -> None:
        check_sequence("evaluation iterations", self.iterations)
        for solver in check_sequence("evaluation solvers", self.solvers):
            check_solver(solver)
        check_integer("evaluation every", self.every, least=0)
        check_integer("evaluation batch_size", self.batch_size, least=1, most=10**6)
        check_integer("evaluation calibration_examples", self.calibration_examples, least=1)


class Examples(NamedTuple):
    """A set of examples on the device, cut into batches.

    Attributes:
      images: `[N, H, W, C]` uint8.
      labels: `[N]` int32.
      batches: `[K, B]` int32 indices, -1 for padding.
    """

    images: Array
    labels: Array
    batches: Int[Array, "K B"]


def in_batches(
    chosen: Int[np.ndarray, " N"], size: int, multiple: int = 1
) -> Int[np.ndarray, "K B"]:
    """Cuts indices into batches of `size`, padded with -1 to a multiple of so many batches."""
    count = -(-len(chosen) // size)
    batches = np.full((-(-count // multiple) * multiple, size), -1, np.int32)
    batches.reshape(-1)[: len(chosen)] = chosen
    return batches


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
    model: Model,
    params: Params,
    calibration: Examples,
    preprocess: Preprocess,
    axis: str | None = None,
) -> Statistics | None:
    """Batch-norm statistics for evaluation, or None for a model without batch norm.

    One pass over the calibration examples, each batch normalised by its own statistics as in
    training. Works for any iteration count and solver, also ones that no client trained. `axis` as
    in `pool`.
    """
    measure = model.measure
    if measure is None:
        return None

    def one(_: None, examples: Array) -> tuple[None, tuple[Statistics, Array]]:
        batch = gather(calibration.images, calibration.labels, examples, preprocess, None)
        return None, (measure(params, batch.images, batch.mask), batch.mask.sum())

    _, (measured, counts) = jax.lax.scan(one, None, calibration.batches)
    return pool(measured, counts, axis)


def make_evaluator(tier: Tier, preprocess: Preprocess, mesh: Mesh) -> jax.stages.Wrapped:
    """A jitted `evaluate(variables, calibration, test) -> Metrics` for one tier.

    Batches are spread over the mesh's devices, so their number must be a multiple of them. A tier
    whose part of the variables moves over rounds (FedRolex) is tested where it starts, as of round
    0: for its full tier that is the server's whole model, what the paper reports.
    """
    model = tier.model

    def evaluate(variables: Params, calibration: Examples, test: Examples) -> Metrics:
        params = tier.extract(variables, 0)
        statistics = recalibrate(model, params, calibration, preprocess, AXIS)

        def one(total: Metrics, examples: Array) -> tuple[Metrics, None]:
            batch = gather(test.images, test.labels, examples, preprocess, None)
            if statistics is None:
                logits = model.apply(params, batch.images)
            else:
                logits = model.apply(params, batch.images, None, statistics)
            _, metrics = cross_entropy(logits, batch)
            return jax.tree.map(jnp.add, total, metrics), None

        nothing = Metrics(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
        return jax.lax.psum(jax.lax.scan(one, nothing, test.batches)[0], AXIS)

    examples = Examples(EVERYWHERE, EVERYWHERE, SPREAD)  # type: ignore[arg-type]
    specs = (EVERYWHERE, examples, examples)
    # Unchecked for the reason given in `make_trainer`.
    return jax.jit(
        jax.shard_map(evaluate, mesh=mesh, in_specs=specs, out_specs=EVERYWHERE, check_vma=False)
    )
