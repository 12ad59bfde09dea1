"""The settings of a run, its parts' own dataclasses put together, and presets of them.

A setting is written once, in the dataclass of its part: its name, type, default and description.
From there come its flag of `jfed run` (see `jfed.cli.flags`), its place in `config.json`
(`client.learning_rate`), and its short name (`learning_rate`), by which `RunConfig.replace` takes
it and reports tell runs apart.

So a new setting is a new field of its part. If another part has a field of that name, it needs a
line in `_SHORT_NAMES` too. A field for functions has no flag; one for anything else that no command
line can give says so: `dataclasses.field(default=..., metadata={"flag": False})`.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

from jfed.algorithms.catalogue import SHORT_NAMES, AlgorithmConfig
from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.codecs import CodecConfig
from jfed.algorithms.privacy import PrivacyConfig
from jfed.algorithms.servers import ServerConfig
from jfed.data import DataConfig, PartitionConfig
from jfed.data.preprocessing import Augmentation
from jfed.engine.devices import EngineConfig
from jfed.engine.faults import FaultConfig
from jfed.errors import check_integer, check_type, one_of
from jfed.models.presets import NetworkConfig
from jfed.runs.initial import InitialConfig
from jfed.seeds import check_seed
from jfed.simulation.evaluation import EvaluationConfig
from jfed.simulation.simulated_time import TimeConfig
from jfed.tiers.methods import MethodConfig


@dataclasses.dataclass(frozen=True)
class PopulationConfig:
    """The clients, and who of them trains in a round.

    Attributes:
      clients: how many there are; with the partition "natural" the data say.
      cohort: how many train in a round, drawn without replacement; by default all.
      shares: share of the clients in each tier, summing to 1; by default equal.
      draw_tiers: each sampled client draws its tier anew in each round, by the shares, among those
        at most so many places from its own (NeFL: 2); 0: it keeps its own.
    """

    clients: int = 20
    cohort: int | None = None
    shares: tuple[float, ...] | None = None
    draw_tiers: int = 0

    def __post_init__(self) -> None:
        check_integer("clients", self.clients, least=1)
        if self.cohort is not None:
            check_integer("cohort", self.cohort, least=1)
        check_integer("draw_tiers", self.draw_tiers, least=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run.

    A setting is reached by its part, `config.client.learning_rate`, and changed by its short name,
    `config.replace(learning_rate=0.05)`; `dataclasses.replace(config, client=...)` changes a whole
    part. `settings()` lists the short names.

    Attributes:
      data: which images.
      partition: how they are dealt out.
      population: the clients.
      network: what they train.
      initial: what it begins with.
      tiers: what of it those train that cannot afford all.
      rounds: how many.
      algorithm: what clients and server do.
      codec: how messages travel.
      client: local training.
      server: what is made of their updates.
      privacy: of the clients.
      faults: clients that fail or attack.
      time: a simulated clock, by the clients' devices.
      augmentation: of training images.
      evaluation: when and how the global model is tested.
      engine: how clients are spread over hardware.
      seed: of everything random.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    partition: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
    population: PopulationConfig = dataclasses.field(default_factory=PopulationConfig)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    initial: InitialConfig = dataclasses.field(default_factory=InitialConfig)
    tiers: MethodConfig = dataclasses.field(default_factory=MethodConfig)
    rounds: int = 20
    algorithm: AlgorithmConfig = dataclasses.field(default_factory=AlgorithmConfig)
    codec: CodecConfig = dataclasses.field(default_factory=CodecConfig)
    client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    time: TimeConfig = dataclasses.field(default_factory=TimeConfig)
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("rounds", self.rounds, least=1)
        check_seed(self.seed)
        for name, kind in parts().items():
            check_type(name, getattr(self, name), kind)

    def replace(self, **changes: Any) -> "RunConfig":
        """The same with other settings, given by their short names.

        Raises:
          ConfigError: no such setting (naming the close ones), or a value that cannot work.
        """
        own: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            part, _, field = settings()[one_of("setting", name, tuple(settings()))].rpartition(".")
            if part:
                nested.setdefault(part, {})[field] = value
            else:
                own[field] = value
        for part, given in nested.items():
            own[part] = dataclasses.replace(getattr(self, part), **given)
        return dataclasses.replace(self, **own)


# Settings are called as their field, except these, of which another part has a field of that name,
# or which would say too little alone.
_SHORT_NAMES = {
    "data.name": "data",
    "data.test_examples": "eval_examples",
    "partition.scheme": "partition",
    "initial.weights": "init",
    "initial.fresh": "init_fresh",
    "server.optimizer": "server_optimizer",
    "server.learning_rate": "server_learning_rate",
    "server.momentum": "server_momentum",
    "server.optimizer_args": "server_optimizer_args",
    **{f"algorithm.{name}": short for name, short in SHORT_NAMES.items()},
    **{f"privacy.{field.name}": f"dp_{field.name}" for field in dataclasses.fields(PrivacyConfig)},
    "codec.up": "codec_up",
    "codec.down": "codec_down",
    "evaluation.every": "eval_every",
    "evaluation.iterations": "eval_iterations",
    "evaluation.solvers": "eval_solvers",
    "evaluation.batch_size": "eval_batch_size",
}


def short_name(path: str) -> str:
    """What users call the setting at a path such as `client.learning_rate`."""
    return _SHORT_NAMES.get(path, path.rpartition(".")[2])


@functools.cache
def parts() -> dict[str, type]:
    """The fields of `RunConfig` that are dataclasses of settings, and which."""
    types: dict[str, type] = typing.get_type_hints(RunConfig)
    return {name: kind for name, kind in types.items() if dataclasses.is_dataclass(kind)}


@functools.cache
def settings() -> dict[str, str]:
    """The path of every setting by its short name, such as `client.learning_rate`."""
    paths = []
    for field in dataclasses.fields(RunConfig):
        kind = parts().get(field.name)
        inner = dataclasses.fields(kind) if kind is not None else ()
        paths += [f"{field.name}.{setting.name}" for setting in inner] or [field.name]
    return {short_name(path): path for path in paths}


def _digits() -> RunConfig:
    return RunConfig().replace(epochs=2, batch_size=16, eval_every=5)


def _cifar10() -> RunConfig:
    return RunConfig().replace(
        data="cifar10",
        clients=100,
        cohort=10,
        min_examples=10,
        model="odenet-56",
        iterations=(2, 4, 8),
        rounds=200,
        epochs=1,
        batch_size=32,
        schedule="cosine",
        weight_decay=5e-4,
        pad=4,
        flip=True,
        eval_every=10,
    )


def _cifar10_small() -> RunConfig:
    """What two CPU cores train in a minute or two."""
    return _cifar10().replace(
        image_size=16,
        train_examples=20000,
        eval_examples=5000,
        partition="iid",
        clients=80,
        cohort=5,
        model="odenet-20",
        iterations=(1, 2, 4),
        rounds=30,
        batch_size=20,
        learning_rate=0.05,
        momentum=0.9,
        pad=0,
        eval_every=0,
        calibration_examples=1000,
    )


def _cifar10_medium() -> RunConfig:
    """All of CIFAR-10 at a quarter of its pixels: ten minutes on two CPU cores.

    Few clients a round, for an image teaches the more the fewer clients' models are averaged: of
    300,000 images ResNet-20 learned as much by 2 clients a round in a quarter as by 10 in half.
    """
    return _cifar10_small().replace(
        train_examples=None,
        eval_examples=None,
        clients=100,
        cohort=3,
        rounds=250,
        epochs=2,
        batch_size=50,
        learning_rate=0.1,
        pad=2,
        calibration_examples=2000,
    )


def _smoke() -> RunConfig:
    """Seconds, which only show that everything works."""
    return _digits().replace(
        train_examples=200,
        eval_examples=50,
        clients=4,
        widths=(4, 4),
        iterations=(1, 2),
        rounds=1,
        epochs=1,
        conv="im2col",
    )


# Made when asked for: to check settings takes milliseconds, and importing should take none.
_PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": _digits,
    "cifar10-flexible": _cifar10,
    # Clients weigh as in its twin, the ODENet.
    "cifar10-resnet": lambda: _cifar10().replace(
        model="resnet-56", iterations=None, weights="count"
    ),
    "cifar10-small": _cifar10_small,
    "cifar10-medium": _cifar10_medium,
    "cifar10-32": lambda: _cifar10_medium().replace(image_size=None, pad=4),
    "smoke": _smoke,
}
RUN_PRESETS = tuple(_PRESETS)


def run_preset(name: str) -> RunConfig:
    """The settings of a preset; ConfigError with the close matches for an unknown name."""
    return _PRESETS[one_of("preset", name, RUN_PRESETS)]()
