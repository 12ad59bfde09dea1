"""Methods by name: the tiers that each makes of a network, with its settings checked."""

import dataclasses
from typing import Any

from jfed.errors import ConfigError, one_of
from jfed.models.ode_nets import Iterations, ODENetConfig
from jfed.models.presets import ModelConfig, build
from jfed.tiers.bounds import exclusive
from jfed.tiers.depth import check_network, depthfl, nefl_d
from jfed.tiers.iterations import ode
from jfed.tiers.tier import Tiers, single
from jfed.tiers.width import fedrolex, heterofl

# The settings that each method has.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "ode": ("iterations", "sharing", "distillation"),
    "depthfl": ("depths", "distillation"),
    "nefl-d": ("ratios",),
    "heterofl": ("ratios", "scaler"),
    "fedrolex": ("ratios", "scaler"),
    "exclusive": ("iterations", "able"),
    "full": ("iterations",),
}
METHODS = tuple(_SETTINGS)


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """What clients that cannot afford the full model train. None: not given.

    Attributes:
      method: "ode" (fewer iterations), "depthfl", "nefl-d", "heterofl", "fedrolex", "exclusive"
        (nothing), or "full" (all can afford it); by default "ode" for an ODENet and "full" for a
        ResNet. Settings of another method must not be given.
      iterations: of "ode": an entry for each tier, solver iterations of all stages of the network
        or of each (a tuple; 3-2-2 in a command); 1, 2 and 4 by default. Of "full" and "exclusive"
        with an ODENet: at most one entry, the network's own by default.
      sharing: of "ode": "all" (every weight is everybody's; the default), "norms-per-depth",
        "steps-per-depth", "norms-and-steps-per-depth" or "classifier-per-depth".
      ratios: of "heterofl" and "fedrolex": share of the channels of each tier; of "nefl-d": share
        of the parameters.
      scaler: of "heterofl" and "fedrolex": divide norms' inputs by the ratio in training; True by
        default.
      depths: of "depthfl": stages of each tier; every number of them by default.
      distillation: the weight of self-distillation. Of "ode": from the count that a client affords
        to the shallower ones, 0 by default; of "depthfl": among exits, 1 by default.
      able: of "exclusive": the share of the clients that can afford the full model.
    """

    method: str | None = None
    iterations: tuple[Iterations, ...] | None = None
    sharing: str | None = None
    ratios: tuple[float, ...] | None = None
    scaler: bool | None = None
    depths: tuple[int, ...] | None = None
    distillation: float | None = None
    able: float | None = None

    def __post_init__(self) -> None:
        if self.method is not None:
            one_of("method", self.method, METHODS)


def make_tiers(network: ModelConfig, config: MethodConfig) -> Tiers:
    """The tiers of a method.

    Raises:
      ConfigError: a setting that the method lacks or needs, or a network that it cannot cut.
    """
    default = "ode" if isinstance(network, ODENetConfig) else "full"
    method = config.method or default
    given = {
        name: getattr(config, name)
        for name in (field.name for field in dataclasses.fields(config))
        if name != "method" and getattr(config, name) is not None
    }
    for name, value in given.items():
        if name not in _SETTINGS[method]:
            users = ", ".join(m for m, names in _SETTINGS.items() if name in names)
            raise ConfigError(
                f"method {method!r} has no {name}, got {name} {value!r}; leave it out, or set "
                f"it to None where a preset has it. Methods that have it: {users}."
            )
    for name in {"ratios", "able"} & set(_SETTINGS[method]):
        if name not in given:
            raise ConfigError(f"method {method!r} needs {name}, got none.")
    return _make(method, network, given)


def _make(method: str, network: Any, given: dict[str, Any]) -> Tiers:
    if method in ("depthfl", "nefl-d", "fedrolex"):
        check_network(method, network)
    match method:
        case "ode":
            return ode(network, **({"iterations": (1, 2, 4)} | given))
        case "depthfl":
            return depthfl(network, **given)
        case "nefl-d":
            return nefl_d(network, given["ratios"])
        case "heterofl":
            return heterofl(network, **given)
        case "fedrolex":
            return fedrolex(network, **given)
        case "exclusive":
            return exclusive(_full(network, given.get("iterations")), given["able"])
    return _full(network, given.get("iterations"))


def _full(network: ModelConfig, iterations: tuple[Iterations, ...] | None) -> Tiers:
    """One tier, the whole network; of an ODENet, at the given or at its own iterations."""
    if not isinstance(network, ODENetConfig):
        if iterations:
            raise ConfigError(
                f"a ResNet has no iterations, got iterations {iterations!r}; leave them out."
            )
        return single(build(network))
    counts = iterations or (network.iterations,)
    if len(counts) > 1:
        raise ConfigError(f"the full model has one entry of iterations, got {counts!r}.")
    return ode(network, counts)
