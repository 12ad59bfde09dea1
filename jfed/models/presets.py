"""Model presets by name, and the ResNet twin that each ODENet is compared with.

ODENet-N runs as many iterations per stage as ResNet-N has residual blocks there; where a stage
begins with a down-sampling block, that block counts as one of them.
"""

import dataclasses
from typing import Any

from jfed.errors import ConfigError, one_of
from jfed.models.conv_nets import ConvNetConfig, conv_net
from jfed.models.model import Model
from jfed.models.ode_nets import Iterations, ODENetConfig, odenet, per_stage
from jfed.models.resnets import ResNetConfig, resnet

ModelConfig = ODENetConfig | ResNetConfig | ConvNetConfig

# Blocks of each stage and whether they are bottlenecks (He et al. 2016, tables 1 and 6).
_IMAGENET_STYLE: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}
_CIFAR_STYLE = (20, 32, 44, 56, 110)
# Doubling the width at every stage puts nine tenths of an ODENet's bytes into its last stage. These
# widths keep ResNet's first stage and grow gently instead; the choice is jfed's.
_ODENET_WIDTHS = (64, 96, 128, 128)


def _presets() -> dict[str, ModelConfig]:
    presets: dict[str, ModelConfig] = {
        "resnet-digits": ResNetConfig(widths=(16, 32), blocks=(4, 5)),
        "odenet-digits": ODENetConfig(widths=(16, 32), iterations=4),
        "heterofl-conv": ConvNetConfig(),
    }
    for n, (blocks, bottleneck) in _IMAGENET_STYLE.items():
        widths = (64, 128, 256, 512)
        resnet_n = ResNetConfig(
            widths=tuple(4 * w for w in widths) if bottleneck else widths,
            blocks=blocks,
            bottleneck=bottleneck,
            shortcut="projection",
            stem=64,
        )
        presets[f"resnet-{n}"] = resnet_n
        presets[f"preresnet-{n}"] = dataclasses.replace(resnet_n, preactivation=True)
        presets[f"odenet-{n}"] = ODENetConfig(
            widths=_ODENET_WIDTHS, iterations=_ode_steps(blocks), shortcut="projection"
        )
    for n in _CIFAR_STYLE:
        blocks = ((n - 2) // 6,) * 3
        presets[f"resnet-{n}"] = ResNetConfig(widths=(16, 32, 64), blocks=blocks)
        presets[f"preresnet-{n}"] = ResNetConfig(
            blocks=blocks, shortcut="projection", preactivation=True
        )
        presets[f"odenet-{n}"] = ODENetConfig(widths=(16, 32, 64), iterations=_ode_steps(blocks))
    for name, config in list(presets.items()):
        if isinstance(config, ODENetConfig):
            presets[f"ds{name}"] = dataclasses.replace(config, separable=True)
    return presets


def _ode_steps(blocks: tuple[int, ...]) -> tuple[int, ...]:
    return (blocks[0], *(b - 1 for b in blocks[1:]))


PRESETS: dict[str, ModelConfig] = _presets()


def preset(name: str) -> ModelConfig:
    """The config of a preset; ConfigError with the close matches for an unknown name."""
    return PRESETS[one_of("model", name, tuple(PRESETS))]


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """A preset by name, and what is changed in it.

    What is changed is called, and means, what it does in `ODENetConfig`, where it is documented;
    `widths`, `norm`, `dtype` and `conv` are of every network, `shortcut` of a ResNet too. None
    leaves the preset's own.

    Attributes:
      model: a preset, see `jfed models`.
      entry: of a ResNet: its first convolution, "3x3", or with a max-pooling after it "3x3-pool" or
        "7x7-pool", see `ResNetConfig`.
    """

    model: str = "odenet-digits"
    widths: tuple[int, ...] | None = None
    shortcut: str | None = None
    entry: str | None = None
    solver: str | None = None
    horizon: str | None = None
    function: str | None = None
    learn_steps: bool = False
    norm: str | None = None
    unroll: bool = False
    dtype: str | None = None
    conv: str | None = None

    def __post_init__(self) -> None:
        self.make(classes=10, channels=3)  # checks every field

    def make(self, classes: int, channels: int) -> ModelConfig:
        """The network for images of so many classes and channels.

        Raises:
          ConfigError: what is changed cannot work, or is not of such a network.
        """
        base, changes = preset(self.model), dict(vars(self))
        changes = {k: v for k, v in changes.items() if k != "model" and v is not None}
        own = {field.name for field in dataclasses.fields(base)}
        if not isinstance(base, ODENetConfig):
            del changes["unroll"]  # which makes no other network
            own -= {"learn_steps"}  # which NeFL switches on
            if not self.learn_steps:
                del changes["learn_steps"]
        for name in changes:
            if name not in own:
                kind = type(base).__name__.removesuffix("Config")
                raise ConfigError(
                    f"{kind} has no {name}, got {name} {changes[name]!r}; leave it out."
                )
        return dataclasses.replace(base, classes=classes, channels=channels, **changes)


def twin(
    name: str, config: ODENetConfig, iterations: Iterations | None = None
) -> tuple[str, ResNetConfig]:
    """The ResNet that an ODENet replaces, with its name.

    Args:
      name: of the preset that the ODENet was made from.
      config: of the ODENet. If its widths are the preset's, the twin is the ResNet preset of the
        same N, else the ResNet of the same widths with a block for each iteration.
      iterations: the deepest that clients run; those of `config` by default.
    """
    same: dict[str, Any] = {"classes": config.classes, "channels": config.channels}
    same |= {"norm": config.norm, "dtype": config.dtype, "conv": config.conv}
    if preset(name).widths == config.widths:
        twin_name = name.removeprefix("ds").replace("odenet", "resnet")
        return twin_name, dataclasses.replace(PRESETS[twin_name], **same)  # type: ignore[return-value]
    steps = per_stage(config.iterations if iterations is None else iterations, len(config.widths))
    blocks = (max(steps[0], 1), *(s + 1 for s in steps[1:]))
    return "ResNet of the same widths", ResNetConfig(
        widths=config.widths, blocks=blocks, shortcut=config.shortcut, **same
    )


def build(config: ModelConfig) -> Model:
    """The model that a config describes."""
    match config:
        case ODENetConfig():
            return odenet(config)
        case ResNetConfig():
            return resnet(config)
    return conv_net(config)
