"""ODENets whose iterations are scanned: the same gradients, and what they keep for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.models.odenet import ODENetConfig, odenet

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


@pytest.mark.parametrize(("separable", "norm", "kept"), [
    (False, "batch", 2),
    (False, "group", 2),
    (True, "batch", 4),
])  # fmt: skip
def test_a_scan_keeps_the_state_and_each_convolution_but_the_last(separable, norm, kept):
    """Not what norms and relus give: that is computed again from the convolutions."""
    gradient, params = _gradient(dataclasses.replace(SCANNED, separable=separable, norm=norm))
    forward, _ = (e for e in jax.make_jaxpr(gradient)(params).eqns if e.primitive.name == "scan")
    stacked = forward.outvars[forward.params["num_carry"] :]
    maps = [v.aval.shape for v in stacked if v.aval.shape[1:] == (*IMAGES.shape[:3], 3)]
    assert len(maps) == kept
    assert sum(np.prod(v.aval.shape) for v in stacked) < (kept + 0.5) * np.prod(maps[0])
