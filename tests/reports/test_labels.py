"""What arms are called, against names written out by hand."""

import json

import pytest

from jfed.reports.labels import arm_labels
from jfed.runs.config import RunConfig, settings
from jfed.settings import as_json, flat


def _flat(config):
    values = flat(as_json(config))
    return {name: values[path] for name, path in settings().items()}


def _called(*changes):
    runs = json.loads(json.dumps([_flat(RunConfig().replace(**change)) for change in changes]))
    return arm_labels(runs, _flat(RunConfig()))


ADAM = {"server_optimizer": "adam", "server_learning_rate": 0.01}


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([{}, {"seed": 1}, {"lanes": 4}], ["all", "all", "all"]),
        (
            [{"algorithm": "scaffold"}, ADAM | {"eval_every": 5}, {"eval_every": 2}],
            ["scaffold", "server_learning_rate 0.01, server_optimizer adam", "default"],
        ),
        (
            [{"server_optimizer_args": {"eps": 0.001, "b1": 0.9}, **ADAM}, ADAM],
            ["server_optimizer_args b1=0.9 eps=0.001", "default"],
        ),
        ([{"rounds": 30}, {}, {"seed": 1}], ["rounds 30", "rounds 20", "rounds 20"]),
        ([{"eval_every": 5}, {"eval_every": 1}], ["eval_every 5", "eval_every 1"]),
        (
            [{}, {"local_test": 0.2}, {"local_test": 0.2, "finetune_epochs": 2}],
            ["default", "local_test 0.2", "finetune_epochs 2, local_test 0.2"],
        ),
        ([{"iterations": (1, (3, 2))}, {"iterations": (4,)}], ["iterations 1 3-2", "iterations 4"]),
        (
            [{"codec_up": ("topk:0.05", "int8")}, {"method": "full"}],
            ["codec_up topk:0.05 int8", "full"],
        ),
        ([{"data": "./a"}, {"data": "./b"}], ["data .:a", "data .:b"]),
    ],
)
def test_labels_tell_what_is_not_at_its_default(runs, expected):
    assert _called(*runs) == expected


def test_arms_that_differ_are_never_called_alike():
    """One run has a setting at its default, the other, which `simulate` made, does not have it."""
    assert arm_labels([{"rounds": 2, "a": 1}, {"rounds": 2}], {"a": 1}) == ["a 1", "default"]
    runs = [{"a": 1, "b": 2}, {"b": 2}, {"a": 1, "b": 3}]
    assert arm_labels(runs, {"a": 1, "b": 2}) == ["a 1, b 2", "b 2", "a 1, b 3"]
