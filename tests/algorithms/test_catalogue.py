"""The algorithms in the box, against loops in NumPy, exact limits, and their papers' numbers."""

import dataclasses
import inspect

import jax
import numpy as np
import numpy_rounds
import pytest
from numpy_rounds import CONFIG, DATA, MODEL, PARTS, RATE, check, each, run

import jfed
from jfed.algorithms import AlgorithmConfig, ServerConfig, make_algorithm
from jfed.algorithms.catalogue import ALGORITHMS
from jfed.simulation.federation import Federation

# That lanes equal the debug engine, whatever the algorithm, is tested elsewhere.
ENGINES = pytest.mark.parametrize(
    "mapping", ["vmap", pytest.param("debug", marks=pytest.mark.slow)]
)
COUNT = ServerConfig(weights="count")
HEAD = ("b",)


def make(name, client=CONFIG, server=None, **settings):
    return make_algorithm(AlgorithmConfig(name, **settings), client, server or ServerConfig())


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)


@ENGINES
def test_fedprox(mapping):
    check(run(make("fedprox", mu=0.5), mapping).variables, numpy_rounds.fedprox(0.5))


@ENGINES
def test_scaffold_with_equal_weights_and_a_server_rate(mapping):
    server = dataclasses.replace(COUNT, learning_rate=0.7)

    def mean(params, trained):
        return each(lambda *own: sum(own[1:]) / (len(own) - 1), params, *trained.values())

    expected, controls = numpy_rounds.scaffold(0.7, mean)
    result = run(make("scaffold", server=server), mapping, server=server)
    check(result.variables, expected)
    for client, control in controls.items():
        check(result.memory(client), control)


@ENGINES
def test_feddyn(mapping):
    expected, terms = numpy_rounds.feddyn(0.3)
    result = run(make("feddyn", alpha=0.3), mapping, server=COUNT)
    check(result.variables, expected)
    for client, term in terms.items():
        check(result.memory(client), term)


@ENGINES
@pytest.mark.parametrize("momentum", [None, 0.8])
def test_fednova(mapping, momentum):
    client = dataclasses.replace(CONFIG, momentum=momentum)
    result = run(make("fednova", client), mapping, client=client)
    check(result.variables, numpy_rounds.fednova(momentum or 0.0))


@ENGINES
def test_ditto_trains_both_models_with_momentum(mapping):
    client = dataclasses.replace(CONFIG, momentum=0.5)
    expected, personal = numpy_rounds.ditto(2.0, 0.5)
    result = run(make("ditto", client, strength=2.0), mapping, client=client)
    check(result.variables, expected)
    for number, model in personal.items():
        check(result.memory(number), model)


@ENGINES
def test_fedper(mapping):
    expected, heads = numpy_rounds.fedper()
    result = run(make("fedper", personal=HEAD), mapping)
    check(result.variables, expected)
    for client, head in heads.items():
        check(result.memory(client), {"b": head})
    assert result.traffic == {"full": (4 * 48, 4 * 48)}


@ENGINES
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_fedrep(mapping, share):
    expected, heads = numpy_rounds.fedrep(share)
    result = run(make("fedrep", personal=HEAD, head_share=share), mapping)
    check(result.variables, expected)
    for client, head in heads.items():
        check(result.memory(client), {"b": head})


def _adam(state, k, delta, b1=0.9, b2=0.999, eps=1e-8):
    m, v, t = state.get(k, (0, 0, 0))
    state[k] = m, v, t = b1 * m + (1 - b1) * delta, b2 * v + (1 - b2) * delta**2, t + 1
    return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def _adagrad(state, k, delta, eps=1e-7, initial_accumulator_value=0.1):
    state[k] = state.get(k, initial_accumulator_value) + delta**2
    return delta / np.sqrt(state[k] + eps)


def _yogi(state, k, delta, b1=0.9, b2=0.999, eps=1e-3):
    m, v, t = state.get(k, (-1e-6, 1e-6, 0))  # of the gradient, -delta
    m = b1 * m + (1 - b1) * delta
    v, t = v - (1 - b2) * np.sign(v - delta**2) * delta**2, t + 1
    state[k] = m, v, t
    return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


@jax.numpy_dtype_promotion("standard")  # Optax raises a float to an integer power
@pytest.mark.parametrize(
    ("optimizer", "rule", "settings"),
    [
        ("adam", _adam, {"b1": 0.8, "eps": 0.01}),
        pytest.param(
            "adagrad",
            _adagrad,
            {"initial_accumulator_value": 0.01, "eps": 0.001},
            marks=pytest.mark.slow,
        ),
        pytest.param("yogi", _yogi, {"eps": 0.05, "b2": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_fedopt_takes_arguments_of_the_servers_optimizer(optimizer, rule, settings):
    server = ServerConfig(optimizer=optimizer, learning_rate=0.1, optimizer_args=settings)
    result = run(make("fedavg", server=server), server=server)
    check(result.variables, numpy_rounds.adaptive(rule, 0.1, **settings))


@pytest.mark.parametrize(
    ("name", "settings"), [("fedprox", {"mu": 0.0}), ("feddyn", {"alpha": 0.0})]
)
def test_limits_that_are_fedavg(name, settings):
    """To the bit, or nearly: XLA fuses other sums where a term is 0."""
    check(run(make(name, **settings)).variables, run(make("fedavg")).variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("adagrad", {"initial_accumulator_value": 1e8}),
        ("adam", {"b1": 0.0, "eps": 1e4}),
        ("yogi", {"b1": 0.0, "eps": 1e4}),
    ],
)
def test_fedopt_that_hardly_adapts_is_fedavg(optimizer, settings):
    """Where tau, or what the second moment begins with, is far above all gradients."""
    server = ServerConfig(optimizer=optimizer, learning_rate=1e4, optimizer_args=settings)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
        found = run(make("fedavg", server=server), server=server).variables
    check(found, run(make("fedavg")).variables)


def test_fedrep_without_batches_for_the_head_trains_the_body_alone():
    found = run(make("fedrep", personal=HEAD, head_share=0.0))
    check(found.variables, numpy_rounds.fedrep(0.0)[0])


@pytest.mark.slow
def test_scaffolds_first_round_is_fedavgs_and_fednova_with_equal_steps_is():
    once = {"rounds": 1, "cohort": 4}
    same(run(make("scaffold"), **once), run(make("fedavg"), **once))
    steps = dataclasses.replace(CONFIG, steps=7)
    found = run(make("fednova", steps), client=steps).variables
    check(found, run(make("fedavg", steps), client=steps).variables)


@pytest.mark.slow
def test_of_a_single_client_scaffold_and_fedper_are_fedavg():
    """Its control variate is the server's, and its model the only one, head included."""
    alone = {"partition": [np.arange(60)], "cohort": 1}
    expected = run(make("fedavg"), **alone)
    check(run(make("scaffold"), **alone).variables, expected.variables)
    found = run(make("fedper", personal=HEAD), **alone)
    check(found.memory(0), expected.variables)
    check({"w": found.variables["w"]}, {"w": expected.variables["w"]})


@pytest.mark.slow
def test_a_fedprox_as_strong_as_its_steps_are_long_begins_each_step_at_what_was_sent():
    """w - r (g(w) + (w - s) / r) = s - r g(w)."""
    found = run(make("fedprox", mu=1 / RATE), rounds=1, cohort=4).variables
    trained = {}
    for client in range(4):
        own = sent = numpy_rounds.start()
        for batch in numpy_rounds.batches(client, 0):
            own = each(lambda w, g: w - RATE * g, sent, numpy_rounds.gradient(own, batch))
        trained[client] = own
    check(found, numpy_rounds.average(numpy_rounds.start(), trained))


@pytest.mark.slow
def test_one_fednova_client_is_fedavg_whatever_its_steps():
    check(run(make("fednova"), cohort=1).variables, run(make("fedavg"), cohort=1).variables)


@pytest.mark.slow
def test_feddyns_first_round_with_all_clients_is_fedprox_at_a_server_rate_of_two():
    once, two = {"rounds": 1, "cohort": 4}, dataclasses.replace(COUNT, learning_rate=2.0)
    found = run(make("feddyn", alpha=0.4), server=COUNT, **once)
    prox = run(make("fedprox", server=two, mu=0.4), server=two, **once)
    check(found.variables, prox.variables)


def test_ditto_without_strength_is_local_training():
    """Each client's own model is what it trains alone, whenever it is sampled."""
    result = run(make("ditto", strength=0.0), cohort=4)
    for client in range(4):
        own = numpy_rounds.start()
        for number in range(numpy_rounds.ROUNDS):
            own = numpy_rounds.sgd(own, client, number)
        check(result.memory(client), own)


@pytest.mark.slow
def test_a_ditto_as_strong_as_its_steps_are_long_begins_each_step_at_the_global_model():
    """v - r (g(v) + (v - w) / r) = w - r g(v)."""
    result = run(make("ditto", strength=1 / RATE), cohort=4, rounds=1)
    for client in range(4):
        own = sent = numpy_rounds.start()
        for batch in numpy_rounds.batches(client, 0):
            own = each(lambda w, g: w - RATE * g, sent, numpy_rounds.gradient(own, batch))
        check(result.memory(client), own)


@pytest.mark.slow
def test_fedper_and_fedrep_clients_share_no_head():
    result = run(make("fedper", personal=HEAD), cohort=4)
    heads = np.stack([result.memory(client)["b"] for client in range(4)])
    assert np.ptp(heads, axis=0).min() > 1e-3
    np.testing.assert_array_equal(result.variables["b"], MODEL.init(jax.random.key(0))["b"])


def test_entries_that_some_clients_own_have_the_mean_of_their_owners_controls():
    """c stays the mean of c_i over the clients that own an entry, in every tier."""
    narrow = jfed.models.Model(
        lambda key: {"w": MODEL.init(key)["w"]},
        lambda p, images: images.reshape(images.shape[0], -1) @ p["w"],
    )
    some = jfed.tiers.Tier("narrow", narrow, lambda variables, _: {"w": variables["w"]})
    both = jfed.tiers.Tiers(MODEL.init, (some, jfed.tiers.Tier("full", MODEL)))
    federation = Federation(
        DATA, PARTS, both, rounds=3, cohort=3, client=CONFIG, algorithm=make("scaffold"),
        engine=jfed.EngineConfig(mapping="debug"),
    )  # fmt: skip
    state = federation.start
    for number in range(3):
        state, _ = federation.round(state, number)
    recall = federation.recall(state)
    control, _ = state.server.state
    rows = [recall(client) for client in range(4)]
    owners = np.flatnonzero(federation.population.tier == 1)
    assert len(owners) == 2
    np.testing.assert_allclose(control["w"], np.mean([r["w"] for r in rows], 0), atol=1e-6)
    mean = np.mean([rows[client]["b"] for client in owners], 0)
    np.testing.assert_allclose(control["b"], mean, atol=1e-6)
    assert np.abs(mean).max() > 1e-3


@pytest.mark.slow
def test_fedbn_is_fedper_of_other_leaves():
    same(run(make("fedbn", personal=HEAD)), run(make("fedper", personal=HEAD)))


def test_norms_stay_at_clients_of_fedbn():
    assert make("fedbn").personal("functions/0/norm1/scale")
    assert not make("fedbn").personal("functions/0/conv1/kernel")


def test_equal_settings_are_one_algorithm_and_others_another():
    rates = [dataclasses.replace(CONFIG, learning_rate=rate) for rate in (0.1, 0.2)]
    for name, settings in NEEDED.items():
        assert len({make(name, rate, **settings) for rate in rates}) == 1, name
    assert make("fedprox", mu=0.1) is not make("fedprox", mu=0.2)


def test_arrays_of_one_number_are_settings_too():
    mu = jfed.algorithms.fedprox(CONFIG, mu=np.array(0.5))
    assert mu is jfed.algorithms.fedprox(CONFIG, mu=0.5)
    listed = jfed.algorithms.fedper(CONFIG, personal=["b"])
    assert listed is jfed.algorithms.fedper(CONFIG, personal=("b",))
    with pytest.raises(jfed.ConfigError, match=r"mu must be a number, .* got array"):
        jfed.algorithms.fedprox(CONFIG, mu=np.ones(2))


NEEDED = {name: {} for name in ALGORITHMS} | {
    "fedprox": {"mu": 0.1},
    "feddyn": {"alpha": 0.1},
    "ditto": {"strength": 0.1},
}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AlgorithmConfig("fedprx", mu=0.1), r"unknown algorithm 'fedprx'. Did you mean"),
        (lambda: AlgorithmConfig("scaffold", mu=0.1), "'scaffold' has no mu, got mu 0.1.*fedprox"),
        (lambda: AlgorithmConfig("fedprox"), "'fedprox' needs mu, got none"),
        (lambda: AlgorithmConfig("ditto"), "'ditto' needs ditto_strength, got none"),
        (
            lambda: AlgorithmConfig("fedavg", alpha=0.1),
            "'fedavg' has no feddyn_alpha, got feddyn_alpha 0.1",
        ),
        (lambda: make("fedprox", mu=-1.0), "mu must be a number, 0 or more, got -1"),
        (lambda: make("feddyn", alpha=float("nan")), "feddyn alpha must be .*, got nan"),
        (lambda: make("ditto", strength=-0.5), "ditto strength must be .*, got -0.5"),
        (lambda: make("fedper", personal=()), r"personal must be one pattern or more.*got \(\)"),
        (lambda: make("fedrep", head_share=1.5), "head_share must be .*, got 1.5"),
        (
            lambda: make("feddyn", server=ServerConfig(momentum=0.9), alpha=0.1),
            "feddyn has no server optimizer, got momentum 0.9",
        ),
        (
            lambda: make("fednova", jfed.ClientConfig(optimizer="adam")),
            "fednova needs clients with the optimizer 'sgd', .* got 'adam'",
        ),
        (
            lambda: ServerConfig(optimizer="adam", optimizer_args={"esp": 0.1}),
            r"unknown argument of server optimizer 'adam' 'esp'. Did you mean 'eps'",
        ),
        (
            lambda: jfed.ClientConfig(optimizer_args={"momentum": 0.1}, momentum=0.2),
            "momentum of optimizer 'sgd' is given twice: 0.2 and 0.1",
        ),
        (
            lambda: jfed.ClientConfig(optimizer_args={"nesterov": None}),
            r"as eps=0.001, got \('nesterov', None\)",
        ),
        (
            lambda: jfed.ClientConfig(optimizer_args=(("nesterov", True), ("nesterov", False))),
            "must name each argument once",
        ),
        (
            lambda: ServerConfig(optimizer_args={"momentum": "x"}),
            "momentum of server optimizer 'sgd' must be a number, 0 or more, got 'x'",
        ),
        (
            lambda: make("fednova", jfed.ClientConfig(optimizer_args={"momentum": 1.0})),
            "momentum of optimizer 'sgd' must be from 0 to below 1, got 1.0",
        ),
        (
            lambda: ServerConfig(optimizer="adam", optimizer_args={"eps": float("nan")}),
            "eps of server optimizer 'adam' must be a number, 0 or more, got nan",
        ),
        (
            lambda: ServerConfig(optimizer="adam", optimizer_args={"b1": "x"}),
            "b1 of server optimizer 'adam' must be a number, 0 or more, got 'x'",
        ),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(jfed.ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("personal", "message"),
    [
        (("nobody",), "personal 'nobody' matches no entry. There are: 'b', 'w'"),
        (("b", "nobody"), "personal 'nobody' matches no entry"),
        (("*",), "names every leaf"),
    ],
)
def test_patterns_that_name_no_leaf_or_all_are_refused_before_anything_compiles(
    personal, message, monkeypatch
):
    monkeypatch.setattr(Federation, "compile", None)
    with pytest.raises(jfed.ConfigError, match=message):
        run(make("fedper", personal=personal))


def test_patterns_that_nearly_name_leaves_are_asked_about():
    network = jfed.models.build(jfed.models.ODENetConfig(widths=(4, 8), channels=1))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    message = (
        r"'clasifier/\*' matches no entry. Did you mean 'classifier/\*'.*\? There are: .*'stem/"
    )
    with pytest.raises(jfed.ConfigError, match=message):
        make("fedper", personal=("clasifier/*",)).memory_init(shapes)


def test_makers_can_be_called_as_their_signatures_tell():
    for name, settings in NEEDED.items():
        maker = getattr(jfed.algorithms, name)
        parameters = inspect.signature(maker).parameters
        assert [parameters[of].default for of in ("client", "server")] == [None, None]
        needed = {p.name for p in parameters.values() if p.default is p.empty}
        assert needed == set(settings)
        assert maker(**settings) is make(name, jfed.ClientConfig(), **settings)


DEPTHFL = (("name", "feddyn"), ("alpha", 0.1), ("h_over", "clients"))


@pytest.mark.parametrize(
    ("given", "alpha"),
    [({}, 0.1), ({"name": "feddyn", "alpha": 0.2}, 0.2), ({"alpha": 0.05}, 0.05)],
)
def test_what_is_not_given_is_as_the_method_has_it(given, alpha):
    client, server = jfed.ClientConfig(), jfed.ServerConfig()
    found = make_algorithm(AlgorithmConfig(**given), client, server, DEPTHFL)
    expected = AlgorithmConfig("feddyn", alpha=alpha, h_over="clients")
    assert found.name == make_algorithm(expected, client, server).name
    assert "clients" in found.name


def test_another_algorithm_is_as_itself():
    found = make_algorithm(
        AlgorithmConfig("fedavg"), jfed.ClientConfig(), jfed.ServerConfig(), DEPTHFL
    )
    assert (
        found.name
        == make_algorithm(AlgorithmConfig(), jfed.ClientConfig(), jfed.ServerConfig()).name
    )
