"""Neural ODE image classifiers: ODENet (rODENet, arXiv 2012.15465) and dsODENet (arXiv 2107.12824).

A stage of a ResNet is z <- z + f_k(z) for k = 1..C, each f_k with weights of its own. An ODE block
keeps one f and integrates dz/dt = f(t, z) in C solver steps, so its size does not depend on C.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jfed.errors import ConfigError, check_integer, check_type, one_of
from jfed.models.blocks import SHORTCUTS, ResidualBlock, Shape
from jfed.models.convolutions.convolution import FORMS
from jfed.models.integration import (
    HORIZONS,
    Count,
    VectorField,
    check_solver,
    integrate,
    step_size,
)
from jfed.models.layers import (
    DTYPES,
    Classifier,
    ConvNorm,
    SeparableTimeConv,
    Style,
    TimeConv,
    check_gain,
    check_widths,
    network,
)
from jfed.models.model import Model
from jfed.models.norms import KEEP_CONVOLUTIONS, NORMS, Shares

Iterations = int | tuple[int, ...]
FUNCTIONS = ("preactivation", "postactivation")


@dataclasses.dataclass(frozen=True)
class ODENetConfig:
    """An ODENet.

    Attributes:
      widths: channels of each stage. A stage is an ODE block; stages are joined by residual blocks
        that halve height and width.
      iterations: solver steps of each stage's ODE block, or one number for all. 0 leaves the ODE
        blocks out, the control that shows what they contribute.
      solver: by diffrax's name: "Euler", "Heun", "Midpoint", "Ralston" or "Bosh3".
      horizon: "fixed" integrates over [0, 1] with step 1/C: more iterations approximate the same
        flow better. "proportional" integrates over [0, C] with step 1: with Euler, a ResNet with
        tied weights and C blocks.
      function: f is norm, relu, convolution, twice ("preactivation"), or convolution, norm, relu,
        twice ("postactivation").
      separable: f's convolutions are depthwise-separable (dsODENet).
      shortcut: of the residual blocks between stages, "projection" or "pad".
      norm: "batch" or "group".
      unroll: trace every solver step, which mostly runs faster, but makes a program of its own of
        each iteration count; or loop over them: about half the memory, and one program for all.
      dtype: of what layers give each other, z included, and so of what convolutions multiply:
        "float32" or "bfloat16". Parameters, the sums of norms and of solver steps, and the
        classifier stay float32.
      conv: the convolutions' form: "auto" (by a measured table), "xla", "transposed", "im2col",
        "winograd2" or "winograd4", see `jfed.models.convolutions.convolution.conv`.
      learn_steps: each ODE block learns the size h_k of each of its steps, which starts at the
        solver's fixed one (see `horizon`); t is then the sum of the steps before.
      gain: what norms multiply their input by, see `jfed.models.layers.Norm`.
      classes: how many logits.
      channels: of the images.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    iterations: Iterations = 4
    solver: str = "Euler"
    horizon: str = "fixed"
    function: str = "preactivation"
    separable: bool = False
    shortcut: str = "pad"
    norm: str = "batch"
    unroll: bool = False
    dtype: str = "float32"
    conv: str = "auto"
    learn_steps: bool = False
    gain: float = 1.0
    classes: int = 10
    channels: int = 3

    def __post_init__(self) -> None:
        one_of("shortcut", self.shortcut, SHORTCUTS)
        object.__setattr__(self, "widths", check_widths(self.widths, self.shortcut))
        check_integer("classes", self.classes, least=2)
        check_integer("channels", self.channels, least=1)
        check_solver(self.solver)
        one_of("horizon", self.horizon, HORIZONS)
        one_of("function", self.function, FUNCTIONS)
        one_of("norm", self.norm, NORMS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("convolution form", self.conv, FORMS)
        check_gain(self.gain)
        for name in ("separable", "unroll", "learn_steps"):
            check_type(name, getattr(self, name), bool)
        per_stage(self.iterations, len(self.widths))


def per_stage(iterations: Iterations, stages: int) -> tuple[int, ...]:
    """Iterations of each stage; raises ConfigError if they do not fit `stages` or are negative."""
    is_one = isinstance(iterations, str) or not isinstance(iterations, Sequence)
    counts: Any = (iterations,) * stages if is_one else iterations
    if len(counts) != stages:
        raise ConfigError(
            f"iterations {iterations!r} do not fit a network of {stages} stages: give one number "
            "for all, or one for each."
        )
    return tuple(check_integer("iterations", count, least=0) for count in counts)


def is_norm(path: tuple[Any, ...]) -> bool:
    """Whether a parameter, by its path in the pytree, is a norm's scale or offset."""
    return any(str(getattr(key, "key", "")).startswith("norm") for key in path)


def is_step(path: tuple[Any, ...]) -> bool:
    """Whether a parameter, by its path in the pytree, is a learned step size."""
    return any(getattr(key, "key", None) in ("step", "steps") for key in path)


class Depth(NamedTuple):
    """How far the ODE blocks of a network run.

    Attributes:
      steps: of each stage, ints (static), or int32 scalars (data) up to the config's `iterations`.
      learned: whether learned step sizes are used, or the solver's fixed ones: a bool, or data.
      largest: under `vmap` over different steps, of each stage, see `integrate`.
      least: the smallest steps that are served where they are data, by default 0.
    """

    steps: tuple[Count, ...]
    learned: bool | Bool[Array, ""] = True
    largest: tuple[Int[Array, ""], ...] | None = None
    least: tuple[int, ...] | None = None


class ODEFunction(nnx.Module):
    """f(t, z) of an ODE block: two 3x3 convolutions that see t, two norms.

    What depends on neither t nor z is `prepare`d once for all steps.
    """

    def __init__(self, channels: int, config: ODENetConfig, style: Style, rngs: nnx.Rngs) -> None:
        kind = SeparableTimeConv if config.separable else TimeConv
        self.conv1, self.conv2 = kind(channels, style, rngs), kind(channels, style, rngs)
        self.norm1, self.norm2 = style.make_norm(channels), style.make_norm(channels)
        self.norm_first = config.function == "preactivation"

    def prepare(self, size: tuple[int, ...]) -> tuple[Any, Any]:
        """Of each convolution, for images of `size` (H, W)."""
        return self.conv1.prepare(size), self.conv2.prepare(size)

    def __call__(
        self,
        t: Any,
        z: Float[Array, "B H W C"],
        shares: Shares,
        given: Any,
        prepared: tuple[Any, Any],
    ) -> tuple[Float[Array, "B H W C"], Any]:
        used = {}
        x = z
        for name, conv, norm, own in (
            ("norm1", self.conv1, self.norm1, prepared[0]),
            ("norm2", self.conv2, self.norm2, prepared[1]),
        ):
            if not self.norm_first:
                x = conv(t, x, own)
            x, used[name] = norm(x, shares, given and given[name])
            x = nnx.relu(x)
            if self.norm_first:
                x = conv(t, x, own)
        return x, used


class ODENet(nnx.Module):
    """Stem, ODE blocks joined by down-sampling residual blocks, classifier."""

    def __init__(self, config: ODENetConfig, rngs: nnx.Rngs) -> None:
        style = Style(config.norm, config.dtype, config.conv, config.gain)
        widths = config.widths
        self.config = config
        self.stem = ConvNorm(config.channels, widths[0], style, rngs)
        self.functions = nnx.List([ODEFunction(width, config, style, rngs) for width in widths])
        self.downs = nnx.List(
            [
                ResidualBlock(Shape(i, o, 2), style, rngs, shortcut=config.shortcut)
                for i, o in itertools.pairwise(widths)
            ]
        )
        # The state of a flow whose f ends in a convolution is not normalised by anything else.
        self.norm = style.make_norm(widths[-1]) if config.function == "preactivation" else None
        self.classifier = Classifier(widths[-1], config.classes, rngs)
        counts = per_stage(config.iterations, len(widths))
        sizes = [jnp.full((c,), step_size(config.horizon, max(c, 1)), jnp.float32) for c in counts]
        self.steps = nnx.List([nnx.Param(h) for h in sizes]) if config.learn_steps else None

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        shares: Shares,
        given: Any,
        *,
        depth: Depth,
        record: bool,
    ) -> tuple[Float[Array, "B classes"], Any]:
        used: dict[str, Any] = {}
        z, used["stem"] = self.stem(x, shares, given and given["stem"])
        z = nnx.relu(z)
        config = self.config
        most = per_stage(config.iterations, len(config.widths))
        for k, function in enumerate(self.functions):
            if k > 0:
                name = f"down{k}"
                z, used[name] = self.downs[k - 1](z, shares, given and given[name])
            name = f"ode{k}"
            with jax.named_scope(name):
                z, used[name] = integrate(
                    self._field(function, shares, z.shape[1:3]),
                    z,
                    steps=depth.steps[k],
                    least=0 if depth.least is None else depth.least[k],
                    most=most[k],
                    horizon=config.horizon,
                    solver=config.solver,
                    unroll=config.unroll,
                    moments=given and given[name],
                    sizes=None if self.steps is None else self._sizes(k, depth),
                    largest=None if depth.largest is None else depth.largest[k],
                    record=record,
                )
        if self.norm is not None:
            z, used["norm"] = self.norm(z, shares, given and given["norm"])
            z = nnx.relu(z)
        return self.classifier(z), used

    def _sizes(self, stage: int, depth: Depth) -> Float[Array, " most"] | None:
        """The step sizes of a stage: as learned, or the solver's."""
        assert self.steps is not None
        learned, steps = self.steps[stage][...], depth.steps[stage]
        if depth.learned is True or (isinstance(steps, int) and not steps):
            return learned
        fixed = jnp.full_like(learned, step_size(self.config.horizon, steps))
        return fixed if depth.learned is False else jnp.where(depth.learned, learned, fixed)

    def _field(self, function: ODEFunction, shares: Shares, size: tuple[int, ...]) -> VectorField:
        """A block's f for `integrate`.

        The gradient of a scan stacks what it needs of every evaluation of f, which costs memory,
        and time to copy; without what `KEEP_CONVOLUTIONS` drops that is half as much or less.
        """
        prepared = function.prepare(size)

        def field(t: Any, z: Array, given: Any) -> tuple[Array, Any]:
            return function(t, z, shares, given, prepared)

        if self.config.unroll:
            return field
        return jax.checkpoint(field, policy=KEEP_CONVOLUTIONS, prevent_cse=False)


def odenet(config: ODENetConfig, depth: Depth | None = None) -> Model:
    """The ODENet as pure functions.

    Args:
      config: of the network.
      depth: how far it runs, by default `config.iterations`. As data (traced) it makes one program
        of all counts up to `config.iterations`.
    """
    at = Depth(per_stage(config.iterations, len(config.widths))) if depth is None else depth

    def call(module: ODENet, *given: Any, record: bool) -> Any:
        return module(*given, depth=at, record=record)

    return network(lambda rngs: ODENet(config, rngs), config.norm, call)
