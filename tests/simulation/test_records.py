"""Records as lines of a CSV file, TensorBoard events and W&B logs."""

import csv
import dataclasses
import io
import json
import sys

import pytest

from jfed.errors import ConfigError
from jfed.runs.writers import TensorBoardWriter, WandbWriter
from jfed.simulation.records import CsvWriter, Evaluation, Record, columns, csv_text


def _record(number, **changes):
    fields = {
        field.name: number / 3 if "float" in str(field.type) else number
        for field in dataclasses.fields(Record)
        if field.name not in ("evaluations", "metrics", "local", "epsilon", "simulated_seconds")
    }
    return Record(**fields | changes)


HISTORY = [
    _record(1),
    _record(2, evaluations={"1": Evaluation(0.1 + 0.2, 1.5)}),
    _record(3, evaluations={"1": Evaluation(0.5, 1.0)}),
]
COLUMNS = columns(["1"])


def _read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_each_line_is_on_disk_before_write_returns(tmp_path):
    path = tmp_path / "metrics.csv"
    writer = CsvWriter(path, COLUMNS)
    assert _read(path) == []
    for i, record in enumerate(HISTORY):
        writer.write(record)
        rows = _read(path)
        assert len(rows) == i + 1
        assert rows[i]["round"] == str(i + 1)
    writer.close()
    assert [row["test_accuracy_1"] for row in rows] == ["", "0.30000000000000004", "0.5"]
    assert float(rows[0]["train_loss"]) == HISTORY[0].train_loss
    assert path.read_text() == csv_text(COLUMNS, HISTORY)


def test_a_file_goes_on_from_a_history_whatever_it_held(tmp_path):
    path = tmp_path / "metrics.csv"
    doubled = csv_text(COLUMNS, [*HISTORY, *HISTORY])
    path.write_text(doubled[:-7])  # the last line torn
    writer = CsvWriter(path, COLUMNS, HISTORY[:2])
    writer.write(HISTORY[2])
    writer.close()
    assert path.read_text() == csv_text(COLUMNS, HISTORY)


def test_a_record_survives_json():
    for record in HISTORY:
        text = json.dumps(dataclasses.asdict(record))
        assert Record.from_dict(json.loads(text)) == record


def test_tensorboard_gets_every_number_and_resumes(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    for done, records in ((0, HISTORY[:2]), (1, HISTORY[1:])):
        writer = TensorBoardWriter(tmp_path / "t", done)
        for record in records:
            writer.write(record)
        writer.close()
    values, purged = [], []
    for path in sorted((tmp_path / "t").iterdir()):
        for blob in _events(path.read_bytes()):
            event = Event.FromString(blob)
            purged += [event.step] if event.session_log.status else []
            values += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    assert (2, "test_accuracy_1", pytest.approx(0.3)) in values
    assert (3, "train_loss", pytest.approx(1.0)) in values
    assert 2 in purged  # so that round 2, which was written twice, counts once


def _events(content):
    """The records of an event file: length, checksum, content, checksum."""
    file = io.BytesIO(content)
    while header := file.read(12):
        yield file.read(int.from_bytes(header[:8], "little"))
        file.read(4)


def test_wandb_logs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "run").mkdir()
    writer = WandbWriter("jfed", tmp_path / "run", {"seed": 1})
    assert writer._run.id == (tmp_path / "run" / "wandb.txt").read_text()
    for record in HISTORY:
        writer.write(record)
    # The last step is held back until the next one, or the end.
    assert writer._run.summary["train_loss"] == HISTORY[1].train_loss
    writer.close()
    assert list((tmp_path / "wandb").rglob("*.wandb"))


def test_what_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'jfed\[tensorboard\]'"):
        TensorBoardWriter(tmp_path, 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'jfed\[wandb\]'"):
        WandbWriter("p", tmp_path, {})
