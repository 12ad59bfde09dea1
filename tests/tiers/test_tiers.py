"""Tiers and the merge of their updates, against NumPy and by property tests."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfed import tiers as tiers_lib
from jfed.engine.merging import TierUpdate, merge
from jfed.errors import ConfigError
from jfed.models import Model, ODENetConfig
from jfed.models.model import initialise
from jfed.tiers import Tier, Tiers, assign
from jfed.tiers.communication import traffic

CONFIG = ODENetConfig(widths=(4, 8), channels=1)
MODEL = Model(lambda key: {"a": jnp.zeros((4, 3)), "b": jnp.zeros(5)}, lambda params, x: x)

# A slice of channels, everything, and a subset of leaves.
TIERS = (
    Tier("slice", MODEL, lambda v, r: {"a": v["a"][:2, :1], "b": v["b"][:3]}),
    Tier("all", MODEL),
    Tier("b", MODEL, lambda v, r: {"b": v["b"][1:]}),
)


def _variables(seed):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=5), jnp.float32),
    }


@pytest.mark.parametrize("tier", TIERS, ids=lambda t: t.name)
def test_extract_and_embed_are_inverse_where_owned(tier):
    variables = _variables(0)
    local = tier.extract(variables, 0)
    embedded, owned = tier.embed(local, variables), tier.owned(variables)
    jax.tree.map(
        lambda e, v, o: np.testing.assert_array_equal(e, v * o), embedded, variables, owned
    )
    jax.tree.map(np.testing.assert_array_equal, tier.extract(embedded, 0), local)


def _numpy_merge(clients, like):
    """For each entry the weighted mean over the clients that own it; 0 where nobody does."""
    masks = {
        "slice": {"a": np.zeros((4, 3)), "b": np.array([1, 1, 1, 0, 0])},
        "all": {"a": np.ones((4, 3)), "b": np.ones(5)},
        "b": {"a": np.zeros((4, 3)), "b": np.array([0, 1, 1, 1, 1])},
    }
    masks["slice"]["a"][:2, :1] = 1
    merged = {}
    for leaf in like:
        total, weight = np.zeros(like[leaf].shape), np.zeros(like[leaf].shape)
        for name, w, update in clients:
            total += w * masks[name][leaf] * update[leaf]
            weight += w * masks[name][leaf]
        merged[leaf] = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return merged


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(1, 100), st.integers(0, 99)), min_size=1, max_size=8
    ),
    st.randoms(),
)
def test_merge_equals_numpy_whatever_the_order_of_clients(clients, shuffler):
    like = _variables(0)
    named = [(TIERS[t].name, w, jax.tree.map(np.asarray, _variables(s))) for t, w, s in clients]
    expected = _numpy_merge(named, like)
    for _ in range(2):
        shuffler.shuffle(clients)
        updates = []
        for index, tier in enumerate(TIERS):
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tier.shapes(like))
            mine = [(w, s) for t, w, s in clients if t == index]
            for w, s in mine:
                local = tier.extract(_variables(s), 0)
                total = jax.tree.map(lambda x, u, w=w: x + np.float32(w) * u, total, local)
            updates.append(TierUpdate(total, jnp.float32(sum(w for w, _ in mine))))
        merged, _ = merge(like, TIERS, updates)
        jax.tree.map(
            lambda m, e: np.testing.assert_allclose(m, e, rtol=1e-4, atol=1e-5), merged, expected
        )


def test_an_entry_that_nobody_owns_does_not_move():
    like = _variables(0)
    update = TierUpdate(TIERS[2].extract(_variables(1), 0), jnp.float32(1.0))
    merged, weight = merge(like, TIERS[2:], [update])
    assert not np.any(weight["a"])
    np.testing.assert_array_equal(merged["a"], np.zeros((4, 3)))
    np.testing.assert_array_equal(merged["b"][0], 0.0)
    np.testing.assert_array_equal(merged["b"][1:], update.total["b"])


def test_ode_tiers_share_every_weight():
    tiers = tiers_lib.ode(CONFIG, (1, (2, 4)))
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    assert [tier.name for tier in tiers.members] == ["1", "2-4"]
    for tier in tiers.members:
        assert jax.tree.structure(tier.shapes(like)) == jax.tree.structure(like)
        assert all(np.all(o == 1) for o in jax.tree.leaves(tier.owned(like)))


def test_norms_per_depth_belong_to_their_tier():
    tiers = tiers_lib.ode(CONFIG, (1, 2, 4), sharing="norms-per-depth")
    shared = tiers_lib.ode(CONFIG, (1, 2, 4))
    variables = initialise(tiers.init, jax.random.key(0))
    alone = initialise(shared.init, jax.random.key(0))
    assert not any("norm" in name for name in variables["shared"])
    for position, tier in enumerate(tiers.members):
        local = tier.extract(variables, 0)
        jax.tree.map(np.testing.assert_array_equal, local, alone)
        owned = tier.owned(variables)
        assert all(np.all(o == 1) for o in owned["shared"].values())
        for name, norms in owned["own"].items():
            assert all("norm" in path for path in norms)
            assert all(np.all(np.asarray(o) == (name == tier.name)) for o in norms.values())
        assert traffic(tier, variables) == traffic(shared.members[position], alone)


def test_an_untrained_depth_takes_the_norms_of_the_nearest():
    tiers = tiers_lib.ode(CONFIG, (4, 1), sharing="norms-per-depth")
    variables = initialise(tiers.init, jax.random.key(0))
    norms = variables["own"]["4"]
    variables["own"]["4"] = {path: jnp.full_like(x, 7.0) for path, x in norms.items()}
    scale = {
        count: float(tiers.at(count).extract(variables, 0)["stem"]["norm"]["scale"][0])
        for count in (0, 1, 2, (2, 3), 3, 4, 9)
    }
    assert scale == {0: 1.0, 1: 1.0, 2: 1.0, (2, 3): 1.0, 3: 7.0, 4: 7.0, 9: 7.0}


def test_each_depth_keeps_its_own_learned_step_sizes():
    config = dataclasses.replace(CONFIG, learn_steps=True)
    tiers = tiers_lib.ode(config, (1, (2, 4)), sharing="norms-and-steps-per-depth")
    variables = initialise(tiers.init, jax.random.key(0))
    deep = tiers.members[1].extract(variables, 0)
    np.testing.assert_allclose(deep["steps"][0], [0.5, 0.5])
    np.testing.assert_allclose(deep["steps"][1], [0.25] * 4)
    assert tiers.members[0].extract(variables, 0)["steps"][0].shape == (1,)
    # The same counts find their steps under any name; others take the solver's.
    np.testing.assert_allclose(tiers.at((2, 4)).extract(variables, 0)["steps"][1], [0.25] * 4)
    assert "steps" in tiers.at((1, 1)).extract(variables, 0)
    assert "steps" not in tiers.at(3).extract(variables, 0)
    # Another solver takes the steps that were learned, too.
    np.testing.assert_allclose(
        tiers.at((2, 4), "Heun").extract(variables, 0)["steps"][0], [0.5] * 2
    )
    assert "steps" not in tiers.at(3, "Heun").extract(variables, 0)


def test_an_iteration_count_is_had_with_any_solver():
    tiers = tiers_lib.ode(CONFIG, (1, (2, 4)), sharing="norms-per-depth")
    assert [tier.iterations for tier in tiers.members] == [(1, 1), (2, 4)]
    assert {tier.solver for tier in tiers.members} == {"Euler"}
    assert [tiers.at(3, solver).name for solver in (None, "Euler", "Heun")] == ["3", "3", "3 Heun"]
    other = tiers.at((2, 4), "Midpoint")
    assert (other.name, other.iterations, other.solver) == ("2-4 Midpoint", (2, 4), "Midpoint")
    variables = initialise(tiers.init, jax.random.key(0))
    variables["own"]["2-4"] = {p: x + 3 for p, x in variables["own"]["2-4"].items()}
    jax.tree.map(
        np.testing.assert_array_equal,
        other.extract(variables, 0),
        tiers.members[1].extract(variables, 0),
    )
    with pytest.raises(ConfigError, match="Did you mean 'Heun'"):
        tiers.at(1, "Huen")


def test_the_classifier_can_be_kept_per_depth():
    tiers = tiers_lib.ode(CONFIG, (1, 2), sharing="classifier-per-depth")
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    assert sorted(like["own"]["1"]) == ["classifier/linear/bias", "classifier/linear/kernel"]
    assert not any("classifier" in name for name in like["shared"])


@pytest.mark.parametrize(
    ("learn_steps", "sharing", "message"),
    [
        (False, "steps-per-depth", "'steps-per-depth' needs learned step sizes"),
        (True, "all", "cannot be shared; use sharing 'steps-per-depth' or .* got 'all'"),
        (True, "norms-per-depth", "got 'norms-per-depth'"),
    ],
)
def test_step_sizes_are_learned_per_depth_or_not_at_all(learn_steps, sharing, message):
    config = dataclasses.replace(CONFIG, learn_steps=learn_steps)
    with pytest.raises(ConfigError, match=message):
        tiers_lib.ode(config, (1, 2), sharing=sharing)


@settings(deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 9))
def test_assignment_meets_the_shares(clients, parts, seed):
    shares = [p / sum(parts) for p in parts]
    if min(shares) * clients < 1:
        with contextlib.suppress(ConfigError):
            assert np.all(np.bincount(assign(clients, len(parts), shares, seed=seed)) > 0)
        return
    assigned = assign(clients, len(parts), shares, seed=seed)
    counts = np.bincount(assigned, minlength=len(parts))
    assert counts.min() > 0
    assert counts.sum() == clients
    assert np.all(np.abs(counts - np.array(shares) * clients) < 1)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.5, 0.6), "sum 1.1"),
        ((1.5, -0.5), "got"),
        ((1.0, 0.0), "above 0"),
        ((1.0,), "for each of 2 tiers"),
        ((float("nan"), 1.0), "nan"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        assign(10, 2, shares, seed=0)


@settings(deadline=None)
@given(st.integers(10, 60), st.floats(0, 0.8), st.integers(0, 9))
def test_idle_clients_have_no_tier(clients, idle, seed):
    assigned = assign(clients, 2, (0.5, 0.5), seed=seed, idle=idle)
    counts = np.bincount(assigned, minlength=3)
    assert np.all(np.abs(counts - clients * np.array([1 - idle, 1 - idle, 2 * idle]) / 2) < 1)


def test_a_tier_without_clients_is_refused():
    with pytest.raises(ConfigError, match=r"2 clients in shares .* leave tier 2 without a client"):
        assign(2, 3, None, seed=0)


def test_tiers_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="at least one tier"):
        tiers_lib.ode(CONFIG, ())
    with pytest.raises(ConfigError, match=r"different names, got \['2', '2'\]"):
        tiers_lib.ode(CONFIG, (2, 2))
    with pytest.raises(ConfigError, match=r"different names, got \['2', '2'\]"):
        tiers_lib.ode(CONFIG, (2, (2, 2)))
    with pytest.raises(ConfigError, match="got -1"):
        tiers_lib.ode(CONFIG, (1, -1))
    with pytest.raises(ConfigError, match="sharing"):
        tiers_lib.ode(CONFIG, (1,), sharing="most")
    with pytest.raises(ConfigError, match="at least one"):
        Tiers(MODEL.init, ())
    with pytest.raises(ConfigError, match="leave some clients to train, got 1"):
        Tiers(MODEL.init, TIERS[:1], idle=1.0)
