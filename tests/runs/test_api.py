"""A user's own model, data and tiers in a run folder, and runs read back."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jfed
from jfed.cli import main
from jfed.reports import finished

ROUNDS = 6
LABELS = np.arange(24, dtype=np.int32) % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1)).astype(np.uint8)
PARTS = tuple(np.split(np.arange(24), 6))


def _data(images=IMAGES):
    split = jfed.data.Split(images, LABELS)
    return jfed.data.Dataset("mine", split, split, ("a", "b", "c"))


def _init(key, classes=3):
    return {"layers": {0: jnp.zeros((16, 8)), 1: jax.random.normal(key, (8, classes))}}


def _apply(params, images):
    flat = images.reshape(images.shape[0], -1)
    return jnp.tanh(flat @ params["layers"][0]) @ params["layers"][1]


MODEL = jfed.models.Model(_init, _apply)


def noisy(learning_rate):
    """A server optimizer that keeps a typed key."""
    noise = optax.add_noise(0.01, 0.5, jax.random.key(3))
    return optax.chain(noise, optax.adam(learning_rate))


SERVER = jfed.ServerConfig(optimizer=noisy, learning_rate=0.05)


def _simulate(workdir=None, data=None, partition=PARTS, model=MODEL, **options):
    given = {"rounds": ROUNDS, "cohort": 3, "server": SERVER, "seed": 2} | options
    return jfed.simulate(data or _data(), partition, model, workdir=workdir, **given)


@pytest.fixture(scope="module", autouse=True)
def _promotion():
    """Optax's Adam and noise mix integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def in_memory():
    return _simulate()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    _simulate(folder)
    return folder


def _without_seconds(history):
    return [dataclasses.replace(record, seconds=0.0) for record in history]


def _check_same(result, other):
    assert _without_seconds(result.history) == _without_seconds(other.history)
    jax.tree.map(np.testing.assert_array_equal, result.variables, other.variables)


def test_a_run_in_a_folder_is_that_in_memory(in_memory, run_folder):
    names = {path.name for path in run_folder.iterdir()}
    figures = {"clients.png", "accuracy.png", "accuracy_by_bytes.png", "accuracy_by_flops.png"}
    assert {"config.json", "metrics.csv", "summary.json", "checkpoints"} | figures <= names
    with (run_folder / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses == [record.train_loss for record in in_memory.history]
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["tiers"][0]["twin"] is None
    assert summary["tiers"][0]["bytes_up"] == 4 * (16 * 8 + 8 * 3)
    run = finished.read(run_folder)
    assert (run.seed, run.average) == (2, in_memory.accuracies["full"])
    assert main(["report", str(run_folder)]) == 0


def _fedprox(mu):
    def correct(gradient, client, local):
        pull = lambda g, w, s: g + mu * (w - s)  # noqa: E731
        return jax.tree.map(pull, gradient, local.params, client.sent)

    return jfed.algorithms.fedavg(jfed.ClientConfig(), correct=correct)


def test_a_folder_of_another_algorithm_is_refused(tmp_path):
    """Of one name, but another value that it closes over."""
    first = _simulate(tmp_path / "run", algorithm=_fedprox(0.1))
    _check_same(_simulate(tmp_path / "run", algorithm=_fedprox(0.1)), first)
    with pytest.raises(jfed.RunFolderError, match=r"algorithm\.client_step is .* there, .* here"):
        _simulate(tmp_path / "run", algorithm=_fedprox(5.0))


def test_settings_are_written_nested(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    assert config["client"]["learning_rate"] == jfed.ClientConfig().learning_rate
    assert config["server"]["optimizer"] == f"{__name__}.noisy"
    assert config["inputs"]["data"]["name"] == "mine"
    assert config["inputs"]["tiers"]["members"]["full"]["parameters"].startswith("152 in 2 arrays")


def test_a_finished_run_is_only_read(in_memory, run_folder):
    heard = []
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    _check_same(_simulate(run_folder, callbacks=[heard.append]), in_memory)
    assert heard == []
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before


def _brier(logits, labels):
    right = jax.nn.one_hot(labels, 3)
    return jnp.square(jax.nn.softmax(logits) - right).sum(-1)


def _loss_and_brier(params, batch, key):
    loss, metrics = jfed.models.cross_entropy(_apply(params, batch.images), batch)
    total = (_brier(_apply(params, batch.images), batch.labels) * batch.mask).sum()
    return loss, metrics._replace(others={"scores": {"brier": total}})


def _measure(logits, batch):
    return {"brier": (_brier(logits, batch.labels) * batch.mask).sum()}


def test_metrics_of_the_users_own_are_columns_of_the_folder(tmp_path):
    model = dataclasses.replace(MODEL, loss=_loss_and_brier)
    evaluation = jfed.EvaluationConfig(every=2, measure=_measure)
    result = _simulate(tmp_path / "run", model=model, evaluation=evaluation)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [float(row["train_scores/brier"]) for row in rows]
    assert trained == [record.metrics["scores/brier"] for record in result.history]
    assert [row["test_brier_full"] != "" for row in rows] == [False, True] * 3
    data = _data()
    mean, deviation = (f(IMAGES / 255.0, (0, 1, 2)) for f in (np.mean, np.std))
    logits = _apply(result.variables, jnp.asarray((IMAGES / 255.0 - mean) / deviation, jnp.float32))
    expected = float(_brier(logits, data.test.labels).mean())
    assert float(rows[-1]["test_brier_full"]) == pytest.approx(expected, rel=1e-4)


def test_further_metrics_are_columns_and_part_of_the_summary(tmp_path):
    """As a test of the result gives them; the run goes on with the same, and not with others."""
    asked = ("balanced-accuracy", "f1", "auc", "ece")
    evaluation = jfed.EvaluationConfig(every=2, metrics=asked, measure=_measure)
    whole = _simulate(tmp_path / "whole", evaluation=evaluation)

    def stop(record):
        if record.round == 3:
            raise ValueError("enough")

    with pytest.raises(jfed.CallbackError):
        _simulate(tmp_path / "run", evaluation=evaluation, callbacks=[stop])
    with pytest.raises(
        jfed.RunFolderError, match=r"evaluation\.metrics is .*'ece'.* there, \['f1'\]"
    ):
        _simulate(tmp_path / "run", evaluation=dataclasses.replace(evaluation, metrics=("f1",)))
    result = _simulate(tmp_path / "run", evaluation=evaluation)
    assert result.history[-1].evaluations == whole.history[-1].evaluations
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("balanced_accuracy", "f1", "auc", "ece")
    assert [row["test_f1_full"] != "" for row in rows] == [False, True] * 3
    last = {name: float(rows[-1][f"test_{name}_full"]) for name in names}
    test = jfed.load(tmp_path / "run", MODEL).evaluate(_data())
    expected = {name: getattr(test, name) for name in names[:3]} | {"ece": test.calibration_error}
    assert last == pytest.approx(expected, rel=1e-4)
    tier = json.loads((tmp_path / "run" / "summary.json").read_text())["tiers"][0]
    assert set(tier["metrics"]) == {*names, "brier"}
    assert {name: tier["metrics"][name] for name in names} == pytest.approx(last)


def _constant(name):
    """A loss with a metric that is 1 for every example."""

    def loss(params, batch, key):
        loss, metrics = jfed.models.cross_entropy(_apply(params, batch.images), batch)
        return loss, metrics._replace(others={name: metrics.examples})

    return dataclasses.replace(MODEL, loss=loss)


def test_a_metric_of_one_tier_is_a_mean_over_its_examples():
    pair = (jfed.tiers.Tier("plain", MODEL), jfed.tiers.Tier("told", _constant("one")))
    result = _simulate(model=jfed.tiers.Tiers(_init, pair), cohort=6, rounds=1)
    assert result.history[0].metrics == {"one": 1.0}


@pytest.mark.parametrize("mapping", ["vmap", "debug"])
def test_a_loss_knows_its_round(mapping):
    def loss(params, batch, key):
        value, metrics = jfed.models.cross_entropy(_apply(params, batch.images), batch)
        told = {"now": batch.round.astype(jnp.float32) * metrics.examples}
        return value, metrics._replace(others=told)

    model, engine = dataclasses.replace(MODEL, loss=loss), jfed.EngineConfig(mapping=mapping)
    result = _simulate(model=model, rounds=3, engine=engine)
    assert [record.metrics["now"] for record in result.history] == [0.0, 1.0, 2.0]


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(jfed.ConfigError, match=r"two columns 'train_loss'; rename"):
        _simulate(model=_constant("loss"))
    evaluation = jfed.EvaluationConfig(measure=lambda *_: {"accuracy": jnp.zeros(())})
    with pytest.raises(jfed.ConfigError, match=r"two columns 'test_accuracy_full'; rename"):
        _simulate(evaluation=evaluation)


def test_a_codecs_bytes_are_in_the_summary_and_in_what_is_loaded(tmp_path):
    half = jfed.algorithms.Codec(
        lambda tree, key: jax.tree.map(lambda u: u.astype(jnp.bfloat16).astype(jnp.float32), tree)
    )
    folder, size = tmp_path / "run", 4 * (16 * 8 + 8 * 3)
    algorithm = jfed.algorithms.compressed(jfed.algorithms.fedavg(), half)
    result = _simulate(folder, algorithm=algorithm)
    down, up = result.traffic["full"]
    assert 0.3 * size < up < 0.55 * size < down < 1.1 * size
    assert result.traffic == jfed.load(folder).traffic
    tier = json.loads((folder / "summary.json").read_text())["tiers"][0]
    assert (tier["bytes_down"], tier["bytes_up"]) == (down, up)
    assert result.history[-1].bytes_up == 3 * up


def test_a_tier_that_is_only_tested_may_have_a_loss_that_is_not_finite(tmp_path):
    wild = jfed.models.Model(_init, lambda params, images: _apply(params, images) * jnp.nan)
    tiers = jfed.tiers.Tiers(
        _init, (jfed.tiers.Tier("full", MODEL),), tested=(jfed.tiers.Tier("wild", wild),)
    )
    result = _simulate(tmp_path / "run", model=tiers)
    assert np.isnan(result.history[-1].evaluations["wild"].loss)
    lines = json.loads((tmp_path / "run" / "summary.json").read_text())["tiers"]
    assert [line["loss"] is None for line in lines] == [False, True]
    again = _simulate(tmp_path / "run", model=tiers)
    jax.tree.map(np.testing.assert_array_equal, again.variables, result.variables)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda logits, batch: {"top": logits @ logits}, r"measure .*lambda.* cannot be used on"),
        (lambda logits, batch: {"top": logits[:, 0]}, r"must give float32 scalars.*got .*\(250,\)"),
        (lambda logits, batch: {"n": batch.labels.sum()}, r"must give float32 scalars.*int32"),
        (lambda logits, batch: logits.sum(), r"must give a dict, got .*float32"),
    ],
    ids=["raises", "by example", "integers", "no names"],
)
def test_what_is_no_measure_is_told(measure, message):
    with pytest.raises(jfed.ConfigError, match=message):
        _simulate(evaluation=jfed.EvaluationConfig(measure=measure))


OTHER = IMAGES.copy()
OTHER[0, 0, 0, 0] ^= 1
LARGER = jfed.models.Model(lambda key: {**_init(key), "more": jnp.zeros(3)}, _apply)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 5}, "has 6 rounds, got 5; a run can only get more"),
        ({"client": jfed.ClientConfig(epochs=2)}, "client.epochs is 1 there, 2 here"),
        ({"server": jfed.ServerConfig()}, r"server.optimizer is '.*noisy' there, 'sgd' here"),
        ({"data": _data(OTHER)}, r"inputs.data.train.digest is '\w+' there, '\w+' here"),
        ({"partition": PARTS[::-1]}, r"inputs.partition.digest is '\w+' there"),
        (
            {"partition": (*PARTS[:4], np.arange(16, 24))},
            "inputs.partition.clients is 6 there, 5 here",
        ),
        ({"model": LARGER}, "inputs.tiers.variables is '152 in 2 arrays.* '155 in 3 arrays"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_another_run_is_refused_with_the_difference(run_folder, changes, message):
    with pytest.raises(jfed.RunFolderError, match=message):
        _simulate(run_folder, **changes)


def test_a_callback_that_raises_loses_nothing(tmp_path, in_memory):
    heard, folder = [], tmp_path / "run"

    def fragile(record):
        if record.round == 3 and len(heard) == 3:
            raise OSError("no answer")

    with pytest.raises(jfed.CallbackError) as raised:
        _simulate(folder, callbacks=[heard.append, fragile])
    assert "fragile raised OSError('no answer') after round 3" in str(raised.value)
    assert isinstance(raised.value.__cause__, OSError)
    kept = jfed.load(folder, MODEL)
    assert f"Stopped after round {len(kept.history)} of 6, which is saved in" in str(raised.value)
    assert _without_seconds(kept.history) == _without_seconds(
        in_memory.history[: len(kept.history)]
    )
    told = len(kept.history)
    _check_same(_simulate(folder, callbacks=[heard.append]), in_memory)
    assert [record.round for record in heard] == [1, 2, 3, *range(told + 1, ROUNDS + 1)]


@pytest.mark.parametrize("kind", ["sampler", "schedule"])
def test_a_function_that_fails_in_a_later_round_loses_nothing(kind, tmp_path, in_memory):
    def sampler(number, rng):
        return [1, 1] if number == 3 else rng.choice(6, 3, replace=False)

    def schedule(number):
        return -1.0 if number == 3 else 0.1

    given = {
        "sampler": {"sampler": sampler},
        "schedule": {"client": jfed.ClientConfig(schedule=schedule)},
    }[kind]
    message = {"sampler": "returned client 1 twice", "schedule": "of round 3 must be"}[kind]
    stopped = r"Stopped after round 3 of 6.*with the function mended .* jfed\.tiers\.start_from"
    with pytest.raises(jfed.ConfigError, match=rf"{kind} .*{message}.* {stopped}"):
        _simulate(tmp_path / "run", **given)
    kept = jfed.load(tmp_path / "run", MODEL).history
    assert _without_seconds(kept) == _without_seconds(in_memory.history[:3])


def test_callbacks_without_a_folder_hear_every_round_in_order():
    heard = []

    def fragile(record):
        if record.round == 4:
            raise KeyError("x")

    with pytest.raises(jfed.CallbackError, match="fragile raised KeyError"):
        _simulate(callbacks=[heard.append, fragile])
    assert [record.round for record in heard] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": ""}, "callbacks must be a sequence, got ''"),
        ({"checkpoints": jfed.CheckpointConfig()}, "checkpoints need a workdir"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_bad_settings_are_quoted(options, message):
    with pytest.raises(jfed.ConfigError, match=message):
        _simulate(**options)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_api import _simulate, jfed
def kill(record):
    if record.round == 5:
        os.kill(os.getpid(), signal.SIGKILL)
_simulate(sys.argv[2], callbacks=[kill], checkpoints=jfed.CheckpointConfig(every=2))
"""


def test_a_killed_call_goes_on_to_the_same_bits(tmp_path, in_memory):
    folder, here = tmp_path / "run", os.path.dirname(__file__)
    same = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    environment = os.environ | same | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, here, str(folder)], env=environment)
    assert done.returncode == -signal.SIGKILL
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("test_api.noisy", f"{__name__}.noisy")
    )
    assert 2 <= len(jfed.load(folder).history) < ROUNDS
    _check_same(_simulate(folder), in_memory)


def test_a_run_of_functions_is_loaded_with_its_tiers_or_as_it_is_stored(run_folder, in_memory):
    result = jfed.load(run_folder, MODEL)
    _check_same(result, in_memory)
    assert result.accuracies == in_memory.accuracies
    assert (result.traffic, result.engine) == (in_memory.traffic, in_memory.engine)
    assert [tier.name for tier in result.evaluated] == ["full"]
    stored = jfed.load(run_folder)
    assert (stored.tiers, stored.evaluated) == (None, ())
    assert stored.traffic == in_memory.traffic
    assert stored.accuracies == in_memory.accuracies
    np.testing.assert_array_equal(stored.variables["layers"]["1"], in_memory.variables["layers"][1])
    stored.plot()


def test_a_run_of_the_command_is_loaded_without_more(tmp_path):
    folder = tmp_path / "run"
    assert main(["run", "--preset", "smoke", "--workdir", str(folder), "--no-cache"]) == 0
    result = jfed.load(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert [tier.name for tier in result.evaluated] == [tier["tier"] for tier in summary["tiers"]]
    assert {name: t.up for name, t in result.traffic.items()} == {
        tier["tier"]: tier["bytes_up"] for tier in summary["tiers"] if tier["trained"]
    }
    assert result.accuracies == {tier["tier"]: tier["accuracy"] for tier in summary["tiers"]}
    shapes = jax.eval_shape(result.tiers.init, jax.random.key(0))
    assert jax.tree.map(np.shape, result.variables) == jax.tree.map(lambda x: x.shape, shapes)
    assert result.compile_seconds == summary["compile_seconds"]
    with pytest.raises(
        jfed.RunFolderError, match=r"made by jfed run, this one is of jfed\.simulate"
    ):
        _simulate(folder)
    with pytest.raises(jfed.ConfigError, match=r"made with other tiers: .*variables is"):
        jfed.load(folder, MODEL)


def test_what_cannot_be_loaded_is_told(tmp_path, run_folder):
    with pytest.raises(jfed.RunFolderError, match=r"holds no run: it has no config.json"):
        jfed.load(tmp_path / "nothing")
    folder = tmp_path / "run"
    folder.mkdir()
    config = (run_folder / "config.json").read_text()
    (folder / "config.json").write_text(config)
    with pytest.raises(jfed.RunFolderError, match="has not saved any round yet"):
        jfed.load(folder)
    (folder / "config.json").write_text(config[:40])
    with pytest.raises(jfed.RunFolderError, match=r"config.json' is damaged"):
        jfed.load(folder)
    (folder / "config.json").write_text('{"rounds": 3}')
    with pytest.raises(jfed.RunFolderError, match="of an older version of jfed"):
        jfed.load(folder)
    (folder / "config.json").write_text('{"rounds": 3, "made_with": {}}')
    with pytest.raises(jfed.RunFolderError, match="damaged, or of another version of jfed"):
        jfed.load(folder)


def test_compiled_programs_are_kept_where_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update(names[0], None)
        jfed.keep_compiled()
        assert jax.config.values[names[0]] == str(tmp_path / "home" / "jfed")
        jfed.keep_compiled(tmp_path / "mine")
        assert jax.config.values[names[0]] == str(tmp_path / "mine")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
