"""Fixed-step integration of an ODE block with the explicit Runge-Kutta methods of diffrax.

The steps are taken by hand, from diffrax's tableaux, so that gradients are the exact gradients of
the discretisation: solving the ODE backwards in time loses accuracy (Gholami et al. 2019, ANODE,
arXiv 1902.10298).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jfed.errors import ConfigError, one_of
from jfed.models.counted_loops import repeat
from jfed.models.model import widened

Moments = Any  # a pytree of arrays: what the norms of one evaluation of f measured, or should use
VectorField = Callable[[Any, Array, Moments | None], tuple[Array, Moments]]
Count = int | Int[Array, ""]


class Method(NamedTuple):
    """An explicit Runge-Kutta method.

    Attributes:
      times: of each stage, within a step from 0 to 1.
      weights: of the slopes of the stages before, for the state at which each stage is evaluated.
      end: the weights of the slopes in the step.
    """

    times: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    end: tuple[float, ...]


def _method(solver: type[diffrax.AbstractSolver]) -> Method:
    if solver is diffrax.Euler:
        return Method((0.0,), ((),), (1.0,))
    tableau = solver.tableau  # type: ignore[attr-defined]
    end = np.trim_zeros(tableau.b_sol, "b").tolist()  # a stage for the error alone is not needed
    rows = ((), *(tuple(row.tolist()) for row in tableau.a_lower))
    return Method((0.0, *tableau.c.tolist())[: len(end)], rows[: len(end)], tuple(end))


_METHODS = {
    solver.__name__: _method(solver)
    for solver in (
        diffrax.Euler,
        diffrax.Heun,
        diffrax.Midpoint,
        diffrax.Ralston,
        diffrax.Bosh3,
    )
}
SOLVERS = tuple(_METHODS)
HORIZONS = ("fixed", "proportional")


def check_solver(name: str) -> str:
    """Returns `name` if jfed can step that solver; raises ConfigError otherwise."""
    other = vars(diffrax).get(name) if isinstance(name, str) else None
    is_solver = isinstance(other, type) and issubclass(other, diffrax.AbstractSolver)
    if is_solver and name not in SOLVERS:
        raise ConfigError(
            f"solver {name!r} of diffrax cannot be stepped at a fixed step here: it is adaptive, "
            "implicit or stochastic, or has many stages. "
            f"Allowed: {', '.join(map(repr, SOLVERS))}."
        )
    return one_of("solver", name, SOLVERS)


def step_size(horizon: str, steps: Count) -> Any:
    """1 / steps on the "fixed" horizon [0, 1], 1 on the "proportional" one [0, steps]."""
    if one_of("horizon", horizon, HORIZONS) == "proportional":
        return 1.0
    # Of no steps none has a size, but it may be computed.
    return 1.0 / (steps if isinstance(steps, int) else jnp.maximum(steps, 1).astype(jnp.float32))


def integrate(
    f: VectorField,
    z: Float[Array, "B H W C"],
    *,
    steps: Count,
    horizon: str,
    solver: str,
    unroll: bool,
    least: int = 0,
    most: int | None = None,
    moments: Moments | None = None,
    sizes: Float[Array, " most"] | None = None,
    largest: Int[Array, ""] | None = None,
    record: bool = False,
) -> tuple[Float[Array, "B H W C"], Moments]:
    """Integrates dz/dt = f(t, z) from t = 0 in `steps` steps.

    The number of steps is static (an int) or data (an int32 scalar). In the latter case one
    compiled program serves all numbers from 0 to `most`, at the cost of the steps that it takes.

    Args:
      f: called as `f(t, z, m)` with a scalar t; returns dz/dt and the moments (a pytree of float32
        arrays) that its norms used. With `m` not None the norms use `m`.
      z: the state at t = 0.
      steps: how many steps; 0 returns z.
      horizon: "fixed" or "proportional", see `step_size`.
      solver: one of `SOLVERS`, by diffrax's name.
      unroll: True traces every step of a static number (mostly faster to run), False loops over
        them (faster to compile).
      least: the smallest number of steps where it is data. From 1 on the last step stands outside
        the loop, where XLA fuses it with what follows.
      most: the largest number of steps where it is data.
      moments: what an earlier call recorded, to be used again, with axes `[most, stages, ...]`.
      sizes: of each step, in place of the horizon's; step k then starts at the sum of those before.
        Those from `steps` on are not used.
      largest: where `steps` is data and differs between the lanes of a `vmap`, see `repeat`.
      record: return the moments of every evaluation. Nothing is learned through them, and where
        `steps` is data, no gradient can be taken.

    Returns:
      The state at the end, and None, or with `record` the moments, with axes `[most, stages, ...]`
      (`[steps, stages, ...]` where `steps` is static), zeros in the steps that were not taken.
    """
    method = _METHODS[check_solver(solver)]
    if (steps if isinstance(steps, int) else most) == 0:
        return z, None
    step = _stepper(f, method, step_size(horizon, steps), moments, sizes)
    if isinstance(steps, int):
        return _static(step, z, steps, unroll, record)
    assert most is not None
    if least == most:
        return _static(step, z, most, unroll, record)
    last = min(least, 1)
    if record:
        assert largest is None
        return _recorded(step, z, steps, most, last)
    before, far = steps - last, None if largest is None else largest - last
    z = repeat(lambda k, z: step(k, z)[0], z, before, most=most - last, largest=far)
    return step(before, z)[0] if last else z, None


def _stepper(
    f: VectorField, method: Method, h: Any, moments: Moments, sizes: Array | None
) -> Callable[[Any, Array], tuple[Array, Moments]]:
    """`step(k, z)`: z after step k, and the moments of its stages, `[stages, ...]`."""
    starts = None if sizes is None else jnp.cumsum(sizes) - sizes

    def step(k: Any, z: Array) -> tuple[Array, Moments]:
        # Here, so that `repeat` computes no gradient of it.
        fixed = h if isinstance(h, float) else jax.lax.stop_gradient(h)
        size = fixed if sizes is None else sizes[k]
        start = jnp.asarray(k, widened(z.dtype)) * fixed if starts is None else starts[k]
        slopes: list[Array] = []
        used = []
        for stage, (time, weights) in enumerate(zip(method.times, method.weights, strict=True)):
            given = jax.tree.map(lambda m, stage=stage: m[k, stage], moments)
            slope, u = f(start + time * size, _moved(z, weights, slopes, size), given)
            slopes.append(slope)
            used.append(jax.lax.stop_gradient(u))
        end = _moved(z, method.end, slopes, size)
        return end, jax.tree.map(lambda *u: jnp.stack(u), *used)

    return step


def _moved(z: Array, weights: tuple[float, ...], slopes: list[Array], size: Any) -> Array:
    """Z a step further along weighted slopes, summed in float32 at least, and rounded as z is."""
    wide = widened(z.dtype)
    terms = [w * size * s.astype(wide) for w, s in zip(weights, slopes, strict=True) if w]
    return (z.astype(wide) + sum(terms[1:], start=terms[0])).astype(z.dtype) if terms else z


def _static(step: Callable, z: Array, steps: int, unroll: bool, record: bool) -> Any:
    if not unroll:

        def body(z: Array, k: Array) -> tuple[Array, Moments]:
            z, used = step(k, z)
            return z, used if record else None

        return jax.lax.scan(body, z, jnp.arange(steps, dtype=jnp.int32))
    found = []
    for k in range(steps):
        z, used = step(k, z)
        found.append(used)
    return z, jax.tree.map(lambda *u: jnp.stack(u), *found) if record else None


def _recorded(
    step: Callable, z: Array, steps: Count, most: int, last: int
) -> tuple[Array, Moments]:
    """As `repeat` and `last` steps after it, with the moments of the steps that were taken."""

    def body(k: Count, carry: Any) -> Any:
        z, moments = carry
        end, used = step(k, z)
        return end, jax.tree.map(lambda m, u: m.at[k].set(u), moments, used)

    shapes = jax.eval_shape(lambda z: step(jnp.zeros((), jnp.int32), z)[1], z)
    moments = jax.tree.map(lambda s: jnp.zeros((most, *s.shape), s.dtype), shapes)
    end = jax.lax.fori_loop(0, steps - last, body, (z, moments))
    return body(steps - 1, end) if last else end
