"""A run in its folder, gone on with by another JAX."""

import functools
import json

import jax
import pytest
from etils import epath

import jfed
from jfed.runs import running
from jfed.runs.assembly import set_up
from jfed.runs.checkpoints import stored
from jfed.runs.config import run_preset
from jfed.settings import as_json


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
