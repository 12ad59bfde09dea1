"""Mixed iteration counts against each single count, and against the ResNet they replace.

    python experiments/flexible.py --scale cpu

trains, for each partition of CIFAR-10 (IID, Dirichlet 0.5 and 0.1), a federation of mixed iteration
counts, one of each count alone, and the ResNet twin; for IID also the control without iterations.
The tables of accuracy compare every arm with the mixed one at the same count. It writes
`experiments/results/flexible_cpu.csv`. Expected there: mixed counts 45.8 to 46.1 % under IID, 40.6
to 41.2 % under Dirichlet 0.5, 29.3 to 29.6 % under 0.1, and no single count apart from them, where
both are tested at it, by more than noise; the ResNet 46.4, 36.1 and 22.0 %. At `--scale cpu`
Dirichlet 0.1 has a protocol of its own, so compare within a partition only: with the other ones'
five clients a round, of one or two classes each, models ended at chance; instead 10 of 40 clients
train 6 batches each at twice the learning rate. `--scale full` is the preset `cifar10-flexible`,
for an accelerator; not run yet.
"""

from typing import Any

from script import main

from jfed.runs.config import RunConfig, run_preset
from jfed.runs.study import Arms

_MIXED = {
    "cpu": run_preset("cifar10-small").replace(weights="count"),  # in the ResNet's mean too
    "full": run_preset("cifar10-flexible").replace(weights="count"),
    "smoke": run_preset("smoke"),
}
_TWIN = {"cpu": "resnet-20", "full": "resnet-56", "smoke": "resnet-digits"}
_PARTITIONS: dict[str, dict[str, Any]] = {
    "IID": {"partition": "iid"},
    "Dirichlet 0.5": {"partition": "dirichlet", "alpha": 0.5},
    "Dirichlet 0.1": {"partition": "dirichlet", "alpha": 0.1},
}
_MORE_CLIENTS = {"clients": 40, "cohort": 10, "steps": 6, "learning_rate": 0.1}


def arms(scale: str) -> Arms:
    """For each partition the mixed federation, one for each count alone, and the twin."""
    found: dict[str, RunConfig] = {}
    for title, partition in list(_PARTITIONS.items())[: 1 if scale == "smoke" else None]:
        if scale == "cpu" and title == "Dirichlet 0.1":
            partition = partition | _MORE_CLIENTS
        mixed = found[f"{title}/mixed"] = _MIXED[scale].replace(**partition)
        counts = mixed.tiers.iterations or ()
        for count in counts[: 1 if scale == "smoke" else None]:
            found[f"{title}/only {count}"] = mixed.replace(
                iterations=(count,), eval_iterations=counts
            )
        found[f"{title}/ResNet"] = mixed.replace(model=_TWIN[scale], iterations=None)
    if scale != "smoke":
        found["IID/no iterations"] = found["IID/mixed"].replace(iterations=(0,))
    return found


if __name__ == "__main__":
    main(__file__, arms, baseline="mixed")
