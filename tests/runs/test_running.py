"""A run in its folder, gone on with by another JAX."""

import functools
import json

import jax
import pytest
from etils import epath

import jfed
from jfed.engine import hosts
from jfed.runs import running
from jfed.runs.assembly import set_up
from jfed.runs.checkpoints import CheckpointConfig, stored
from jfed.runs.config import run_preset
from jfed.settings import as_json
from jfed.simulation import loop


def test_a_run_tells_what_made_it_and_warns_when_another_goes_on(tmp_path):
    config = run_preset("smoke").replace(rounds=4, iterations=(1,), widths=(4,), devices=1)
    seen = []

    class Stop:
        def write(self, record):
            seen.append(record.round)

        def close(self):
            pass

    run = functools.partial(
        running.run, tmp_path / "run", as_json(config), functools.partial(set_up, config)
    )
    with pytest.raises(jfed.PreemptedError):
        run(writers=lambda done: [Stop()], stop=lambda: bool(seen))
    path = tmp_path / "run" / "config.json"
    there = json.loads(path.read_text())
    assert there["network"]["widths"] == [4]
    made_with = there["made_with"]
    assert set(made_with) == {"jfed", "commit", "jax", "platform", "devices"}
    assert made_with["jax"] == jax.__version__
    assert made_with["jfed"] == jfed.__version__
    assert sum(made_with["devices"].values()) == len(jax.devices())
    assert stored(epath.Path(tmp_path / "run")).made_with == made_with
    made_with["jax"] = "0.1.2"
    path.write_text(json.dumps(there))
    with pytest.warns(UserWarning, match=rf"jax is '0.1.2' there, '{jax.__version__}' here"):
        result, _ = run()
    assert len(result.history) == 4


def test_an_error_of_another_host_in_the_middle_of_the_rounds_is_raised(tmp_path, monkeypatch):
    """Also where no state was kept so far."""
    config = run_preset("smoke").replace(rounds=8, iterations=(1,), widths=(4,), devices=1)
    looks = []

    def check(phase):
        looks.append(phase)
        if len(looks) > 20:
            raise jfed.ConfigError("another host's sampler")

    monkeypatch.setattr(hosts.Phase, "check", check)
    prepare, every = functools.partial(set_up, config), CheckpointConfig(every=50)
    with pytest.raises(jfed.ConfigError, match="another host's sampler"):
        running.run(tmp_path / "run", as_json(config), prepare, checkpoints=every)
    assert len(looks) > 20


def test_a_state_that_was_given_away_is_not_given_to_be_saved(monkeypatch):
    config = run_preset("smoke").replace(rounds=4, iterations=(1,), widths=(4,), devices=1)
    federation = set_up(config).federation
    train = federation.round

    def fail(state, number):
        if number < 2:
            return train(state, number)
        jax.tree.map(lambda x: x.delete(), state.server)
        raise jfed.ConfigError("another host's disk is full")

    monkeypatch.setattr(federation, "round", fail)
    given = []
    with pytest.raises(jfed.ConfigError, match="another host's"):
        given.extend(loop.iterate(federation))
    states = [leaf for state, _ in given for leaf in jax.tree.leaves(state)]
    assert not any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in states)


def test_a_run_that_another_saved_last_warns_too(tmp_path, monkeypatch):
    config = run_preset("smoke").replace(iterations=(1,), widths=(4,), devices=1)
    own = running.made_with

    def run(rounds):
        settings = config.replace(rounds=rounds)
        prepare = functools.partial(set_up, settings)
        running.run(tmp_path / "run", as_json(settings), prepare)

    run(1)
    monkeypatch.setattr(running, "made_with", lambda where: own(where) | {"jax": "0.1.2"})
    with pytest.warns(UserWarning, match=rf"jax is '{jax.__version__}' there, '0.1.2' here"):
        run(2)
    monkeypatch.setattr(running, "made_with", own)
    with pytest.warns(UserWarning, match=rf"jax is '0.1.2' there, '{jax.__version__}' here"):
        run(3)
