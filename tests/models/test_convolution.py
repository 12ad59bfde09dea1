"""Every form against `lax.conv_general_dilated` and XLA's own gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

from jfed.errors import ConfigError
from jfed.models.convolutions import winograd
from jfed.models.convolutions.convolution import FORMS, choose_form, constant_response, conv
from jfed.platforms import vmapped

# (H, W), C, O, kernel size, stride, padding
SHAPES = {
    "odd": ((9, 11), 5, 6, 3, 1, "SAME"),
    "valid": ((10, 7), 4, 6, 3, 1, "VALID"),
    "stem": ((8, 8), 3, 16, 3, 1, "SAME"),
    "pairs of pixels": ((5, 16), 16, 20, 3, 1, "SAME"),
    "smaller than a tile": ((3, 3), 4, 4, 3, 1, "SAME"),
    "strided": ((8, 9), 4, 6, 3, 2, "SAME"),
    "tall strided": ((19, 4), 4, 6, 3, 2, "SAME"),
    "strided symmetric": ((8, 9), 4, 6, 3, 2, "SYMMETRIC"),
    "tall strided symmetric": ((19, 4), 4, 6, 3, 2, "SYMMETRIC"),
    "1x1 strided symmetric": ((8, 6), 4, 6, 1, 2, "SYMMETRIC"),
    "strided valid": ((10, 9), 4, 6, 3, 2, "VALID"),
    "5x5": ((14, 13), 3, 8, 5, 1, "VALID"),
    "even": ((7, 8), 3, 5, 2, 1, "SAME"),
    "1x1": ((6, 6), 4, 6, 1, 1, "SAME"),
    "1x1 strided": ((7, 6), 4, 6, 1, 2, "SAME"),
}
QUICK = {"xla_backend_optimization_level": 0}  # most of the time goes into compiling
WINOGRAD = ("odd", "valid", "stem", "pairs of pixels", "smaller than a tile", "5x5")
DENSE = tuple(form for form in FORMS if form not in ("auto", "xla", "depthwise"))
CASES = [
    (form, name)
    for form in DENSE
    for name in SHAPES
    if not form.startswith("winograd") or name in WINOGRAD
]


def reference(x, kernel, *, stride=1, padding="SAME", groups=1):
    if padding == "SYMMETRIC":
        padding = [(n // 2, n // 2) for n in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def operands(size, c, inputs, o, k, dtype=jnp.float32, lead=()):
    rng = np.random.default_rng(0)  # compiling jax.random would take most of the time
    x = rng.normal(size=(*lead, 2, *size, c))
    kernel = rng.normal(size=(*lead, k, k, inputs, o)) / k
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def with_gradients(function, *args):
    """The output and its gradients against a fixed, uneven cotangent."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(*args):
        y, pull = jax.vjp(function, *args)
        return y, *pull(
            jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
        )

    return run(*args)


def assert_close(got, want, tolerance=3e-5):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize(("form", "name"), CASES)
def test_dense_forms_equal_xla(form, name):
    size, c, o, k, stride, padding = SHAPES[name]
    args = operands(size, c, c, o, k)
    options = {"stride": stride, "padding": padding}
    got = with_gradients(functools.partial(conv, form=form, **options), *args)
    assert_close(got, with_gradients(functools.partial(reference, **options), *args))


@pytest.mark.parametrize("name", ["odd", "pairs of pixels"])
def test_winograd_in_parts_equals_xla(name, monkeypatch):
    monkeypatch.setattr(winograd, "_AT_A_TIME", 1.0)
    size, c, o, k, _, padding = SHAPES[name]
    args = operands(size, c, c, o, k)
    got = with_gradients(functools.partial(conv, form="winograd4", padding=padding), *args)
    assert_close(got, with_gradients(functools.partial(reference, padding=padding), *args))


@pytest.mark.parametrize("form", ["auto", "xla"])
@pytest.mark.parametrize("name", ["odd", "strided", "strided symmetric", "tall strided", "5x5"])
def test_depthwise_equals_xla(form, name):
    size, c, _, k, stride, padding = SHAPES[name]
    args = operands(size, c, 1, c, k)
    options = {"stride": stride, "padding": padding, "groups": c}
    got = with_gradients(functools.partial(conv, form=form, **options), *args)
    assert_close(got, with_gradients(functools.partial(reference, **options), *args))


@pytest.mark.parametrize("form", [*DENSE, "depthwise"])
def test_vmap_over_images_and_kernels(form):
    groups = 4 if form == "depthwise" else 1
    args = operands((6, 7), 4, 4 // groups, 4, 3, lead=(3,))
    got = with_gradients(jax.vmap(functools.partial(conv, form=form, groups=groups)), *args)
    want = with_gradients(jax.vmap(functools.partial(reference, groups=groups)), *args)
    assert_close(got, want)


@pytest.mark.parametrize(
    ("form", "mapped"),
    [("im2col", False), ("transposed", False), ("winograd2", True), ("depthwise", True)],
)
def test_training_in_a_scan_with_checkpoints(form, mapped):
    groups = 4 if form == "depthwise" else 1
    xs, kernels = operands((6, 6), 4, 4 // groups, 4, 3, lead=(2,))

    def train(convolve, x, kernel):
        def loss(kernel):
            return jnp.mean(jnp.tanh(x + jax.checkpoint(convolve)(x, kernel)) ** 2)

        def step(kernel, _):
            return kernel - 0.1 * jax.grad(loss)(kernel), None

        return lax.scan(step, kernel, None, length=3)[0]

    def run(convolve):
        quickly = functools.partial(jax.jit, compiler_options=QUICK)
        one = functools.partial(train, convolve)
        if mapped:
            return quickly(lambda *args: lax.map(lambda pair: one(*pair), args))(xs, kernels)
        return quickly(one)(xs[0], kernels[0])

    got = run(functools.partial(conv, form=form, groups=groups))
    assert_close([got], [run(functools.partial(reference, groups=groups))])


@pytest.mark.parametrize("form", [*DENSE, "depthwise"])
def test_float64(form):
    groups = 4 if form == "depthwise" else 1
    with jax.enable_x64(True):
        args = operands((6, 7), 4, 4 // groups, 4, 3, jnp.float64)
        got = with_gradients(functools.partial(conv, form=form, groups=groups), *args)
        want = with_gradients(functools.partial(reference, groups=groups), *args)
        assert got[0].dtype == jnp.float64
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize("form", ["auto", "transposed", "im2col", "depthwise"])
def test_bfloat16(form):
    groups = 4 if form == "depthwise" else 1
    args = operands((6, 7), 4, 4 // groups, 4, 3, jnp.bfloat16)
    got = with_gradients(functools.partial(conv, form=form, groups=groups), *args)
    exact = with_gradients(
        functools.partial(reference, groups=groups), *(a.astype(jnp.float32) for a in args)
    )
    assert all(a.dtype == jnp.bfloat16 for a in got)
    assert_close([a.astype(jnp.float32) for a in got], exact, 2e-2)


@pytest.mark.parametrize("form", DENSE)
def test_shard_map(form):
    """Each device's kernel gradient is that of its own images."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("clients",))
    args = operands((6, 6), 4, 4, 4, 3)
    gradient = jax.grad(lambda x, k: jnp.sum(conv(x, k, form=form) ** 2), (0, 1))

    def local(x, kernel):
        dx, dk = gradient(x, kernel)
        return dx, dk[None]

    sharded = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("clients"), P()),
            out_specs=(P("clients"), P("clients")),
            check_vma=False,
        ),
        compiler_options=QUICK,
    )
    dx, dk = sharded(*args)
    assert_close((dx, dk.sum(0)), jax.jit(gradient, compiler_options=QUICK)(*args))


@pytest.mark.parametrize("form", ["im2col"])
def test_second_order_is_right(form):
    x, kernel = operands((5, 5), 3, 3, 3, 3)

    def penalty(convolve):
        @jax.grad
        def gradient(k):
            return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(convolve(x, k))))(x) ** 2)

        return jax.jit(gradient, compiler_options=QUICK)(kernel)

    assert_close([penalty(functools.partial(conv, form=form))], [penalty(reference)])


@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, "SYMMETRIC"), (1, "VALID")])
def test_a_constant_channel_is_a_plane(stride, padding):
    _, kernel = operands((6, 7), 1, 1, 6, 3)
    options = {"stride": stride, "padding": padding}
    got = with_gradients(lambda k: constant_response((6, 7), k, **options), kernel)
    ones = jnp.ones((1, 6, 7, 1))
    assert_close(got, with_gradients(lambda k: reference(ones, k, **options), kernel), 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride must be at least 1; got 0"),
        ({"padding": "same"}, "unknown padding 'same'"),
        ({"form": "winograd"}, "unknown convolution form 'winograd'. Did you mean 'winograd"),
        ({"groups": 2}, "groups must be 1 or the channel count 4; got 2"),
        ({"groups": 4}, "needs 1 input"),
        ({"form": "depthwise"}, "cannot compute groups=1"),
        ({"form": "winograd4", "stride": 2}, "got stride 2"),
    ],
)
def test_errors_quote_the_setting(options, message):
    x, kernel = operands((6, 6), 4, 4, 4, 3)
    with pytest.raises(ConfigError, match=message):
        conv(x, kernel, **options)


def test_errors_quote_the_shapes():
    x, kernel = operands((6, 6), 4, 4, 4, 3)
    with pytest.raises(ConfigError, match="needs 4 input channels"):
        conv(x, kernel[:, :, :3])
    with pytest.raises(ConfigError, match="does not fit into 2x6"):
        conv(x[:, :2], kernel, padding="VALID")
    with pytest.raises(ConfigError, match="share a dtype; got float32 and bfloat16"):
        conv(x, kernel.astype(jnp.bfloat16))
    with pytest.raises(ConfigError, match=r"\[kh, kw, 1, 4\]"):
        conv(x, kernel[:, :, :1, :2], groups=4)
    with pytest.raises(ConfigError, match="float32 or float64"):
        conv(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), form="winograd2")


def test_choice():
    assert choose_form((3, 3, 64, 64), size=(16, 16), backend="cpu") == "winograd4"
    assert choose_form((3, 3, 64, 64), size=(16, 16), dtype=jnp.bfloat16, backend="cpu") == "im2col"
    assert choose_form((3, 3, 3, 64), size=(32, 32), backend="cpu") == "im2col"
    assert choose_form((3, 3, 64, 64), stride=2, size=(16, 16), backend="cpu") == "im2col"
    assert choose_form((3, 3, 1, 64), groups=64, size=(16, 16), backend="cpu") == "depthwise"
    assert choose_form((3, 3, 64, 64), size=(2, 2), backend="cpu") == "winograd2"
    assert choose_form((3, 3, 64, 64), size=(8, 8), backend="cpu") == "winograd4"
    assert choose_form((3, 3, 256, 256), size=(8, 8), backend="cpu") == "winograd2"
    assert choose_form((3, 3, 256, 256), size=(16, 16), backend="cpu") == "winograd4"
    assert choose_form((3, 3, 64, 64), size=(16, 16), backend="gpu") == "xla"
    with vmapped(8):
        assert choose_form((3, 3, 64, 64), backend="gpu") == "im2col"
        assert choose_form((3, 3, 1, 64), groups=64, backend="gpu") == "depthwise"
        assert choose_form((3, 3, 64, 64), backend="tpu") == "xla"
        assert choose_form((3, 3, 64, 64), size=(16, 16), backend="cpu") == "winograd4"
