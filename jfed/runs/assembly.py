"""What the settings of a run make: its network, its tiers, and the federation."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from jfed import data as data_lib
from jfed import tiers as tiers_lib
from jfed.data.preprocessing import Augmentation
from jfed.engine.client import ClientConfig
from jfed.engine.devices import make_mesh
from jfed.engine.faults import FaultConfig
from jfed.engine.lanes import EngineConfig
from jfed.engine.server import ServerConfig
from jfed.errors import ConfigError, check_integer, one_of
from jfed.models.ode_nets import ODENetConfig
from jfed.models.presets import ModelConfig, preset
from jfed.reports.summary import Twin, find_twin
from jfed.runs.config import RunConfig
from jfed.seeds import check_seed
from jfed.simulation.evaluation import EvaluationConfig
from jfed.simulation.federation import Federation

_Part = TypeVar("_Part")


def model_config(config: RunConfig, classes: int, channels: int) -> ModelConfig:
    """The network that a run trains."""
    base = preset(config.model)
    changes: dict[str, Any] = {
        "norm": config.norm,
        "dtype": config.dtype,
        "conv": config.conv,
        "classes": classes,
        "channels": channels,
    }
    if config.widths is not None:
        changes["widths"] = config.widths
    if isinstance(base, ODENetConfig):
        changes |= {"solver": config.solver, "horizon": config.horizon}
        changes |= {"function": config.function, "unroll": config.unroll}
        changes["learn_steps"] = config.learn_steps
    else:
        for name in ("solver", "horizon", "function", "learn_steps"):
            if getattr(config, name) != getattr(RunConfig, name):
                raise ConfigError(
                    f"a ResNet has no {name}, got {name} {getattr(config, name)!r}; leave it out."
                )
    return dataclasses.replace(base, **changes)


def make_tiers(config: RunConfig, network: ModelConfig) -> tiers_lib.Tiers:
    """The tiers that the method of a run makes of its network."""
    return tiers_lib.make_tiers(network, _named(tiers_lib.MethodConfig, config))


def _named(kind: type[_Part], config: RunConfig, prefix: str = "") -> _Part:
    """A dataclass of the settings called as its fields, or as its fields after a prefix.

    Fields that no setting is called after, which the command line cannot give, keep their defaults.
    """
    given = vars(config)
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    settings = {name: prefix + name if prefix + name in given else name for name in fields}
    return kind(**{name: given[at] for name, at in settings.items() if at in given})


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


def set_up(config: RunConfig) -> Prepared:
    """Loads the data, deals it out, builds the model, and checks everything; compiles nothing."""
    client = _named(ClientConfig, config)
    server = _named(ServerConfig, config, "server_")
    faults = _named(FaultConfig, config)
    evaluation = _named(EvaluationConfig, config, "eval_")
    augmentation = _named(Augmentation, config)
    engine = _named(EngineConfig, config)
    # What can fail without the data does so before they are read.
    check_seed(config.seed)
    check_integer("rounds", config.rounds, least=1)
    one_of("partition", config.partition, data_lib.SCHEMES)
    tiers = make_tiers(config, model_config(config, classes=10, channels=3))
    tiers_lib.assign(
        config.clients, len(tiers.members), config.shares, seed=config.seed, idle=tiers.idle
    )
    make_mesh(config.devices)
    data = data_lib.load(
        config.data,
        data_dir=config.data_dir,
        image_size=config.image_size,
        train_examples=config.train_examples,
        test_examples=config.eval_examples,
        seed=config.seed,
    )
    network = model_config(config, data.num_classes, data.image_shape[-1])
    partition = data_lib.partition(
        config.partition,
        data.train.labels,
        config.clients,
        alpha=config.alpha,
        shards_per_client=config.shards_per_client,
        min_examples=config.min_examples,
        seed=config.seed,
    )
    federation = Federation(
        data,
        partition,
        make_tiers(config, network),
        rounds=config.rounds,
        cohort=config.cohort,
        shares=config.shares,
        draw_tiers=config.draw_tiers,
        client=client,
        server=server,
        evaluation=evaluation,
        augmentation=augmentation,
        engine=engine,
        faults=faults,
        seed=config.seed,
    )
    return Prepared(federation, data, find_twin(config.model, network, federation.tiers))


def rebuild(
    settings: Mapping[str, Any], classes: int, channels: int
) -> tuple[tiers_lib.Tiers, EvaluationConfig, EngineConfig]:
    """What the settings in the `config.json` of `jfed run` make, as far as it takes no data."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    config = RunConfig(**{n: _tuples(value) for n, value in settings.items() if n in names})
    tiers = make_tiers(config, model_config(config, classes, channels))
    return tiers, _named(EvaluationConfig, config, "eval_"), _named(EngineConfig, config)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
