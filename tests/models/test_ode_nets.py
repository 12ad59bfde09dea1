"""ODENets whose iterations are scanned, or data: the same gradients, and what they keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.models.ode_nets import Depth, ODENetConfig, odenet

SCANNED = ODENetConfig(widths=(3,), iterations=2, channels=1, classes=3, unroll=False)
IMAGES = jax.random.normal(jax.random.key(1), (5, 6, 6, 1))
MASK = jnp.array([1.0, 1, 1, 1, 0])


def _gradient(config):
    """The gradient of a loss as a function of the parameters, and parameters."""
    model = odenet(config)
    params = model.init(jax.random.key(0))
    arguments = (IMAGES, MASK) if config.norm == "batch" else (IMAGES,)
    return jax.grad(lambda p: jnp.square(model.apply(p, *arguments)).mean()), params


@pytest.mark.parametrize(
    "options",
    [
        {"separable": True},
        {"norm": "group"},
        {"function": "postactivation", "gain": 2.0, "learn_steps": True, "solver": "Heun"},
    ],
    ids=str,
)
def test_gradients_of_scanned_and_traced_iterations_are_equal(options):
    scanned = dataclasses.replace(SCANNED, **options)
    traced = dataclasses.replace(scanned, unroll=True)
    found, expected = (jax.jit(f)(p) for f, p in map(_gradient, (scanned, traced)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 2),
        ({"norm": "group"}, 2),
        ({"separable": True}, 4),
        ({"dtype": "bfloat16"}, 2),
        ({"function": "postactivation"}, 3),
    ],
    ids=str,
)
def test_a_scans_gradient_keeps_the_state_the_convolutions_and_the_moments(options, kept):
    """What norms and relus give is computed again; the last convolution's output is not needed."""
    gradient, params = _gradient(dataclasses.replace(SCANNED, **options))
    forward, backward = (
        e for e in jax.make_jaxpr(gradient)(params).eqns if e.primitive.name == "scan"
    )
    stacked = [v.aval.shape for v in forward.outvars[1:]]  # after the state
    size = np.prod((SCANNED.iterations, *IMAGES.shape[:3], *SCANNED.widths))
    assert len([shape for shape in stacked if np.prod(shape) == size]) == kept
    assert sum(map(np.prod, stacked)) < (kept + 0.5) * size
    assert "square" in str(forward)  # of the variances
    assert "square" not in str(backward)


def _temporary_bytes(config, steps):
    """What the gradient needs beside its arguments and results, where steps are data."""
    params = odenet(config).init(jax.random.key(0))

    def loss(params, steps):
        model = odenet(config, Depth((steps,)))
        return jnp.square(model.apply(params, jnp.zeros((1, 2, 2, 1)), jnp.ones(1))).mean()

    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.int32(steps)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("learn_steps", [False, True])
def test_the_gradient_of_counted_steps_keeps_no_kernel_for_each(learn_steps):
    width = 64  # so that a kernel, 9 * 65 * 64 numbers, is much more than the state, 2 * 2 * 64
    config = dataclasses.replace(
        SCANNED, widths=(width,), iterations=2, conv="transposed", learn_steps=learn_steps
    )
    few, many = (
        _temporary_bytes(dataclasses.replace(config, iterations=most), 2) for most in (2, 10)
    )
    kernel = 4 * 9 * (width + 1) * width
    assert (many - few) / 8 < kernel / 4


@pytest.mark.parametrize(
    ("least", "options"),
    [
        pytest.param(
            (0, 0),
            {"horizon": "proportional", "solver": "Midpoint", "norm": "group"},
            marks=pytest.mark.slow,
        ),
        ((0, 0), {"learn_steps": True, "function": "postactivation"}),
        ((2, 3), {}),
        pytest.param((0, 0), {"separable": True, "solver": "Bosh3"}, marks=pytest.mark.slow),
        pytest.param((0, 0), {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_program_of_all_counts_is_each_static_network(least, options):
    form = "auto" if "separable" in options else "transposed"
    config = dataclasses.replace(SCANNED, widths=(3, 4), iterations=(4, 3), conv=form, **options)
    whole = odenet(config)
    params = whole.init(jax.random.key(0))
    arguments = (IMAGES, MASK) if config.norm == "batch" else (IMAGES,)

    def run(params, depth, config=config):
        model = odenet(config, depth)
        square = lambda p: jnp.square(model.apply(p, *arguments)).mean()  # noqa: E731
        logits = model.apply(params, *arguments)
        moments = None if model.measure is None else model.measure(params, IMAGES, MASK)
        given = None if moments is None else model.apply(params, IMAGES, None, moments)
        return logits, jax.grad(square)(params), moments, given

    counted = jax.jit(lambda params, steps: run(params, Depth(steps, least=least)))
    compiled = counted.lower(params, (jnp.int32(0), jnp.int32(0))).compile()
    for steps in ((4, 3), (2, 3)) if any(least) else ((0, 0), (4, 3), (1, 2), (3, 0)):
        found = compiled(params, tuple(map(jnp.int32, steps)))
        depth = Depth(steps)
        logits, gradient, moments, given = jax.jit(lambda p, d=depth: run(p, d))(params)
        expected = (logits, gradient, _padded(moments, found[2]), given)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected
        )


def _padded(moments, like):
    """Moments of static steps, with zeros for those of the longest, as those of counted steps."""
    if moments is None:
        return None
    padded = {}
    for name, mine in moments.items():
        if mine is None:  # of no steps
            padded[name] = jax.tree.map(jnp.zeros_like, like[name])
        else:
            padded[name] = jax.tree.map(_to_length, mine, like[name])
    return padded


def _to_length(x, like):
    if x.ndim < 3:
        return x
    return jnp.pad(x, ((0, len(like) - len(x)), *((0, 0),) * (x.ndim - 1)))
