"""Mixed iteration counts against each single count, and against the ResNet they replace.

    python experiments/flexible.py --scale cpu

trains, for each partition of CIFAR-10 (IID, Dirichlet 0.5 and 0.1), a federation of mixed iteration
counts, one of each count alone, the ResNet twin, and the control without iterations.
The tables of accuracy compare every arm with the mixed one at the same count. It writes
`experiments/results/flexible_cpu.csv`. Expected there: mixed counts 45.8 to 46.1 % under IID, 40.6
to 41.2 % under Dirichlet 0.5, 29.3 to 29.6 % under 0.1, and no single count apart from them, where
both are tested at it, by more than noise; the ResNet 46.4, 36.1 and 22.0 %. At `--scale cpu`
Dirichlet 0.1 has a protocol of its own, so compare within a partition only: with the other ones'
five clients a round, of one or two classes each, models ended at chance; instead 10 of 40 clients
train 6 batches each at twice the learning rate. `--scale medium` is the preset `cifar10-medium`,
with counts to 8, ResNet-56, and a federation that leaves out the clients who cannot afford 4
iterations, of which `experiments/results/flexible_medium.csv` has the first arms and seed; `--scale
full` is `cifar10-flexible`, for an accelerator, and has not been run yet.
"""

from typing import Any

from script import main

from jfed.runs.config import RunConfig, run_preset
from jfed.runs.study import Arms

_BASE = {
    "cpu": run_preset("cifar10-small"),
    "medium": run_preset("cifar10-medium"),
    "full": run_preset("cifar10-flexible"),
    "smoke": run_preset("smoke"),
}
# The counts of the mixed federations.
_MIXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "cpu": ((1, 2, 4),),
    "medium": ((1, 2, 4), (1, 4, 8)),
    "full": ((2, 4, 8),),
    "smoke": ((1, 2),),
}
_TWINS = {"cpu": ("20",), "medium": ("20", "56"), "full": ("56",), "smoke": ("digits",)}
_PARTITIONS: dict[str, dict[str, Any]] = {
    "IID": {"partition": "iid"},
    "Dirichlet 0.5": {"partition": "dirichlet", "alpha": 0.5},
    "Dirichlet 0.1": {"partition": "dirichlet", "alpha": 0.1},
}
_FIRST = {"medium": 2, "smoke": 1}  # so many of them; all at the other scales
# At the medium scale, those that matter most first; under Dirichlet 0.5 the first six alone.
_ORDER = (
    *("mixed 1+4+8", "only 1", "ResNet-20", "only 4", "mixed", "only 8"),
    *("exclusive", "no iterations", "only 2", "ResNet-56"),
)
_MORE_CLIENTS = {"clients": 40, "cohort": 10, "steps": 6, "learning_rate": 0.1}


def arms(scale: str) -> Arms:
    """The federations of each partition, those that matter most first."""
    found: dict[str, RunConfig] = {}
    for title, partition in list(_PARTITIONS.items())[: _FIRST.get(scale)]:
        if (scale, title) == ("cpu", "Dirichlet 0.1"):
            partition = partition | _MORE_CLIENTS
        base = _BASE[scale].replace(weights="count", **partition)  # in the ResNet's mean too
        own = _federations(base, scale)
        if scale == "medium":
            own = {arm: own[arm] for arm in _ORDER[: None if title == "IID" else 6]}
        found |= {f"{title}/{arm}": config for arm, config in own.items()}
    return found


def _federations(base: RunConfig, scale: str) -> dict[str, RunConfig]:
    mixes = _MIXES[scale]
    counts = tuple(sorted({count for mix in mixes for count in mix}))
    ode = base.replace(iterations=mixes[0], eval_iterations=counts)
    twins = {
        f"ResNet-{n}": base.replace(model=f"resnet-{n}", iterations=None) for n in _TWINS[scale]
    }
    found = {"mixed": ode}
    found |= {f"only {n}": ode.replace(iterations=(n,)) for n in counts}
    if scale == "smoke":
        return {name: found[name] for name in ("mixed", "only 1")} | twins
    found |= twins | {"no iterations": base.replace(iterations=(0,))}
    if scale == "medium":
        able = {"method": "exclusive", "able": 1 / 3, "iterations": mixes[0][-1:]}
        found["exclusive"] = ode.replace(**able, eval_iterations=())
        found |= {_named(mix): ode.replace(iterations=mix) for mix in mixes[1:]}
    return found


def _named(mix: tuple[int, ...]) -> str:
    return f"mixed {'+'.join(map(str, mix))}"


if __name__ == "__main__":
    main(__file__, arms, baseline="mixed", scales=tuple(_BASE))
