"""Methods by name: the tiers that each makes of a network, with its settings checked."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

from jfed.errors import ConfigError, one_of
from jfed.models.ode_nets import Iterations, ODENetConfig
from jfed.models.presets import ModelConfig, build
from jfed.tiers.blocks import nefl_d, nefl_w, nefl_wd
from jfed.tiers.bounds import exclusive
from jfed.tiers.iterations import ode
from jfed.tiers.ordered_dropout import fjord
from jfed.tiers.stages import depthfl
from jfed.tiers.tier import Tiers, single
from jfed.tiers.width import fedrolex, heterofl


def _full(network: ModelConfig, iterations: tuple[Iterations, ...] | None = None) -> Tiers:
    """One tier, the whole network; of an ODENet, at the given or at its own iterations."""
    if not isinstance(network, ODENetConfig):
        if iterations:
            raise ConfigError(
                f"only an ODENet has iterations, got iterations {iterations!r}; leave them out."
            )
        return single(build(network))
    counts = iterations or (network.iterations,)
    if len(counts) > 1:
        raise ConfigError(f"the full model has one entry of iterations, got {counts!r}.")
    return dataclasses.replace(ode(network, counts), weights="examples")  # as of any network


def _exclusive(
    network: ModelConfig, able: float, iterations: tuple[Iterations, ...] | None = None
) -> Tiers:
    return exclusive(_full(network, iterations), able)


_MAKERS: dict[str, Callable[..., Tiers]] = {
    "ode": functools.partial(ode, iterations=(1, 2, 4)),
    "depthfl": depthfl,
    "nefl-d": nefl_d,
    "nefl-w": nefl_w,
    "nefl-wd": nefl_wd,
    "heterofl": heterofl,
    "fedrolex": fedrolex,
    "fjord": fjord,
    "exclusive": _exclusive,
    "full": _full,
}
METHODS = tuple(_MAKERS)


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """What clients that cannot afford the full model train. None: not given.

    Attributes:
      method: "ode" (fewer iterations), "depthfl", "nefl-d", "nefl-w", "nefl-wd", "heterofl",
        "fedrolex", "fjord", "exclusive" (nothing), or "full" (all can afford it); by default "ode"
        for an ODENet and "full" for others. Settings of another method must not be given.
      iterations: of "ode": an entry for each tier, solver iterations of all stages of the network
        or of each (a tuple; 3-2-2 in a command); 1, 2 and 4 by default. Of "full" and "exclusive"
        with an ODENet: at most one entry, the network's own by default.
      sharing: of "ode": "all" (every weight is everybody's; the default), "norms-per-depth",
        "steps-per-depth", "norms-and-steps-per-depth" or "classifier-per-depth".
      ratios: of "heterofl", "fedrolex" and "fjord": share of the channels of each tier; of
        "nefl-d", "nefl-w" and "nefl-wd": share of the parameters, by default the five of the paper.
      scaler: of "heterofl" and "fedrolex": divide norms' inputs by the ratio in training; True by
        default.
      depths: of "depthfl": stages of each tier; every number of them by default.
      exits: of "depthfl": "bottleneck", the authors' and the default, or "linear".
      distillation: the weight of self-distillation. Of "ode": from the count that a client affords
        to the shallower ones, 0 by default; of "fjord": from its own width to others, likewise; of
        "depthfl": among exits, 1 by default.
      ramp: of "depthfl": the rounds over which the weight of distillation rises; 300 by default.
      able: of "exclusive": the share of the clients that can afford the full model.
    """

    method: str | None = None
    iterations: tuple[Iterations, ...] | None = None
    sharing: str | None = None
    ratios: tuple[float, ...] | None = None
    scaler: bool | None = None
    depths: tuple[int, ...] | None = None
    exits: str | None = None
    distillation: float | None = None
    ramp: int | None = None
    able: float | None = None

    def __post_init__(self) -> None:
        if self.method is not None:
            one_of("method", self.method, METHODS)


@functools.cache
def _settings(method: str) -> dict[str, bool]:
    """The settings of a method, and whether it needs each."""
    fields = {field.name for field in dataclasses.fields(MethodConfig)}
    parameters = inspect.signature(_MAKERS[method]).parameters
    return {p.name: p.default is p.empty for p in parameters.values() if p.name in fields}


def make_tiers(network: ModelConfig, config: MethodConfig) -> Tiers:
    """The tiers of a method.

    Raises:
      ConfigError: a setting that the method lacks or needs, or a network that it cannot cut.
    """
    default = "ode" if isinstance(network, ODENetConfig) else "full"
    method = config.method or default
    names = [field.name for field in dataclasses.fields(config) if field.name != "method"]
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    for name, value in given.items():
        if name not in _settings(method):
            users = ", ".join(other for other in METHODS if name in _settings(other))
            raise ConfigError(
                f"method {method!r} has no {name}, got {name} {value!r}; leave it out, or set "
                f"it to None where a preset has it. Methods that have it: {users}."
            )
    for name, is_needed in _settings(method).items():
        if is_needed and name not in given:
            raise ConfigError(f"method {method!r} needs {name}, got none.")
    return _MAKERS[method](network, **given)
