"""What the settings of a run make: its network, its tiers, and the federation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath

from jfed import data as data_lib, tiers as tiers_lib
from jfed.algorithms.catalogue import make_algorithm
from jfed.algorithms.codecs import compressed
from jfed.engine.devices import EngineConfig, make_mesh
from jfed.errors import ConfigError
from jfed.models.presets import ModelConfig, NetworkConfig
from jfed.reports.summary import Twin, find_twin
from jfed.runs import initial
from jfed.runs.config import RunConfig
from jfed.simulation.evaluation import EvaluationConfig
from jfed.simulation.federation import Federation

_Part = TypeVar("_Part")


class Prepared(NamedTuple):
    """A federation that is ready to run, and what its reports need beside it.

    Attributes:
      federation: not compiled yet.
      data: that it was made with.
      twin: what its traffic is compared with, if there is such a network.
    """

    federation: Federation
    data: data_lib.Dataset
    twin: Twin | None = None


def set_up(
    config: RunConfig,
    memory_folder: epath.Path | None = None,
    load: Callable[..., data_lib.Dataset] = data_lib.load,
    devices: Sequence[jax.Device] | None = None,
) -> Prepared:
    """Loads the data, deals it out, builds the model, and checks everything; compiles nothing.

    Args:
      config: of the run.
      memory_folder: where rows of client memory lie, see `jfed.engine.memory.ClientMemory`.
      load: reads the data.
      devices: that there are, see `jfed.engine.devices.make_mesh`.
    """
    population, seed = config.population, config.seed
    # What can fail without the data does so before they are read.
    tiers = tiers_lib.make_tiers(config.network.make(classes=10, channels=3), config.tiers)
    if config.partition.scheme != "natural":
        tiers_lib.assign(
            population.clients, len(tiers.members), population.shares, seed=seed, idle=tiers.idle
        )
    make_mesh(config.engine.devices, devices)
    algorithm = make_algorithm(config.algorithm, config.client, config.server, tiers.algorithm)
    algorithm = compressed(algorithm, config.codec.up, config.codec.down)
    path = config.initial.weights
    weights = None if path is None else initial.read(path)
    data = load(config.data, seed=seed)
    if len(data.image_shape) != 3:
        raise ConfigError(
            f"jfed's networks take images [N, H, W, C], got shape {data.train.images.shape} of "
            f"{data.name!r}; give one channel an axis of its own."
        )
    network = config.network.make(data.num_classes, data.image_shape[-1])
    partition = data_lib.partition(
        config.partition, data.train.labels, population.clients, natural=data.clients, seed=seed
    )
    federation = Federation(
        data,
        partition,
        _started(tiers_lib.make_tiers(network, config.tiers), network, weights, config),
        rounds=config.rounds,
        cohort=population.cohort,
        shares=population.shares,
        draw_tiers=population.draw_tiers,
        algorithm=algorithm,
        client=config.client,
        server=config.server,
        evaluation=config.evaluation,
        augmentation=config.augmentation,
        engine=config.engine,
        faults=config.faults,
        privacy=config.privacy,
        time=config.time,
        seed=seed,
        memory_folder=memory_folder,
        devices=devices,
    )
    return Prepared(federation, data, find_twin(config.network.model, network, federation.tiers))


def _started(
    tiers: tiers_lib.Tiers,
    network: ModelConfig,
    weights: Mapping[str, np.ndarray] | None,
    config: RunConfig,
) -> tiers_lib.Tiers:
    """The tiers, starting from the weights of a file if there are any."""
    if weights is None:
        return tiers
    return tiers_lib.start_from(tiers, initial.fitting(network, weights, config.initial.fresh))


def rebuild(
    settings: Mapping[str, Any], classes: int, channels: int
) -> tuple[tiers_lib.Tiers, EvaluationConfig, EngineConfig]:
    """What the settings in the `config.json` of `jfed run` make, as far as it takes no data."""

    def part(kind: type[_Part], name: str) -> _Part:
        return kind(**{field: _tuples(value) for field, value in settings[name].items()})

    network = part(NetworkConfig, "network").make(classes, channels)
    tiers = tiers_lib.make_tiers(network, part(tiers_lib.MethodConfig, "tiers"))
    return tiers, part(EvaluationConfig, "evaluation"), part(EngineConfig, "engine")


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
