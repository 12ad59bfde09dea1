"""The ODE block against closed forms, hand-written recurrences and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from jfed.errors import ConfigError
from jfed.models.integration import SOLVERS, check_solver, integrate, step_size
from jfed.models.layers import Style
from jfed.models.ode_nets import ODEFunction, ODENetConfig

ORDERS = {"Euler": 1, "Heun": 2, "Midpoint": 2, "Ralston": 2, "Bosh3": 3}
MATRIX = np.array([[-0.3, 1.0], [-1.0, -0.2]])


def _solve(f, z, moments=None, **options):
    options = {"horizon": "fixed", "solver": "Euler", "unroll": True} | options
    return jax.jit(lambda z, m: integrate(f, z, moments=m, **options))(z, moments)


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence_on_a_linear_system(solver):
    """dz/dt = cos(t) A z, whose solution is expm(sin(t) A) z."""
    z0 = np.array([1.0, 0.5])
    exact = scipy.linalg.expm(np.sin(1.0) * MATRIX) @ z0

    def field(t, z, _):
        return jnp.cos(jnp.asarray(t, z.dtype)) * (z @ jnp.asarray(MATRIX.T)), None

    def error(steps):
        z = jnp.asarray(z0).reshape(1, 1, 1, 2)
        end, _ = _solve(field, z, steps=steps, solver=solver, unroll=False)
        return np.abs(np.asarray(end).ravel() - exact).max()

    with jax.enable_x64(True):
        order = np.log2(error(16) / error(32))
    assert order == pytest.approx(ORDERS[solver], abs=0.25)


def _ode_function(channels, dtype="float32"):
    config = ODENetConfig()
    return ODEFunction(channels, config, Style(dtype=dtype), nnx.Rngs(0))


@pytest.mark.parametrize("unroll", [True, False])
def test_euler_with_step_1_is_the_tied_resnet_recurrence(unroll):
    f = _ode_function(4)
    z = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))
    end, _ = _solve(
        lambda t, z, m: f(t, z, None, m), z, steps=3, horizon="proportional", unroll=unroll
    )
    step = jax.jit(lambda t, z: z + f(t, z, None, None)[0])
    expected = z
    for k in range(3):
        expected = step(float(k), expected)
    np.testing.assert_allclose(end, expected, rtol=2e-5, atol=2e-5)


def test_euler_on_the_fixed_horizon_takes_steps_of_one_over_c():
    z = jnp.ones((1, 1, 1, 1))
    end, _ = _solve(lambda t, z, m: (z, None), z, steps=4)
    assert end.item() == pytest.approx((1 + 1 / 4) ** 4)
    assert step_size("fixed", 4) == 0.25
    assert step_size("proportional", 4) == 1.0


@pytest.mark.parametrize("solver", ["Euler", "Heun"])
@pytest.mark.parametrize("unroll", [True, False])
def test_given_step_sizes_follow_one_another_in_time(solver, unroll):
    sizes, z = np.array([0.5, 0.2, 1.0]), 1.5

    def field(t, z):
        return (t + 1) * z

    expected, t = z, 0.0
    for h in sizes:
        slope = field(t, expected)
        if solver == "Heun":
            slope = (slope + field(t + h, expected + h * slope)) / 2
        expected, t = expected + h * slope, t + h

    def end(h):
        start = jnp.full((1, 1, 1, 1), z)
        return integrate(
            lambda t, z, m: (field(t, z), None),
            start,
            steps=3,
            horizon="fixed",
            solver=solver,
            unroll=unroll,
            sizes=h,
        )[0].sum()

    given = jnp.asarray(sizes, jnp.float32)
    assert jax.jit(end)(given) == pytest.approx(expected, rel=1e-5)
    gradient = np.asarray(jax.jit(jax.grad(end))(given))
    for k in range(3):
        push = 1e-2 * np.eye(3, dtype=np.float32)[k]
        slope = (end(given + push) - end(given - push)) / 2e-2
        assert gradient[k] == pytest.approx(float(slope), rel=1e-2)


def test_no_iterations_leave_the_state_alone():
    z = jnp.ones((1, 2, 2, 3))
    end, moments = _solve(lambda t, z, m: (z, None), z, steps=0)
    np.testing.assert_array_equal(end, z)
    assert moments is None


@pytest.mark.parametrize("solver", ["Euler", "Heun"])
def test_gradients_equal_finite_differences_in_float64(solver):
    with jax.enable_x64(True):
        f = _ode_function(3, dtype="float64")
        graph, state = nnx.split(f)
        state = jax.tree.map(lambda x: x.astype(jnp.float64), state)
        z = jax.random.normal(jax.random.key(1), (2, 4, 4, 3), jnp.float64)
        weights = jax.random.normal(jax.random.key(2), z.shape, jnp.float64)

        def loss(state, z):
            def field(t, z, m):
                return nnx.merge(graph, state)(t, z, None, m)

            end, _ = _solve(field, z, steps=2, solver=solver, unroll=False)
            return (end * weights).sum()

        loss = jax.jit(loss)
        gradient = jax.grad(loss, argnums=(0, 1))(state, z)
        for seed in range(3):
            direction = jax.tree.map(
                lambda x, seed=seed: jax.random.normal(jax.random.key(seed), x.shape, x.dtype),
                (state, z),
            )
            moved = [
                loss(*jax.tree.map(lambda x, d, e=e: x + e * d, (state, z), direction))
                for e in (1e-6, -1e-6)
            ]
            slope = sum(
                (g * d).sum()
                for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
            )
            np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize(("solver", "unroll"), [*((s, False) for s in SOLVERS), ("Heun", True)])
def test_moments_are_those_of_each_evaluation_and_can_be_used_again(solver, unroll):
    """The field reports the mean of its input, and adds what it reports or was given."""

    def field(t, z, given):
        used = z.mean((0, 1, 2)) if given is None else given
        return jnp.sin(z) + 0.1 * used[None, None, None], used

    z = jax.random.normal(jax.random.key(0), (2, 3, 3, 2))
    end, moments = _solve(field, z, steps=3, solver=solver, unroll=unroll)
    assert moments.shape[0] == 3
    again, same = _solve(field, z, steps=3, solver=solver, unroll=unroll, moments=moments)
    np.testing.assert_allclose(again, end, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(same, moments, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments[0, 0], z.mean((0, 1, 2)), rtol=1e-5)
    other, _ = _solve(field, z, steps=3, solver=solver, unroll=unroll, moments=moments + 1.0)
    assert np.abs(other - end).max() > 0.05


def test_euler_moments_are_the_means_along_the_trajectory():
    z = jnp.full((1, 1, 1, 1), 2.0)
    _, moments = _solve(lambda t, z, m: (-z, z.mean((0, 1, 2))), z, steps=4)
    np.testing.assert_allclose(moments.ravel(), 2.0 * 0.75 ** np.arange(4), rtol=1e-6)


def test_unknown_and_unsuitable_solvers_are_refused():
    with pytest.raises(ConfigError, match=r"unknown solver 'Eulr'. Did you mean 'Euler'"):
        check_solver("Eulr")
    with pytest.raises(ConfigError, match="'Kvaerno3' of diffrax cannot be stepped"):
        check_solver("Kvaerno3")
    with pytest.raises(ConfigError, match="unknown horizon 'fix'"):
        step_size("fix", 2)
