"""All methods for clients that cannot afford the full model, on one protocol.

    python experiments/rivals.py --scale cpu

gives every method three tiers of equal shares of the clients, IID, its authors' networks, weights
of the mean, algorithm and gradient clipping, and the best of three learning rates, each tried once
with a seed of its own and chosen by its test accuracy; the rest is the preset's. NeFL's clients
draw a tier next to their own in each round, and DepthFL's distillation rises over 0.3 of the
rounds, as in their papers. No two budgets are equal at once, so the ODENet comes twice. "ode" has
no more parameters than the ResNet: every client sends all of them, and computes 2 to 5 times as
much as a rival's. "ode, fewer FLOPs" computes no more than a rival's client in any tier, with two
thirds of the parameters (a fifth at `--scale full`). The rivals' clients send about 1/3, 2/3 and
all of the parameters (DepthFL, whose tiers are stages with an exit each, others). The upper bounds
train the full model on every client, the lower one on the third that can afford it. Bytes and FLOPs
by tier stand beside the accuracies. It writes `experiments/results/rivals_cpu.csv`. `--scale
medium` has the same networks on the preset `cifar10-medium`, rates tried in a twentieth of its
rounds; `--scale full` is ResNet-56 on `cifar10-resnet`, but IID, for an accelerator. Neither has
been run yet.
"""

from typing import Any

from script import main

from jfed.runs.config import RunConfig, run_preset
from jfed.runs.study import Arms

_NO_TIERS: dict[str, Any] = {"iterations": None}
_BASE: dict[str, RunConfig] = {
    "cpu": run_preset("cifar10-small").replace(**_NO_TIERS),
    "medium": run_preset("cifar10-medium").replace(**_NO_TIERS),
    "full": run_preset("cifar10-resnet").replace(partition="iid"),
    "smoke": run_preset("smoke").replace(**_NO_TIERS),
}
_RATES = (0.02, 0.05, 0.15)
_SEARCH = {"medium": {"rounds": 20}}
_NETWORKS = {"medium": "cpu"}  # whose networks are those of which other scale
_RESNET = {"cpu": "resnet-20", "full": "resnet-56", "smoke": "resnet-digits"}
# An ODENet of no more parameters.
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
_WIDTHS = (0.58, 0.82, 1.0)  # shares of the channels: about 1/3, 2/3 and all parameters
_THIRDS = (1 / 3, 2 / 3, 1.0)


def arms(scale: str) -> Arms:
    """Every method, the bounds last; at the smoke scale two of them."""
    base, scale = _BASE[scale], _NETWORKS.get(scale, scale)
    small = {"widths": (4, 4)} if scale == "smoke" else {}

    def resnet(method: str, **settings: Any) -> RunConfig:
        changes = {"model": _RESNET[scale], "shortcut": "projection", "method": method}
        return base.replace(**(changes | small | settings))

    before = {"model": f"pre{_RESNET[scale]}", "shortcut": None, "clip_norm": 1.0}
    depthfl = {"ramp": round(0.3 * base.rounds)}
    ode = base.replace(**(_ODENET[scale] | small))
    deepest = _ODENET[scale]["iterations"][-1:]
    found = {"ode": ode, "full ResNet": resnet("full")}
    if scale == "smoke":
        return found
    return {
        "ode": ode,
        "ode, fewer FLOPs": base.replace(**_CHEAP[scale]),
        "NeFL-D": resnet("nefl-d", ratios=_THIRDS, draw_tiers=1),
        "NeFL-W": resnet("nefl-w", ratios=_THIRDS, draw_tiers=1),
        "DepthFL": resnet("depthfl", **depthfl),
        "DepthFL (FedAvg)": resnet("depthfl", algorithm="fedavg", distillation=0.0),
        "HeteroFL": resnet("heterofl", ratios=_WIDTHS, **before),
        "FedRolex": resnet("fedrolex", ratios=_WIDTHS, **before),
        "FjORD": resnet("fjord", ratios=_WIDTHS, distillation=1.0),
        "exclusive ResNet": resnet("exclusive", able=1 / 3),
        "full ODENet": ode.replace(method="full", iterations=deepest),
        "full ResNet": found["full ResNet"],
    }


if __name__ == "__main__":
    main(__file__, arms, baseline="ode", rates=_RATES, search=_SEARCH, scales=tuple(_BASE))
