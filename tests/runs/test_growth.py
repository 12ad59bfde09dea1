"""Runs that get more rounds, or go on with other settings of where and when."""

import csv
import json

import jax
import numpy as np
import pytest

import jfed
from jfed.algorithms.clients import learning_rate
from jfed.errors import CallbackError, RunFolderError
from jfed.reports import finished

RNG = np.random.default_rng(0)
LABELS = np.arange(30) % 3
IMAGES = RNG.integers(0, 256, (30, 4, 4, 1)).astype(np.uint8)
PARTS = np.split(np.arange(30), 5)
SPLIT = jfed.data.Split(IMAGES, LABELS)
DATA = jfed.data.Dataset("mine", SPLIT, SPLIT, ("a", "b", "c"))
MODEL = jfed.models.Model(
    lambda key: {"w": jax.random.normal(key, (16, 3))},
    lambda params, x: x.reshape(len(x), 16) @ params["w"],
)


def _simulate(folder, rounds, *, schedule="constant", restart=0, **options):
    client = jfed.ClientConfig(
        batch_size=4, learning_rate=0.05, schedule=schedule, restart_schedule=restart
    )
    given = {"cohort": 3, "client": client, "seed": 1} | options
    return jfed.simulate(DATA, PARTS, MODEL, rounds=rounds, workdir=folder, **given)


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)
    assert [r.train_loss for r in one.history] == [r.train_loss for r in other.history]


def test_a_finished_run_that_gets_more_rounds_is_the_longer_run(tmp_path):
    whole = _simulate(tmp_path / "whole", 7)
    _simulate(tmp_path / "grown", 4)
    grown = _simulate(tmp_path / "grown", 7)
    _same(grown, whole)
    for name in ("whole", "grown"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["rounds"] == 7
        with (tmp_path / name / "metrics.csv").open() as file:
            assert len(list(csv.DictReader(file))) == 7
    assert finished.read(tmp_path / "grown").config["rounds"] == 7
    heard = []
    _simulate(tmp_path / "grown", 7, callbacks=[heard.append])
    assert heard == []


def test_a_run_that_is_stopped_while_it_grows_goes_on(tmp_path):
    whole = _simulate(tmp_path / "whole", 8)
    _simulate(tmp_path / "grown", 3)

    def stop(record):
        if record.round == 5:
            raise ValueError("enough")

    with pytest.raises(CallbackError, match="of 8"):
        _simulate(tmp_path / "grown", 8, callbacks=[stop])
    with pytest.raises(RunFolderError, match="not finished"):
        finished.read(tmp_path / "grown")
    assert jfed.load(tmp_path / "grown", MODEL).inputs is None
    _same(_simulate(tmp_path / "grown", 8), whole)


def test_a_schedule_that_ends_with_the_run_is_refused_with_what_could_be_done(tmp_path):
    _simulate(tmp_path / "run", 4, schedule="cosine")
    with pytest.raises(RunFolderError, match=r"ends with its 4 rounds.*--restart-schedule 4"):
        _simulate(tmp_path / "run", 8, schedule="cosine")
    grown = _simulate(tmp_path / "run", 8, schedule="cosine", restart=4)
    rates = [record.learning_rate for record in grown.history]
    assert rates == pytest.approx([0.05 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)] * 2)


def test_a_schedule_of_the_round_alone_may_go_on(tmp_path):
    def falling(round_):
        return 0.1 / (1 + round_)

    _simulate(tmp_path / "run", 2, schedule=falling)
    grown = _simulate(tmp_path / "run", 4, schedule=falling)
    rates = [record.learning_rate for record in grown.history]
    assert rates == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_a_schedule_begins_anew(schedule):
    config = jfed.ClientConfig(schedule=schedule, restart_schedule=4)
    plain = jfed.ClientConfig(schedule=schedule)
    first = [learning_rate(plain, i, 4) for i in range(4)]
    second = [learning_rate(plain, i, 8) for i in range(8)]
    assert [learning_rate(config, i, 12) for i in range(12)] == first + second


def test_fewer_rounds_and_a_spent_epsilon_are_refused(tmp_path):
    _simulate(tmp_path / "run", 4)
    with pytest.raises(RunFolderError, match="has 4 rounds, got 3; a run can only get more"):
        _simulate(tmp_path / "run", 3)
    private = jfed.algorithms.PrivacyConfig(clip=1.0, epsilon=8.0, delta=1e-2)
    options = {"privacy": private, "server": jfed.ServerConfig(weights="count")}
    _simulate(tmp_path / "private", 2, **options)
    with pytest.raises(RunFolderError, match=r"dp_epsilon 8\.0 after 2 rounds; 3 would spend"):
        _simulate(tmp_path / "private", 3, **options)


def test_where_and_when_may_differ_on_resume(tmp_path):
    first = jfed.EvaluationConfig(every=1)
    _simulate(tmp_path / "run", 3, evaluation=first, engine=jfed.EngineConfig(lanes=1))
    later = {
        "evaluation": jfed.EvaluationConfig(every=3),
        "engine": jfed.EngineConfig(lanes=2, mapping="map"),
    }
    grown = _simulate(tmp_path / "run", 6, **later)
    tested = [bool(record.evaluations) for record in grown.history]
    assert tested == [True, True, True, False, False, True]
    whole = _simulate(tmp_path / "whole", 6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grown.variables,
        whole.variables,
    )
    with pytest.raises(RunFolderError, match="seed is 1 there, 2 here"):
        _simulate(tmp_path / "run", 6, seed=2)
