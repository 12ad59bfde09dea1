"""Convolutions whose gradients stay fast inside loops and under `vmap` over per-client kernels.

What may be convolved with what, and by which form (`forms.py`): `conv(form="auto")` picks one from
a measured table.

Layouts are NHWC for images and HWIO for kernels. Reverse mode only, as `jax.custom_vjp` demands.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jfed.errors import ConfigError, one_of
from jfed.models.convolutions import forms
from jfed.models.convolutions.padding import PADDINGS, pads_of
from jfed.platforms import lanes, platform

FORMS = ("auto", "xla", *forms.BY_NAME)


def conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw I O"],
    *,
    stride: int = 1,
    padding: str = "SAME",
    groups: int = 1,
    form: str = "auto",
) -> Float[Array, "B Ho Wo O"]:
    """Two-dimensional cross-correlation, equal to `lax.conv_general_dilated` up to rounding.

    Args:
      x: images, channels last.
      kernel: [kh, kw, C, O], or [kh, kw, 1, C] for a depthwise convolution (`groups=C`).
      stride: the same in both directions.
      padding: "SAME" (XLA's, Ho = ceil(H / stride)), "SYMMETRIC" ((kh - 1) // 2 rows on either
        side, as PyTorch's networks have it: the same Ho for odd kernels, but other numbers where a
        stride meets an even size), or "VALID" (Ho = ceil((H - kh + 1) / stride)).
      groups: 1 (dense) or C (depthwise).
      form: one of `FORMS`; "auto" asks `choose_form`. It rules the pass forward and back of what is
        differentiated; what is not, such as evaluation, takes XLA's convolution.

    Raises:
      ConfigError: shapes, dtypes or settings that do not fit together, or a form that cannot
        compute this convolution.
    """
    _check(x, kernel, stride, padding, groups)
    if one_of("convolution form", form, FORMS) == "auto":
        form = choose_form(
            kernel.shape, stride=stride, groups=groups, size=x.shape[1:3], dtype=x.dtype
        )
    _check_form(form, kernel, stride, groups, x.dtype)
    pads = pads_of(x.shape[1:3], kernel.shape[:2], stride, padding)
    if form == "xla":
        return forms.xla(x, kernel, stride, pads, groups)
    return forms.convolve(forms.BY_NAME[form], stride, pads, x, kernel)


def constant_response(
    size: tuple[int, ...],
    kernel: Float[Array, "kh kw 1 O"],
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> Float[Array, "1 Ho Wo O"]:
    """The convolution of one channel of ones of `size` (H, W): sums of the taps that lie inside."""
    kh, kw, _, outputs = kernel.shape
    ones = np.pad(np.ones(size), pads_of(size, (kh, kw), stride, padding))
    inside = np.lib.stride_tricks.sliding_window_view(ones, (kh, kw))[::stride, ::stride]
    ho, wo = inside.shape[:2]
    taps = kernel.reshape(kh * kw, outputs)
    plane = jnp.asarray(inside.reshape(ho * wo, kh * kw), kernel.dtype) @ taps
    return plane.reshape(1, ho, wo, outputs)


# Two AVX-512 cores (AMD EPYC), JAX 0.10.2, batch 32, float32. experiments/convolution_forms.py
# times layers of most rows, though not at their bounds. The first row that fits decides; other
# dense convolutions take im2col. Where images are small and channels many, F4's transforms of the
# kernel cost more than its fewer products save; where images are smaller still, most of its tiles
# would be halo. Each row: kernel size, stride, least number of input and of output channels,
# least height and width, form.
_CPU_TABLE = (
    (3, 1, 8, 9, "winograd4"),
    (3, 1, 256, 1, "winograd2"),
    (3, 1, 8, 7, "winograd4"),
    (3, 1, 8, 1, "winograd2"),
    (5, 1, 16, 5, "winograd4"),
)


def choose_form(
    kernel_shape: tuple[int, ...],
    *,
    stride: int = 1,
    groups: int = 1,
    size: tuple[int, ...] = (32, 32),
    dtype: jnp.dtype | type = jnp.float32,
    backend: str | None = None,
) -> str:
    """The form that "auto" takes for a kernel [kh, kw, I, O] on images of `size` (H, W).

    On the CPU from a table measured inside a scan. On others by what their compilers make of it
    (`jfed plan`), unmeasured: "xla", but on a GPU whose lanes have kernels of their own, where it
    would be a convolution in as many groups as there are lanes, gradients included, matrix
    products. A TPU's compiler knows a way without groups. Platform and lanes are known while the
    engine traces: a function with a `jax.jit` of its own keeps what it was first traced for.
    """
    backend = backend or platform()
    if backend == "tpu" or (backend == "gpu" and lanes() == 1):
        return "xla"
    if groups > 1:
        return "depthwise"
    if backend == "gpu":
        return "im2col"
    kh, kw, *channels = kernel_shape
    if jnp.dtype(dtype).itemsize >= 4:  # Winograd's transforms lose too much in bfloat16
        for window, step, least_channels, least_size, form in _CPU_TABLE:
            fits = kh == kw == window and stride == step
            if fits and min(channels) >= least_channels and min(size) >= least_size:
                return form
    return "im2col"


def _check(x: Array, kernel: Array, stride: int, padding: str, groups: int) -> None:
    one_of("padding", padding, PADDINGS)
    if x.ndim != 4 or kernel.ndim != 4:
        raise ConfigError(
            f"conv needs x [B, H, W, C] and a kernel [kh, kw, I, O]; got {x.shape}, {kernel.shape}."
        )
    if stride < 1:
        raise ConfigError(f"stride must be at least 1; got {stride}.")
    if x.dtype != kernel.dtype:
        raise ConfigError(f"x and kernel must share a dtype; got {x.dtype} and {kernel.dtype}.")
    channels, (kh, kw, inputs, outputs) = x.shape[-1], kernel.shape
    if groups not in (1, channels):
        raise ConfigError(f"groups must be 1 or the channel count {channels}; got {groups}.")
    if inputs != channels // groups:
        raise ConfigError(
            f"a kernel for x {x.shape} with groups={groups} needs {channels // groups} input "
            f"channels; got kernel {kernel.shape}. (`channels` of a network is that of the images.)"
        )
    if groups > 1 and outputs != channels:
        raise ConfigError(
            f"a depthwise kernel must be [kh, kw, 1, {channels}]; got {kernel.shape}."
        )
    if padding == "VALID" and (x.shape[1] < kh or x.shape[2] < kw):
        raise ConfigError(
            f"a {kh}x{kw} kernel with VALID padding does not fit into {x.shape[1]}x{x.shape[2]}."
        )


def _check_form(form: str, kernel: Array, stride: int, groups: int, dtype: jnp.dtype) -> None:
    if (form == "depthwise") != (groups > 1) and form != "xla":
        raise ConfigError(
            f"form {form!r} cannot compute groups={groups}; depthwise convolutions (groups=C > 1) "
            f"take 'depthwise' or 'xla', dense ones (groups=1) the others."
        )
    if form.startswith("winograd") and (
        stride != 1 or kernel.shape[:2] not in ((3, 3), (5, 5)) or dtype.itemsize < 4
    ):
        raise ConfigError(
            f"form {form!r} takes stride 1, a 3x3 or 5x5 kernel and float32 or float64; got stride "
            f"{stride}, kernel {kernel.shape}, {dtype}."
        )
