"""Fixed-step integration of an ODE block with diffrax's solvers.

The number of steps is static and the solver is stepped by hand (`solver.step`), so that gradients
are the exact gradients of the discretisation: solving the ODE backwards in time loses accuracy
(Gholami et al. 2019, ANODE, arXiv 1902.10298).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jfed.errors import ConfigError, one_of

Moments = Any  # a pytree of arrays: what the norms of one evaluation of f measured, or should use
VectorField = Callable[[Any, Array, Moments | None], tuple[Array, Moments]]

# Explicit one-step methods whose stages lie at different times within a step; that time tells which
# stage's norm statistics an evaluation of f uses (diffrax does not pass the stage on).
_SOLVERS: dict[str, tuple[type[diffrax.AbstractSolver], tuple[float, ...]]] = {
    "Euler": (diffrax.Euler, (0.0,)),
    **{
        solver.__name__: (solver, (0.0, *np.asarray(solver.tableau.c).tolist()))
        for solver in (diffrax.Heun, diffrax.Midpoint, diffrax.Ralston, diffrax.Bosh3)
    },
}
SOLVERS = tuple(_SOLVERS)
HORIZONS = ("fixed", "proportional")


class _State(NamedTuple):
    """What diffrax integrates: z, and beside it the integral of the norms' moments.

    The latter is a way to get each stage's moments out of `solver.step`: its derivative is what f
    measured.
    """

    z: Float[Array, "B H W C"]
    moments: Moments


def check_solver(name: str) -> str:
    """Returns `name` if jfed can step that solver; raises ConfigError otherwise."""
    other = vars(diffrax).get(name) if isinstance(name, str) else None
    is_solver = isinstance(other, type) and issubclass(other, diffrax.AbstractSolver)
    if is_solver and name not in SOLVERS:
        raise ConfigError(
            f"solver {name!r} of diffrax cannot be stepped at a fixed step here: it is adaptive, "
            "implicit, stochastic, or evaluates f twice at one time. "
            f"Allowed: {', '.join(map(repr, SOLVERS))}."
        )
    return one_of("solver", name, SOLVERS)


def step_size(horizon: str, steps: int) -> float:
    """1 / steps on the "fixed" horizon [0, 1], 1 on the "proportional" one [0, steps]."""
    return 1.0 / steps if one_of("horizon", horizon, HORIZONS) == "fixed" else 1.0


def integrate(
    f: VectorField,
    z: Float[Array, "B H W C"],
    *,
    steps: int,
    horizon: str,
    solver: str,
    unroll: bool,
    moments: Moments | None = None,
    sizes: Float[Array, " steps"] | None = None,
) -> tuple[Float[Array, "B H W C"], Moments]:
    """Integrates dz/dt = f(t, z) from t = 0 in `steps` steps.

    Args:
      f: called as `f(t, z, m)` with a scalar t; returns dz/dt and the moments (a pytree of float32
        arrays) that its norms used. With `m` not None the norms use `m`.
      z: the state at t = 0.
      steps: how many steps; 0 returns z.
      horizon: "fixed" or "proportional", see `step_size`.
      solver: one of `SOLVERS`, by diffrax's name.
      unroll: True traces every step (mostly faster to run), False scans over them (faster to
        compile).
      moments: what an earlier call returned, to be used again, with axes `[steps, stages, ...]`.
      sizes: of each step, in place of the horizon's; step k then starts at the sum of those before.

    Returns:
      The state at the end, and the moments of each evaluation, with axes `[steps, stages, ...]`.
    """
    if steps == 0:
        return z, None
    kind, times = _SOLVERS[check_solver(solver)]
    # The default loop over a solver's stages, diffrax's checkpointed one, fails under `shard_map`.
    method = kind() if kind is diffrax.Euler else kind(scan_kind="bounded")
    dt = step_size(horizon, steps)
    term = diffrax.ODETerm(_stage_field(f, times))
    zeros = _zero_moments(f, z)

    def step(carry: Any, inputs: Any) -> Any:
        z, solver_state = carry
        t, h, given = inputs
        h = dt if h is None else h
        y = _State(z, zeros)
        args = (t, h, given)
        y1, _, dense, solver_state, _ = method.step(
            term, t, t + h, y, args, solver_state, made_jump=False
        )
        return (y1.z, solver_state), _stage_moments(dense, h)

    first = None if moments is None else jax.tree.map(lambda m: m[0], moments)
    start = method.init(term, 0.0, dt, _State(z, zeros), (0.0, dt, first))
    if unroll:
        carry, used = (z, start), []
        for i in range(steps):
            given = None if moments is None else jax.tree.map(lambda m, i=i: m[i], moments)
            at = (i * dt, None) if sizes is None else (sizes[:i].sum(), sizes[i])
            carry, u = step(carry, (*at, given))
            used.append(u)
        return carry[0], jax.tree.map(lambda *u: jnp.stack(u), *used)
    t = jnp.arange(steps, dtype=z.dtype) * dt if sizes is None else jnp.cumsum(sizes) - sizes
    (z, _), stacked = jax.lax.scan(step, (z, start), (t, sizes, moments))
    return z, stacked


def _stage_field(f: VectorField, times: tuple[float, ...]) -> Callable:
    """F as diffrax calls it, with the moments of the stage that the time belongs to."""

    def field(t: Any, y: _State, args: Any) -> _State:
        step_start, h, given = args
        if given is not None:
            distance = jnp.abs((t - step_start) / h - np.asarray(times, dtype=np.float32))
            stage = jnp.argmin(distance)
            given = jax.tree.map(lambda m: m[stage], given)
        dz, used = f(t, y.z, given)
        # Nothing is learned through the record of the moments, so it must not cost a backward pass.
        return _State(dz, jax.lax.stop_gradient(used))

    return field


def _zero_moments(f: VectorField, z: Array) -> Moments:
    _, shapes = jax.eval_shape(lambda z: f(jnp.zeros((), z.dtype), z, None), z)
    return jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes)


def _stage_moments(dense: dict[str, Any], dt: Any) -> Moments:
    """The moments of each stage of one step, `[stages, ...]`; the solver recorded dt times them."""
    if "k" in dense:
        return jax.tree.map(lambda k: k / dt, dense["k"].moments)
    return jax.tree.map(lambda m: m[None] / dt, dense["y1"].moments)
