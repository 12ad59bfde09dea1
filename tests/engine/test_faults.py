"""Who fails, and what they send instead, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.algorithms import Server, fedavg
from jfed.algorithms.clients import ClientConfig
from jfed.data.preprocessing import Augmentation, Images
from jfed.engine.devices import make_mesh
from jfed.engine.faults import (
    ATTACKS,
    EXPLODING,
    HONEST,
    NON_FINITE,
    FaultConfig,
    corrupt,
    draw_fate,
    hostile_clients,
)
from jfed.engine.lanes import Inputs, Training, make_trainer
from jfed.engine.packing import Packing, Work, pack
from jfed.errors import ConfigError
from jfed.models import Model
from jfed.simulation.population import make_population
from jfed.tiers import Tier

CONFIG = FaultConfig(dropout=0.2, stragglers=0.3, non_finite=0.1, exploding=0.15, hostile=0.25)
PARTS = tuple(np.split(np.arange(200), 20))


def _fates(config, rounds, seed=0):
    return [
        [draw_fate(config, r, c, hostile=False, seed=seed) for c in range(20)]
        for r in range(rounds)
    ]


def test_faults_come_in_their_shares():
    fates = [fate for round_ in _fates(CONFIG, 200) for fate in round_]
    sound = [fate for fate in fates if not fate.drops]

    def near(count, share):
        assert abs(count / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)

    near(len(fates) - len(sound), 0.2)
    near(sum(fate.straggles for fate in fates), 0.3)
    near(sum(fate.straggles for fate in sound), 0.3 * 0.8)
    near(sum(fate.fault == NON_FINITE for fate in sound), 0.1)
    near(sum(fate.fault == EXPLODING for fate in sound), 0.15)
    near(sum(fate.fault == HONEST for fate in sound), 0.55)


def test_faults_differ_between_rounds_clients_and_seeds_only():
    fates = _fates(CONFIG, 30)
    assert fates == _fates(CONFIG, 30)
    assert fates != _fates(CONFIG, 30, seed=1)
    drops = np.array([[fate.drops for fate in round_] for round_ in fates])
    assert 0 < drops.sum(0).min() <= drops.sum(0).max() < 30
    assert len(set(map(tuple, drops))) > 20
    everybody = dataclasses.replace(CONFIG, dropout=0.0, non_finite=0.0, exploding=0.0)
    assert all(not f.drops and f.fault == HONEST for r in _fates(everybody, 9) for f in r)


def test_the_same_clients_stay_hostile():
    hostile = hostile_clients(CONFIG, 20, seed=3)
    assert hostile.sum() == 5
    assert (hostile != hostile_clients(CONFIG, 20, seed=4)).any()
    population = _population(CONFIG, seed=3)
    for number in range(4):
        attacking = {w.client for w in population.work(number, [np.arange(20)])[0] if w.fault > 2}
        assert attacking <= set(np.flatnonzero(hostile))
    assert not hostile_clients(FaultConfig(), 20, seed=3).any()


def _population(faults, seed=0):
    return make_population(
        PARTS,
        tiers=1,
        shares=None,
        cohort=None,
        draw_tiers=0,
        client=ClientConfig(epochs=2, batch_size=2),
        seed=seed,
        faults=faults,
    )


@pytest.mark.parametrize(("part", "steps"), [(0.5, 5), (0.01, 1), (0.29, 3), (1.0, 10)])
def test_dropping_and_straggling_change_the_work_and_no_more(part, steps):
    faults = dataclasses.replace(CONFIG, straggler_steps=part, hostile=0.0)
    plain, faulty = _population(None), _population(faults)
    for number in range(3):
        before = {w.client: w for w in plain.work(number, [np.arange(20)])[0]}
        after = {w.client: w for w in faulty.work(number, [np.arange(20)])[0]}
        fates = [draw_fate(faults, number, c, hostile=False, seed=0) for c in range(20)]
        assert sorted(after) == [c for c, fate in enumerate(fates) if not fate.drops]
        for client, work in after.items():
            count = steps if fates[client].straggles else 10
            np.testing.assert_array_equal(work.batches, before[client].batches[:count])
            assert work.weight == before[client].weight == 10
            assert work.fault == fates[client].fault
        # Who else is there does not matter.
        ((alone,),) = faulty.work(number, [np.array([sorted(after)[0]])])
        np.testing.assert_array_equal(alone.batches, after[alone.client].batches)


def test_what_is_sent_instead_of_an_update():
    update = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array(3.0)}
    config = FaultConfig(explosion=1e3, attack_scale=-4.0, attack_noise=2.0)
    sent = jax.jit(lambda code, key: corrupt(config, update, code, key))
    factors = {HONEST: 1.0, EXPLODING: 1e3, 3: -1.0, 5: -4.0, NON_FINITE: np.nan}
    assert ATTACKS == ("sign-flip", "noise", "scaled")
    for code, factor in factors.items():
        found = sent(jnp.int32(code), jax.random.key(0))
        jax.tree.map(lambda f, u, k=factor: np.testing.assert_array_equal(f, k * u), found, update)
    wide = {"a": jnp.zeros((100, 100)), "b": jnp.ones(10000)}
    noise = corrupt(config, wide, jnp.int32(4), jax.random.key(1))
    for leaf in jax.tree.leaves(noise):
        assert abs(leaf.std() - 2) < 0.1
        assert abs(leaf.mean()) < 0.1
    assert np.abs(np.corrcoef(noise["a"].ravel(), noise["b"])[0, 1]) < 0.05


MODEL = Model(lambda key: jnp.zeros((16, 3)), lambda p, x: x.reshape(x.shape[0], -1) @ p)


def _train(faults, work, lanes=1):
    """A linear model's clients, trained on one device; and the program's text."""
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1)), jnp.uint8)
    labels = jnp.asarray(np.arange(40) % 3, jnp.int32)
    train = make_trainer(
        Training(
            tiers=(Tier("t", MODEL),),
            algorithm=fedavg(ClientConfig(batch_size=10)),
            augmentation=Augmentation(),
            mesh=make_mesh(1),
            mapping="map",
            slots=4,
            faults=faults,
        )
    )
    moments = (jnp.full(1, 128.0), jnp.full(1, 64.0))
    server = Server(MODEL.init(None), ())
    numbers = (jax.random.key(0), jnp.int32(0), jnp.float32(0.1))
    inputs = Inputs(server, Images(images, labels, *moments), None, *numbers)
    packing = Packing(1, lanes, False, 10, 8, 4, 4, (1.0,))
    schedule = jax.tree.map(jnp.asarray, pack(work, packing))
    return train(inputs, schedule, ())[0], train.lower(inputs, schedule, ()).as_text()


def _work(*faults):
    return [
        Work(c, 0, np.arange(10, dtype=np.int32)[None] + 10 * c, 10, float(c + 1), fault)
        for c, fault in enumerate(faults)
    ]


def test_the_engine_sends_what_each_client_sends():
    config = FaultConfig(hostile=1.0)
    plain = _work(0, 0, 0, 0)
    alone = [_train(config, plain[c : c + 1])[0].parts["update"] for c in range(4)]
    found, _ = _train(config, _work(0, NON_FINITE, 3, EXPLODING))
    expected = alone[0] - alone[2] + config.explosion * alone[3]
    np.testing.assert_allclose(found.parts["update"], expected, rtol=1e-4)
    np.testing.assert_array_equal(found.weights["update"], [1, 0, 3, 4])
    np.testing.assert_array_equal(found.report.delivered, [True, False, True, True])
    np.testing.assert_array_equal(found.report.rejected, [False, True, False, False])
    np.testing.assert_array_equal(found.report.metrics.examples, [10, 0, 10, 10])
    assert np.isfinite(found.report.metrics.loss).all()
    first = _train(config, _work(0, 4, 0, 4))[0].parts["update"]
    again = _train(config, _work(0, 4, 0, 4), lanes=3)[0].parts["update"]
    noise = np.asarray(first - alone[0] - alone[2])
    np.testing.assert_allclose(again, first, rtol=1e-5)
    assert 0.7 * np.hypot(2, 4) < noise.std() < 1.4 * np.hypot(2, 4)


def test_without_corruption_the_program_is_the_plain_one():
    plain, other = FaultConfig(dropout=0.5, stragglers=0.5), FaultConfig(non_finite=0.1)
    text = _train(None, _work(0, 0))[1]
    assert _train(plain, _work(0, 0))[1] == text
    assert _train(other, _work(0, 0))[1] != text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": -0.1}, r"dropout must be a number from 0 to 1, got -0\.1"),
        ({"stragglers": 1.1}, r"stragglers must be a number from 0 to 1, got 1\.1"),
        ({"non_finite": float("nan")}, "non_finite must be a number from 0 to 1, got nan"),
        ({"exploding": 0.6, "dropout": 0.5}, r"at most 1, got .*'exploding': 0\.6"),
        ({"straggler_steps": 0.0}, r"straggler_steps must be above 0 and at most 1, got 0\.0"),
        ({"attack": "signflip"}, "unknown attack 'signflip'. Did you mean 'sign-flip'"),
        ({"attack_noise": 0.0}, r"attack_noise must be a number, above 0, got 0\.0"),
        ({"attack_scale": float("inf")}, "got inf"),
        ({"explosion": -1.0}, r"got -1\.0"),
    ],
    ids=str,
)
def test_bad_faults_are_quoted(changes, message):
    with pytest.raises(ConfigError, match=message):
        FaultConfig(**changes)


def test_a_share_that_is_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"hostile 0\.02 of 20 clients are none"):
        hostile_clients(FaultConfig(hostile=0.02), 20, seed=0)
