"""Robust aggregators against plain NumPy, for tiers that own parts of the variables."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.algorithms import Server, ServerConfig, fedavg
from jfed.algorithms.aggregators import AGGREGATORS, Aggregation, Stack, make_aggregator
from jfed.data.preprocessing import Augmentation
from jfed.engine.devices import make_mesh
from jfed.engine.lanes import Training
from jfed.engine.merging import Delivered, Group, Report, clip, merge
from jfed.errors import ConfigError
from jfed.models import Model
from jfed.models.losses import Metrics
from jfed.simulation.programs import Specification, make_server
from jfed.tiers import Tier

LIKE = {"a": jnp.zeros((4, 3)), "b": jnp.zeros(5)}
MODEL = Model(lambda key: LIKE, lambda params, x: x)
TIERS = (
    Tier("slice", MODEL, lambda v, r: {"a": v["a"][:2, :1], "b": v["b"][:3]}),
    Tier("all", MODEL),
    Tier("b", MODEL, lambda v, r: {"b": v["b"][1:]}),
)
SLOTS = (4, 7, 3)
OWNED = np.zeros((3, 17), bool)  # the 12 entries of "a", then the 5 of "b"
OWNED[0, [0, 3, 12, 13, 14]] = OWNED[1] = OWNED[2, 13:] = True

MEDIAN = Aggregation("median")
TRIMMED = Aggregation("trimmed-mean", trim=0.3)
KRUM = Aggregation("krum", krum_byzantine=2)
MULTI = Aggregation("multi-krum", krum_byzantine=2)
THREE = Aggregation("multi-krum", krum_byzantine=1, krum_selected=3)
CLIPPED = Aggregation("norm-clipping")
ALL = (MEDIAN, TRIMMED, KRUM, MULTI, THREE, CLIPPED)

# How many clients of each tier deliver: odd and even, some tiers none, one client alone.
COUNTS = [(0, 7, 0), (0, 6, 0), (4, 7, 3), (3, 4, 2), (2, 0, 3), (0, 1, 0), (1, 2, 0)]


def _clients(counts, seed=0):
    """`(tier, weight, update)` of each client; updates are `[17]`, zeros in what is not owned."""
    rng = np.random.default_rng([*counts, seed])
    return [
        (tier, rng.uniform(1, 9), np.where(OWNED[tier], rng.normal(size=17) * rng.uniform(1, 4), 0))
        for tier, count in enumerate(counts)
        for _ in range(count)
    ]


def _tree(flat):
    flat = jnp.asarray(flat, jnp.float32)
    return {"a": flat[:12].reshape(4, 3), "b": flat[12:]}


def _flat(tree):
    return np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])])


def _delivered(parts, weights):
    weights = jnp.asarray(weights, jnp.float32)
    zeros, there = jnp.zeros_like(weights), weights > 0
    report = Report(Metrics(zeros, zeros, zeros), there, jnp.zeros_like(there))
    return Delivered({"update": parts}, {"update": weights}, report)


def _stacks(clients, shuffle=0):
    """What each tier delivers, its clients in random slots, the others empty."""
    rng = np.random.default_rng(shuffle)
    stacks = []
    for index, (tier, slots) in enumerate(zip(TIERS, SLOTS, strict=True)):
        mine = [(w, u) for t, w, u in clients if t == index]
        mine += [(0.0, np.zeros(17))] * (slots - len(mine))
        mine = [mine[i] for i in rng.permutation(slots)]
        trees = [tier.extract(_tree(u), 0) for _, u in mine]
        stacks.append(
            _delivered(jax.tree.map(lambda *x: jnp.stack(x), *trees), [w for w, _ in mine])
        )
    return stacks


def _slots(delivered):
    return [jnp.zeros(len(told.weights["update"]), jnp.int32) for told in delivered]


def _merge(delivered, aggregator):
    groups = [
        Group((tier,), told, slots)
        for tier, told, slots in zip(TIERS, delivered, _slots(delivered), strict=True)
    ]
    message, owners = merge(LIKE, groups, aggregator)
    return message["update"], owners


@functools.cache
def _jitted(config):
    return jax.jit(lambda stacks: _merge(stacks, make_aggregator(config)))


def _found(config, clients, shuffle=0):
    update, owners = _jitted(config)(_stacks(clients, shuffle))
    return _flat(update), _flat(owners)


def _mean(clients, weights):
    owned = np.array([OWNED[t] for t, _, _ in clients])
    shares = owned * np.asarray(weights)[:, None]
    total = (shares * np.array([u for _, _, u in clients])).sum(0)
    return np.divide(total, shares.sum(0), out=np.zeros(17), where=shares.sum(0) > 0)


def _by_entry(clients, reduce):
    result = np.zeros(17)
    for entry in range(17):
        values = np.sort([u[entry] for t, _, u in clients if OWNED[t, entry]])
        if len(values):
            result[entry] = reduce(values)
    return result


def _numpy_trimmed(values):
    cut = 3 * len(values) // 10
    return np.mean(values[cut : len(values) - cut])


def _numpy_krum(clients, byzantine, selected):
    n = len(clients)
    scores = []
    for i, (tier, _, update) in enumerate(clients):
        distances = []
        for j, (other, _, theirs) in enumerate(clients):
            both = OWNED[tier] & OWNED[other]
            if i != j:
                distances.append(np.mean((update - theirs)[both] ** 2))
        scores.append(sum(sorted(distances)[: max(n - byzantine - 2, 1)]))
    chosen = np.argsort(scores)[: selected or max(n - byzantine, 1)]
    return _mean([clients[i] for i in chosen], np.ones(len(chosen)))


def _numpy_clipped(clients):
    sizes = np.array([np.sqrt((u**2).sum() / OWNED[t].sum()) for t, _, u in clients])
    scales = np.minimum(1, np.median(sizes) / sizes)
    scaled = [(t, w, s * u) for (t, w, u), s in zip(clients, scales, strict=True)]
    return _mean(scaled, [w for _, w, _ in clients])


EXPECTED = {
    MEDIAN: lambda clients: _by_entry(clients, np.median),
    TRIMMED: lambda clients: _by_entry(clients, _numpy_trimmed),
    KRUM: lambda clients: _numpy_krum(clients, 2, 1),
    MULTI: lambda clients: _numpy_krum(clients, 2, None),
    THREE: lambda clients: _numpy_krum(clients, 1, 3),
    CLIPPED: _numpy_clipped,
}


def _ties(config, clients):
    """Whether each client is judged by its nearest alone, so that the nearest two are equal."""
    return config.krum_byzantine is not None and 1 < clients < config.krum_byzantine + 4


@pytest.mark.parametrize(
    ("config", "counts"),
    [(a, counts) for a, counts in itertools.product(ALL, COUNTS) if not _ties(a, sum(counts))],
    ids=str,
)
def test_aggregators_equal_numpy(config, counts):
    for seed in range(5):
        clients = _clients(counts, seed)
        expected = EXPECTED[config](clients)
        for shuffle in range(2):
            update, owners = _found(config, clients, shuffle)
            np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(owners, OWNED[[t for t, _, _ in clients]].sum(0))


def test_krum_moves_only_what_the_chosen_client_owns():
    clients = _clients((4, 7, 3))
    clients = [(t, w, 0.1 * u if t == 0 else u) for t, w, u in clients]
    update, _ = _found(KRUM, clients)
    np.testing.assert_array_equal(update != 0, OWNED[0])


def test_an_aggregator_of_the_users_own_gets_every_update_by_itself():
    """Of tiers that own parts of the variables, zeros elsewhere; here the largest of each entry."""
    clients, seen = _clients((2, 3, 1)), []

    def largest(stack):
        seen.append(stack)
        return jax.tree.map(
            lambda u, o: jnp.where(o, u, -jnp.inf).max(0), stack.updates, stack.owned
        )

    update, owners = _merge(_stacks(clients), make_aggregator(Aggregation(largest)))
    owned = np.array([OWNED[t] for t, _, _ in clients])
    values = np.where(owned, [u for _, _, u in clients], -np.inf)
    np.testing.assert_allclose(_flat(update), values.max(0), rtol=1e-6)
    np.testing.assert_array_equal(_flat(owners), owned.sum(0))
    (stack,) = seen
    assert isinstance(stack, Stack)
    assert sorted(np.asarray(stack.weight)[np.asarray(stack.weight) > 0]) == pytest.approx(
        sorted(w for _, w, _ in clients)
    )
    rows = np.concatenate([np.reshape(u, (sum(SLOTS), -1)) for u in stack.updates.values()], 1)
    sums = rows.sum(1)[np.asarray(stack.weight) > 0]
    np.testing.assert_allclose(sorted(sums), sorted(u.sum() for _, _, u in clients), rtol=1e-4)
    assert not rows[np.asarray(stack.weight) == 0].any()
    # What nobody owns is left alone, whatever the aggregator makes of it.
    update, _ = _merge(_stacks(_clients((2, 0, 0))), make_aggregator(Aggregation(largest)))
    assert np.isfinite(_flat(update)).all()
    assert not _flat(update)[~OWNED[0]].any()


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.aggregator}-{c.krum_selected}")
def test_huge_updates_do_no_harm(config):
    """Two clients of nine send what would overflow when squared."""
    clients = _clients((0, 7, 2))
    honest = _clients((0, 7, 2))[2:]
    for i, sign in enumerate([1, -1]):
        clients[i] = (1, 1.0, sign * np.full(17, 1e30))
    update, _ = _found(config, clients)
    assert np.isfinite(update).all()
    assert np.abs(update).max() <= max(np.abs(u).max() for _, _, u in honest)


@pytest.mark.parametrize("config", [MEDIAN, TRIMMED, KRUM, MULTI], ids=lambda c: c.aggregator)
def test_a_client_counts_once_whatever_its_weight(config):
    clients = _clients((0, 7, 0))
    heavy = [(t, 1e6 if i == 0 else w, u) for i, (t, w, u) in enumerate(clients)]
    np.testing.assert_array_equal(_found(config, clients)[0], _found(config, heavy)[0])


@pytest.mark.parametrize("norm", [0.5, 2.0, 100.0])
def test_an_update_is_clipped_to_its_l2_norm(norm):
    update = np.random.default_rng(0).normal(size=17)
    found = _flat(clip(_tree(update), norm))
    expected = update * min(1, norm / np.linalg.norm(update))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(_flat(clip(_tree(0 * update), norm)), 0 * update)


@pytest.mark.parametrize("norm", [1e-3, 1e3])
def test_clipping_does_not_overflow(norm):
    update = np.zeros(17)
    update[[2, 14]] = 3e30, -4e30
    expected = np.zeros(17)
    expected[[2, 14]] = 0.6 * norm, -0.8 * norm
    np.testing.assert_allclose(_flat(clip(_tree(update), norm)), expected, rtol=1e-5)
    assert not np.isfinite(_flat(clip(_tree(np.full(17, np.inf)), norm))).any()


def test_sums_are_merged_by_their_weighted_mean():
    clients, sums = _clients((2, 3, 1)), []
    for index, tier in enumerate(TIERS):
        mine = [(w, u) for t, w, u in clients if t == index]
        total = sum(w * u for w, u in mine)
        sums.append(_delivered(tier.extract(_tree(total), 0), [w for w, _ in mine]))
    for config in (Aggregation(), Aggregation("norm-clipping", clip_updates=1.0)):
        assert not config.stacked
        assert make_aggregator(config) is None
    update, owners = _merge(sums, None)
    expected = _mean(clients, [w for _, w, _ in clients])
    np.testing.assert_allclose(_flat(update), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(_flat(owners), OWNED[[0, 0, 1, 1, 1, 2]].sum(0))


def test_parts_unlike_the_variables_are_merged_over_all_clients():
    """Tiers whose settings tell what they own, and a part with weights of its own."""
    model = Model(lambda key: jnp.zeros(4), lambda params, x: x)

    def first(like, setting):
        return (jnp.arange(4) < setting[0]).astype(jnp.float32)

    tiers = [Tier(str(n), model, setting=(n,), mask=first) for n in (1, 3)]
    weights = {"update": jnp.float32([2.0, 1.0, 5.0]), "told": jnp.float32([1.0, 1.0, 1.0])}
    there = jnp.array([True, True, True])
    report = Report(Metrics(*jnp.zeros((3, 3))), there, ~there)
    each = np.array([[3.0, 0, 0, 0], [1.0, 2.0, 3.0, 0], [2.0, 4.0, 6.0, 0]])
    parts = {
        "update": jnp.float32(np.array([2.0, 1.0, 5.0]) @ each),
        "told": {"x": jnp.float32(12.0)},
    }
    group = Group(tiers, Delivered(parts, weights, report), jnp.array([0, 1, 1]))
    message, owners = merge(jnp.zeros(4), [group])
    np.testing.assert_allclose(message["update"], [17 / 8, 22 / 6, 33 / 6, 0], rtol=1e-6)
    np.testing.assert_array_equal(owners, [3, 2, 2, 0])
    assert message["told"]["x"] == 4


@pytest.mark.parametrize("aggregator", [name for name in AGGREGATORS if name != "mean"])
def test_a_round_that_nobody_delivers_in_leaves_variables_and_momentum(aggregator):
    needs = {"trimmed-mean": {"trim": 0.1}, "krum": {"krum_byzantine": 1}}
    needs["multi-krum"] = needs["krum"]
    config = ServerConfig(aggregator=aggregator, momentum=0.9, **needs.get(aggregator, {}))
    algorithm = fedavg(None, config)
    trainings = tuple(
        Training((tier,), algorithm, Augmentation(), make_mesh(1), "map", slots, stacked=True)
        for tier, slots in zip(TIERS, SLOTS, strict=True)
    )
    step = make_server(
        Specification(trainings, (), make_aggregator(config), ((7,),) * len(trainings), 7, None)
    )

    def after(*rounds):
        variables = jax.tree.map(jnp.copy, LIKE)
        server, finite = Server(variables, algorithm.server_init(variables)), True
        for number, clients in enumerate(rounds):
            told = _stacks(clients)
            server, finite = step(server, told, _slots(told), jnp.int32(number), jax.random.key(0))
        assert finite
        return server

    once, twice = after(_clients((2, 4, 1))), after(_clients((2, 4, 1)), [])
    assert np.abs(_flat(once.variables)).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, twice, once)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregator": "avg"}, "unknown aggregator 'avg'"),
        ({"aggregator": np.median, "trim": 0.1}, r"numpy\.median has no trim, got 0\.1"),
        ({"aggregator": "mean", "trim": 0.1}, r"'mean' has no trim, got 0\.1"),
        ({"aggregator": "median", "clip_updates": 1.0}, r"'median' has no clip_updates, got 1\.0"),
        ({"aggregator": "krum", "krum_byzantine": 1, "krum_selected": 2}, "no krum_selected"),
        ({"aggregator": "trimmed-mean"}, "'trimmed-mean' needs trim, got none"),
        ({"aggregator": "multi-krum"}, "'multi-krum' needs krum_byzantine, got none"),
        ({"aggregator": "trimmed-mean", "trim": 0.5}, r"trim must be below 0\.5.*got 0\.5"),
        ({"aggregator": "trimmed-mean", "trim": -0.1}, r"got -0\.1"),
        ({"aggregator": "krum", "krum_byzantine": -1}, "got -1"),
        ({"aggregator": "norm-clipping", "clip_updates": 0.0}, r"clip_updates .* got 0\.0"),
    ],
)
def test_bad_settings_are_quoted(settings, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**settings)


def test_krum_needs_enough_clients():
    for byzantine, clients in itertools.product(range(4), range(1, 12)):
        config = Aggregation("krum", krum_byzantine=byzantine)
        if clients >= 2 * byzantine + 3:
            config.check_cohort(clients)
        else:
            with pytest.raises(ConfigError, match=rf"needs {2 * byzantine + 3} .* got {clients}\."):
                config.check_cohort(clients)
    with pytest.raises(ConfigError, match=r"at most the 7 clients .* got 8"):
        Aggregation("multi-krum", krum_byzantine=2, krum_selected=8).check_cohort(9)
