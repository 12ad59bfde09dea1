"""What the settings of a run make."""

import pytest

from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.servers import ServerConfig
from jfed.engine.faults import FaultConfig
from jfed.errors import ConfigError
from jfed.models import ODENetConfig, ResNetConfig
from jfed.runs.assembly import set_up
from jfed.runs.config import run_preset
from jfed.simulation.evaluation import EvaluationConfig


def test_presets_make_the_network_that_they_name():
    flexible = run_preset("cifar10-flexible").network.make(10, 3)
    assert isinstance(flexible, ODENetConfig)
    assert flexible.widths == (16, 32, 64)
    resnet = run_preset("cifar10-resnet").network.make(10, 3)
    assert isinstance(resnet, ResNetConfig)
    assert resnet.blocks == (9, 9, 9)
    same = {"model": "resnet-56", "iterations": None, "weights": "count"}
    assert run_preset("cifar10-flexible").replace(**same) == run_preset("cifar10-resnet")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["1", "2", "4"]),
        ({"model": "resnet-digits"}, ["full"]),
        ({"model": "resnet-digits", "method": "depthfl"}, ["1", "2"]),
        ({"model": "resnet-digits", "method": "nefl-d", "ratios": (0.5, 1.0)}, ["0.5", "1"]),
        ({"model": "resnet-20", "method": "heterofl", "ratios": (0.25, 1.0)}, ["0.25", "1"]),
        ({"model": "resnet-20", "method": "fedrolex", "ratios": (0.5,)}, ["0.5"]),
        ({"method": "heterofl", "ratios": (0.5, 1.0)}, ["0.5", "1"]),
        ({"method": "exclusive", "able": 0.2}, ["4"]),
        ({"method": "full", "iterations": ((2, 3),)}, ["2-3"]),
    ],
    ids=str,
)
def test_methods_make_tiers_of_the_network(changes, names):
    federation, _, _ = set_up(run_preset("digits").replace(**changes))
    assert [tier.name for tier in federation.tiers.members] == names


def test_every_tested_count_is_tested_with_every_solver():
    config = run_preset("digits").replace(
        iterations=(1, (2, 3)), eval_iterations=(4, 1), eval_solvers=("Heun", "Euler")
    )
    federation, _, _ = set_up(config)
    names = [tier.name for tier in federation.evaluated]
    assert names == ["1", "2-3", "4", "1 Heun", "2-3 Heun", "4 Heun"]


def test_settings_change_the_network():
    config = run_preset("digits").replace(
        widths=(8, 8), solver="Heun", horizon="proportional", norm="group"
    )
    network = config.network.make(classes=7, channels=1)
    assert network == ODENetConfig(
        widths=(8, 8),
        solver="Heun",
        horizon="proportional",
        norm="group",
        unroll=False,
        classes=7,
        channels=1,
    )


def test_every_part_gets_its_own_settings():
    config = run_preset("digits").replace(
        learning_rate=0.2,
        server_learning_rate=0.3,
        momentum=0.4,
        server_momentum=0.5,
        weight_decay=0.01,
        aggregator="trimmed-mean",
        trim=0.1,
        batch_size=7,
        eval_batch_size=70,
        iterations=(1, 3),
        eval_iterations=(2,),
        eval_every=4,
        calibration_examples=90,
        dropout=0.25,
        lanes=2,
    )
    federation, _, _ = set_up(config)
    assert federation.client == ClientConfig(
        epochs=2, batch_size=7, learning_rate=0.2, momentum=0.4, weight_decay=0.01
    )
    assert federation.server == ServerConfig(
        weights="count", learning_rate=0.3, momentum=0.5, aggregator="trimmed-mean", trim=0.1
    )
    assert federation.evaluation == EvaluationConfig(
        every=4, iterations=(2,), batch_size=70, calibration_examples=90
    )
    assert federation.population.faults == FaultConfig(dropout=0.25)
    assert federation.engine.lanes == 2
    assert [tier.name for tier in federation.evaluated] == ["1", "3", "2"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("solver", "Heun"),
        ("horizon", "proportional"),
        ("function", "postactivation"),
        ("learn_steps", True),
    ],
)
def test_a_resnet_takes_no_settings_of_an_odenet(name, value):
    with pytest.raises(ConfigError, match=f"ResNet has no {name}, got {name} {value!r}; leave"):
        run_preset("cifar10-resnet").replace(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "odenet-21"}, r"unknown model 'odenet-21'\. Did you mean"),
        ({"data": "cifar"}, r"unknown data set \(nor is it a path\) 'cifar'"),
        ({"partition": "dirichlt"}, "unknown partition 'dirichlt'"),
        ({"clients": 2000}, "2000"),
        ({"clients": 0}, "0"),
        ({"alpha": 0.0}, r"alpha.*0\.0"),
        ({"alpha": -1.0}, r"-1\.0"),
        ({"cohort": 21}, "at most the 20 clients, got 21"),
        ({"iterations": (1, -2)}, "got -2"),
        ({"iterations": ()}, "at least one tier"),
        ({"iterations": ((1, 2, 3),)}, r"\(1, 2, 3\) do not fit a network of 2 stages"),
        ({"shares": (0.5, 0.5, 0.5)}, r"sum 1\.5"),
        ({"solver": "Dopri5"}, "'Dopri5' of diffrax cannot be stepped"),
        ({"solver": "euler"}, "Did you mean 'Euler'"),
        (
            {"model": "resnet-digits", "iterations": (1, 2, 4)},
            r"only an ODENet has iterations, got iterations \(1, 2, 4\)",
        ),
        ({"method": "hetero"}, r"unknown method 'hetero'\. Did you mean 'heterofl'"),
        ({"method": "heterofl", "ratios": (0.5, 2.0)}, r"got 2\.0"),
        ({"method": "heterofl", "ratios": (1.0,), "able": 0.5}, r"has no able, got able 0\.5"),
        ({"method": "fedrolex", "ratios": (0.5,)}, "fedrolex needs a ResNet"),
        ({"sharing": "norms-per-depht"}, "Did you mean 'norms-per-depth'"),
        ({"sharing": "steps-per-depth"}, "needs learned step sizes"),
        ({"method": "exclusive", "able": 0.01}, "leave tier 0 without a client"),
        ({"conv": "fft"}, "unknown convolution form 'fft'"),
        ({"image_size": 3}, "3"),
        ({"train_examples": 10**6}, "1000000"),
        ({"eval_batch_size": 0}, "got 0"),
        ({"eval_solvers": ("Huen",)}, r"unknown solver 'Huen'\. Did you mean 'Heun'"),
        ({"model": "resnet-digits", "eval_solvers": ("Heun",)}, r"solvers \('Heun',\) need tiers"),
        ({"optimizer": "sgdd"}, "Did you mean 'sgd'"),
        ({"server_learning_rate": 0.0}, r"got 0\.0"),
        ({"rounds": 0}, "got 0"),
        ({"seed": -1}, "got -1"),
        ({"dropout": 1.5}, r"dropout must be a number from 0 to 1, got 1\.5"),
        ({"attack": "flip"}, r"unknown attack 'flip'\. Did you mean 'sign-flip'"),
        ({"aggregator": "medain"}, r"Did you mean 'median'"),
        ({"aggregator": "krum", "krum_byzantine": 9}, "needs 21 clients in a round, got 20"),
        ({"hostile": 0.01}, r"hostile 0\.01 of 20 clients are none"),
    ],
    ids=str,
)
def test_bad_settings_are_quoted_before_anything_is_compiled(changes, message):
    with pytest.raises(ConfigError, match=message):
        set_up(run_preset("digits").replace(**changes))
