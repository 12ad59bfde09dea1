"""Throws malformed settings and data at jfed's entry points; run by test_bad_input.py.

    python tests/bad_input.py EXAMPLES RUNS SEED

Each call either works or raises an error of jfed's own, whatever it is given. A process of its own,
without the checks of types that other tests run under, which would refuse most of it first.
"""

import dataclasses
import math
import operator
import random
import sys
import traceback

import datasets
import jax.numpy as jnp
import numpy as np

import jfed
from jfed.benchmark.settings import Settings
from jfed.data import DataConfig, PartitionConfig
from jfed.models.presets import NetworkConfig
from jfed.runs.assembly import set_up
from jfed.runs.checkpoints import CheckpointConfig
from jfed.runs.config import PopulationConfig, RunConfig, run_preset, settings
from jfed.runs.initial import InitialConfig
from jfed.simulation.federation import Federation
from jfed.tiers.methods import MethodConfig

NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    7,
    10**6,
    2**70,
    -(2**70),
    -0.5,
    0.0,
    0.5,
    1.0,
    1e308,
    math.nan,
    math.inf,
]
TEXTS = ["", "x", "4", "sgd", "Euler", "é\x00", b"1", "auto", "batch", "mean", "krum", "all"]
TUPLES = [(), (0,), (1, 2), (-1,), (1, "2"), ((1, 2), 3), (0.5, 1.0), (0.5, 0.2, 0.3), (math.nan,)]
ARRAYS = [
    np.float32(3),
    np.int64(2),
    np.array([1, 2]),
    np.array([]),
    np.array("a"),
    np.ones((2, 2)),
]
OTHERS = [None, True, False, [], [3], {}, {"a": 1}, object(), lambda x: x, int, range(3), set()]
JUNK = NUMBERS + TEXTS + TUPLES + ARRAYS + OTHERS

LABELS = np.arange(24, dtype=np.int32) % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1)).astype(np.uint8)
SPLIT = jfed.data.Split(IMAGES, LABELS)
DATA = jfed.data.Dataset("d", SPLIT, SPLIT, ("a", "b", "c"))
PAIRS = list(zip(IMAGES, LABELS.tolist(), strict=True))
COLUMNS = datasets.Dataset.from_dict(
    {"x": IMAGES.tolist(), "y": LABELS, "who": LABELS},
    datasets.Features(
        {"x": datasets.Array3D((4, 4, 1), "uint8")}
        | dict.fromkeys(("y", "who"), datasets.Value("int64"))
    ),
)
PARTS = tuple(np.split(np.arange(24), 6))
MODEL = jfed.models.Model(
    lambda key: {"w": jnp.zeros((16, 3))},
    lambda params, images: images.reshape(images.shape[0], -1) @ params["w"],
)

SMALL_RESNET = jfed.models.ResNetConfig(widths=(4, 8), blocks=(1, 1), channels=1)


def _resolved(**given):
    return jfed.EngineConfig(**given).resolve(3, None, lambda device: 8)


def mutated(rng, given):
    """The keyword arguments with one to three of them replaced by junk."""
    names = rng.sample(sorted(given), min(len(given), rng.choice([1, 1, 2, 3])))
    return given | {name: rng.choice(JUNK) for name in names}


def arguments_of(config):
    """The fields of a frozen config, as keyword arguments."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def data_set(train, test, names):
    """A data set of two splits."""
    return jfed.data.Dataset("d", train, test, names)


def federation(**given):
    """All that `simulate` checks before it compiles."""
    return Federation(**given)


def splits(rng):
    """A split, perhaps of the wrong type, shape or length."""
    images = rng.choice([IMAGES, IMAGES[:7], IMAGES[0], IMAGES / 2, IMAGES.tolist(), *JUNK])
    large = LABELS.astype(np.int64) + 2**40
    labels = rng.choice([LABELS, LABELS[:7], LABELS - 5, LABELS / 2, large, *JUNK])
    return jfed.data.Split(images, labels)


def entry_points():
    """Functions, and keyword arguments that they work with."""
    labels = {"labels": LABELS, "clients": 4, "seed": 0}
    dirichlet = labels | {"alpha": 0.5, "min_examples": 1}
    skew = labels | {"alpha": 2.0, "min_examples": 1}
    others = {"image_size": None, "test_share": 0.3, "name": "d", "seed": 0}
    pairs = others | {"train": PAIRS, "test": None, "class_names": ("a", "b", "c")}
    columns = others | {"dataset": COLUMNS, "image": "x", "label": "y", "client": "who"}
    odenet = arguments_of(jfed.models.ODENetConfig(widths=(4, 8), channels=1, unroll=False))
    resnet = arguments_of(jfed.models.ResNetConfig(widths=(4, 8), blocks=(1, 1), channels=1))
    simulation = {
        "data": DATA,
        "partition": PARTS,
        "tiers": MODEL,
        "rounds": 2,
        "cohort": 3,
        "shares": None,
        "draw_tiers": 0,
        "time": jfed.TimeConfig(("nvidia-t4@5g",), deadline=9.0),
        "seed": 0,
    }
    return [
        (jfed.ClientConfig, arguments_of(jfed.ClientConfig())),
        (jfed.ServerConfig, arguments_of(jfed.ServerConfig())),
        (jfed.EvaluationConfig, arguments_of(jfed.EvaluationConfig())),
        (jfed.Augmentation, arguments_of(jfed.Augmentation())),
        (jfed.FaultConfig, arguments_of(jfed.FaultConfig())),
        (jfed.TimeConfig, arguments_of(jfed.TimeConfig(("nvidia-t4@5g",), deadline=9.0))),
        (
            lambda **given: jfed.EngineConfig(**given).resolve(3, None, lambda device: 8),
            arguments_of(jfed.EngineConfig()),
        ),
        (CheckpointConfig, arguments_of(CheckpointConfig())),
        (Settings, arguments_of(Settings())),
        (jfed.models.ODENetConfig, odenet),
        (jfed.models.ResNetConfig, resnet),
        (MethodConfig, arguments_of(MethodConfig())),
        (PartitionConfig, arguments_of(PartitionConfig())),
        (PopulationConfig, arguments_of(PopulationConfig())),
        (DataConfig, arguments_of(DataConfig())),
        (NetworkConfig, arguments_of(NetworkConfig())),
        (InitialConfig, arguments_of(InitialConfig())),
        (jfed.tiers.start_from, {"tiers": MODEL, "params": {"w": np.ones((16, 3))}, "fresh": ()}),
        (jfed.models.load_torch, {"config": SMALL_RESNET, "state_dict": {"fc.bias": np.ones(3)}}),
        (RunConfig, arguments_of(RunConfig())),
        (jfed.data.iid, labels),
        (jfed.data.dirichlet, dirichlet),
        (jfed.data.dirichlet_balanced, dirichlet),
        (jfed.data.dirichlet_clients, labels | {"alpha": 0.5}),
        (jfed.data.shards, labels | {"shards_per_client": 2}),
        (jfed.data.quantity_skew, skew),
        (jfed.data.from_torchvision, pairs),
        (jfed.data.from_huggingface, columns),
        (data_set, {"train": SPLIT, "test": SPLIT, "names": ("a", "b", "c")}),
        (federation, simulation),
    ]


def whole_run(**given):
    """All that `jfed run` checks before it compiles and writes."""
    set_up(RunConfig().replace(**given))


SMALL = run_preset("digits").replace(widths=(4, 4), iterations=(0,), clients=4)
RUN = {name: operator.attrgetter(path)(SMALL) for name, path in settings().items()}


def attempt(rng, points):
    """One call; returns what went wrong, or None."""
    if rng.random() < 0.1:
        call, given = "Split", {}
    else:
        call, given = rng.choice(points)
        given = mutated(rng, given)
    try:
        splits(rng) if call == "Split" else call(**given)
    except jfed.JfedError as error:
        return None if str(error) else f"{call} {given}: an error without a message"
    except Exception:
        return f"{call} {given}\n{traceback.format_exc(limit=-3)}"
    return None


def main(examples, runs, seed):
    """Prints each failure; returns how many there were."""
    rng, points, failures = random.Random(seed), entry_points(), 0
    for i in range(examples + runs):
        wrong = attempt(rng, points if i < examples else [(whole_run, RUN)])
        if wrong is not None:
            failures += 1
            print(wrong)
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(*map(int, sys.argv[1:])) else 0)
