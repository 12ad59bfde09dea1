"""Clients tested on examples of their own, against NumPy and against the model itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_rounds
import pytest
from numpy_rounds import CONFIG, DATA, MODEL, PARTS, ROUNDS, X, each

import jfed
from jfed.algorithms import AlgorithmConfig, ServerConfig, make_algorithm
from jfed.data import Split
from jfed.data.preprocessing import channel_moments
from jfed.seeds import generator
from jfed.simulation import local_tests
from jfed.simulation.records import LocalEvaluation

SHARE = 0.4
_LABELS = np.where(
    np.random.default_rng(1).random(60) < 0.4, np.arange(60, dtype=np.int32) % 3, DATA.train.labels
)
HARD = dataclasses.replace(DATA, train=Split(DATA.train.images, _LABELS))  # no model gets it right
TRAIN, TEST = local_tests.split(PARTS, SHARE, seed=numpy_rounds.SEED)


def _run(monkeypatch, name="fedavg", mapping="map", client=CONFIG, tiers=MODEL, **options):
    """A run with local tests; NumPy's clients train on what is left to them."""
    monkeypatch.setattr(numpy_rounds, "PARTS", TRAIN)
    monkeypatch.setattr(numpy_rounds, "DATA", HARD)
    evaluation = jfed.EvaluationConfig(every=0, batch_size=4, local_test=SHARE, **options)
    settings = {"strength": 2.0} if name == "ditto" else {}
    settings |= {"personal": ("b",)} if name == "fedper" else {}
    algorithm = make_algorithm(AlgorithmConfig(name, **settings), client, ServerConfig())
    return jfed.simulate(
        HARD, PARTS, tiers, rounds=ROUNDS, cohort=numpy_rounds.COHORT, client=client,
        seed=numpy_rounds.SEED, algorithm=algorithm, evaluation=evaluation,
        engine=jfed.EngineConfig(mapping=mapping),
    )  # fmt: skip


def _accuracy(params, client):
    logits = X[TEST[client]] @ params["w"] + params["b"]
    return (logits.argmax(1) == _LABELS[TEST[client]]).mean()


def _check(result, models):
    local = result.history[-1].local
    assert local.clients == (0, 1, 2, 3)
    assert local.examples == tuple(map(len, TEST))
    expected = [_accuracy(models[client], client) for client in range(4)]
    np.testing.assert_allclose(local.accuracies, expected, atol=1e-6)
    assert np.std(expected) > 0.1
    assert all(record.local is None for record in result.history[:-1])


def test_examples_are_held_out_of_every_client_once():
    for part, train, test in zip(PARTS, TRAIN, TEST, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), part)
        assert len(test) == round(SHARE * len(part))
    assert [len(t) for t in local_tests.split([np.arange(2)] * 3, 0.99, seed=0)[0]] == [1, 1, 1]


@pytest.mark.parametrize("mapping", ["vmap", pytest.param("debug", marks=pytest.mark.slow)])
def test_the_global_model_is_tested_where_none_is_personal(mapping, monkeypatch):
    result = _run(monkeypatch, mapping=mapping)
    _check(result, [numpy_rounds.rounds(numpy_rounds.sgd)] * 4)


def test_personal_models_are_tested(monkeypatch):
    result = _run(monkeypatch, "ditto")
    _check(result, numpy_rounds.ditto(2.0)[1])
    result = _run(monkeypatch, "fedper")
    common, heads = numpy_rounds.fedper()
    _check(result, [common | {"b": heads[client]} for client in range(4)])


def test_clients_fine_tune_before_the_test(monkeypatch):
    """Three epochs by the client's optimizer, momentum and all, on what it trains on."""
    client = jfed.ClientConfig(epochs=1, batch_size=4, learning_rate=0.1, momentum=0.5)
    result = _run(monkeypatch, client=client, finetune_epochs=3)
    models = []
    for number, train in enumerate(TRAIN):
        rng = generator(numpy_rounds.SEED, "fine-tuning", number)
        own = {k: np.asarray(v, np.float64) for k, v in result.variables.items()}
        trace = each(np.zeros_like, own)
        for _ in range(3):
            order = rng.permutation(train)
            for batch in np.split(order, range(4, len(order), 4)):
                trace = each(lambda t, g: 0.5 * t + g, trace, numpy_rounds.gradient(own, batch))
                own = each(lambda w, t: w - 0.1 * t, own, trace)
        models.append(own)
    _check(result, models)
    plain = _run(monkeypatch, client=client)
    jax.tree.map(np.testing.assert_array_equal, plain.variables, result.variables)
    assert plain.history[-1].local != result.history[-1].local


@pytest.mark.parametrize(
    "personal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["own", "global"]
)
def test_norms_have_the_clients_statistics_in_personal_models_alone(personal):
    """Of an ODENet of two counts: its logits with statistics of one batch with all examples."""
    network = jfed.models.ODENetConfig(widths=(4,), channels=1, classes=3, conv="xla")
    tiers = jfed.tiers.ode(network, (1, 3))
    client = jfed.ClientConfig(batch_size=32)
    name = "fedper" if personal else "fedavg"
    algorithm = make_algorithm(AlgorithmConfig(name), client, ServerConfig())
    result = jfed.simulate(
        HARD, PARTS, tiers, rounds=2, client=client, algorithm=algorithm, seed=7,
        evaluation=jfed.EvaluationConfig(local_test=SHARE, calibration_examples=60, batch_size=60),
    )  # fmt: skip
    mean, std = channel_moments(DATA.train.images)
    images = (DATA.train.images.astype(np.float32) - mean) / std
    train, test = local_tests.split(PARTS, SHARE, seed=7)
    local = result.history[-1].local
    by_name = {tier.name: tier for tier in tiers.members}
    assert set(local.tiers) == {"1", "3"}
    for number, title in enumerate(local.tiers):
        model, params = by_name[title].bound(), result.variables
        if personal:
            own = result.memory(number)["classifier"]
            params = params | {"classifier": own}
        params = jax.tree.map(jnp.asarray, params)
        seen = images[train[number]] if personal else images
        norms = model.measure(params, jnp.asarray(seen), jnp.ones(len(seen)))
        logits = model.apply(params, jnp.asarray(images[test[number]]), None, norms)
        right = np.argmax(logits, 1) == _LABELS[test[number]]
        assert local.accuracies[number] == pytest.approx(float(right.mean()), abs=1e-6)


def test_summaries_are_those_of_numpy():
    accuracies, examples = (0.5, 1.0, 0.25, 0.75), (4, 2, 4, 8)
    local = LocalEvaluation((0, 1, 2, 3), ("b", "a", "b", "a"), accuracies, examples)
    assert local.summary == {
        "mean": 0.625,
        "weighted": pytest.approx((2 + 2 + 1 + 6) / 18),
        "worst": 0.25,
        "p10": pytest.approx(np.quantile(accuracies, 0.1)),
        "std": pytest.approx(np.std(accuracies)),
    }
    assert local.by_tier == {"a": 0.875, "b": 0.375}


def test_a_run_folder_has_columns_a_figure_and_a_summary_of_it(tmp_path):
    evaluation = jfed.EvaluationConfig(every=2, local_test=SHARE)
    options = {"rounds": 3, "client": CONFIG, "evaluation": evaluation, "workdir": tmp_path / "a"}
    result = jfed.simulate(DATA, PARTS, MODEL, **options)
    lines = (tmp_path / "a" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    shown = [float(rows[i]["local_accuracy_of_full"]) for i in (1, 2)]
    assert shown == [result.history[i].local.summary["mean"] for i in (1, 2)]
    assert rows[0]["local_accuracy_worst"] == ""
    assert (tmp_path / "a" / "local_accuracy.png").stat().st_size > 1000
    assert jfed.load(tmp_path / "a", MODEL).history == result.history
    found = jfed.simulate(DATA, PARTS, MODEL, **options)  # finished: read again
    assert found.history[-1].local == result.history[-1].local


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_test": 1.0}, "local_test must be below 1, got 1.0"),
        ({"local_test": -0.1}, "local_test must be a number, 0 or more, got -0.1"),
        ({"finetune_epochs": 2}, "finetune_epochs 2 need examples to test on: set local_test"),
    ],
)
def test_bad_settings_are_quoted(options, message):
    with pytest.raises(jfed.ConfigError, match=message):
        jfed.EvaluationConfig(**options)


def test_a_client_with_one_example_cannot_be_tested():
    parts = [np.arange(1), np.arange(1, 60)]
    with pytest.raises(jfed.ConfigError, match=r"local_test 0.4 leaves client 0, which has 1 ex"):
        jfed.simulate(
            DATA, parts, MODEL, rounds=1, evaluation=jfed.EvaluationConfig(local_test=SHARE)
        )
