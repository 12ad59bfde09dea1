"""The run folder: whose it is, claimed by one process, given back if nothing comes of it."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from jfed.errors import DataNotFoundError, RunFolderError
from jfed.files import write_json
from jfed.runs.folder import claim, explain_disk, inspect

CONFIG = {"seed": 1, "iterations": (1, 2), "shares": None}


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path / "run")


def test_a_folder_is_nothing_then_begun_then_finished(folder):
    assert inspect(folder, CONFIG) == "nothing"
    with claim(folder):
        assert inspect(folder, CONFIG) == "nothing"
        write_json(folder / "config.json", CONFIG)
        assert inspect(folder, CONFIG) == "begun"
        write_json(folder / "summary.json", {})
        assert inspect(folder, CONFIG) == "finished"
    assert inspect(folder, CONFIG) == "finished"


def test_other_settings_are_refused_and_shown(folder):
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    other = {"seed": 2, "iterations": (1, 2), "rounds": 9}
    with pytest.raises(RunFolderError) as error:
        inspect(folder, other)
    assert "rounds is 'not set' there, 9 here" in str(error.value)
    assert "seed is 1 there, 2 here" in str(error.value)
    assert "iterations" not in str(error.value)


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
    with pytest.raises(RunFolderError, match="is a file"):
        inspect(epath.Path(tmp_path / "thesis.tex"), CONFIG)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_is_given_back_after_a_failure(folder, error):
    with pytest.raises(error), claim(folder):
        raise error
    assert not folder.exists()


def test_a_folder_with_a_run_in_it_is_kept(folder):
    with claim(folder):
        write_json(folder / "config.json", CONFIG)
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
