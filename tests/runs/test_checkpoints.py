"""Checkpoints come back bit for bit, or not at all."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed.algorithms import Server
from jfed.errors import ConfigError, RunFolderError
from jfed.runs.checkpoints import CheckpointConfig, Checkpoints
from jfed.simulation.federation import State
from jfed.simulation.records import Evaluation, LocalEvaluation, Record


def _state(seed):
    """The tree of a Flax network (integer keys) and of a server with momentum and a counter."""
    leaves = np.random.default_rng(seed).normal(size=(40, 7)).astype(np.float32)
    variables = {"blocks": {0: {"w": leaves}, 1: {"w": 3 * leaves}}, "norm": leaves[0]}
    optimizer = optax.adam(0.1)
    sizes = np.array([[2**40, 1], [3, 4]])
    return State(Server(variables, optimizer.init(variables)), np.arange(3, dtype=np.int32), sizes)


def _record(number, **changes):
    fields = {
        field.name: 0.1 * number if "float" in str(field.type) else number
        for field in dataclasses.fields(Record)
        if field.name not in ("evaluations", "metrics", "local")
    }
    local = LocalEvaluation((0, 2), ("1", "1"), (1 / 3, 0.5), (3, 4))
    fields |= {"evaluations": {"1": Evaluation(1 / 3, 2.5)}, "local": local}
    return Record(**fields | changes)


HISTORY = [_record(n) for n in range(1, 6)]


def _saved(folder, rounds, keep=3):
    checkpoints = Checkpoints(folder, CheckpointConfig(every=1, keep=keep))
    for number in rounds:
        checkpoints.save(_state(number), HISTORY[:number])
    checkpoints.wait()


def _latest(folder):
    checkpoints = Checkpoints(folder, CheckpointConfig())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _state(0))
    return checkpoints.latest(like)


def _check(checkpoint, number):
    assert list(checkpoint.history) == HISTORY[:number]
    jax.tree.map(np.testing.assert_array_equal, checkpoint.state, _state(number))
    assert jax.tree.structure(checkpoint.state) == jax.tree.structure(_state(number))


def test_the_latest_comes_back_and_the_oldest_go(tmp_path):
    assert _latest(tmp_path / "c") is None
    _saved(tmp_path / "c", range(1, 6), keep=2)
    _check(_latest(tmp_path / "c"), 5)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["4", "5"]


def test_what_is_saved_is_a_copy(tmp_path):
    """The device may reuse its memory while the save goes on."""
    checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig())
    state = _state(1)
    state = state._replace(server=jax.tree.map(jnp.asarray, state.server))
    checkpoints.save(state, HISTORY[:1])
    jax.tree.map(lambda x: x.delete(), state.server)
    checkpoints.wait()
    _check(_latest(tmp_path / "c"), 1)


def test_typed_keys_come_back(tmp_path):
    """Of any implementation, alone and in arrays; what they draw is the same."""
    keys = {"one": jax.random.key(3), "more": jax.random.split(jax.random.key(4, impl="rbg"), 3)}
    state = State(Server({"w": np.ones(2, np.float32)}, (keys, optax.EmptyState())), (), ())
    checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig())
    checkpoints.save(state, HISTORY[:1])
    checkpoints.wait()
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
    for asked in (like, None):
        found = checkpoints.latest(asked).state
        found = found.server.state if asked is not None else found["server"]["state"]
        for name, key in keys.items():
            again = found[0][name]
            assert jax.random.key_impl(again) == jax.random.key_impl(key)
            np.testing.assert_array_equal(jax.random.key_data(again), jax.random.key_data(key))
    checkpoints.close()


def test_another_tree_is_named(tmp_path):
    _saved(tmp_path / "c", (1,))
    checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig())
    variables = _state(0).server.variables
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 1), x.dtype), variables)
    name = r"\['server', 'variables', 'blocks', '0', 'w'\]"
    message = rf"float32\[40, 7\] at {name}.* float32\[40, 7, 1\]"
    with pytest.raises(ValueError, match=message):
        checkpoints.load(1, _state(0)._replace(server=_state(0).server._replace(variables=like)))
    checkpoints.close()


def test_reading_leaves_the_folder_as_it_is(tmp_path):
    """A run may be at work in it."""
    _saved(tmp_path / "c", (1, 2, 3))
    (tmp_path / "c" / "4.orbax-checkpoint-tmp-5").mkdir()
    _flip(_files(tmp_path / "c" / "3" / "d")[0])
    before = sorted(path.name for path in (tmp_path / "c").iterdir())
    checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig(keep=1))
    with pytest.warns(UserWarning, match="that of round 3"):
        assert len(checkpoints.latest(None, repair=False).history) == 2
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == before


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    (tmp_path / "c" / "4.orbax-checkpoint-tmp-5").mkdir(parents=True)
    _saved(tmp_path / "c", (1,))
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def test_a_remote_save_that_a_kill_cut_short_is_made_anew(tmp_path, monkeypatch):
    """A remote folder has its final name from the beginning, and a mark once it is complete."""
    monkeypatch.setattr("jfed.runs.checkpoints.is_local", lambda path: False)
    (tmp_path / "c" / "2" / "d").mkdir(parents=True)
    _saved(tmp_path / "c", (1, 2))
    _check(_latest(tmp_path / "c"), 2)


def test_a_round_that_is_damaged_twice_is_set_aside_twice(tmp_path):
    for rounds in ((1, 2), (2,)):
        _saved(tmp_path, rounds)
        _flip(max(_files(tmp_path / "2"), key=lambda path: path.stat().st_size))
        with pytest.warns(UserWarning, match="that of round 2"):
            _check(_latest(tmp_path), 1)


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flip(path):
    content = bytearray(path.read_bytes())
    if content:  # Orbax's marks are empty
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [_flip, _truncate, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_never_used(tmp_path, damage):
    """Each file of the newest one in turn: the one before takes its place, or nothing was lost."""
    passed_over = 0
    _saved(tmp_path / "0", (1, 2))
    for i in range(len(_files(tmp_path / "0" / "2"))):
        folder = tmp_path / f"run{i}"
        _saved(folder, (1, 2))
        files = _files(folder / "2")
        if i >= len(files):
            break
        damage(files[i])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = _latest(folder)
        _check(found, len(found.history))
        if len(found.history) == 1:
            passed_over += 1
            assert (folder / "damaged-2").exists()
            assert not (folder / "2").exists()
            assert any(
                "damaged checkpoint set aside, that of round 2" in str(w.message) for w in caught
            )
    assert passed_over >= 3


def test_without_any_intact_checkpoint_the_reasons_are_given(tmp_path):
    _saved(tmp_path / "c", (1, 2))
    for number in "12":
        for path in _files(tmp_path / "c" / number / "d"):
            _truncate(path)
    with pytest.raises(RunFolderError, match=r"no checkpoint in .* is intact: that of round 2"):
        _latest(tmp_path / "c")
    assert (tmp_path / "c" / "2").exists()


def test_a_save_that_fails_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig())
    checkpoints.save(_state(1), HISTORY[:1])
    checkpoints.wait()
    (tmp_path / "c").rename(tmp_path / "elsewhere")
    (tmp_path / "c").touch()

    def save_on():
        checkpoints.save(_state(2), HISTORY[:2])
        checkpoints.wait()

    with pytest.raises(RunFolderError, match="cannot save a checkpoint in"):
        save_on()


@pytest.mark.parametrize("name", ["every", "keep"])
def test_bad_settings_are_quoted(name):
    with pytest.raises(ConfigError, match=f"checkpoint_{name} must be 1 or more, got 0"):
        CheckpointConfig(**{name: 0})
