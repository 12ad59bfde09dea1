"""Algorithms side by side, for unequal and for equal clients: global and personal accuracy.

    python experiments/algorithms.py --scale cpu

trains digits and CIFAR-10 (16x16), dealt out by Dirichlet 0.1 and 0.5 to 20 clients of which ten
train in a round, with tiers of 1, 2 and 4 iterations and with 4 alone, by every algorithm of jfed:
plain SGD, one learning rate for all, every client counting once in the mean, settings of the
papers' own experiments where they have one, none tuned. A fifth of each client's examples is held
out and tested on: by personal models where there are such, else by the global one. FedPer's and
FedRep's global model has an untrained classifier, so that of theirs only the clients' column tells.
Beside both accuracies stand rounds and bytes until the global one was 80 % (digits) or 35 %
(CIFAR-10). It writes `experiments/results/algorithms_cpu.csv`. Expected there, on digits with
Dirichlet 0.1: 84 % by FedAvg, 92 by FedAdam, 93 by FedDyn; on the clients' own examples 86, and by
Ditto 95. `--scale full` is the preset `cifar10-flexible`, for an accelerator; not run yet.
"""

from typing import Any

from script import main

from jfed.reports.finished import FinishedRun
from jfed.runs.config import RunConfig, run_preset
from jfed.runs.study import Arms

_ALGORITHMS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedAvg, fine-tuned": {"finetune_epochs": 1},
    "FedProx": {"algorithm": "fedprox", "mu": 0.01},
    "SCAFFOLD": {"algorithm": "scaffold"},
    "FedDyn": {"algorithm": "feddyn", "feddyn_alpha": 0.01},
    "FedNova": {"algorithm": "fednova"},
    "FedAdam": {
        "server_optimizer": "adam",
        "server_learning_rate": 0.01,
        "server_optimizer_args": {"b1": 0.9, "b2": 0.99, "eps": 0.001},
    },
    "Ditto": {"algorithm": "ditto", "ditto_strength": 1.0},
    "FedPer": {"algorithm": "fedper"},
    "FedRep": {"algorithm": "fedrep"},
    "FedBN": {"algorithm": "fedbn"},
}
_PLAIN: dict[str, Any] = {"momentum": None, "weight_decay": 0.0, "local_test": 0.2}
_SMALL = {"clients": 20, "cohort": 10, "min_examples": 10} | _PLAIN
_BASES: dict[str, dict[str, RunConfig]] = {
    "cpu": {
        "digits": run_preset("digits").replace(**_SMALL, rounds=20, eval_every=2),
        "CIFAR-10": run_preset("cifar10-small").replace(
            **_SMALL, rounds=25, steps=6, learning_rate=0.1, eval_every=5, eval_examples=2000
        ),
    },
    "full": {"CIFAR-10": run_preset("cifar10-flexible").replace(**_PLAIN)},
    "smoke": {"digits": run_preset("smoke").replace(local_test=0.2)},
}
_TARGETS = {"digits": 0.8, "cifar10": 0.35}
_SMOKE = ("FedAvg", "FedPer")


def arms(scale: str) -> Arms:
    """Every algorithm, in a section for each data set, partition and kind of clients."""
    found: dict[str, RunConfig] = {}
    for title, base in _BASES[scale].items():
        for alpha in (0.5, 0.1)[: 1 if scale == "smoke" else None]:
            mixed = base.replace(partition="dirichlet", alpha=alpha)
            counts = mixed.tiers.iterations or (1, 2, 4)
            groups = {"mixed": counts, f"only {counts[-1]}": counts[-1:]}
            for kind, own in list(groups.items())[: 1 if scale == "smoke" else None]:
                for name, settings in _ALGORITHMS.items():
                    if scale != "smoke" or name in _SMOKE:
                        arm = f"{title}, Dirichlet {alpha}, {kind}/{name}"
                        found[arm] = mixed.replace(iterations=own, **settings)
    return found


def target(run: FinishedRun) -> float:
    """Of the global accuracy, from 0 to 1."""
    return _TARGETS[run.config["data"]["name"]]


if __name__ == "__main__":
    main(__file__, arms, baseline="FedAvg", target=target)
