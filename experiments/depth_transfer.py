"""One trained model at iteration counts that no client ran, and with another solver.

    python experiments/depth_transfer.py --scale cpu

trains mixed counts and the deepest alone, on both horizons, with Euler, and tests each model at
counts from 0 to 8 with Euler and Midpoint, batch-norm statistics measured anew for each. The curves
of accuracy against iterations and FLOPs go to `runs/depth_transfer/cpu/`. It writes
`experiments/results/depth_transfer_cpu.csv`. Expected there, over 3 seeds: on the fixed horizon the
mixed model has 45.7 to 46.1 % from 1 to 8 iterations under both solvers, one trained at 4 alone
44.1 % at 1; on the proportional one 36.0 to 43.5 % and 29.5 %. `--scale full` is the preset
`cifar10-flexible`, but IID, for an accelerator; not run yet.
"""

from script import main

from jfed.runs.config import run_preset
from jfed.runs.study import Arms

_BASE = {
    "cpu": run_preset("cifar10-small"),
    "full": run_preset("cifar10-flexible").replace(partition="iid"),
    "smoke": run_preset("smoke"),
}
_TESTED = {"cpu": (0, 1, 2, 3, 4, 8), "full": (0, 1, 2, 3, 4, 6, 8, 12, 16), "smoke": (0, 3)}


def arms(scale: str) -> Arms:
    """Mixed counts and the deepest alone, on both horizons."""
    mixed = _BASE[scale].replace(eval_iterations=_TESTED[scale], eval_solvers=("Midpoint",))
    counts = mixed.tiers.iterations or ()
    found = {"mixed": mixed}
    if scale != "smoke":
        found[f"only {counts[-1]}"] = mixed.replace(iterations=counts[-1:])
    return {
        f"{horizon} horizon/{name}": config.replace(horizon=horizon)
        for horizon in ("fixed", "proportional")[: 1 if scale == "smoke" else None]
        for name, config in found.items()
    }


if __name__ == "__main__":
    main(__file__, arms, baseline="mixed")
