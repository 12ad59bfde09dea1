"""Bytes a round, and bytes to a target accuracy: ResNet, ODENet and dsODENet.

    python experiments/communication.py --scale cpu

trains the three networks in the same federation, IID, plain and with codecs (8 bits in both
directions; 4 bits up and 8 down; 5 % of the entries in 8 bits up, with error feedback, and 8 down),
and tells, beside the bytes of an upload, how many were sent until the mean accuracy of the tiers
was 40 % (60 % at `--scale medium`, 70 % at `--scale full`), as seen at the rounds that are
evaluated: every second one, on 2,000 test images (every tenth, on all). The ODENets run mixed
iteration counts, so a round of theirs does other work than one of the ResNet; FLOPs stand beside.
It writes `experiments/results/communication_cpu.csv`. `--scale medium` is the preset
`cifar10-medium`; `--scale full` is `cifar10-flexible`, but IID, with networks of 32, 56 and 110
layers, for an accelerator. Neither has been run yet. Bytes of other networks: `jfed models`.
"""

from script import main

from jfed.runs.config import RunConfig, run_preset
from jfed.runs.study import Arms

_BASE: dict[str, RunConfig] = {
    "cpu": run_preset("cifar10-small").replace(eval_every=2, eval_examples=2000),
    "medium": run_preset("cifar10-medium").replace(eval_every=10),
    "full": run_preset("cifar10-flexible").replace(partition="iid"),
    "smoke": run_preset("smoke"),
}
# Layers, and the iteration counts of the ODENets: the deepest is about a block of the ResNet each.
_LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"20": (1, 2, 4)},
    "medium": {"20": (1, 2, 4)},
    "full": {"32": (1, 2, 5), "56": (2, 4, 9), "110": (4, 9, 18)},
    "smoke": {"digits": (1, 2)},
}
_TARGET = {"cpu": 0.4, "medium": 0.6, "full": 0.7, "smoke": 0.05}


# What goes up and what comes down.
_CODECS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {},
    ", int8": {"codec_up": ("int8",), "codec_down": ("int8",)},
    ", int4": {"codec_up": ("int4",), "codec_down": ("int8",)},
    ", topk": {"codec_up": ("topk:0.05", "int8"), "codec_down": ("int8",)},
}


def arms(scale: str) -> Arms:
    """The ResNet and its two ODENets, of each number of layers, plain and with each codec."""
    found: dict[str, RunConfig] = {}
    for layers, counts in _LAYERS[scale].items():
        base = _BASE[scale].replace(iterations=counts)
        networks = {
            f"ResNet-{layers}": base.replace(model=f"resnet-{layers}", iterations=None),
            f"ODENet-{layers}": base.replace(model=f"odenet-{layers}"),
        }
        if scale != "smoke":
            networks[f"dsODENet-{layers}"] = base.replace(model=f"dsodenet-{layers}")
        for name, network in networks.items():
            for codec, settings in list(_CODECS.items())[: 2 if scale == "smoke" else None]:
                found[name + codec] = network.replace(**settings)
    return found


if __name__ == "__main__":
    main(__file__, arms, target=_TARGET, scales=tuple(_BASE))
