"""Differential privacy: what one client can change, the noise, and what it costs."""

import dataclasses
import functools
import json

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import numpy_rounds
import pytest
from numpy_rounds import CONFIG, DATA, MODEL, PARTS, each

import jfed
from jfed.algorithms import (
    AlgorithmConfig,
    Codec,
    PrivacyConfig,
    ServerConfig,
    compressed,
    private,
)
from jfed.algorithms.catalogue import make_algorithm
from jfed.algorithms.privacy import Accountant, most_drawn, poisson
from jfed.simulation.federation import Federation

COUNT = ServerConfig(weights="count")
NARROW = jfed.models.Model(
    lambda key: {"w": MODEL.init(key)["w"]},
    lambda p, images: images.reshape(images.shape[0], -1) @ p["w"],
)
UNEQUAL = jfed.tiers.Tiers(
    MODEL.init,
    (
        jfed.tiers.Tier("narrow", NARROW, lambda variables, _: {"w": variables["w"]}),
        jfed.tiers.Tier("full", MODEL),
    ),
)
CLIP = 0.05


def _federation(algorithm, tiers=MODEL, **options):
    given = {"rounds": 30, "client": CONFIG, "server": COUNT, "seed": 5, "faults": None}
    given |= {"engine": jfed.EngineConfig(devices=1, mapping="map", lanes=1)}
    given |= {"evaluation": jfed.EvaluationConfig(every=0, batch_size=30)}
    return Federation(DATA, PARTS, tiers, algorithm=algorithm, **given | options)


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])


@functools.cache
def _after(name, codecs, tiers, without, rounds=2):
    """The server after rounds of all clients but one in the last; and how many own each entry."""
    settings = {"ditto": {"strength": 1.0}, "fedprox": {"mu": 0.1}, "feddyn": {"alpha": 0.1}}
    algorithm = make_algorithm(AlgorithmConfig(name, **settings.get(name, {})), CONFIG, COUNT)
    algorithm = private(compressed(algorithm, codecs), clip=CLIP, noise=0.0, share=1.0)

    def sampler(number, rng):
        return [c for c in range(4) if number < rounds - 1 or c != without]

    federation = _federation(algorithm, tiers, sampler=sampler)
    state = federation.start
    for number in range(rounds):
        state, _ = federation.round(state, number)
    full = (federation.population.tier == len(federation.tiers.members) - 1).sum()
    owners = {"b": np.full(3, full), "w": np.full((16, 3), 4)}
    return jax.device_get(state.server), _flat(owners)


@pytest.mark.parametrize(
    "tiers",
    [pytest.param(MODEL, marks=pytest.mark.slow, id="equal"), pytest.param(UNEQUAL, id="unequal")],
)
@pytest.mark.parametrize(
    ("name", "codecs"),
    [
        pytest.param("fedavg", (), marks=pytest.mark.slow),
        pytest.param("fedavg", ("int2",), marks=pytest.mark.slow),
        pytest.param("fedprox", ("topk:0.3", "int4"), marks=pytest.mark.slow),
        ("scaffold", ("sign",)),
        pytest.param("ditto", (), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_client_changes_the_sum_by_more_than_the_clip(name, codecs, tiers):
    """Of all parts of its message together, whatever its tier owns and its codec makes of it."""
    whole, owners = _after(name, codecs, tiers, None)
    changed = []
    for client in range(4):
        without, _ = _after(name, codecs, tiers, client)
        # The mean's denominators are fixed, so sums differ by the means' difference times those.
        change = [(_flat(whole.variables) - _flat(without.variables)) * owners]
        if name == "scaffold":
            controls = [_flat(server.state[0][0]) for server in (whole, without)]
            change.append((controls[0] - controls[1]) * owners)
        changed.append(np.linalg.norm(np.concatenate(change)))
    assert max(changed) <= CLIP * (1 + 1e-4)
    assert min(changed) > 0.9 * CLIP  # all are longer than that here


def _noises(algorithm, tiers=MODEL, rounds=30, **options):
    """What rounds add to the variables of clients that learn nothing."""
    client = jfed.ClientConfig(batch_size=30, learning_rate=1e-12)
    federation = _federation(algorithm, tiers, client=client, **options)
    state, found = federation.start, []
    for number in range(rounds):
        before = jax.device_get(state.server.variables)
        state, _ = federation.round(state, number)
        after = jax.device_get(state.server.variables)
        found.append(jax.tree.map(np.subtract, after, before))
    return jax.tree.map(lambda *x: np.stack(x), *found)


def test_noise_has_the_deviation_it_should_have_and_is_new_every_round():
    config = jfed.ClientConfig(learning_rate=1e-12)
    shared = make_algorithm(AlgorithmConfig(), config, COUNT)
    found = _noises(private(shared, clip=2.0, noise=3.0, share=0.5), cohort=2)
    values = np.concatenate([found["b"].reshape(30, -1), found["w"].reshape(30, -1)], 1)
    # The mean is over an expected two clients. 1530 values: a deviation known to 1.8 %.
    assert values.std() == pytest.approx(2.0 * 3.0 / 2, rel=0.08)
    assert abs(values.mean()) < 5 * 3 / np.sqrt(values.size)
    assert np.abs(np.corrcoef(values) - np.eye(30)).max() < 0.6


def test_entries_that_few_own_get_the_noise_of_all_over_fewer_clients():
    config = jfed.ClientConfig(learning_rate=1e-12)
    shared = make_algorithm(AlgorithmConfig(), config, COUNT)
    algorithm = private(shared, clip=1.0, noise=1.0, share=1.0)
    found = _noises(algorithm, UNEQUAL, rounds=60)
    assert found["w"].std() == pytest.approx(1 / 4, rel=0.1)
    assert found["b"].std() == pytest.approx(1 / 2, rel=0.2)  # 180 values


@pytest.mark.parametrize("mapping", [pytest.param("map", marks=pytest.mark.slow), "debug"])
def test_a_round_without_clients_has_noise_too(mapping):
    shared = make_algorithm(AlgorithmConfig(), CONFIG, COUNT)
    algorithm = private(shared, clip=1.0, noise=1.0, share=0.5)
    engine = jfed.EngineConfig(mapping=mapping)
    found = _noises(algorithm, rounds=2, sampler=lambda number, rng: [], engine=engine)
    assert found["w"].std() == pytest.approx(1 / 2, rel=0.4)


def test_noise_is_another_than_what_is_drawn_from_the_servers_key():
    """By a codec of what it sends next, or by an algorithm that splits its own key."""
    shared = make_algorithm(AlgorithmConfig(), jfed.ClientConfig(learning_rate=1e-12), COUNT)
    keys = []

    def apply(tree, key):
        keys.append(key)
        return tree

    def server_step(server, merged):
        keys.append(merged.key)
        return shared.server_step(server, merged)

    spying = dataclasses.replace(shared, server_step=server_step)
    algorithm = private(compressed(spying, down=Codec(apply)), clip=1.0, noise=1.0, share=1.0)
    found = _noises(algorithm, rounds=3, engine=jfed.EngineConfig(mapping="debug"))
    keys = [key for key in keys if not isinstance(key, jax.core.Tracer)]
    assert len(keys) >= 6
    for key in keys:
        own = [key, *(jax.random.fold_in(key, i) for i in range(4))]
        for one in [*own, *(jax.random.fold_in(k, i) for k in own for i in range(4))]:
            drawn = np.ravel(jax.random.normal(one, (16, 3)))
            for noise in found["w"]:
                assert abs(np.corrcoef(drawn, noise.ravel())[0, 1]) < 0.8


def test_personal_leaves_get_no_noise():
    shared = make_algorithm(AlgorithmConfig("fedper", personal=("b",)), CONFIG, COUNT)
    found = _noises(private(shared, clip=1.0, noise=1.0, share=1.0), rounds=2)
    np.testing.assert_array_equal(found["b"], 0)
    assert found["w"].std() > 0.1


@pytest.mark.slow
def test_the_server_knows_not_how_many_took_part():
    seen = []
    shared = make_algorithm(AlgorithmConfig(), CONFIG, COUNT)

    def server_step(server, merged):
        if not isinstance(merged.clients, jax.core.Tracer):
            seen.append((float(merged.clients), float(merged.owners["b"].max())))
        return shared.server_step(server, merged)

    spying = dataclasses.replace(shared, server_step=server_step)
    algorithm = private(spying, clip=1.0, noise=0.5, share=0.5)
    engine = jfed.EngineConfig(mapping="debug")
    _noises(algorithm, rounds=3, sampler=lambda n, rng: range(n + 1), engine=engine)
    assert seen == [(2.0, 2.0)] * 3


def test_the_clip_follows_a_quantile_of_the_norms(monkeypatch):
    """Without noise, of norms that hardly change: the first step by hand, and where it ends."""
    client = dataclasses.replace(CONFIG, learning_rate=1e-4)
    monkeypatch.setattr(numpy_rounds, "RATE", 1e-4)
    start = numpy_rounds.start()
    moved = [numpy_rounds.sgd(start, number, 0) for number in range(4)]
    norms = sorted(np.linalg.norm(_flat(each(np.subtract, own, start))) for own in moved)
    first = 1.01 * norms[0]
    shared = make_algorithm(AlgorithmConfig(), client, COUNT)
    algorithm = private(shared, clip=first, noise=0.0, share=1.0, quantile=0.5)
    federation = _federation(algorithm, cohort=4, client=client)
    state, bounds = federation.start, []
    for number in range(30):
        state, _ = federation.round(state, number)
        bounds.append(float(state.server.state[1]))
    assert bounds[0] == pytest.approx(first * np.exp(-0.2 * (0.25 - 0.5)))
    assert norms[1] * np.exp(-0.06) < bounds[-1] < norms[2] * np.exp(0.06)


@pytest.mark.parametrize(("accountant", "expected"), [("rdp", 2.1014), ("pld", 1.8282)])
def test_epsilon_of_a_known_case(accountant, expected):
    """10,000 clients, 1 % a round, noise 1.0, 1,000 rounds: figures of dp-accounting 0.6."""
    config = PrivacyConfig(clip=1.0, noise=1.0, delta=1e-5, accountant=accountant)
    assert Accountant(config, 10_000, 100).epsilon(1.0, 1000) == pytest.approx(expected, rel=1e-3)


def test_epsilon_of_full_participation_is_that_of_gaussians():
    """Everybody in each round: n Gaussians of noise z are one of noise z / sqrt(n)."""
    config = PrivacyConfig(clip=1.0, noise=4.0, delta=1e-5, accountant="pld")
    found = Accountant(config, 50, 50).epsilon(4.0, 16)
    exact = dp_accounting.get_epsilon_gaussian(1.0, 1e-5)
    assert found == pytest.approx(exact, rel=1e-3)


def test_a_fixed_cohort_is_accounted_for_by_replacement():
    config = PrivacyConfig(clip=1.0, noise=1.0, delta=1e-5, sampling="fixed")
    found = Accountant(config, 10_000, 100).epsilon(1.0, 1000)
    assert found == pytest.approx(20.987, rel=1e-3)  # dp-accounting 0.6


@pytest.mark.parametrize("accountant", ["rdp", pytest.param("pld", marks=pytest.mark.slow)])
def test_the_noise_of_an_epsilon_keeps_to_it(accountant):
    config = PrivacyConfig(clip=1.0, epsilon=3.0, delta=1e-5, accountant=accountant)
    accountant = Accountant(config, 1000, 50)
    noise = accountant.noise(200)
    assert 2.98 < accountant.epsilon(noise, 200) <= 3.0
    assert accountant.epsilon(0.98 * noise, 200) > 3.0


def test_noise_that_an_accountant_has_no_memory_for_is_told_at_once():
    config = PrivacyConfig(clip=1.0, noise=1e-6, delta=1e-5, accountant="pld")
    with pytest.raises(jfed.ConfigError, match=r"'pld' runs out of memory at noise 1e-06; use"):
        Accountant(config, 1000, 50).noise(10)


def test_poisson_draws_each_client_alike_and_its_bound_holds():
    draws = [poisson(0.2)(50, np.random.default_rng(i)) for i in range(2000)]
    counts = np.bincount(np.concatenate(draws), minlength=50) / 2000
    assert np.abs(counts - 0.2).max() < 5 * np.sqrt(0.16 / 2000)
    sizes = np.array(list(map(len, draws)))
    assert sizes.var() == pytest.approx(50 * 0.16, rel=0.2)
    assert sizes.max() < most_drawn(50, 0.2) < 50
    assert most_drawn(7, 1.0) == 7


@pytest.mark.parametrize("sampling", ["poisson", pytest.param("fixed", marks=pytest.mark.slow)])
def test_a_run_tells_epsilon_in_its_columns_summary_and_records(sampling, tmp_path):
    privacy = PrivacyConfig(clip=0.1, noise=1.0, delta=1e-3, sampling=sampling)
    evaluation = jfed.EvaluationConfig(every=2)
    options = {"rounds": 3, "cohort": 2, "client": CONFIG, "server": COUNT, "privacy": privacy}
    result = jfed.simulate(
        DATA, PARTS, MODEL, evaluation=evaluation, workdir=tmp_path / "run", **options
    )
    told = [record.epsilon for record in result.history]
    accountant = Accountant(privacy, 4, 2)
    assert told == [None, accountant.epsilon(1.0, 2), accountant.epsilon(1.0, 3)]
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("epsilon")
    assert [line.split(",")[column] for line in lines[1:]] == ["", *map(str, told[1:])]
    assert jfed.load(tmp_path / "run", MODEL).history == result.history
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["epsilon"], summary["noise"], result.noise) == (told[-1], 1.0, 1.0)
    sizes = [record.clients for record in result.history]
    assert (sizes == [2, 2, 2]) == (sampling == "fixed")


@pytest.mark.slow
def test_private_lanes_equal_the_debug_engine():
    privacy = PrivacyConfig(clip=0.1, noise=0.3, delta=1e-3, quantile=0.4)
    results = [
        jfed.simulate(
            DATA, PARTS, UNEQUAL, rounds=3, client=CONFIG, server=COUNT, privacy=privacy, seed=2,
            engine=jfed.EngineConfig(mapping=mapping),
        )
        for mapping in ("vmap", "debug")
    ]  # fmt: skip
    numpy_rounds.check(results[0].variables, results[1].variables)
    assert not jnp.allclose(results[0].variables["w"], numpy_rounds.start()["w"], atol=0.01)


OK = {"clip": 1.0, "noise": 1.0, "delta": 1e-5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": None}, "dp_noise 1.0 needs dp_clip, got none"),
        (
            {"clip": None, "noise": None, "delta": None, "sampling": "fixed"},
            "dp_sampling 'fixed' needs dp_clip, got none",
        ),
        (
            {"clip": None, "noise": None, "delta": None, "accountant": "pld"},
            "dp_accountant 'pld' needs dp_clip, got none",
        ),
        ({"clip": 0.0}, "dp_clip must be a number, above 0, got 0"),
        ({"noise": None}, "needs one of dp_noise and dp_epsilon, got None and None"),
        ({"epsilon": 2.0}, "needs one of dp_noise and dp_epsilon, got 1.0 and 2.0"),
        ({"noise": -1.0}, "dp_noise must be a number, 0 or more, got -1"),
        ({"delta": None}, "needs dp_delta, such as 1e-5, got none"),
        ({"delta": 1.0}, "dp_delta must be above 0 and below 1, got 1.0"),
        ({"quantile": 0.0}, "dp_quantile must be above 0 and below 1, got 0.0"),
        ({"sampling": "posson"}, "unknown dp_sampling 'posson'. Did you mean 'poisson'"),
        ({"sampling": "fixed", "accountant": "pld"}, "'pld' cannot do dp_sampling 'fixed'"),
    ],
    ids=str,
)
def test_bad_settings_are_quoted(changes, message):
    with pytest.raises(jfed.ConfigError, match=message):
        PrivacyConfig(**OK | changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": ServerConfig()}, "needs weights 'count', got 'examples'"),
        (
            {"server": ServerConfig(weights="count", aggregator="median")},
            "needs the aggregator 'mean', got 'median'",
        ),
        ({"cohort": 0}, "cohort must be from 1 to 4, got 0"),
        (
            {"privacy": PrivacyConfig(clip=1.0, noise=1.0, delta=0.25)},
            "dp_delta must be below one over the 4 clients, .* got 0.25",
        ),
        (
            {"faults": jfed.FaultConfig(hostile=0.5)},
            "dp_clip cannot be with exploding or hostile clients",
        ),
        ({"sampler": lambda number, rng: [0]}, "dp_clip draws clients itself, got sampler"),
        ({"algorithm": "fednova"}, r"'fednova' cannot be private: parts \['trained'\]"),
        (
            {"privacy": PrivacyConfig(clip=1.0, epsilon=1e-9, delta=1e-12)},
            "dp_epsilon 1e-09 cannot be reached in 30 rounds",
        ),
        (
            {"privacy": PrivacyConfig(**OK, quantile=0.5)},
            r"dp_quantile 0\.5 counts the short messages with noise 0\.2, .* half of the noise, 1;",
        ),
    ],
)
def test_what_breaks_the_guarantee_is_refused_before_anything_compiles(
    options, message, monkeypatch
):
    monkeypatch.setattr(Federation, "compile", None)
    given = {"server": COUNT, "client": CONFIG, "privacy": PrivacyConfig(**OK), "rounds": 30}
    given |= options
    if isinstance(given.get("algorithm"), str):
        config = AlgorithmConfig(given["algorithm"])
        given["algorithm"] = make_algorithm(config, CONFIG, given["server"])
    with pytest.raises(jfed.ConfigError, match=message):
        jfed.simulate(DATA, PARTS, MODEL, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": ServerConfig(weights="count", aggregator="median")}, "aggregator 'mean'"),
        ({"server": ServerConfig()}, "needs weights 'count', got 'examples'"),
        ({"faults": jfed.FaultConfig(exploding=0.5)}, "exploding or hostile"),
    ],
)
def test_an_algorithm_that_is_made_private_by_hand_needs_a_sum_too(options, message):
    algorithm = private(jfed.algorithms.fedavg(CONFIG), clip=1.0, noise=1.0, share=1.0)
    with pytest.raises(jfed.ConfigError, match=message):
        _federation(algorithm, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda a: private(a, clip=-1.0, noise=1.0, share=0.5), "clip must be .* got -1"),
        (lambda a: private(a, clip=1.0, noise=1.0, share=2.0), "share must be .* got 2"),
        (
            lambda a: private(
                private(a, clip=1.0, noise=1.0, share=0.5), clip=1.0, noise=1.0, share=0.5
            ),
            "is private already",
        ),
        (
            lambda a: compressed(private(a, clip=1.0, noise=1.0, share=0.5), up="int8"),
            "a codec after the clip could exceed it",
        ),
    ],
)
def test_what_cannot_be_private_is_refused(build, message):
    with pytest.raises(jfed.ConfigError, match=message):
        build(make_algorithm(AlgorithmConfig(), CONFIG, COUNT))
