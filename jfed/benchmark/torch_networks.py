"""The same networks in PyTorch, as its users write them: `nn.Module`s in NCHW.

`load` and `unload` translate weights: a kernel `[kh, kw, I, O]` is a weight `[O, I, kh, kw]`, a
matrix `[I, O]` is `[O, I]`, a norm's scale and offset are weight and bias.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from jfed.benchmark.tasks import CLASSES, Task
from jfed.errors import ConfigError
from jfed.models.ode_nets import ODENetConfig

_NAMES = {"kernel": "weight", "scale": "weight", "offset": "bias", "bias": "bias"}


def build(task: Task) -> nn.Module:
    """The task's network; an ODENet's is called with the iterations beside the images."""
    return CNN(task.size) if task.network is None else ODENet(task.network)


class CNN(nn.Module):
    """`jfed.models.cnn`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        pooled = (size - 4) // 2
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3)
        self.dense1 = nn.Linear(64 * pooled * pooled, 128)
        self.dense2 = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        x = torch.flatten(functional.max_pool2d(x, 2), 1)
        return self.dense2(functional.relu(self.dense1(x)))


class Conv(nn.Conv2d):
    """A convolution without bias, padded by half its size."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, padding=size // 2, bias=False)


class TimeConv(nn.Module):
    """A 3x3 convolution with the time as its first input channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(1 + channels, channels)

    def forward(self, t: float, x: Tensor) -> Tensor:
        return self.conv(with_time(t, x))


class SeparableTimeConv(nn.Module):
    """The same as a depthwise and a pointwise convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inputs = 1 + channels
        self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, channels, 1, bias=False)

    def forward(self, t: float, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(with_time(t, x)))


def with_time(t: float, x: Tensor) -> Tensor:
    """X with a first channel that is t everywhere."""
    return torch.cat([torch.full_like(x[:, :1], t), x], 1)


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm that trains on each batch's statistics and keeps none."""
    return nn.BatchNorm2d(channels, eps=1e-5, track_running_stats=False)


class ODEFunction(nn.Module):
    """f(t, z): norm, relu, convolution, twice."""

    def __init__(self, channels: int, separable: bool) -> None:
        super().__init__()
        kind = SeparableTimeConv if separable else TimeConv
        self.conv1, self.conv2 = kind(channels), kind(channels)
        self.norm1, self.norm2 = norm(channels), norm(channels)

    def forward(self, t: float, z: Tensor) -> Tensor:
        z = self.conv1(t, functional.relu(self.norm1(z)))
        return self.conv2(t, functional.relu(self.norm2(z)))


class Down(nn.Module):
    """A residual block that halves height and width; its shortcut pads new channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = Conv(inputs, outputs, stride=2), norm(outputs)
        self.conv2, self.norm2 = Conv(outputs, outputs), norm(outputs)
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))
        return functional.relu(shortcut + self.norm2(self.conv2(y)))


class ODENet(nn.Module):
    """`jfed.models.odenet` with Euler's method on [0, 1]; called as `net(images, iterations)`."""

    def __init__(self, config: ODENetConfig) -> None:
        super().__init__()
        given = (config.solver, config.horizon, config.function, config.shortcut, config.norm)
        known = ("Euler", "fixed", "preactivation", "pad", "batch")
        if given != known:
            raise ConfigError(f"the PyTorch twin is an ODENet of {known}, got {given}.")
        widths = config.widths
        self.stem, self.stem_norm = Conv(config.channels, widths[0]), norm(widths[0])
        self.functions = nn.ModuleList([ODEFunction(width, config.separable) for width in widths])
        self.downs = nn.ModuleList([Down(i, o) for i, o in itertools.pairwise(widths)])
        self.norm = norm(widths[-1])
        self.classifier = nn.Linear(widths[-1], config.classes)

    def forward(self, x: Tensor, iterations: int) -> Tensor:
        z = functional.relu(self.stem_norm(self.stem(x)))
        for k, function in enumerate(self.functions):
            if k > 0:
                z = self.downs[k - 1](z)
            for step in range(iterations):
                z = z + function(step / iterations, z) / iterations
        return self.classifier(functional.relu(self.norm(z)).mean((2, 3)))


def torch_name(name: str) -> str:
    """The twin's name of one of jfed's weights."""
    *path, leaf = name.split(".")
    where = ".".join(path)
    where = where.replace("stem.conv", "stem").replace("stem.norm", "stem_norm")
    where = where.replace("classifier.linear", "classifier")
    for layer in (0, 1):
        where = where.replace(f"layers.{layer}.conv", f"conv{layer + 1}")
        where = where.replace(f"layers.{layer}.norm", f"norm{layer + 1}")
    if where.startswith("functions") and ".conv" in where and leaf == "kernel":
        return f"{where}.conv.weight"
    if leaf in ("depthwise", "pointwise"):
        return f"{where}.{leaf}.weight"
    return f"{where}.{_NAMES[leaf]}"


def to_torch(name: str, value: np.ndarray) -> np.ndarray:
    """One of jfed's weights in the twin's layout."""
    if name == "dense1.kernel":  # its rows are pixels of 64 channels, here channels of pixels
        side = int(np.sqrt(len(value) // 64))
        value = value.reshape(side, side, 64, -1).transpose(2, 0, 1, 3).reshape(len(value), -1)
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def to_jfed(name: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    if name == "dense1.kernel":
        side = int(np.sqrt(len(value) // 64))
        value = value.reshape(64, side, side, -1).transpose(1, 2, 0, 3).reshape(len(value), -1)
    return value


def load(module: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copies jfed's weights, by name, into the twin; all of them, and no others."""
    module.load_state_dict(
        {torch_name(n): torch.tensor(to_torch(n, v).copy()) for n, v in weights.items()}
    )


def unload(tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, np.ndarray]:
    """The twin's tensors (weights, or their gradients) in jfed's names and layouts."""
    return {n: to_jfed(n, tensors[torch_name(n)].detach().cpu().numpy()) for n in names}
