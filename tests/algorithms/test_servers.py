"""The server's step against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed.algorithms.servers import (
    ServerConfig,
    ServerState,
    make_server_optimizer,
    make_server_step,
)
from jfed.engine.merging import TierUpdate
from jfed.errors import ConfigError
from jfed.models import Model
from jfed.tiers import Tier

TIER = Tier("full", Model(lambda key: jnp.zeros(2), lambda params, x: x))


def _step(config, updates):
    optimizer = make_server_optimizer(config)
    state = ServerState(jnp.array([1.0, 2.0]), optimizer.init(jnp.zeros(2)))
    step = make_server_step([TIER], optimizer)
    for total, weight in updates:
        state, finite = step(state, [TierUpdate(jnp.asarray(total), jnp.float32(weight))])
        assert finite
    return np.asarray(state.variables)


def test_fedavg_adds_the_mean_update():
    moved = _step(ServerConfig(), [([3.0, 6.0], 3.0)])
    np.testing.assert_allclose(moved, [2.0, 4.0])


def test_server_momentum_goes_on_in_the_direction_of_the_last_update():
    moved = _step(ServerConfig(momentum=0.5), [([1.0, 0.0], 1.0), ([0.0, 1.0], 1.0)])
    np.testing.assert_allclose(moved, [2.5, 3.0])


@jax.numpy_dtype_promotion("standard")  # Optax's Adam raises a float to an integer power
def test_fedadam_is_optax_adam_on_the_negative_update():
    moved = _step(ServerConfig("adam", learning_rate=0.1), [([4.0, -8.0], 2.0)])
    adam = optax.adam(0.1)
    change, _ = adam.update(-jnp.array([2.0, -4.0]), adam.init(jnp.zeros(2)))
    np.testing.assert_allclose(moved, np.array([1.0, 2.0]) + change, rtol=1e-6)


def test_a_round_in_which_nobody_delivers_changes_nothing():
    np.testing.assert_array_equal(_step(ServerConfig(), [([0.0, 0.0], 0.0)]), [1.0, 2.0])


def test_what_nobody_owns_stays_although_the_optimizer_remembers():
    half = Tier("half", TIER.model, lambda v, r: v[:1])
    optimizer = make_server_optimizer(ServerConfig(momentum=0.9))
    state = ServerState(jnp.array([1.0, 2.0]), optimizer.init(jnp.zeros(2)))
    step = make_server_step([TIER, half], optimizer)
    both, nothing = TierUpdate(jnp.ones(2), jnp.float32(1)), jnp.float32(0)
    state, _ = step(state, [both, TierUpdate(jnp.zeros(1), nothing)])
    np.testing.assert_allclose(state.variables, [2.0, 3.0])
    state, _ = step(state, [TierUpdate(jnp.zeros(2), nothing), TierUpdate(jnp.ones(1), 1.0)])
    np.testing.assert_allclose(state.variables, [3.9, 3.0])


def test_variables_that_are_not_finite_are_told():
    optimizer = make_server_optimizer(ServerConfig())
    step = make_server_step([TIER], optimizer)
    state = ServerState(jnp.zeros(2), optimizer.init(jnp.zeros(2)))
    _, finite = step(state, [TierUpdate(jnp.array([1.0, jnp.inf]), jnp.float32(1))])
    assert not finite


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sdg"},
        {"learning_rate": -1.0},
        {"momentum": float("inf")},
        {"momentum": 1.0},
        {"optimizer": "lbfgs"},
    ],
    ids=str,
)
def test_bad_settings_are_quoted(changes):
    with pytest.raises(ConfigError, match=str(next(iter(changes.values())))):
        ServerConfig(**changes)
