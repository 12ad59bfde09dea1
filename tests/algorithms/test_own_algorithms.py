"""Algorithms as a user writes them, each against a loop in NumPy.

Their lines are counted in the README.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_rounds
import pytest
from numpy_rounds import COHORT, CONFIG, DATA, MODEL, PARTS, ROUNDS, check, run

import jfed
from jfed.algorithms import (
    Algorithm,
    ClientConfig,
    Server,
    fedavg,
    local_training,
    make_optimizer,
    one_each,
)
from jfed.simulation.federation import Federation

# What a user writes ------------------------------------------------------------------------------


def fedprox(config, mu):
    """FedProx (Li et al. 2020, arXiv 1812.06127, equation 2)."""

    def correct(gradient, client, local):
        return jax.tree.map(lambda g, w, s: g + mu * (w - s), gradient, local.params, client.sent)

    return fedavg(config, correct=correct)


def scaffold(config):
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II)."""

    def correct(gradient, client, local):
        control = client.sent["control"]
        return jax.tree.map(lambda g, own, c: g - own + c, gradient, local.memory, control)

    def client_final(client, local, key):
        x, c = client.sent["variables"], client.sent["control"]
        scale = client.steps.astype(jnp.float32) * client.learning_rate
        step = lambda own, c, x, y: own - c + (x - y) / scale  # noqa: E731
        own = jax.tree.map(step, local.memory, c, x, local.params)
        pairs = {"update": (local.params, x), "control": (own, local.memory)}
        return {name: jax.tree.map(jnp.subtract, *pair) for name, pair in pairs.items()}, own

    def server_step(server, merged):
        control = jax.tree.map(jnp.add, server.state, merged.per_client("control"))
        return Server(jax.tree.map(jnp.add, server.variables, merged.message["update"]), control)

    start = lambda client, memory: client.sent["variables"]  # noqa: E731
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    training = local_training(make_optimizer(config), correct=correct, start=start)
    send = lambda server: {"variables": server.variables, "control": server.state}  # noqa: E731
    weights = {"control": one_each}
    return Algorithm(*training, client_final, server_step, zeros, zeros, send, weights)


def ditto(config, strength):
    """Ditto (Li et al. 2021, arXiv 2012.04221, algorithm 1): a personal model beside the other."""
    shared = fedavg(config)

    def client_init(client, memory, key):
        return shared.client_init(client, (), key), memory

    def client_step(client, local, batch, key):
        common, metrics = shared.client_step(client, local[0], batch, key)
        gradient, _ = jax.grad(client.loss, has_aux=True)(local[1], batch, key)
        step = lambda v, g, w: v - client.learning_rate * (g + strength * (v - w))  # noqa: E731
        return (common, jax.tree.map(step, local[1], gradient, client.sent)), metrics

    def client_final(client, local, key):
        return shared.client_final(client, local[0], key)[0], local[1]

    mine = {"client_init": client_init, "client_step": client_step, "client_final": client_final}
    return dataclasses.replace(shared, **mine, memory_init=lambda variables: variables)


def personal_head(config, is_head):
    """FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): some leaves never leave their client."""

    def pick(head, body):
        return jax.tree_util.tree_map_with_path(lambda p, h, b: h if is_head(p) else b, head, body)

    def client_final(client, local, key):
        change = jax.tree.map(jnp.subtract, local.params, client.sent)
        return {"update": pick(jax.tree.map(jnp.zeros_like, change), change)}, local.params

    training = local_training(
        make_optimizer(config), start=lambda client, memory: pick(memory, client.sent)
    )
    return dataclasses.replace(
        fedavg(config), **training._asdict(), client_final=client_final, memory_init=lambda v: v
    )


# The tests ---------------------------------------------------------------------------------------

MAPPINGS = pytest.mark.parametrize(
    "mapping", ["map", pytest.param("debug", marks=pytest.mark.slow)]
)


@MAPPINGS
def test_fedprox(mapping):
    expected = numpy_rounds.fedprox(mu=0.5)
    check(run(fedprox(CONFIG, 0.5), mapping).variables, expected)


@MAPPINGS
def test_scaffold(mapping):
    expected, own = numpy_rounds.scaffold()
    result = run(scaffold(CONFIG), mapping)
    check(result.variables, expected)
    for client in range(4):
        check(result.memory(client), own[client])


@MAPPINGS
def test_ditto(mapping):
    expected, personal = numpy_rounds.ditto(strength=2.0)
    result = run(ditto(CONFIG, 2.0), mapping)
    check(result.variables, expected)
    for client in range(4):
        check(result.memory(client), personal[client])


@MAPPINGS
def test_a_personal_head(mapping):
    expected, heads = numpy_rounds.fedper()
    result = run(personal_head(CONFIG, lambda path: path[0].key == "b"), mapping)
    check(result.variables, expected)
    for client in range(4):
        np.testing.assert_allclose(result.memory(client)["b"], heads[client], rtol=2e-4, atol=2e-5)


def test_memory_is_the_same_after_a_kill(tmp_path):
    """Stopped by a callback and gone on with: the same bits as in one go, memory included."""

    def stop(record):
        if record.round == 2:
            raise RuntimeError("enough")

    whole = run(scaffold(CONFIG), workdir=tmp_path / "whole")
    options = {"workdir": tmp_path / "parts", "checkpoints": jfed.CheckpointConfig(every=1, keep=1)}
    with pytest.raises(jfed.CallbackError, match="enough"):
        run(scaffold(CONFIG), callbacks=[stop], **options)
    parts = run(scaffold(CONFIG), **options)
    jax.tree.map(np.testing.assert_array_equal, whole.variables, parts.variables)
    for client in range(4):
        jax.tree.map(np.testing.assert_array_equal, whole.memory(client), parts.memory(client))


def test_memory_survives_a_change_of_tier_and_belongs_to_its_entries():
    """A client in the narrow tier leaves what it remembers of other entries as it was."""
    narrow = jfed.models.Model(
        lambda key: {"w": MODEL.init(key)["w"]},
        lambda p, images: images.reshape(images.shape[0], -1) @ p["w"],
    )
    some = jfed.tiers.Tier("narrow", narrow, lambda variables, _: {"w": variables["w"]})
    both = jfed.tiers.Tiers(MODEL.init, (some, jfed.tiers.Tier("full", MODEL)))
    results = [
        jfed.simulate(
            DATA, PARTS, both, rounds=5, draw_tiers=1, client=CONFIG, algorithm=scaffold(CONFIG),
            engine=jfed.EngineConfig(mapping=mapping), seed=3,
        )
        for mapping in ("map", "debug")
    ]  # fmt: skip
    for client in range(4):
        check(results[0].memory(client), results[1].memory(client))
        assert np.abs(results[0].memory(client)["b"]).max() > 0
    check(results[0].variables, results[1].variables)


@pytest.fixture
def nothing_compiles(monkeypatch):
    monkeypatch.setattr(Federation, "compile", None)


def _broken(**changes):
    return dataclasses.replace(scaffold(CONFIG), **changes)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (_broken(client_init=lambda client, memory, key: memory), r"client_step .* cannot be used"),
        (
            _broken(
                client_step=lambda client, local, batch, key: (
                    local.params,
                    client.loss(local.params, batch, key)[1],
                )
            ),
            r"client_step .* must keep the local state",
        ),
        (
            _broken(client_step=lambda client, local, batch, key: (local, {"loss": 1.0})),
            r"client_step .* must return jfed\.models\.Metrics",
        ),
        (
            _broken(memory_init=lambda variables: jax.random.key(0)),
            r"memory_init .* must give arrays of numbers",
        ),
        (_broken(client_step=lambda *_: 3), r"client_step .* must return a pair"),
        (
            _broken(client_final=lambda client, local, key: ({"control": local.memory}, ())),
            r"client_final .* must keep the memory .*: \['b'\] is missing, expected float32\[3\]",
        ),
        (_broken(parts=("updaet", "control")), r"parts \['updaet'\] of the algorithm, but"),
        (
            _broken(server_step=lambda server, merged: merged.message["updat"]),
            r"server_step .* KeyError: 'updat'",
        ),
        (
            _broken(client_final=lambda c, local, key: ({"w": local.memory["w"]}, local.memory)),
            r"weights of parts \['control'\]",
        ),
        (
            _broken(
                client_final=lambda c, local, key: (
                    {"update": {"w": jnp.zeros(3), "b": jnp.zeros(3)}, "control": local.memory},
                    local.memory,
                )
            ),
            "part 'update' .* does not match what tier 'full' owns",
        ),
        (_broken(server_step=lambda server, merged: server.variables), "server_step .* must keep"),
        (_broken(memory_init=lambda variables: variables["nobody"]), "memory_init .*nobody"),
        (_broken(weights={"control": lambda client: jnp.ones(2)}), "must give a scalar"),
    ],
)
def test_functions_that_do_not_fit_are_named_before_anything_compiles(
    algorithm, message, nothing_compiles
):
    with pytest.raises(jfed.ConfigError, match=message):
        run(algorithm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": lambda number, rng: [1, 1]}, r"round 0 \(from 0\), returned client 1 twice"),
        ({"sampler": lambda number, rng: [4]}, "returned client 4, of clients 0 to 3"),
        ({"sampler": lambda number, rng: [0, 1, 2, 3]}, "returned 4 clients, of a cohort of 3"),
        ({"sampler": lambda number: [0]}, "sampler .* cannot be used on round 0"),
        ({"server": jfed.ServerConfig(weights=lambda c, n: -1.0)}, "of client 0 must be .* got -1"),
        ({"server": jfed.ServerConfig(weights=lambda c, n: 0.0)}, "are 0 for all 4 clients"),
        ({"client": ClientConfig(schedule=lambda number: -1.0)}, "of round 0 must be .* got -1"),
        (
            {"server": jfed.ServerConfig(aggregator=lambda stack: stack.updates["nobody"])},
            r"aggregator .*lambda.* cannot be used on clients 3",
        ),
        (
            {"server": jfed.ServerConfig(aggregator=lambda s: jax.tree.map(jnp.sum, s.updates))},
            r"aggregator .* must keep the update",
        ),
    ],
)
def test_functions_that_cannot_work_are_named_before_anything_compiles(
    options, message, nothing_compiles
):
    with pytest.raises(jfed.ConfigError, match=message):
        run(None, **options)


@pytest.mark.parametrize("algorithm", [None, scaffold(CONFIG), personal_head(CONFIG, lambda p: 0)])
def test_traffic_is_what_the_algorithm_sends(algorithm):
    """SCAFFOLD sends two trees like the 51 variables each way, the others one."""
    trees = 2 if algorithm is not None and algorithm.weights else 1
    result = run(algorithm)
    assert result.traffic == {"full": (trees * 4 * 51, trees * 4 * 51)}
    assert result.history[0].bytes_up == COHORT * trees * 4 * 51


@pytest.mark.parametrize("mapping", ["map", pytest.param("debug", marks=pytest.mark.slow)])
def test_numbers_of_python_and_numpy_are_state_and_memory_too(mapping, tmp_path):
    """Counters: of a client's batches in the round, and of its rounds."""
    shared = fedavg(CONFIG)

    def client_init(client, memory, key):
        return shared.client_init(client, (), key), 0, memory

    def client_step(client, local, batch, key):
        inner, metrics = shared.client_step(client, local[0], batch, key)
        return (inner, local[1] + 1, local[2]), metrics

    def client_final(client, local, key):
        message, _ = shared.client_final(client, local[0], key)
        rounds, batches = local[2]["rounds"] + 1, local[2]["batches"] + jnp.float32(local[1])
        return message, {"rounds": rounds, "batches": batches}

    counting = dataclasses.replace(
        shared,
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        memory_init=lambda variables: {"rounds": 0, "batches": np.zeros(())},
    )
    with jax.numpy_dtype_promotion("standard"):
        result = run(counting, mapping, cohort=4, workdir=tmp_path / "run")
    for client, part in enumerate(PARTS):
        per_round = CONFIG.epochs * -(-len(part) // CONFIG.batch_size)
        memory = result.memory(client)
        assert (memory["rounds"], memory["batches"]) == (ROUNDS, ROUNDS * per_round)


@pytest.mark.parametrize("mapping", ["map", "debug"])
def test_a_client_whose_memory_is_not_finite_is_rejected(mapping):
    shared = fedavg(CONFIG)
    broken = dataclasses.replace(
        shared,
        memory_init=lambda variables: jnp.zeros(()),
        client_final=lambda client, local, key: (
            shared.client_final(client, local, key)[0],
            jnp.where(client.number == 1, jnp.nan, 1.0),
        ),
    )
    result = run(broken, mapping, cohort=4)
    assert [(r.delivered, r.rejected) for r in result.history] == [(3, 1)] * ROUNDS
    assert [float(result.memory(client)) for client in range(4)] == [1, 0, 1, 1]


def test_the_same_optimizers_are_the_same_algorithm():
    rates = [ClientConfig(learning_rate=rate, epochs=2) for rate in (0.1, 0.2)]
    assert len({fedavg(config) for config in rates}) == 1
    assert fedavg(rates[0]) is not fedavg(ClientConfig(momentum=0.9))
