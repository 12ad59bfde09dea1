"""The flat settings of a run."""

import dataclasses
import re

import pytest

from jfed.errors import ConfigError
from jfed.runs.config import RunConfig, parse_iterations


def test_iterations_are_one_number_or_one_a_stage():
    assert parse_iterations("4") == 4
    assert parse_iterations("3-2-2") == (3, 2, 2)
    assert parse_iterations("-1") == -1
    with pytest.raises(ConfigError, match="'3x2'"):
        parse_iterations("3x2")


def test_every_field_is_documented():
    documented = re.findall(r"^      (\w+): ", RunConfig.__doc__, re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(RunConfig)]
