"""Times every form of `jfed.models.convolutions.forms` where training uses it: inside a `lax.scan`.

    python experiments/convolution_forms.py --scale cpu

One step computes a convolution and both its gradients and updates the images and the kernel in the
scan's carry. Rates are effective GFLOP/s, 2 * B * Ho * Wo * kh * kw * I * O * 3 / time: a form that
multiplies less (Winograd) may exceed the machine's peak. `vmap` is the same scan vmapped over four
clients' kernels; "auto, devices" is the form that `auto` picks on a device for each core at once,
as `jfed run` trains. Rows of kind "time" have the time as one more input channel: "concat"
concatenates it, "TimeConv" is jfed's. PyTorch's convolution is timed beside them where it is
installed; its threads suffer from other load on the machine far more than XLA's, so compare the two
on an idle one. Runs of one row are interleaved and their medians shown. It writes
`experiments/results/convolution_forms_cpu.csv`. Expected there, "auto, devices" against PyTorch's
better layout: 0.95 to 1.65 of its rate for 3x3 convolutions of 64 to 256 channels and 0.95 to 1.02
of 32; 1.00 to 1.44 with the time as a channel; 0.56 (0.60) of 16 channels; 0.90 to 1.90 for 1x1
ones, 0.64 to 0.90 for strided 3x3, 0.82 to 1.32 for 3 input channels, 0.88 for 5x5, 0.47 to 0.63
for depthwise ones.
"""

import functools
import importlib.util
import pathlib
import statistics
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P
from script import finish, table_of

from jfed import provenance
from jfed.benchmark.timing import interleaved, timed
from jfed.errors import ConfigError
from jfed.models.convolutions.convolution import FORMS, choose_form, conv
from jfed.models.layers import Style, TimeConv

CLIENTS = 4
RATE = 1e-6  # learning rate: small enough that values stay where they are
WORK = 1.5e9  # floating-point operations in one timed run, at least two steps
SLOW = ("xla", "xla vmap", "transposed vmap")  # XLA's gradients in loops and grouped convolutions:
SMALL = 5e8  # timed on small layers only, up to this many operations a step


Pair = tuple[jax.Array, jax.Array]  # images and kernel


class Layer(NamedTuple):
    kind: str  # "dense", "depthwise" or "time"
    size: int  # H = W
    inputs: int
    outputs: int
    window: int = 3
    stride: int = 1
    padding: str = "SAME"

    @property
    def groups(self) -> int:
        return self.inputs if self.kind == "depthwise" else 1

    def flops(self, batch: int) -> int:
        """Multiplications and additions of the forward pass and both gradients."""
        valid = self.size if self.padding == "SAME" else self.size - self.window + 1
        taps = self.window**2 * self.inputs // self.groups
        return 6 * batch * (-(-valid // self.stride)) ** 2 * taps * self.outputs


SMOKE = Layer("dense", 4, 8, 8)
LAYERS = (
    *(Layer("dense", 32, 3, o) for o in (16, 64)),
    *(Layer("dense", h, c, c) for h, c in ((32, 16), (32, 32), (32, 64), (16, 32), (16, 64))),
    *(Layer("dense", h, c, c) for h, c in ((16, 128), (8, 64), (8, 128), (8, 256), (4, 256))),
    *(Layer("time", h, c + 1, c) for h, c in ((32, 16), (16, 32), (16, 64), (8, 128), (8, 256))),
    *(Layer("dense", h, c, 2 * c, 3, 2) for h, c in ((32, 16), (32, 64), (16, 128))),
    *(Layer("dense", h, c, 2 * c, 1, 2) for h, c in ((32, 16), (32, 64), (16, 128))),
    *(Layer("dense", h, c, c, 1) for h, c in ((32, 16), (16, 64), (8, 256))),
    *(Layer("depthwise", h, c, c, 3, s) for h, c, s in ((32, 16, 1), (16, 64, 1), (32, 64, 2))),
    *(Layer("dense", h, i, o, 5, 1, "VALID") for h, i, o in ((32, 3, 32), (14, 32, 64))),
)


def operations(layer: Layer) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """The functions of (images, kernel) to compare on this layer."""
    if layer.kind == "time":
        return {
            "concat": lambda x, k: conv(
                jnp.pad(x, ((0, 0),) * 3 + ((1, 0),), constant_values=0.5), k
            ),
            "TimeConv": _time_conv,
        }
    return {
        form: functools.partial(
            conv, stride=layer.stride, padding=layer.padding, groups=layer.groups, form=form
        )
        for form in FORMS
        if form != "auto" and _fits(layer, form)
    }


def _time_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layer = TimeConv(kernel.shape[-1], Style(), nnx.Rngs(0))
    layer.kernel[...] = kernel
    return layer(jnp.float32(0.5), x, layer.prepare(x.shape[1:3]))


def auto(layer: Layer) -> str:
    """What jfed takes for this layer."""
    if layer.kind == "time":
        return "time_conv"
    size = (layer.size, layer.size)
    return choose_form(_kernel_shape(layer), stride=layer.stride, groups=layer.groups, size=size)


def _fits(layer: Layer, form: str) -> bool:
    x = jax.ShapeDtypeStruct((1, layer.size, layer.size, layer.inputs), jnp.float32)
    k = jax.ShapeDtypeStruct(_kernel_shape(layer), jnp.float32)
    try:
        jax.eval_shape(
            functools.partial(conv, stride=layer.stride, groups=layer.groups, form=form), x, k
        )
    except ConfigError:
        return False
    return True


def _kernel_shape(layer: Layer) -> tuple[int, int, int, int]:
    return layer.window, layer.window, layer.inputs // layer.groups, layer.outputs


def jax_run(
    operation: Callable[..., jax.Array],
    x: np.ndarray,
    kernel: np.ndarray,
    steps: int,
    copies: int = 1,
    spread: Callable[[Callable[..., Pair]], Callable[..., Pair]] = jax.vmap,
) -> Callable[[], object]:
    """A compiled scan of training steps; of several copies, `spread` makes one function."""

    def step(carry: Pair, _: None) -> tuple[Pair, None]:
        y, gradient = jax.vjp(operation, *carry)
        dx, dk = gradient(RATE * y)
        return (carry[0] - dx, carry[1] - dk), None

    def train(x: jax.Array, kernel: jax.Array) -> Pair:
        return jax.lax.scan(step, (x, kernel), None, length=steps)[0]

    operands = [jnp.asarray(x), jnp.asarray(kernel)]
    if copies > 1:
        operands = [jnp.stack([a] * copies) for a in operands]
    compiled = jax.jit(spread(train) if copies > 1 else train).lower(*operands).compile()
    return lambda: jax.block_until_ready(compiled(*operands))


def on_devices(train: Callable[..., Pair]) -> Callable[..., Pair]:
    """The function of operands with a leading axis that is spread over all devices."""

    def own(x: jax.Array, kernel: jax.Array) -> Pair:
        x, kernel = train(x[0], kernel[0])
        return x[None], kernel[None]

    mesh, spread = Mesh(jax.devices(), ("devices",)), P("devices")
    return jax.shard_map(own, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)


def torch_run(
    layer: Layer, x: np.ndarray, kernel: np.ndarray, steps: int, channels_last: bool
) -> Callable[[], None]:
    """The same steps with PyTorch, padded alike except for the side of an odd row."""
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    weights = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous(memory_format=layout)
    padding = layer.window // 2 if layer.padding == "SAME" else 0

    def run() -> None:
        a, k = images, weights
        for _ in range(steps):
            a, k = a.detach().requires_grad_(), k.detach().requires_grad_()
            y = torch.nn.functional.conv2d(a, k, None, layer.stride, padding, 1, layer.groups)
            da, dk = torch.autograd.grad(y, (a, k), RATE * y.detach())
            a, k = a.detach() - da, k.detach() - dk

    return run


def measure(layer: Layer, batch: int, repeats: int) -> dict[str, str | float]:
    """One row of the table: the layer and the rates of everything that can compute it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, layer.size, layer.size, layer.inputs)).astype(np.float32)
    shape = _kernel_shape(layer)
    kernel = (rng.normal(size=shape) / np.sqrt(np.prod(shape[:3]))).astype(np.float32)
    flops = layer.flops(batch)
    steps = max(2, min(10, int(WORK / flops)))
    runs: dict[str, Callable[[], object]] = {}
    work: dict[str, int] = {}
    images = x[..., 1:] if layer.kind == "time" else x
    for name, operation in operations(layer).items():
        for column, clients in ((name, 1), (f"{name} vmap", CLIENTS)):
            if column in SLOW and flops > SMALL:
                continue
            count = 2 if column in SLOW else steps
            work[column] = flops * count * clients
            runs[column] = jax_run(operation, images, kernel, count, clients)
    if (devices := jax.device_count()) > 1:
        best = operations(layer)[auto(layer)]
        work["auto, devices"] = flops * steps * devices
        runs["auto, devices"] = jax_run(best, images, kernel, steps, devices, on_devices)
    if importlib.util.find_spec("torch"):
        for name, last in (("torch", False), ("torch nhwc", True)):
            runs[name] = torch_run(layer, x, kernel, steps, last)
            work[name] = flops * steps
    seconds = median_seconds(runs, repeats)
    row: dict[str, str | float] = {k: str(v) for k, v in layer._asdict().items()}
    row["auto"] = auto(layer)
    for name, value in seconds.items():
        row[name] = float(f"{work[name] / value / 1e9:.3g}")
    return row


def median_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, after one warm-up, in turns; slow ones once."""
    for run in runs.values():
        run()
    seconds = interleaved({name: timed(run) for name, run in runs.items()}, repeats, once=SLOW)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(
    scale: Literal["cpu", "smoke"] = "cpu",
    batch: int = 32,
    repeats: int = 5,
    kinds: tuple[Literal["dense", "depthwise", "time"], ...] = ("dense", "depthwise", "time"),
    output: pathlib.Path | None = None,
) -> None:
    """Times every form on every layer.

    Args:
      scale: cpu (two cores, ten minutes) or smoke (one small layer).
      batch: images in a batch.
      repeats: timed runs of each form.
      kinds: of layers.
      output: of the CSV; experiments/results/convolution_forms_cpu.csv where not given, but
        nowhere for smoke.
    """
    output = table_of(__file__, scale, output)
    jax.config.update("jax_num_cpu_devices", len(provenance.cores()))
    hardware = provenance.hardware()
    about = {"hardware": f"{hardware['cpus']} x {hardware['machine']}"}
    about |= {name: hardware[name] for name in ("jax", "commit")}
    about["command"] = f"python experiments/convolution_forms.py --scale {scale} --batch {batch}"
    rows: list[dict[str, str | float]] = []
    for layer in (SMOKE,) if scale == "smoke" else LAYERS:
        if layer.kind in kinds:
            rows.append(measure(layer, batch, repeats))
            print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    finish(rows, about, output)


if __name__ == "__main__":
    tyro.cli(main)
