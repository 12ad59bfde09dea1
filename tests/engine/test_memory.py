"""Client memory on the host: rows in RAM and in a folder."""

import numpy as np
import pytest
from etils import epath

from jfed.engine import memory as memory_lib
from jfed.engine.memory import NEVER, ClientMemory
from jfed.errors import RunFolderError

FIRST = {"count": np.int32(7), "drift": np.arange(6, dtype=np.float32).reshape(2, 3)}


def _row(number):
    return {"count": np.int32(number), "drift": np.full((2, 3), number, np.float32)}


@pytest.fixture(params=["RAM", "folder"])
def folder(request, tmp_path):
    return None if request.param == "RAM" else epath.Path(tmp_path) / "memory"


def _counts(memory, clients, latest):
    rows = memory.rows(clients, np.asarray(latest, np.int32), (range(len(clients)), len(clients)))
    return rows["count"].tolist()


def test_rows_are_those_of_the_latest_rounds(folder):
    memory = ClientMemory(FIRST, 4, folder)
    assert memory.row_bytes == 4 + 24
    latest = memory.begin(4)
    assert latest.tolist() == [NEVER] * 4
    memory.keep([(2, 0, _row(20))])
    memory.keep([(2, 3, _row(23))])
    memory.keep([(0, 3, _row(3))])
    latest[[0, 2]] = 3
    rows = memory.rows([2, 1, 0], latest, ([4, 0, 2], 5))
    np.testing.assert_array_equal(rows["count"], [7, 0, 3, 0, 23])
    expected = [FIRST["drift"], np.zeros((2, 3)), np.full((2, 3), 3), np.zeros((2, 3))]
    np.testing.assert_array_equal(rows["drift"], [*expected, np.full((2, 3), 23)])
    assert {k: v.dtype for k, v in rows.items()} == {"count": np.int32, "drift": np.float32}
    # The state after an earlier round still has its rows.
    assert _counts(memory, [0, 2], [NEVER, 0, 0, 0]) == [7, 20]
    assert memory.rows([], latest, ([], 2))["count"].tolist() == [0, 0]


def test_a_row_is_a_copy(folder):
    memory, row = ClientMemory(FIRST, 2, folder), _row(1)
    memory.keep([(0, 0, row)])
    row["drift"][:] = 9
    read = memory.rows([0], np.zeros(2, np.int32), ([0], 1))
    np.testing.assert_array_equal(read["drift"], np.ones((1, 2, 3)))
    read["drift"][:] = 9
    again = memory.rows([0], np.zeros(2, np.int32), ([0], 1))
    np.testing.assert_array_equal(again["drift"], np.ones((1, 2, 3)))
    memory.keep([(0, 0, _row(5))])  # the same round once more, after a run was stopped
    assert _counts(memory, [0], [0, 0]) == [5]


def test_superseded_rows_are_forgotten(folder):
    memory = ClientMemory(FIRST, 2, folder)
    for round_ in (0, 2, 5):
        memory.keep([(0, round_, _row(round_))])
    memory.keep([(1, 0, _row(10))])
    memory.forget(np.array([2, NEVER], np.int32))
    assert _counts(memory, [0, 1], [2, 0]) == [2, 10]
    assert _counts(memory, [0, 1], [5, 0]) == [5, 10]
    with pytest.raises((KeyError, RunFolderError)):
        _counts(memory, [0], [0, 0])
    if folder is not None:
        assert sorted(path.name for path in folder.iterdir()) == ["0-2.row", "0-5.row", "1-0.row"]
    memory.forget(np.array([2, NEVER], np.int32))  # nothing is left to forget


def test_rows_in_a_folder_outlive_the_process(tmp_path):
    folder = epath.Path(tmp_path) / "memory"
    before = ClientMemory(FIRST, 2, folder)
    before.keep([(0, 0, _row(1))])
    before.keep([(0, 1, _row(2))])
    (folder / "1-7.partial").write_bytes(b"killed while writing")
    after = ClientMemory(FIRST, 2, folder)
    assert _counts(after, [0, 1], [1, NEVER]) == [2, 7]
    after.forget(np.array([1, NEVER], np.int32))
    assert sorted(path.name for path in folder.glob("*.row")) == ["0-1.row"]


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "empty"])
def test_a_damaged_row_is_named(tmp_path, damage):
    folder = epath.Path(tmp_path)
    memory = ClientMemory(FIRST, 30, folder)
    memory.keep([(29, 4, _row(1))])
    path = folder / "29-4.row"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[11] ^= 1
    path.write_bytes(
        {"short": content[:-1], "long": content + b"\0", "empty": b""}.get(damage, content)
    )
    with pytest.raises(RunFolderError, match=r"29-4\.row' is damaged.*client 29 after round 5"):
        _counts(memory, [29], [4] * 30)
    path.unlink()
    with pytest.raises(RunFolderError, match="memory of client 29 is gone"):
        _counts(memory, [29], [4] * 30)


def test_rows_that_do_not_fit_in_ram_are_files_for_the_time_being(monkeypatch):
    monkeypatch.setattr(memory_lib, "IN_RAM", 100)
    few, many = ClientMemory(FIRST, 3), ClientMemory(FIRST, 4)
    for memory in (few, many):
        memory.keep([(1, 0, _row(4))])
        assert _counts(memory, [1], [0] * 4) == [4]
    assert few._folder is None
    folder = many._folder
    assert folder is not None
    assert [path.name for path in folder.iterdir()] == ["1-0.row"]
    del memory, many
    assert not folder.exists()
