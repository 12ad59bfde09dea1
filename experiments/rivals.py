"""All methods for clients that cannot afford the full model, on one protocol.

    python experiments/rivals.py --scale cpu

gives every method three tiers of equal shares of the clients, and one learning rate, the preset's,
tuned for none of them. No two budgets are equal at once, so the ODENet comes twice. "ode" has the
parameters of the ResNet: every client sends all of them, and computes 2 to 5 times as much as a
rival's. "ode, fewer FLOPs" computes no more than a rival's client in any tier, with two thirds of
the parameters (a fifth at `--scale full`). The rivals' clients send about 1/3, 2/3 and all of the
parameters (DepthFL, whose tiers are stages, less). The upper bounds train the full model on every
client, the lower one on the third that can afford it. Bytes and FLOPs stand beside the accuracies.
It writes `experiments/results/rivals_cpu.csv`. Expected there, worst tier / mean of the tiers in %:
ode 46.4 / 46.7, ode with fewer FLOPs 41.4 / 42.8, NeFL-D 42.5 / 43.1, HeteroFL 41.2 / 43.0, DepthFL
38.2 / 40.7, FedRolex 25.6 / 35.0; the bounds 41.8, 46.4 and 46.7. `--scale full` is ResNet-56 on
the preset `cifar10-resnet`, but IID, for an accelerator; not run yet.
"""

from typing import Any

from script import main

from jfed.runs.config import RunConfig, run_preset
from jfed.runs.study import Arms

_NO_TIERS: dict[str, Any] = {"iterations": None}
_BASE: dict[str, RunConfig] = {
    "cpu": run_preset("cifar10-small").replace(**_NO_TIERS),
    "full": run_preset("cifar10-resnet").replace(partition="iid"),
    "smoke": run_preset("smoke").replace(**_NO_TIERS),
}
# The ResNet, and an ODENet of no more parameters.
_RESNET = {"cpu": "resnet-20", "full": "resnet-56", "smoke": "resnet-digits"}
_ODENET: dict[str, dict[str, Any]] = {
    "cpu": {"model": "odenet-20", "widths": (20, 40, 80), "iterations": (1, 2, 4)},
    "full": {"model": "odenet-56", "widths": (36, 72, 144), "iterations": (2, 4, 8)},
    "smoke": {"model": "odenet-digits", "iterations": (1, 2)},
}
# An ODENet none of whose tiers computes more than the rivals'.
_CHEAP: dict[str, dict[str, Any]] = {
    "cpu": {"model": "odenet-20", "iterations": (0, 1, 2)},
    "full": {"model": "odenet-56", "iterations": (2, 5, 8)},
    "smoke": {"model": "odenet-digits", "iterations": (0, 1)},
}
_SMOKE = ("ode", "full ResNet")
_WIDTHS = (0.58, 0.82, 1.0)  # shares of the channels: about 1/3, 2/3 and all parameters


def arms(scale: str) -> Arms:
    """Every method, the bounds last; at the smoke scale two of them."""
    base = _BASE[scale]
    small = {"widths": (4, 4)} if scale == "smoke" else {}

    def resnet(method: str, **settings: Any) -> RunConfig:
        changes = {"model": _RESNET[scale], "method": method, **small, **settings}
        return base.replace(**changes)

    ode = base.replace(**(_ODENET[scale] | small))
    deepest = _ODENET[scale]["iterations"][-1:]
    found = {
        "ode": ode,
        "ode, fewer FLOPs": base.replace(**(_CHEAP[scale] | small)),
        "DepthFL": resnet("depthfl"),
        "NeFL-D": resnet("nefl-d", ratios=(1 / 3, 2 / 3, 1.0)),
        "HeteroFL": resnet("heterofl", ratios=_WIDTHS),
        "FedRolex": resnet("fedrolex", ratios=_WIDTHS),
        "exclusive ResNet": resnet("exclusive", able=1 / 3),
        "full ODENet": ode.replace(method="full", iterations=deepest),
        "full ResNet": resnet("full"),
    }
    return {name: found[name] for name in _SMOKE} if scale == "smoke" else found


if __name__ == "__main__":
    main(__file__, arms, baseline="ode")
