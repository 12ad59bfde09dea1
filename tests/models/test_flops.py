"""Operation counts against published ones and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jfed.models import Model, build, preset
from jfed.models.flops import forward_flops


def _flops(name, **changes):
    model = build(dataclasses.replace(preset(name), **changes))
    return forward_flops(model, jax.eval_shape(model.init, jax.random.key(0)), (32, 32, 3))


def test_resnet_20_needs_the_known_multiply_adds():
    """He et al.'s CIFAR ResNet-20: 40.55 million multiply-adds."""
    assert _flops("resnet-20") / 2e6 == pytest.approx(40.55, abs=0.01)


def test_scanned_and_unrolled_networks_need_the_same():
    assert _flops("odenet-20", unroll=True) == _flops("odenet-20", unroll=False)


def test_each_iteration_costs_the_same():
    zero, one, three = (_flops("odenet-20", iterations=c, unroll=False) for c in (0, 1, 3))
    assert three - zero == 3 * (one - zero) > 0


@pytest.mark.parametrize(("solver", "evaluations"), [("Midpoint", 2), ("Heun", 2)])
def test_a_solver_costs_its_evaluations(solver, evaluations):
    """And the sums of its stages, which are products with its tableau: a few percent."""
    changes = {"iterations": 2, "unroll": False}
    zero = _flops("odenet-20", iterations=0)
    euler, other = _flops("odenet-20", **changes), _flops("odenet-20", solver=solver, **changes)
    assert evaluations <= (other - zero) / (euler - zero) < 1.03 * evaluations


def test_products_and_loops_are_counted_by_hand():
    def apply(params, images):
        x = images.reshape(images.shape[0], -1)
        x, _ = jax.lax.scan(lambda x, _: (x @ params["square"], None), x, None, length=5)
        return x @ params["out"]

    model = Model(lambda key: {"square": jnp.zeros((12, 12)), "out": jnp.zeros((12, 10))}, apply)
    assert forward_flops(model, model.init(None), (2, 2, 3)) == 2 * (5 * 12 * 12 + 12 * 10)
