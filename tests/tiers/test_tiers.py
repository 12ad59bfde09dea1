"""Tiers and the merge of their updates, against NumPy and by property tests."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfed import tiers as tiers_lib
from jfed.engine.merging import Delivered, Group, Report, merge
from jfed.errors import ConfigError
from jfed.models import Model, ODENetConfig
from jfed.models.model import initialise
from jfed.tiers import Tier, Tiers, assign
from jfed.tiers.communication import traffic
from jfed.tiers.tier import check_extract

CONFIG = ODENetConfig(widths=(4, 8), channels=1)
SCANNED = dataclasses.replace(CONFIG, unroll=False, conv="transposed")
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


def _numpy_owners(clients, like):
    """For each entry how many clients own it."""
    ones = jax.tree.map(np.ones_like, like)
    found = jax.tree.map(np.zeros_like, like)
    for name, _, _ in clients:
        mean = _numpy_merge([(name, 1.0, ones)], like)
        found = jax.tree.map(np.add, found, mean)
    return found


def _group(tier, clients, like):
    """What clients of one tier, as pairs of weight and update, delivered; one slot is empty."""
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tier.shapes(like))
    for w, update in clients:
        total = jax.tree.map(lambda x, u, w=w: x + np.float32(w) * u, total, update)
    weights = jnp.asarray([w for w, _ in clients] + [0.0], jnp.float32)
    report = Report((), weights > 0, jnp.zeros(len(weights), bool))
    delivered = Delivered({"update": total}, {"update": weights}, report)
    return Group((tier,), delivered, jnp.zeros(len(weights), jnp.int32))


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
    counted = _numpy_owners(named, like)
    for _ in range(2):
        shuffler.shuffle(clients)
        groups = []
        for index, tier in enumerate(TIERS):
            mine = [(w, tier.extract(_variables(s), 0)) for t, w, s in clients if t == index]
            groups.append(_group(tier, mine, like))
        merged, owners = merge(like, groups)
        jax.tree.map(
            lambda m, e: np.testing.assert_allclose(m, e, rtol=1e-4, atol=1e-5),
            merged["update"],
            expected,
        )
        jax.tree.map(np.testing.assert_array_equal, owners, counted)


def test_an_entry_that_nobody_owns_does_not_move():
    like = _variables(0)
    update = TIERS[2].extract(_variables(1), 0)
    merged, owners = merge(like, [_group(TIERS[2], [(1.0, update)], like)])
    assert not np.any(owners["a"])
    np.testing.assert_array_equal(merged["update"]["a"], np.zeros((4, 3)))
    np.testing.assert_array_equal(merged["update"]["b"][0], 0.0)
    np.testing.assert_array_equal(merged["update"]["b"][1:], update["b"])


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
    names = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in _leaves(alone)}
    for position, tier in enumerate(tiers.members):
        for path, leaf in names.items():
            mine = variables["own"][path][position] if "norm" in path else variables["shared"][path]
            np.testing.assert_array_equal(mine, leaf)
        owned = tier.owned(variables)
        assert all(np.all(o == 1) for o in owned["shared"].values())
        assert sorted(owned["own"]) == sorted(path for path in names if "norm" in path)
        for norm in owned["own"].values():
            rows = np.asarray(norm)
            assert np.all(rows == (np.arange(3) == position).reshape(3, *(1,) * (rows.ndim - 1)))
        assert traffic(tier, variables) == traffic(shared.members[position], alone)


def test_an_untrained_depth_takes_the_norms_of_the_nearest():
    tiers = tiers_lib.ode(SCANNED, (4, 1), sharing="norms-per-depth")
    variables = initialise(tiers.init, jax.random.key(0))
    own = {path: x.at[0].set(jnp.nan) for path, x in variables["own"].items()}  # of 4
    counts = (0, 1, 2, (2, 3), 3, 4, 9)
    found = _logits(tiers.at(counts), variables | {"own": own})
    from_four = [bool(np.isnan(logits).all()) for logits in found]
    assert dict(zip(counts, from_four, strict=True)) == {
        0: False,
        1: False,
        2: False,
        (2, 3): False,
        3: True,
        4: True,
        9: True,
    }


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def _logits(tiers, variables):
    """The logits of tiers that share a program, all by one compilation."""
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    assert len({tier.program for tier in tiers}) == 1
    apply = jax.jit(lambda v, setting: tiers[0].bound(setting).apply(v, images))
    settings = [jax.tree.map(jnp.int32, tier.setting) for tier in tiers]
    compiled = apply.lower(variables, settings[0]).compile()
    return [compiled(variables, setting) for setting in settings]


def test_each_depth_keeps_its_own_learned_step_sizes():
    config = dataclasses.replace(SCANNED, learn_steps=True)
    tiers = tiers_lib.ode(config, (1, (2, 4)), sharing="norms-and-steps-per-depth")
    variables = initialise(tiers.init, jax.random.key(0))
    shallow, deep = (tier.owned(variables)["own"] for tier in tiers.members)
    np.testing.assert_allclose(variables["own"]["steps/0"], [[1, 1], [0.5, 0.5]])
    np.testing.assert_allclose(variables["own"]["steps/1"], [[1] * 4, [0.25] * 4])
    np.testing.assert_array_equal(shallow["steps/0"], [[1, 0], [0, 0]])
    np.testing.assert_array_equal(shallow["steps/1"], [[1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(deep["steps/0"], [[0, 0], [1, 1]])
    np.testing.assert_array_equal(deep["steps/1"], [[0, 0, 0, 0], [1, 1, 1, 1]])
    # The same counts find their steps under any name, and with any solver; others take the
    # solver's, whatever was learned.
    nan = {name: x * (np.nan if "steps" in name else 1) for name, x in variables["own"].items()}
    for solver in ("Euler", "Heun"):
        found = _logits(tiers.at(((2, 4), (1, 1), 3, (2, 2)), solver), variables | {"own": nan})
        assert [bool(np.isnan(x).any()) for x in found] == [True, True, False, False]


def test_an_iteration_count_is_had_with_any_solver():
    tiers = tiers_lib.ode(CONFIG, (1, (2, 4)), sharing="norms-per-depth")
    assert [tier.iterations for tier in tiers.members] == [(1, 1), (2, 4)]
    assert {tier.solver for tier in tiers.members} == {"Euler"}
    named = [tiers.at([3], solver) for solver in (None, "Euler", "Heun")]
    assert [tier.name for (tier,) in named] == ["3", "3", "3 Heun"]
    (other,) = tiers.at([(2, 4)], "Midpoint")
    assert (other.name, other.iterations, other.solver) == ("2-4 Midpoint", (2, 4), "Midpoint")
    variables = initialise(tiers.init, jax.random.key(0))
    jax.tree.map(
        np.testing.assert_array_equal, other.owned(variables), tiers.members[1].owned(variables)
    )
    with pytest.raises(ConfigError, match="Did you mean 'Heun'"):
        tiers.at([1], "Huen")


def test_the_classifier_can_be_kept_per_depth():
    tiers = tiers_lib.ode(CONFIG, (1, 2), sharing="classifier-per-depth")
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    assert {name: x.shape for name, x in like["own"].items()} == {
        "classifier/linear/bias": (2, 10),
        "classifier/linear/kernel": (2, 8, 10),
    }
    assert not any("classifier" in name for name in like["shared"])


@pytest.mark.parametrize("sharing", ["norms-and-steps-per-depth", "steps-per-depth"])
def test_traffic_counts_only_what_a_tier_owns(sharing):
    """Of step sizes one float32 for each step of each stage, whatever deeper tiers keep."""
    config = dataclasses.replace(CONFIG, learn_steps=True)
    tiers = tiers_lib.ode(config, (0, 1, (2, 4)), sharing=sharing)
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    alone = tiers_lib.ode(CONFIG, (1,))
    weights = traffic(alone.members[0], jax.eval_shape(alone.init, jax.random.key(0)))
    for tier, steps in zip(tiers.members, (0, 2, 6), strict=True):
        assert traffic(tier, like) == (weights.down + 4 * steps, weights.up + 4 * steps)
    # A count that nobody trained takes the solver's steps, and needs none of the learned.
    assert traffic(tiers.at([3])[0], like) == weights


def test_traffic_is_counted_exactly_above_what_float32_holds():
    whole = Tier("all", MODEL, mask=lambda like, _: jax.tree.map(lambda x: jnp.ones(x.shape), like))
    like = {"w": jax.ShapeDtypeStruct((2**24 + 1,), jnp.float32)}
    assert traffic(whole, like).up == 4 * (2**24 + 1)


@pytest.mark.parametrize(
    ("extract", "message"),
    [
        (lambda v, r: jax.tree.map(lambda x: 0.5 * x, v), "'odd' must select entries as they are"),
        (lambda v, r: {"b": v["b"] + 1}, "must select entries as they are"),
        (lambda v, r: {"b": jnp.zeros(3)}, "must select entries as they are"),
        (lambda v, r: {"b": v["a"][0] + v["a"][1]}, "makes .* where an entry is"),
        (lambda v, r: {"b": v["b"].astype("bfloat16").astype("float32")}, "where an entry is"),
        (lambda v, r: {"b": v["b"] / 2 if r == 1 else v["b"]}, "must select entries as they are"),
        (lambda v, r: {"b": v["b"][:2], "c": v["b"][1:]}, "takes an entry 2 times; once at most"),
        (lambda v, r: {"b": v["b"][jnp.asarray([3, 3, 3])]}, "takes an entry 3 times"),
    ],
    ids=[
        "halves",
        "adds",
        "invents",
        "sums",
        "rounds",
        "halves later",
        "twice in two leaves",
        "three times in one",
    ],
)
def test_what_is_no_selection_is_refused(extract, message):
    with pytest.raises(ConfigError, match=message):
        check_extract(Tier("odd", MODEL, extract), _variables(0))


@pytest.mark.parametrize("tier", TIERS, ids=lambda t: t.name)
def test_a_selection_is_accepted(tier):
    check_extract(tier, jax.eval_shape(lambda: _variables(0)))


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
    with pytest.raises(ConfigError, match=r"must differ between tiers, got \(2, 2\)"):
        tiers_lib.ode(CONFIG, (2, 2))
    with pytest.raises(ConfigError, match=r"must differ between tiers, got \(2, \(2, 2\)\)"):
        tiers_lib.ode(CONFIG, (2, (2, 2)))
    with pytest.raises(ConfigError, match=r"different names, got \['all', 'all'\]"):
        Tiers(MODEL.init, (TIERS[1], TIERS[1]))
    with pytest.raises(ConfigError, match=r"different names, got \['all', 'all'\]"):
        Tiers(MODEL.init, TIERS[1:2], tested=TIERS[1:2])
    with pytest.raises(ConfigError, match="got -1"):
        tiers_lib.ode(CONFIG, (1, -1))
    with pytest.raises(ConfigError, match="sharing"):
        tiers_lib.ode(CONFIG, (1,), sharing="most")
    with pytest.raises(ConfigError, match="at least one"):
        Tiers(MODEL.init, ())
    with pytest.raises(ConfigError, match="leave some clients to train, got 1"):
        Tiers(MODEL.init, TIERS[:1], idle=1.0)
