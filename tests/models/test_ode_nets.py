"""ODENets whose iterations are scanned: the same gradients, and what they keep for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.models.ode_nets import ODENetConfig, odenet

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
    stacked = [v.aval.shape for v in forward.outvars[forward.params["num_carry"] :]]
    size = np.prod((SCANNED.iterations, *IMAGES.shape[:3], *SCANNED.widths))
    assert len([shape for shape in stacked if np.prod(shape) == size]) == kept
    assert sum(map(np.prod, stacked)) < (kept + 0.5) * size
    assert "square" in str(forward)  # of the variances
    assert "square" not in str(backward)
