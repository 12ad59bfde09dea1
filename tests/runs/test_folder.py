"""The run folder: whose it is, claimed by one process, given back if nothing comes of it."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

import jfed
from jfed.errors import DataNotFoundError, RunFolderError
from jfed.files import write_json
from jfed.runs.config import run_preset
from jfed.runs.folder import claim, explain_disk, inspect, warn_of_others
from jfed.settings import as_json, read_settings, write_settings

CONFIG = {"rounds": 4, "seed": 1, "tiers": {"iterations": [1, 2]}, "population": {"shares": None}}
MADE_WITH = {"jfed": "0.1.0", "commit": "abc", "jax": "0.10.2", "devices": {"cpu": 2}}


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path / "run")


def test_a_folder_is_nothing_then_begun_then_finished(folder):
    assert inspect(folder, CONFIG) == "nothing"
    with claim(folder):
        assert inspect(folder, CONFIG) == "nothing"
        write_settings(folder, CONFIG, MADE_WITH)
        assert inspect(folder, CONFIG) == "begun"
        write_json(folder / "summary.json", {"rounds": 4})
        assert inspect(folder, CONFIG) == "finished"
    assert inspect(folder, CONFIG) == "finished"


def test_other_settings_are_refused_and_shown(folder):
    folder.mkdir()
    write_settings(folder, CONFIG, MADE_WITH)
    other = CONFIG | {"seed": 2, "population": {"shares": [1]}, "more": 9}
    with pytest.raises(RunFolderError) as error:
        inspect(folder, other)
    assert "more is 'not set' there, 9 here" in str(error.value)
    assert "seed is 1 there, 2 here" in str(error.value)
    assert "population.shares is None there, [1] here" in str(error.value)
    assert "iterations" not in str(error.value)


def test_a_setting_that_differs_is_named_by_its_path(folder):
    folder.mkdir()
    config = run_preset("smoke")
    write_settings(folder, as_json(config), MADE_WITH)
    assert inspect(folder, as_json(config)) == "begun"
    message = r"other settings: client.learning_rate is 0.1 there, 0.05 here\. Choose"
    with pytest.raises(RunFolderError, match=message):
        inspect(folder, as_json(config.replace(learning_rate=0.05)))


def test_a_folder_of_an_older_version_is_named_as_such(folder):
    """Whose config.json was flat, and did not tell what it was made with."""
    folder.mkdir()
    write_json(folder / "config.json", {"seed": 1, "learning_rate": 0.1, "model": "odenet-20"})
    with pytest.raises(RunFolderError, match="is of an older version of jfed"):
        inspect(folder, CONFIG)


def test_settings_are_json_and_functions_are_their_names():
    made = as_json(
        jfed.ClientConfig(
            optimizer=functools.partial(optax.adamw, b1=np.float32(0.5)),
            schedule=jax.tree_util.Partial(jnp.multiply),
        )
    )
    assert made["optimizer"] == {"partial": ["optax._src.alias.adamw", [], {"b1": 0.5}]}
    assert made["learning_rate"] == 0.1
    assert made["steps"] is None
    assert json.loads(json.dumps(made)) == made
    by_name = as_json(run_preset("smoke").replace(optimizer=optax.sgd))
    assert by_name["client"]["optimizer"] == "optax._src.alias.sgd"
    assert by_name["tiers"]["iterations"] == [1, 2]


def test_functions_made_inside_of_others_tell_what_they_close_over():
    def scaled(by, more=(1, {"a": 2})):
        def scale(x, plus=0.0):
            return by * x + plus + len(more)

        return scale

    one, same, other = as_json([scaled(2.0), scaled(2.0), scaled(3.0)])
    assert one == same != other
    assert one.startswith(f"{__name__}.test_functions_made_inside")
    keys = as_json([scaled(2.0, jax.random.key(n)) for n in (3, 4)])
    assert keys[0] != keys[1]
    arrays = as_json([scaled(2.0, np.arange(n)) for n in (3, 4)])
    assert arrays[0] != arrays[1]
    assert as_json(lambda x: x + 1) != as_json(lambda x: x + 2)
    assert as_json(scaled(scaled)) == as_json(scaled(scaled))  # which closes over itself


def test_another_jfed_jax_or_devices_are_told(folder):
    folder.mkdir()
    write_settings(folder, CONFIG, MADE_WITH)
    assert read_settings(folder) == (CONFIG, MADE_WITH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_others(folder, MADE_WITH)
    other = {"jfed": "0.1.0", "commit": "def", "jax": "0.11.0", "devices": {"NVIDIA H100": 1}}
    with pytest.warns(UserWarning, match="goes on with what it was not begun with") as found:
        warn_of_others(folder, other)
    (told,) = (str(warning.message) for warning in found)
    assert "\n" not in told
    assert "jax is '0.10.2' there, '0.11.0' here" in told
    assert "commit is 'abc' there, 'def' here" in told
    assert "devices.cpu is 2 there, 'not set' here" in told
    assert "devices.NVIDIA H100 is 'not set' there, 1 here" in told
    assert "jfed is" not in told


@pytest.mark.parametrize("text", ["", '{"seed": 1', "[]", '{"seed"\x00: 1}', "\ufffd"])
def test_a_damaged_config_is_named(folder, text):
    folder.mkdir()
    (folder / "config.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"config.json' is damaged"):
        inspect(folder, CONFIG)


def test_what_is_no_run_folder_is_refused(tmp_path, folder):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"holds no run but \['thesis.tex'\]"):
        inspect(epath.Path(tmp_path), CONFIG)
    with pytest.raises(
        RunFolderError, match=r"^the run folder \S+ is a file; choose another one\.$"
    ):
        inspect(epath.Path(tmp_path / "thesis.tex"), CONFIG)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_is_given_back_after_a_failure(folder, error):
    with pytest.raises(error), claim(folder):
        raise error
    assert not folder.exists()


def test_a_folder_with_a_run_in_it_is_kept(folder):
    with claim(folder):
        write_settings(folder, CONFIG, MADE_WITH)
    assert inspect(folder, CONFIG) == "begun"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunFolderError, match=r"cannot write a run to '.*file/run'"),
        claim(epath.Path(tmp_path / "file" / "run")),
    ):
        pass


HOLD = """
import sys, time
from etils import epath
from jfed.runs.folder import claim
with claim(epath.Path(sys.argv[1])):
    (epath.Path(sys.argv[1]) / "held").touch()
    time.sleep(60)
"""


def test_a_second_process_is_kept_out_until_the_first_one_dies(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)])
    try:
        while not (folder / "held").exists():
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(RunFolderError, match="another process is running in"), claim(folder):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with claim(folder):
        assert (folder / "held").exists()


def test_json_that_is_no_json_is_not_written(folder):
    folder.mkdir()
    with pytest.raises(ValueError, match="JSON"):
        write_json(folder / "a.json", {"loss": float("nan")})
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_explained(folder):
    message = r"No space left.*the same command goes on"
    with pytest.raises(RunFolderError, match=message), explain_disk(folder):
        raise OSError(28, "No space left on device")
    with pytest.raises(RunFolderError, match="mine"), explain_disk(folder):
        raise RunFolderError("mine")


def test_a_run_folder_that_is_gone_is_explained(folder, monkeypatch):
    message = r"No such file.*the same command goes on"
    with pytest.raises(RunFolderError, match=message), explain_disk(folder):
        (folder / "metrics.csv").write_text("")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(RunFolderError, match=message), explain_disk(folder):
        (epath.Path("run") / "metrics.csv").write_text("")


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/etc/shadow"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "run.txt"),
        ConnectionError("no answer from wandb"),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
        DataNotFoundError("no cifar10"),
    ],
    ids=repr,
)
def test_errors_that_are_not_of_the_disk_stay_what_they_are(folder, error):
    with pytest.raises(type(error)) as raised, explain_disk(folder):
        raise error
    assert raised.value is error
