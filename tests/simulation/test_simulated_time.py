"""How long rounds last, and who is late: against closed forms, for a linear model."""

import csv
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfed
from jfed.algorithms import PrivacyConfig, compressed, fedavg
from jfed.data import Dataset, Split
from jfed.engine.faults import draw_fate
from jfed.errors import ConfigError, RunFolderError
from jfed.seeds import generator
from jfed.simulation.federation import Federation
from jfed.simulation.population import make_population
from jfed.simulation.simulated_time import make_devices

RNG = np.random.default_rng(0)
SPLIT = Split(
    RNG.integers(0, 256, (60, 4, 4, 1)).astype(np.uint8), RNG.integers(0, 3, 60).astype(np.int32)
)
DATA = Dataset("noise", SPLIT, SPLIT, tuple("abc"))
PARTS = tuple(np.sort(p) for p in np.split(RNG.permutation(60), [5, 20, 38]))
MODEL = jfed.models.Model(
    lambda key: {"w": 0.1 * jax.random.normal(key, (16, 3)), "b": jnp.zeros(3)},
    lambda params, images: images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None],
)
NARROW = jfed.models.Model(
    lambda key: {"w": MODEL.init(key)["w"]},
    lambda params, images: images.reshape(images.shape[0], -1) @ params["w"],
)
TIERS = jfed.tiers.Tiers(
    MODEL.init,
    (
        jfed.tiers.Tier("narrow", NARROW, lambda variables, _: {"w": variables["w"]}),
        jfed.tiers.Tier("full", MODEL),
    ),
)
CLIENT = jfed.ClientConfig(epochs=2, batch_size=4, learning_rate=0.05)
BYTES = 4 * (16 * 3 + 3)
FLOPS = 3 * 2 * 16 * 3  # of an example: a product, forward and twice backward
# Of four clients: FLOP/s, bytes a second down and up. Client 2 is slow, client 3 sends slowly.
RATES = np.array([[1e4, 500, 100], [5e3, 1000, 50], [1e3, 400, 80], [4e4, 300, 10]])
EXAMPLES = 2 * np.array([len(part) for part in PARTS])
SECONDS = BYTES / RATES[:, 1] + EXAMPLES * FLOPS / RATES[:, 0] + BYTES / RATES[:, 2]
BETWEEN = 9.0  # seconds, after clients 0 and 1 and before the others


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("devices") / "devices.csv"
    rows = [",".join(map(str, (client, *rates))) for client, rates in enumerate(RATES)]
    path.write_text("\n".join(["client,flops,down,up", *rows]))
    return str(path)


def _options(**options):
    given = {"rounds": 3, "client": CLIENT, "seed": 5}
    given |= {"evaluation": jfed.EvaluationConfig(every=1, batch_size=30)}
    return given | options


def _simulate(tiers=MODEL, **options):
    return jfed.simulate(DATA, PARTS, tiers, **_options(**options))


def _lasted(history):
    return np.diff([0.0, *(record.simulated_seconds for record in history)])


def test_the_clients_are_slow_in_different_ways():
    assert (np.sort(SECONDS)[1:] - np.sort(SECONDS)[:-1]).min() > 0.4
    assert (SECONDS < BETWEEN).tolist() == [True, True, False, False]


def test_a_round_lasts_until_its_slowest_client(path):
    result = _simulate(cohort=2, time=jfed.TimeConfig((path,)))
    cohorts = [generator(5, "cohort", n).choice(4, 2, replace=False) for n in range(3)]
    expected = [SECONDS[cohort].max() for cohort in cohorts]
    np.testing.assert_allclose(_lasted(result.history), expected)
    assert [record.delivered for record in result.history] == [2, 2, 2]


def test_a_clock_alone_changes_no_bit_of_what_is_trained(path):
    timed, plain = (_simulate(time=jfed.TimeConfig(name)) for name in ((path,), ()))
    jax.tree.map(np.testing.assert_array_equal, timed.variables, plain.variables)
    assert [record.simulated_seconds for record in plain.history] == [None] * 3
    assert "simulated_seconds" not in plain.history[0].row()


def test_a_deadline_drops_exactly_those_who_are_late(path):
    late = _simulate(time=jfed.TimeConfig((path,), deadline=BETWEEN))
    in_time = np.flatnonzero(SECONDS <= BETWEEN)
    others = _simulate(cohort=4, sampler=lambda number, rng: in_time)
    for name, value in late.variables.items():
        np.testing.assert_allclose(value, others.variables[name], rtol=1e-6)
    np.testing.assert_allclose(_lasted(late.history), [BETWEEN] * 3)
    for record in late.history:
        assert (record.clients, record.delivered, record.dropped) == (4, 2, 2)
        assert (record.bytes_down, record.bytes_up) == (4 * BYTES, 2 * BYTES)
    assert SECONDS.max() < 200
    patient = _simulate(time=jfed.TimeConfig((path,), deadline=200.0))
    np.testing.assert_allclose(_lasted(patient.history), [SECONDS.max()] * 3)


@pytest.mark.slow
def test_both_engines_tell_the_same_of_tiers_that_are_drawn(path):
    """Client 1 is in time in the narrow tier alone."""
    options = {"tiers": TIERS, "draw_tiers": 1, "rounds": 2}
    options |= {"time": jfed.TimeConfig((path,), deadline=SECONDS[1] - 0.01)}
    engines = [jfed.EngineConfig(devices=1, mapping=m, lanes=1) for m in ("map", "debug")]
    packed, plain = (_simulate(**options, engine=engine) for engine in engines)
    assert [r.simulated_seconds for r in packed.history] == [
        r.simulated_seconds for r in plain.history
    ]
    assert [r.delivered for r in packed.history] == [r.delivered for r in plain.history]
    assert {r.dropped for r in packed.history} <= {2, 3}
    for name, value in packed.variables.items():
        np.testing.assert_allclose(value, plain.variables[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("deadline", [None, 100.0])
def test_dropouts_and_stragglers_take_the_time_of_what_they_do(deadline, path):
    faults = jfed.FaultConfig(dropout=0.4, stragglers=0.5, straggler_steps=0.5)
    time = jfed.TimeConfig((path,), deadline=deadline)
    federation = Federation(DATA, PARTS, MODEL, **_options(faults=faults, time=time))
    drops = 0
    for number in range(20):
        ends = []
        for client in range(4):
            fate = draw_fate(faults, number, client, hostile=False, seed=5)
            down, up = BYTES / RATES[client, 1], BYTES / RATES[client, 2]
            steps = 2 * -(-len(PARTS[client]) // 4)
            half = round(steps / 2)
            # Half of the steps of two epochs is one epoch: each of the client's examples once.
            assert half == steps // 2
            examples = EXAMPLES[client] // (2 if fate.straggles else 1)
            whole = down + examples * FLOPS / RATES[client, 0] + up
            gone = down if deadline is None else deadline
            ends.append(gone if fate.drops else whole)
            drops += fate.drops
        cohort = federation.population.sample(number)
        work = federation.population.work(number, cohort)
        sizes = np.full((1, 2), BYTES)
        in_time, lasts = federation.clock.round(cohort, work, sizes)
        assert lasts == pytest.approx(max(ends))
        assert [w.client for w in in_time[0]] == [w.client for w in work[0]]
    assert drops > 10


def test_measured_bytes_take_the_time_that_they_need(path):
    """One client a round: its seconds follow from the bytes that the record tells."""
    algorithm = compressed(fedavg(CLIENT), up="int8")
    result = _simulate(cohort=1, algorithm=algorithm, time=jfed.TimeConfig((path,)))
    expected = []
    for number, record in enumerate(result.history):
        client = int(generator(5, "cohort", number).choice(4, 1, replace=False)[0])
        flops, down, up = RATES[client]
        expected.append(
            record.bytes_down / down + EXAMPLES[client] * FLOPS / flops + record.bytes_up / up
        )
        assert record.bytes_up < BYTES
    np.testing.assert_allclose(_lasted(result.history), expected)


def test_when_a_run_is_tested_does_not_decide_who_is_late(path):
    """Client 1 is in time since codecs send fewer bytes than 204, in every round as many."""
    time = jfed.TimeConfig((path,), deadline=SECONDS[1] - 0.5)
    algorithm = compressed(fedavg(CLIENT), up="int8")
    often, once = (
        _simulate(algorithm=algorithm, time=time, evaluation=jfed.EvaluationConfig(every=every))
        for every in (1, 0)
    )
    for one, other in zip(often.history, once.history, strict=True):
        assert (one.delivered, one.bytes_up) == (other.delivered, other.bytes_up)
        assert one.delivered == 2
        assert one.bytes_up == often.history[0].bytes_up


def _population(tiers, clients=12, idle=0.0):
    parts = tuple(np.arange(clients)[:, None])
    options = {"shares": None, "cohort": None, "draw_tiers": 0, "client": CLIENT, "seed": 3}
    return make_population(parts, tiers=tiers, idle=idle, **options)


def test_devices_are_those_of_the_tiers():
    names = ("raspberry-pi-4@mobile", "nvidia-t4@5g", "jetson-nano@ethernet")
    population = _population(3, idle=0.25)
    config = jfed.TimeConfig(names, utilisation=0.5)
    found = make_devices(config, population)
    flops = np.array([8e9, 4.05e12, 118e9, 118e9])  # the last of clients without a tier, any
    np.testing.assert_allclose(found.flops, flops[population.tier])
    one = make_devices(jfed.TimeConfig(names[:1]), population)
    np.testing.assert_array_equal(one.up, [10.42e6 / 8] * 12)
    with pytest.raises(ConfigError, match=r"one device, or one for each of 2 tiers, .* got \['ra"):
        make_devices(config, _population(2))


def test_devices_are_drawn_in_equal_numbers_whatever_the_tier():
    names = ("raspberry-pi-4@mobile", "nvidia-t4@5g", "raspberry-pi-4@mobile")
    config = jfed.TimeConfig(names, draw_devices=True, utilisation=1.0)
    population = _population(2)
    found = make_devices(config, population).flops
    assert (found == 8e9).sum() == 8
    assert {(t, f) for t, f in zip(population.tier, found, strict=True)} == {
        (t, f) for t in (0, 1) for f in (8e9, 8.1e12)
    }
    np.testing.assert_array_equal(make_devices(config, population).flops, found)


@pytest.mark.parametrize(
    ("deadline", "options"),
    [
        (SECONDS.min() - 0.01, {}),
        (SECONDS.min() - 0.01, {"faults": jfed.FaultConfig(dropout=0.5)}),
    ],
)
def test_a_deadline_that_nobody_can_meet_is_refused(deadline, options, path, monkeypatch):
    monkeypatch.setattr(Federation, "compile", None)
    client, told = int(SECONDS.argmin()), f"{SECONDS.min():.4g}"
    with pytest.raises(ConfigError, match=f"fastest, client {client}, takes {told} s"):
        _simulate(time=jfed.TimeConfig((path,), deadline=deadline), **options)


def test_a_straggler_may_meet_a_deadline_that_others_cannot(path):
    faults = jfed.FaultConfig(stragglers=0.5)
    time = jfed.TimeConfig((path,), deadline=SECONDS.min() - 0.01)
    Federation(DATA, PARTS, MODEL, **_options(faults=faults, time=time))


def test_a_deadline_is_private_unless_messages_decide_who_is_late(path):
    pytest.importorskip("dp_accounting")
    private = {
        "privacy": PrivacyConfig(clip=1.0, noise=1.0, delta=1e-3),
        "server": jfed.ServerConfig(weights="count"),
        "time": jfed.TimeConfig((path,), deadline=BETWEEN),
    }
    Federation(DATA, PARTS, MODEL, **_options(**private))
    codec = {"algorithm": compressed(fedavg(CLIENT), up="int8")}
    with pytest.raises(ConfigError, match="dp_clip cannot be with a deadline and codecs"):
        Federation(DATA, PARTS, MODEL, **_options(**private | codec))
    private["time"] = jfed.TimeConfig((path,))
    Federation(DATA, PARTS, MODEL, **_options(**private | codec))


def test_a_run_that_was_stopped_goes_on_with_its_seconds(tmp_path, path):
    time = jfed.TimeConfig((path,), deadline=BETWEEN)
    whole = _simulate(time=time)

    def stop(record):
        if record.round == 2:
            raise KeyError("stop")

    folder, other = tmp_path / "run", tmp_path / "devices.csv"
    other.write_text(pathlib.Path(path).read_text())
    moved = dataclasses.replace(time, devices_of_clients=(str(other),))
    options = {"workdir": folder, "time": moved}
    with pytest.raises(jfed.CallbackError):
        _simulate(**options, callbacks=[stop])
    text = other.read_text()
    other.write_text(text.replace("80.0", "79.0"))
    with pytest.raises(RunFolderError, match=r"inputs\.devices is"):
        _simulate(**options)
    other.write_text(text)
    result = _simulate(**options)
    told = [record.simulated_seconds for record in result.history]
    assert told == [record.simulated_seconds for record in whole.history]
    with (folder / "metrics.csv").open() as file:
        assert [float(row["simulated_seconds"]) for row in csv.DictReader(file)] == told
    assert (folder / "accuracy_by_time.png").exists()
