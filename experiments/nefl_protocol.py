"""NeFL's protocol but for its test of batch norms and its one learning rate: ODENets and NeFL-D.

    python experiments/nefl_protocol.py --scale full

is the protocol of arXiv 2308.07761 and its authors' code: CIFAR-10, IID, 100 clients, 10 in a
round, 500 rounds of 5 local epochs, batches of 32, SGD with rate 0.1 without momentum or weight
decay, a tenth of it after half and after three quarters of the rounds, crop and flip; ResNet-110
with projection shortcuts and the authors' five submodels, and in each round a client draws a tier
within two of its own. Where it is not NeFL's to the letter: batch norms are tested with statistics
measured on 2,000 training images, not with the clients' running averages; every arm has the best of
three learning rates, each tried once and chosen by test accuracy. NeFL reports 85.96 % for the
worst tier of NeFL-D on ResNet-110 (1.73 M parameters) and 86.66 % for the mean of the tiers. "ode"
has as many parameters as NeFL-D's full model; its clients send all of them and compute 3 to 4 times
as much as NeFL-D's in the same tier. "ode, fewer FLOPs" computes no more than NeFL-D in any tier,
with about a quarter of the parameters (at `--scale cpu` 37 %, and no iterations in its smallest
tier).
For an accelerator; not run yet. `--scale cpu` has the same federation with 12 rounds on a tenth of
the images at 16x16 pixels, and ResNet-32, of which the authors have no submodels: the first blocks
of each stage. It compares the methods with each other, not with the published figures, and writes
`experiments/results/nefl_protocol_cpu.csv`.
"""

from typing import Any

from script import main

from jfed.runs.config import RunConfig, run_preset
from jfed.runs.study import Arms

_FULL = RunConfig().replace(
    data="cifar10",
    partition="iid",
    clients=100,
    cohort=10,
    draw_tiers=2,
    rounds=500,
    epochs=5,
    batch_size=32,
    learning_rate=0.1,
    schedule="step",
    pad=4,
    flip=True,
    eval_every=25,
)
_BASE: dict[str, RunConfig] = {
    "cpu": _FULL.replace(image_size=16, train_examples=5000, rounds=12, pad=2, eval_every=0),
    "full": _FULL,
    "smoke": run_preset("smoke").replace(clients=10, draw_tiers=2),
}
_RATES = (0.03, 0.1, 0.3)
_RATIOS = {
    "cpu": (0.2, 0.4, 0.6, 0.8, 1.0),
    "full": (0.2, 0.4, 0.6, 0.8, 1.0),
    "smoke": (0.5, 1.0),
}
_RESNET = {"cpu": "resnet-32", "full": "resnet-110", "smoke": "resnet-digits"}
_ODENET: dict[str, dict[str, Any]] = {
    "cpu": {"model": "odenet-20", "widths": (24, 48, 104), "iterations": (1, 2, 3, 4, 5)},
    "full": {"model": "odenet-20", "widths": (48, 96, 208), "iterations": (1, 2, 3, 4, 5)},
    "smoke": {"model": "odenet-digits", "iterations": (1, 2)},
}
# An ODENet none of whose tiers computes more than NeFL-D's.
_CHEAP: dict[str, dict[str, Any]] = {
    "cpu": {"model": "odenet-20", "iterations": (0, 1, 2, 3, 4)},
    "full": {"model": "odenet-20", "widths": (24, 48, 96), "iterations": (1, 2, 4, 5, 7)},
    "smoke": {"model": "odenet-digits", "iterations": (0, 1)},
}


def arms(scale: str) -> Arms:
    """NeFL-D, and ODENets that share every weight."""
    base = _BASE[scale]
    nefl: dict[str, Any] = {"model": _RESNET[scale], "shortcut": "projection", "method": "nefl-d"}
    nefl["ratios"] = _RATIOS[scale]
    return {
        "NeFL-D": base.replace(**nefl, iterations=None),
        "ode": base.replace(**_ODENET[scale]),
        "ode, fewer FLOPs": base.replace(**_CHEAP[scale]),
    }


if __name__ == "__main__":
    main(__file__, arms, baseline="NeFL-D", rates=_RATES)
