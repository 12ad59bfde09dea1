"""The ODE block against closed forms, hand-written recurrences and finite differences."""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from jfed.errors import ConfigError
from jfed.models.integration import SOLVERS, check_solver, integrate, step_size
from jfed.models.layers import Style
from jfed.models.norms import shares_of
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


EQUAL = shares_of(None)


def _ode_function(channels, dtype="float32"):
    config = ODENetConfig()
    return ODEFunction(channels, config, Style(dtype=dtype), nnx.Rngs(0))


@pytest.mark.parametrize("unroll", [True, False])
def test_euler_with_step_1_is_the_tied_resnet_recurrence(unroll):
    f = _ode_function(4)
    rest = f.prepare((5, 5))
    z = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))
    end, _ = _solve(
        lambda t, z, m: f(t, z, EQUAL, m, rest), z, steps=3, horizon="proportional", unroll=unroll
    )
    step = jax.jit(lambda t, z: z + f(t, z, EQUAL, None, rest)[0])
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
        shares = EQUAL

        def loss(state, z):
            def field(t, z, m):
                function = nnx.merge(graph, state)
                return function(t, z, shares, m, function.prepare((4, 4)))

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
    end, moments = _solve(field, z, steps=3, solver=solver, unroll=unroll, record=True)
    assert moments.shape[0] == 3
    options = {"steps": 3, "solver": solver, "unroll": unroll, "record": True}
    again, same = _solve(field, z, moments=moments, **options)
    np.testing.assert_allclose(again, end, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(same, moments, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments[0, 0], z.mean((0, 1, 2)), rtol=1e-5)
    other, _ = _solve(field, z, moments=moments + 1.0, **options)
    assert np.abs(other - end).max() > 0.05


def test_euler_moments_are_the_means_along_the_trajectory():
    z = jnp.full((1, 1, 1, 1), 2.0)
    _, moments = _solve(lambda t, z, m: (-z, z.mean((0, 1, 2))), z, steps=4, record=True)
    np.testing.assert_allclose(moments.ravel(), 2.0 * 0.75 ** np.arange(4), rtol=1e-6)


def test_unknown_and_unsuitable_solvers_are_refused():
    with pytest.raises(ConfigError, match=r"unknown solver 'Eulr'. Did you mean 'Euler'"):
        check_solver("Eulr")
    with pytest.raises(ConfigError, match="'Kvaerno3' of diffrax cannot be stepped"):
        check_solver("Kvaerno3")
    with pytest.raises(ConfigError, match="unknown horizon 'fix'"):
        step_size("fix", 2)


def _field(t, z, given):
    used = z.mean((0, 1, 2)) if given is None else given
    return jnp.sin(z) * (1 + jnp.asarray(t, z.dtype)) + 0.1 * used[None, None, None], used


STATE = jax.random.normal(jax.random.key(3), (2, 3, 3, 2))
MOST = 4
COUNTED = {"most": MOST, "unroll": False}


@pytest.mark.parametrize("horizon", ["fixed", "proportional"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_are_those_of_diffrax(solver, horizon):
    """Static counts and counts that are data, which one program serves."""
    theirs = getattr(diffrax, solver)()
    term = diffrax.ODETerm(lambda t, z, _: _field(t, z, None)[0])

    @jax.jit
    def step(start, end, z):
        state = theirs.init(term, start, end, z, None)
        return theirs.step(term, start, end, z, None, state, False)[0]

    @jax.jit
    def counted(z, steps):
        return integrate(_field, z, steps=steps, horizon=horizon, solver=solver, **COUNTED)[0]

    compiled = counted.lower(STATE, jnp.int32(0)).compile()
    for steps in (0, 1, 3, MOST):
        ends = np.linspace(0, 1 if horizon == "fixed" else steps, steps + 1, dtype=np.float32)
        expected = STATE
        for start, end in itertools.pairwise(ends):
            expected = step(start, end, expected)
        static, _ = _solve(_field, STATE, steps=steps, horizon=horizon, solver=solver)
        np.testing.assert_allclose(static, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            compiled(STATE, jnp.int32(steps)), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_moments_of_counted_steps_are_those_of_static_ones(solver):
    options = {"horizon": "fixed", "solver": solver, "record": True}

    @jax.jit
    def counted(z, steps, moments):
        return integrate(_field, z, steps=steps, moments=moments, **COUNTED, **options)

    for steps in (1, 3):
        end, moments = _solve(_field, STATE, steps=steps, **options)
        found_end, found = counted(STATE, jnp.int32(steps), None)
        np.testing.assert_allclose(found_end, end, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[:steps], moments, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[steps:], np.zeros_like(found[steps:]))
        again, _ = counted(STATE, jnp.int32(steps), found + 1.0)
        expected, _ = _solve(_field, STATE, steps=steps, moments=moments + 1.0, **options)
        np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-5)


def _gradient(weights, z, sizes, steps, largest=None, **options):
    """Of a sum over the end, with respect to what the field closes over, the state, the sizes."""

    def loss(weights, z, sizes):
        def field(t, z, given):
            return jnp.tanh(z @ weights) * (1 + jnp.asarray(t, z.dtype)), None

        options_ = {"horizon": "fixed", "solver": "Heun", "sizes": sizes} | options
        return jnp.square(integrate(field, z, steps=steps, largest=largest, **options_)[0]).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(weights, z, sizes)


WEIGHTS = jax.random.normal(jax.random.key(4), (2, 2))
SIZES = jnp.asarray([0.5, 0.2, 0.4, 0.3])


def _assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("least", [0, 1, MOST])
def test_counted_steps_have_the_gradient_of_static_ones(least):
    counted = jax.jit(lambda n: _gradient(WEIGHTS, STATE, SIZES, n, least=least, **COUNTED))
    compiled = counted.lower(jnp.int32(0)).compile()
    for steps in [n for n in (0, 1, 3, MOST) if n >= least]:
        static = jax.jit(lambda n=steps: _gradient(WEIGHTS, STATE, SIZES, n, unroll=True))()
        _assert_close(compiled(jnp.int32(steps)), static)


@pytest.mark.parametrize("least", [0, 1])
def test_lanes_of_different_counts_are_each_as_alone(least):
    counts = jnp.asarray([3, least, 1, 2, 3])  # none as large as the program could serve
    states = jax.random.normal(jax.random.key(5), (5, *STATE.shape))

    def one(z, steps, largest):
        return _gradient(WEIGHTS, z, SIZES, steps, largest, least=least, **COUNTED)

    run = jax.jit(jax.vmap(one, (0, 0, None)))
    alone = jax.jit(lambda z, steps: _gradient(WEIGHTS, z, SIZES, steps, **COUNTED))
    expected = [alone(z, steps) for z, steps in zip(states, counts, strict=True)]
    for largest in (3, MOST):
        found = run(states, counts, jnp.int32(largest))
        _assert_close(found, jax.tree.map(lambda *x: jnp.stack(x), *expected))


def test_infinite_values_beyond_a_count_do_not_leak():
    """A lane whose own steps are over runs on into a field that is infinite there."""
    sizes = jnp.asarray([0.5, 0.2, jnp.inf, jnp.inf])
    counts = jnp.asarray([2, 1, 0])
    run = jax.jit(
        jax.vmap(
            lambda steps, largest: _gradient(WEIGHTS, STATE, sizes, steps, largest, **COUNTED),
            (0, None),
        )
    )
    found = run(counts, jnp.int32(MOST))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    for lane, steps in enumerate((2, 1, 0)):
        expected = jax.jit(lambda n=steps: _gradient(WEIGHTS, STATE, SIZES, n, unroll=True))()
        _assert_close(jax.tree.map(lambda x, i=lane: x[i], found), expected)
