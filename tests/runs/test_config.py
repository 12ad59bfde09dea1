"""The settings of a run: each written once, called by a short name, changed by it."""

import dataclasses
import operator

import pytest

import jfed
from jfed.errors import ConfigError
from jfed.runs.config import RUN_PRESETS, RunConfig, parts, run_preset, settings, short_name


def test_every_setting_has_a_short_name_of_its_own():
    config, paths = RunConfig(), list(settings().values())
    fields = sum(len(dataclasses.fields(kind)) for kind in parts().values())
    assert len(settings()) == fields + len(dataclasses.fields(RunConfig)) - len(parts())
    assert [short_name(path) for path in paths] == list(settings())
    for path in paths:
        operator.attrgetter(path)(config)  # there is such a setting


def test_settings_are_changed_by_their_short_names():
    before = run_preset("digits")
    after = before.replace(rounds=5, learning_rate=0.2, server_learning_rate=0.5, eval_every=2)
    assert (after.rounds, after.client.learning_rate, after.evaluation.every) == (5, 0.2, 2)
    assert after.server == jfed.ServerConfig(learning_rate=0.5)
    assert after.client == dataclasses.replace(before.client, learning_rate=0.2)
    assert after.replace(
        rounds=20, learning_rate=0.1, server_learning_rate=1.0, eval_every=5
    ) == run_preset("digits")


def test_several_settings_of_a_part_are_changed_at_once():
    """Either of the two alone would be refused."""
    krum = RunConfig().replace(aggregator="krum", krum_byzantine=3)
    assert krum.replace(aggregator="mean", krum_byzantine=None) == RunConfig()


def test_what_is_no_setting_is_refused():
    with pytest.raises(ConfigError, match=r"unknown setting 'learning_rat'\. Did you mean 'learni"):
        RunConfig().replace(learning_rat=0.1)
    with pytest.raises(ConfigError, match="unknown setting 'client'"):
        RunConfig().replace(client=jfed.ClientConfig())
    with pytest.raises(ConfigError, match=r"learning_rate must be a number, above 0, got 0"):
        RunConfig().replace(learning_rate=0.0)


def test_an_unknown_preset_names_the_close_ones():
    assert RUN_PRESETS[0] == "digits"
    with pytest.raises(ConfigError, match=r"unknown preset 'digit'\. Did you mean 'digits'"):
        run_preset("digit")
