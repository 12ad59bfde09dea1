"""Algorithms by name, with their settings checked."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jfed.algorithms.algorithm import Algorithm
from jfed.algorithms.averaging import fedavg
from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.controls import scaffold
from jfed.algorithms.dynamic_regularization import feddyn
from jfed.algorithms.normalized_averaging import fednova
from jfed.algorithms.personal_leaves import fedbn, fedper, fedrep
from jfed.algorithms.personal_models import ditto
from jfed.algorithms.proximal import fedprox
from jfed.algorithms.servers import ServerConfig
from jfed.errors import ConfigError, one_of

_MAKERS: dict[str, Callable[..., Algorithm]] = {
    maker.__name__: maker
    for maker in (fedavg, fedprox, scaffold, feddyn, fednova, ditto, fedper, fedrep, fedbn)
}
ALGORITHMS = tuple(_MAKERS)
# What users call those of its settings whose field alone says too little beside all of a run's.
SHORT_NAMES = {"name": "algorithm", "alpha": "feddyn_alpha", "strength": "ditto_strength"}


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """What clients and server do, by name.

    None: not given, so what the method's authors have, if it is their algorithm, else the
    algorithm's default.

    Attributes:
      name: "fedavg" (with the server optimizers "sgd" with momentum, "adagrad", "adam" and "yogi":
        FedAvgM, FedAdagrad, FedAdam, FedYogi), "fedprox", "scaffold", "feddyn", "fednova"; and with
        personal models "ditto", "fedper", "fedrep", "fedbn". Settings of another algorithm must not
        be given. By default what the method's authors train with, see `jfed.tiers`.
      mu: of "fedprox": the weight of its proximal term, mu/2 |w - w_t|^2.
      alpha: of "feddyn": the weight of its regulariser.
      h_over: of "feddyn": whose mean the server's h is of, for each entry: its "owners", the
        default, or all "clients", as the method "depthfl" has it.
      strength: of "ditto": the weight lambda that draws personal models to the global one.
      personal: of "fedper", "fedrep" and "fedbn": shell patterns of the paths of leaves that never
        leave their client, such as "classifier/*"; by default the classifiers, of "fedbn" the norms
        of jfed's networks.
      head_share: of "fedrep": the share of a round's batches, the first ones, that train the
        personal leaves alone; 0.5 by default.
    """

    name: str | None = None
    mu: float | None = None
    alpha: float | None = None
    h_over: str | None = None
    strength: float | None = None
    personal: tuple[str, ...] | None = None
    head_share: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.personal, list):
            object.__setattr__(self, "personal", tuple(self.personal))
        if self.name is None:  # which one it is, the method says
            return
        own = _settings(one_of("algorithm", self.name, ALGORITHMS))
        for name, value in self.given().items():
            if name not in own:
                users = ", ".join(other for other in ALGORITHMS if name in _settings(other))
                told = SHORT_NAMES.get(name, name)
                raise ConfigError(
                    f"algorithm {self.name!r} has no {told}, got {told} {value!r}; leave it out. "
                    f"Algorithms that have it: {users}."
                )
        for name, is_needed in own.items():
            if is_needed and name not in self.given():
                told = SHORT_NAMES.get(name, name)
                raise ConfigError(f"algorithm {self.name!r} needs {told}, got none.")

    def given(self) -> dict[str, Any]:
        """The settings that are not None."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "name"]
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


@functools.cache
def _settings(name: str) -> dict[str, bool]:
    """The settings of an algorithm, and whether it needs each."""
    fields = {field.name for field in dataclasses.fields(AlgorithmConfig)}
    parameters = inspect.signature(_MAKERS[name]).parameters
    return {p.name: p.default is p.empty for p in parameters.values() if p.name in fields}


def make_algorithm(
    config: AlgorithmConfig,
    client: ClientConfig,
    server: ServerConfig,
    default: Sequence[tuple[str, Any]] = (("name", "fedavg"),),
) -> Algorithm:
    """The algorithm; ConfigError for a value that cannot work.

    Args:
      config: which; settings that it does not give are those of `default`, of the same algorithm.
      client: the clients' optimizer.
      server: the server's.
      default: the settings of the one to take where `config` names none, see `Tiers.algorithm`.
    """
    usual = dict(default)
    name = config.name or usual["name"]
    settings = config.given()
    if name == usual.pop("name"):
        settings = usual | settings
    return _MAKERS[name](client, server, **AlgorithmConfig(name, **settings).given())
