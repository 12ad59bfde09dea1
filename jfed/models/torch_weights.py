"""Weights of ResNets from PyTorch, in torchvision's names and the common ones for CIFAR."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jfed.errors import ConfigError, check_type
from jfed.models.blocks import Shape
from jfed.models.model import Moments, Params, Statistics, path_name
from jfed.models.named_parameters import as_float32, chosen
from jfed.models.resnets import ResNetConfig, resnet

_ALIASES = {"linear.": "fc.", ".shortcut.": ".downsample."}  # of CIFAR ResNets -> torchvision
_COUNTER = ".num_batches_tracked"  # which nothing but torch's training uses
_REPLACED = {"entry": "stem/*", "classes": "classifier/*"}  # in what is trained further
_MOMENTS = {"running_mean": "mean", "running_var": "var"}


class TorchWeights(NamedTuple):
    """Weights as jfed's networks take them, NumPy arrays (float32).

    Attributes:
      params: the parameters of `resnet(config)`.
      statistics: of its batch norms, as `measure` gives and `apply` takes them: running mean and
        variance; None for group norm, or where the weights hold none.
    """

    params: Params
    statistics: Statistics | None


def load_torch(config: ResNetConfig, state_dict: Mapping[str, Any]) -> TorchWeights:
    """Reads a ResNet's weights from PyTorch's `state_dict`.

    The names are torchvision's (`layer1.0.conv1.weight`, `layer2.0.downsample.0.weight`,
    `fc.weight`), or those of ResNets for CIFAR, which have `linear` for `fc` and `shortcut` for
    `downsample`; a leading `module.` is left out. torchvision's ResNet-18, 34, 50 and 101 are the
    presets of these names with the entry "7x7-pool" and 1000 classes; in evaluation, with the
    running statistics, the logits are the same:

        config = dataclasses.replace(preset("resnet-18"), entry="7x7-pool", classes=1000)
        params, statistics = load_torch(config, torchvision_model.state_dict())
        logits = build(config).apply(params, images, None, statistics)

    Shortcuts without parameters ("pad") are taken as those of akamaster/pytorch_resnet_cifar10: its
    option A adds half of the new channels before the old ones and half after them, where jfed's
    "pad" adds all after them. Which channel is where tells nothing, so the channels of each stage
    are put in another order, in which jfed's network computes the same function. Weights that were
    trained with zeros at the end alone have the same names and shapes, and must not be read by
    this function: they would load, and compute something else.

    Args:
      config: the network; its `dtype`, `conv` and `gain` may be any.
      state_dict: arrays by name, anything that `np.asarray` takes: CPU tensors of PyTorch too, but
        for bfloat16, which needs `.float()` first. Kernels are `[O, I, k, k]`.

    Raises:
      ConfigError: the first weight that is missing or of another shape, in the order of the
        network, or else the first that is left over, and what network the weights are of, where
        that can be told; weights that are not finite floats; a config with preactivation, learned
        step sizes or blocks left out, which these names do not tell.
    """
    params, moments = entries_of(config, state_dict)
    shapes = jax.eval_shape(resnet(config).init, jax.random.key(0))
    tree = jax.tree_util.tree_map_with_path(lambda path, _: params[path_name(path)], shapes)
    return TorchWeights(tree, None if moments is None else _statistics(moments))


def entries_of(
    config: ResNetConfig, state_dict: Mapping[str, Any], fresh: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Parameters and moments by name, see `load_torch`; moments are called `stem/mean` and such.

    Args:
      config: the network.
      state_dict: see `load_torch`.
      fresh: shell patterns of the names of parameters that are left out, and so need not fit.
        With some, there are no moments.
    """
    check_type("config", config, ResNetConfig)
    for name, value in vars(config).items():
        if name in ("preactivation", "learn_steps", "kept") and value not in (False, None):
            raise ConfigError(f"weights of PyTorch fit no network with {name}, got {value!r}.")
    given = _Given(state_dict)
    running = config.norm == "batch" and not fresh and given.has("running_mean", "running_var")
    entries = list(_entries(config))
    left_out = chosen(
        fresh, [entry.name for entry in entries if not entry.is_moment], title="fresh"
    )
    found: dict[str, np.ndarray] = {}
    for entry in entries:
        if entry.name in left_out or (entry.is_moment and not running):
            given.drop(entry.torch)
        else:
            found[entry.name] = entry.read(given.take(entry, config))
    given.check_empty(config, {entry.torch.rpartition(".")[0] + _COUNTER for entry in entries})
    moments = {entry.name for entry in entries if entry.is_moment}
    params = {name: value for name, value in found.items() if name not in moments}
    measured = {name: value for name, value in found.items() if name in moments}
    return params, measured if running else None


class _Entry(NamedTuple):
    """A weight: its names, its shape in torch, and the channels in jfed's order (out, in)."""

    torch: str
    name: str
    shape: tuple[int, ...]
    channels: tuple[np.ndarray, ...]

    @property
    def is_moment(self) -> bool:
        return self.torch.rpartition(".")[2] in _MOMENTS

    def read(self, value: np.ndarray) -> np.ndarray:
        """The weight as jfed has it: channels in its order, kernels `[k, k, I, O]`."""
        for axis, order in enumerate(self.channels):
            value = np.take(value, order, axis)
        if value.ndim > 1:
            value = np.moveaxis(value, (0, 1), (-1, -2))
        return np.ascontiguousarray(value)


class _Layer(NamedTuple):
    """A convolution and its norm: names in torch, paths in jfed, and channels in jfed's order."""

    conv: str
    norm: str
    path: str
    moments: str
    size: int
    inputs: np.ndarray
    outputs: np.ndarray


def _entries(config: ResNetConfig) -> Iterator[_Entry]:
    """Every weight of the network, in its order."""
    channels = np.arange(0)
    for conv, norm, path, moments, size, inputs, channels in _layers(config):
        own, shape = (channels.shape, (channels,)), (len(channels), len(inputs), size, size)
        yield _Entry(f"{conv}.weight", f"{path}/conv/kernel", shape, (channels, inputs))
        yield _Entry(f"{norm}.weight", f"{path}/norm/scale", *own)
        yield _Entry(f"{norm}.bias", f"{path}/norm/offset", *own)
        for name, moment in _MOMENTS.items():
            yield _Entry(f"{norm}.{name}", f"{moments}/{moment}", *own)
    linear, classes = "classifier/linear", np.arange(config.classes)
    yield _Entry(
        "fc.weight", f"{linear}/kernel", (len(classes), len(channels)), (classes, channels)
    )
    yield _Entry("fc.bias", f"{linear}/bias", classes.shape, (classes,))


def _layers(config: ResNetConfig) -> Iterator[_Layer]:
    stream = np.arange(config.stem or config.widths[0])
    size, images = 7 if config.entry.startswith("7x7") else 3, np.arange(config.channels)
    yield _Layer("conv1", "bn1", "stem", "stem", size, images, stream)
    for (k, i), shape in config.shapes().items():
        theirs, path, used = f"layer{k + 1}.{i}", f"stages/{k}/block{i}", f"stage{k}_block{i}"
        before = stream
        if shape.changes:
            stream = _order(config.shortcut, shape, before)
        plan = shape.convolutions(config.bottleneck)
        for j, (inputs, outputs, size, _) in enumerate(plan):
            yield _Layer(
                f"{theirs}.conv{j + 1}",
                f"{theirs}.bn{j + 1}",
                f"{path}/layers/{j}",
                f"{used}/layer{j}",
                size,
                before if j == 0 else np.arange(inputs),
                stream if j == len(plan) - 1 else np.arange(outputs),
            )
        if shape.changes and config.shortcut == "projection":
            names = f"{theirs}.downsample.0", f"{theirs}.downsample.1"
            yield _Layer(*names, f"{path}/projection", f"{used}/projection", 1, before, stream)


def _order(shortcut: str, shape: Shape, before: np.ndarray) -> np.ndarray:
    """Which channel in torch each channel of a stage is, given those of the stage before.

    Where zeros pad, jfed's first channels are those of the stage before, torch's are in the middle.
    """
    every = np.arange(shape.outputs)
    if shortcut == "projection":
        return every
    middle = before + (shape.outputs - shape.inputs) // 2
    return np.concatenate([middle, np.setdiff1d(every, middle)])


class _Given:
    """The weights that were given, by torchvision's names, until they are taken."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        check_type("state_dict", state_dict, Mapping)
        if "state_dict" in state_dict:
            raise ConfigError("these are not weights by name; give their entry 'state_dict'.")
        names = [check_type("the name of a weight", name, str) for name in state_dict]
        prefix = "module." if names and all(n.startswith("module.") for n in names) else ""
        self._names: dict[str, str] = {}  # as they were given
        for name in names:
            own = name.removeprefix(prefix)
            for alias, theirs in _ALIASES.items():
                own = own.replace(alias, theirs)
            if own in self._names:
                raise ConfigError(f"weights {self._names[own]!r} and {name!r} are of one entry.")
            self._names[own] = name
        self._shapes = {own: _shape(state_dict[name]) for own, name in self._names.items()}
        self._left = {own: state_dict[name] for own, name in self._names.items()}

    def has(self, *endings: str) -> bool:
        """Whether a name ends with one of these."""
        return any(name.rpartition(".")[2] in endings for name in self._names)

    def drop(self, name: str) -> None:
        self._left.pop(name, None)

    def take(self, entry: _Entry, config: ResNetConfig) -> np.ndarray:
        """The weight as it was given; ConfigError if there is none, or of another shape."""
        if entry.torch not in self._left:
            raise ConfigError(
                f"the weights have no {entry.torch!r}, which the network needs as {entry.name!r} "
                f"of shape {entry.shape}.{self._hint(config)}"
            )
        name, shape = self._names[entry.torch], self._shapes[entry.torch]
        if shape != entry.shape:
            raise ConfigError(
                f"weights {name!r} are of shape {shape}, the network's {entry.name!r} is of "
                f"{entry.shape} in PyTorch.{self._hint(config)}"
            )
        return as_float32(name, self._left.pop(entry.torch))

    def check_empty(self, config: ResNetConfig, ignored: set[str]) -> None:
        """Raises ConfigError if there is a weight that the network has no place for."""
        for name in self._left:
            if name not in ignored:
                raise ConfigError(
                    f"the network has no place for weights {self._names[name]!r} of shape "
                    f"{self._shapes[name]}.{self._hint(config)}"
                )

    def _hint(self, config: ResNetConfig) -> str:
        """In what the network that the weights are of differs from the config, as a sentence."""
        here = vars(config) | {"stem": config.stem or config.widths[0]}
        if config.entry.startswith("3x3"):
            here["entry"] = "3x3"  # whether it pools does not show
        if not any(shape.changes for shape in config.shapes().values()):
            del here["shortcut"]
        found = {k: v for k, v in self._network().items() if k in here and here[k] != v}
        told = ", ".join(f"{name}={value!r} (not {here[name]!r})" for name, value in found.items())
        hint = f" They are of a network with {told}." if told else ""
        if found and set(found) <= set(_REPLACED):
            patterns = " ".join(repr(_REPLACED[name]) for name in found)
            hint += f" Or let these begin anew where they start a run: --init-fresh {patterns}."
        return hint

    def _network(self) -> dict[str, Any]:
        """Fields of `ResNetConfig` as the weights' names and shapes tell them; those they do."""
        blocks, widths = _stages(self._shapes)
        found: dict[str, Any] = {}
        if blocks:
            found["bottleneck"] = any(name.endswith(".conv3.weight") for name in self._shapes)
            projects = any(".downsample." in name for name in self._shapes)
            found["shortcut"] = "projection" if projects else "pad"
            found |= {"blocks": blocks, "widths": widths}
        stem, linear = self._shapes.get("conv1.weight", ()), self._shapes.get("fc.weight", ())
        if len(stem) == 4:
            found |= {"stem": stem[0], "channels": stem[1]}
            found["entry"] = {7: "7x7-pool", 3: "3x3"}.get(stem[2], f"of {stem[2]}x{stem[2]}")
        if len(linear) == 2:
            found["classes"] = linear[0]
        return found


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an array of any library, or of what NumPy makes one of; else a number's."""
    try:
        return tuple(np.shape(value))
    except (TypeError, ValueError):
        return ()


def _stages(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and channels of each stage, as names such as `layer1.0.conv2.weight` tell them."""
    stages: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        stage, block, layer, *_ = [*name.split("."), "", ""]
        if stage.startswith("layer") and layer.startswith("conv") and shape:
            stages.setdefault(stage, {})[block] = shape[0]  # in the end the last convolution's
    ordered = [stages[stage] for stage in sorted(stages)]
    return tuple(map(len, ordered)), tuple(next(reversed(s.values())) for s in ordered)


def _statistics(moments: Mapping[str, np.ndarray]) -> Statistics:
    """Moments by name as networks take them: nested dictionaries of `Moments`."""
    found: dict[str, Any] = {}
    for name in moments:
        place, _, moment = name.rpartition("/")
        if moment == "mean":
            *outer, last = place.split("/")
            inner = found
            for key in outer:
                inner = inner.setdefault(key, {})
            pair: list[Any] = [moments[name], moments[f"{place}/var"]]
            inner[last] = Moments(*pair)
    return found
