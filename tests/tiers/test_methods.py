"""What every method's tiers promise, by property tests against NumPy, and that every method learns.

NumPy knows what a tier owns from numbering all global entries and extracting the numbers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import jfed
from jfed import tiers as tiers_lib
from jfed.engine.merging import Delivered, Group, Report, merge
from jfed.errors import ConfigError
from jfed.models import ConvNetConfig, ODENetConfig, ResNetConfig
from jfed.tiers import METHODS, MethodConfig, make_tiers

RESNET = ResNetConfig(widths=(4, 6), blocks=(2, 1), channels=1, classes=4, conv="transposed")
PROJECTED = dataclasses.replace(RESNET, shortcut="projection")
BOTTLENECK = dataclasses.replace(PROJECTED, widths=(8, 16), bottleneck=True, stem=4)
PREACTIVATED = dataclasses.replace(PROJECTED, preactivation=True)
CONV_NET = ConvNetConfig(widths=(4, 6), channels=1, classes=4, conv="transposed")
RESNET_18 = dataclasses.replace(PROJECTED, widths=(3, 4, 5, 6), blocks=(2, 2, 2, 2))
SHALLOW = dataclasses.replace(RESNET, blocks=(1, 1))
THIN_STEM = dataclasses.replace(PROJECTED, stem=3)
ODENET = ODENetConfig(widths=(4, 6), channels=1, classes=4, unroll=False, conv="transposed")
STEPS = dataclasses.replace(ODENET, learn_steps=True)
SHARED = "norms-and-steps-per-depth"
CASES = {
    "ode": (ODENET, MethodConfig("ode", iterations=(1, (2, 1)))),
    "ode norms and steps": (STEPS, MethodConfig("ode", iterations=(1, (2, 1)), sharing=SHARED)),
    "depthfl": (RESNET, MethodConfig("depthfl")),
    "depthfl linear": (RESNET, MethodConfig("depthfl", exits="linear")),
    "nefl-d": (RESNET, MethodConfig("nefl-d", ratios=(0.7, 1.0))),
    "nefl-d published": (RESNET_18, MethodConfig("nefl-d", ratios=(0.2, 0.8))),
    "nefl-w": (RESNET, MethodConfig("nefl-w", ratios=(0.3, 1.0))),
    "nefl-wd": (RESNET_18, MethodConfig("nefl-wd", ratios=(0.2, 0.4, 1.0))),
    "heterofl": (RESNET, MethodConfig("heterofl", ratios=(0.3, 0.5, 1.0))),
    "heterofl odenet": (ODENET, MethodConfig("heterofl", ratios=(0.5, 1.0))),
    "heterofl preactivation": (PREACTIVATED, MethodConfig("heterofl", ratios=(0.5, 1.0))),
    "heterofl conv": (CONV_NET, MethodConfig("heterofl", ratios=(0.5, 1.0))),
    "fjord": (RESNET, MethodConfig("fjord", ratios=(0.5, 1.0))),
    "heterofl bottleneck": (BOTTLENECK, MethodConfig("heterofl", ratios=(0.5, 1.0))),
    "fedrolex": (PROJECTED, MethodConfig("fedrolex", ratios=(0.3, 0.5, 0.8))),
    "fedrolex pad": (RESNET, MethodConfig("fedrolex", ratios=(0.3, 0.5, 1.0))),
    "exclusive": (RESNET, MethodConfig("exclusive", able=0.5)),
    "full": (RESNET, MethodConfig("full")),
}
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def _case(case):
    network, config = CASES[case]
    tiers = make_tiers(network, config)
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(like))
    numbered = _tree(np.arange(count), like)
    extract = [jax.jit(tier.extract) for tier in tiers.members]

    @functools.cache
    def owned(i, r):
        """The numbers of the entries that a tier owns, and which of its variables they are."""
        found = _flat(extract[i](numbered, np.int32(r))).astype(int)
        if tiers.members[i].mask is None:
            return found, np.arange(len(found))
        at = np.flatnonzero(np.isin(found, np.flatnonzero(_flat(_mine(case, i, like)))))
        return found[at], at

    embed = [
        jax.jit(lambda local, r, t=tier: (t.embed(local, like, r), t.owned(like, r)))
        for tier in tiers.members
    ]

    @jax.jit
    def merged(delivered, tier, r):
        """Tiers that share a program are a group; `tier` has its members' places by slot."""
        groups = [
            Group([tiers.members[i] for i in places], d, t)
            for places, d, t in zip(_groups(tiers), delivered, tier, strict=True)
        ]
        found, owners = merge(like, groups, None, r)
        return found["update"], owners

    return tiers, like, count, owned, extract, embed, merged


def _groups(tiers):
    """The places of the tiers that share a program, for each program."""
    groups = {}
    for place, tier in enumerate(tiers.members):
        groups.setdefault(tier.program, []).append(place)
    return list(groups.values())


# Stages of which a tier of NeFL has no first block, so that it does not own its projection.
LONE = {"nefl-d published": ((1, 3), (2,))}


def _mine(case, place, like):
    """1 for what a tier with a mask owns: of iterations where something is kept per depth, or NeFL.

    Written out, but for what the tier of NeFL extracts.
    """
    if case in LONE:
        tier = make_tiers(*CASES[case]).members[place]
        ones = jax.tree.map(lambda x: jnp.ones(x.shape), tier.shapes(like))
        mine = jax.tree.map(np.array, tier.embed(ones, like))
        for stage in LONE[case][place]:
            mine["shared"][f"stages/{stage}/block0/projection/conv/kernel"][:] = 0
        return mine
    steps = np.broadcast_to(CASES[case][1].iterations[place], 2)
    own = {name: np.zeros(x.shape) for name, x in like["own"].items()}
    for name, rows in own.items():
        rows[place, : steps[int(name[-1])] if name.startswith("steps/") else None] = 1
    return {"shared": {n: np.ones(x.shape) for n, x in like["shared"].items()}, "own": own}


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _tree(flat, like):
    leaves, structure = jax.tree.flatten(like)
    cut = np.split(flat.astype(np.float32), np.cumsum([leaf.size for leaf in leaves])[:-1])
    shaped = [jnp.asarray(part.reshape(leaf.shape)) for part, leaf in zip(cut, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def test_every_method_is_checked():
    assert {config.method for _, config in CASES.values()} == set(METHODS)


@every_case
@settings(max_examples=5, deadline=None)
@given(round_=st.integers(0, 40))
def test_extract_and_embed_are_inverse_where_owned(case, round_):
    tiers, like, count, owned, extract, embed, _ = _case(case)
    for position, tier in enumerate(tiers.members):
        mine, at = owned(position, round_)
        assert len(set(mine)) == len(mine) > 0
        local = np.zeros(
            len(_flat(extract[position](_tree(np.zeros(count), like), round_))), np.float32
        )
        local[at] = np.random.default_rng(round_).normal(size=len(mine))
        placed, ones = embed[position](_tree(local, tier.shapes(like)), np.int32(round_))
        expected, mask = np.zeros(count, np.float32), np.zeros(count)
        expected[mine], mask[mine] = local[at], 1
        np.testing.assert_array_equal(_flat(placed), expected)
        np.testing.assert_array_equal(_flat(ones), mask)
        np.testing.assert_array_equal(_flat(extract[position](placed, np.int32(round_))), local)


@every_case
@settings(max_examples=5, deadline=None)
@given(
    round_=st.integers(0, 40),
    clients=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_merge_is_the_mean_over_owners_in_any_order(case, round_, clients, seed):
    tiers, like, count, owned, _, _, merged = _case(case)
    clients = [(t % len(tiers.members), w) for t, w in clients]
    rng = np.random.default_rng(seed)
    updates = [rng.normal(size=len(owned(t, round_)[0])) for t, _ in clients]
    total, weight, number = np.zeros(count), np.zeros(count), np.zeros(count)
    for (t, w), update in zip(clients, updates, strict=True):
        mine = owned(t, round_)[0]
        total[mine] += w * update
        weight[mine] += w
        number[mine] += 1
    expected = np.divide(total, weight, out=np.zeros(count), where=weight > 0)
    for order in (range(len(clients)), reversed(range(len(clients)))):
        order, delivered, tier = list(order), [], []
        for places in _groups(tiers):
            shapes = tiers.members[places[0]].shapes(like)
            part = np.zeros(sum(x.size for x in jax.tree.leaves(shapes)))
            weights, at = np.zeros(6, np.float32), np.zeros(6, np.int32)
            for slot, k in enumerate(k for k in order if clients[k][0] in places):
                t, w = clients[k]
                part[owned(t, round_)[1]] += w * updates[k]
                weights[slot], at[slot] = w, places.index(t)
            report = Report((), jnp.asarray(weights > 0), jnp.zeros(6, bool))
            delivered.append(
                Delivered({"update": _tree(part, shapes)}, {"update": jnp.asarray(weights)}, report)
            )
            tier.append(jnp.asarray(at))
        mean, owners = merged(delivered, tier, np.int32(round_))
        np.testing.assert_array_equal(_flat(owners), number)
        np.testing.assert_array_equal(_flat(mean)[weight == 0], 0)  # nobody's: stays as it is
        np.testing.assert_allclose(_flat(mean), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        MethodConfig("heterofl", ratios=(1.0,)),
        MethodConfig("fedrolex", ratios=(1.0,)),
        MethodConfig("nefl-d", ratios=(1.0,)),
        MethodConfig("depthfl", depths=(2,)),
        MethodConfig("full"),
    ],
    ids=lambda c: c.method,
)
def test_one_full_tier_is_fedavg(config):
    tiers = make_tiers(RESNET, config)
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    (tier,) = tiers.members
    update = jax.tree.map(lambda x: jnp.full(x.shape, 6.0), tier.shapes(like))
    weights = jnp.asarray([3.0, 0.0, 1.0])
    report = Report((), weights > 0, jnp.zeros(3, bool))
    delivered = Delivered({"update": update}, {"update": weights}, report)
    mean, owners = merge(like, [Group([tier], delivered, jnp.zeros(3, int))], round_=5)
    assert all(np.all(leaf == 1.5) for leaf in jax.tree.leaves(mean["update"]))
    assert all(np.all(leaf == 2) for leaf in jax.tree.leaves(owners))


@pytest.mark.parametrize(
    ("network", "config", "message"),
    [
        (RESNET, {"method": "ode"}, "needs an ODENet, got ResNetConfig"),
        (ODENET, {"method": "depthfl"}, "depthfl needs a ResNet"),
        (ODENET, {"method": "nefl-d", "ratios": (1.0,)}, "nefl-d needs a ResNet"),
        (ODENET, {"method": "fedrolex", "ratios": (1.0,)}, "fedrolex needs a ResNet"),
        (RESNET, {"method": "heteroFL"}, r"unknown method 'heteroFL'\. Did you mean 'heterofl'"),
        (RESNET, {"method": "heterofl"}, "'heterofl' needs ratios, got none"),
        (RESNET, {"method": "heterofl", "ratios": ()}, r"got \(\)"),
        (RESNET, {"method": "heterofl", "ratios": (0.5, 1.5)}, "at most 1, got 1.5"),
        (RESNET, {"method": "fedrolex", "ratios": (0.0, 1.0)}, "got 0.0"),
        (RESNET, {"method": "fedrolex", "ratios": (float("nan"),)}, "got nan"),
        (RESNET, {"method": "heterofl", "ratios": (0.5, 0.5)}, r"differ, got \(0\.5, 0\.5\)"),
        (THIN_STEM, {"method": "heterofl", "ratios": (0.5,)}, "ratio 0.5 of a stem of 3"),
        (RESNET, {"method": "heterofl", "ratios": (1.0,), "depths": (1,)}, r"depths \(1,\)"),
        (RESNET, {"method": "full", "scaler": False}, "has no scaler, got scaler False"),
        (RESNET, {"sharing": "all"}, "'full' has no sharing, got sharing 'all'"),
        (
            RESNET,
            {"method": "nefl-d", "ratios": (0.01,)},
            r"ratio 0.01 is out .* 0.\d\d to 1 of",
        ),
        (RESNET, {"method": "nefl-d"}, r"needs ratios for a network of \(2, 1\) blocks"),
        (RESNET, {"method": "nefl-wd"}, r"no submodel of ratio 0.2 .* have none"),
        (RESNET_18, {"method": "nefl-wd", "ratios": (0.3,)}, r"ratio 0.3 .* have \(0.2, 0.4"),
        (RESNET, {"method": "fjord"}, "'fjord' needs ratios, got none"),
        (RESNET, {"method": "fjord", "ratios": (0.5,), "distillation": -1.0}, "got -1.0"),
        (RESNET, {"method": "depthfl", "exits": "lines"}, "unknown exits 'lines'"),
        (RESNET, {"method": "depthfl", "ramp": -1}, "ramp .* got -1"),
        (
            RESNET,
            {"method": "depthfl", "ramp": 9, "distillation": 0.0},
            "ramp 9 is of distillation",
        ),
        (PREACTIVATED, {"method": "depthfl"}, "got preactivation=True"),
        (PREACTIVATED, {"method": "nefl-d", "ratios": (1.0,)}, "no learn_steps, got True"),
        (RESNET, {"method": "depthfl", "depths": (1, 3)}, "from 1 to 2, got 3"),
        (RESNET, {"method": "depthfl", "depths": ()}, "at least one tier"),
        (RESNET, {"method": "depthfl", "depths": (1, 1)}, "different names"),
        (RESNET, {"method": "depthfl", "distillation": -1.0}, "got -1.0"),
        (RESNET, {"method": "exclusive"}, "'exclusive' needs able"),
        (RESNET, {"method": "exclusive", "able": 1.5}, "at most 1, got 1.5"),
        (RESNET, {"method": "exclusive", "able": 0.0}, "got 0.0"),
        (ODENET, {"method": "full", "iterations": (1, 2)}, r"one entry .* got \(1, 2\)"),
        (ODENET, {"method": "ode", "iterations": ((1, 2, 3),)}, r"\(1, 2, 3\) do not fit"),
        (ODENET, {"method": "ode", "distillation": -0.5}, "got -0.5"),
        (
            ODENET,
            {"method": "full", "distillation": 0.5},
            "has no distillation, got distillation 0.5",
        ),
        (
            ODENET,
            {"distillation": 0.5, "sharing": "norms-per-depth"},
            "got distillation 0.5 with sharing 'norms-per-depth' and learn_steps=False",
        ),
        (
            STEPS,
            {"distillation": 0.5, "iterations": (2,)},
            "distillation 0.5 with sharing 'all' and learn_steps=True",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_quoted(network, config, message):
    with pytest.raises(ConfigError, match=message):
        make_tiers(network, MethodConfig(**config))


def test_exclusive_takes_one_tier():
    with pytest.raises(ConfigError, match=r"one tier .* got \['1', '2'\]"):
        tiers_lib.exclusive(tiers_lib.ode(ODENET, (1, 2)), 0.5)


@pytest.fixture(scope="module")
def digits():
    data = jfed.data.load("digits", train_examples=500, test_examples=300)
    return data, jfed.data.dirichlet(data.train.labels, 8, alpha=1.0, min_examples=8, seed=0)


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("network", "config", "tested"),
    [
        _slow(
            dataclasses.replace(STEPS, norm="group"),
            MethodConfig("ode", iterations=(1, 2), sharing=SHARED),
            ("1", "2"),
        ),
        _slow(
            dataclasses.replace(SHALLOW, norm="group"), MethodConfig("depthfl"), ("2", "ensemble")
        ),
        _slow(SHALLOW, MethodConfig("fjord", ratios=(0.5, 1.0), distillation=1.0), ("0.5", "1")),
        _slow(RESNET, MethodConfig("nefl-w", ratios=(0.5, 1.0)), ("0.5", "1")),
        _slow(RESNET, MethodConfig("nefl-d", ratios=(0.8, 1.0)), ("0.8", "1")),
        _slow(SHALLOW, MethodConfig("heterofl", ratios=(0.5, 1.0)), ("0.5", "1")),
        # The paper's measure; a smaller tier is tested at a window that it last trained rounds ago.
        _slow(SHALLOW, MethodConfig("fedrolex", ratios=(0.5, 1.0)), ("1",)),
        _slow(SHALLOW, MethodConfig("exclusive", able=0.5), ("full",)),
    ],
    ids=lambda x: x.method if isinstance(x, MethodConfig) else "",
)
def test_every_method_learns_digits(digits, network, config, tested):
    data, clients = digits
    tiers = make_tiers(dataclasses.replace(network, widths=(8, 16), classes=10), config)
    result = jfed.simulate(
        data,
        clients,
        tiers,
        rounds=16,
        client=jfed.ClientConfig(
            epochs=2,
            batch_size=20,
            learning_rate=0.2,
            mask_absent_classes=config.method == "heterofl",
        ),
        evaluation=jfed.EvaluationConfig(every=0, calibration_examples=250),
        engine=jfed.EngineConfig(devices=1),
        seed=0,
    )
    assert min(result.accuracies[name] for name in tested) > 0.35  # chance is 0.1
