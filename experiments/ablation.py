"""What makes the merge of different iteration counts better or worse: one change at a time.

    python experiments/ablation.py --scale cpu

trains the mixed federation of `flexible.py` (IID) as it is and with one setting changed: the
horizon, norms and learned step sizes of each depth's own, the norm, counts drawn anew each round,
self-distillation from the deepest to the shallower trajectories, the solver. Two of them train at
other cost: with distillation a client also runs the counts of the shallower tiers (4, 2 and 1 in
place of 4), and Midpoint evaluates f twice a step. It writes
`experiments/results/ablation_cpu.csv`. Expected there, mean over the tiers less the default's 46.0
%: proportional horizon -3.1, group norm -7.8, Midpoint -1.0 points, all else within 0.4. `--scale
full` is the preset `cifar10-flexible`, but IID, for an accelerator; not run yet.
"""

from typing import Any

from script import main

from jfed.runs.config import run_preset
from jfed.runs.study import Arms

_DEFAULT = {
    "cpu": run_preset("cifar10-small"),
    "full": run_preset("cifar10-flexible").replace(partition="iid"),
    "smoke": run_preset("smoke"),
}
_CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "proportional horizon": {"horizon": "proportional"},
    "norms per depth": {"sharing": "norms-per-depth"},
    "norms and learned steps per depth": {
        "sharing": "norms-and-steps-per-depth",
        "learn_steps": True,
    },
    "group norm": {"norm": "group"},
    "counts drawn each round": {"draw_tiers": 2},
    "distillation": {"distillation": 1.0},
    "Midpoint": {"solver": "Midpoint"},
}


def arms(scale: str) -> Arms:
    """The default, and each change of it; at the smoke scale the first ones."""
    chosen = list(_CHANGES.items())[: 2 if scale == "smoke" else None]
    return {name: _DEFAULT[scale].replace(**changes) for name, changes in chosen}


if __name__ == "__main__":
    main(__file__, arms, baseline="default")
