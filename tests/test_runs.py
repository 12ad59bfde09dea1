"""The run folder: claimed once, and given back if nothing comes of it."""

import pytest

from jfed.errors import RunFolderError
from jfed.runs import check_folder, claim_folder, write_json


def test_a_folder_is_made_and_kept(tmp_path):
    with claim_folder(tmp_path / "a" / "b"):
        pass
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_is_given_back_after_a_failure(tmp_path, error):
    with pytest.raises(error), claim_folder(tmp_path / "run"):
        raise error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot write a run to '.*file/run'"):
        claim_folder(tmp_path / "file" / "run").__enter__()


def test_a_folder_in_use_is_refused(tmp_path):
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="exists already and is not empty"):
        check_folder(tmp_path)
    with pytest.raises(RunFolderError, match="is a file"):
        check_folder(tmp_path / "file")


def test_json_that_is_no_json_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
