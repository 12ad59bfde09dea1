import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st
from stand_in import conv

from jfed.errors import ConfigError
from jfed.planning.counting import count
from jfed.planning.hlo import parse
from jfed.planning.products import groups, product_dtype, product_flops


def product(shape, call, *operands):
    """An instruction, and the instructions that are its operands."""
    names = ", ".join(f"%a{i}" for i in range(len(operands)))
    given = "".join(f"  %a{i} = {s} parameter({i})\n" for i, s in enumerate(operands))
    line = f"  ROOT %r = {shape} {call.replace('()', f'({names})', 1)}\n"
    program = parse(f"HloModule m\n\nENTRY %e () -> x {{\n{given}{line}}}\n")
    return program.entry.root, program.entry.operands(program.entry.root)


# A convolution of 10 images of 16 x 16, 3 x 3 windows of 24 channels to 32.
IMAGES, KERNEL, OUTPUT = "f32[10,16,16,24]", "f32[32,3,3,24]", "f32[10,16,16,32]"
LABELS = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
CONVOLUTION = 2 * 10 * 16 * 16 * 9 * 24 * 32


@pytest.mark.parametrize(
    ("made", "called", "first", "second"),
    [
        (OUTPUT, "convForward", IMAGES, KERNEL),
        (OUTPUT, "convBiasActivationForward", IMAGES, KERNEL),
        (IMAGES, "convBackwardInput", OUTPUT, KERNEL),
        (KERNEL, "convBackwardFilter", IMAGES, OUTPUT),
    ],
)
def test_convolutions_of_cudnn(made, called, first, second):
    call = f'custom-call(), {LABELS}, custom_call_target="__cudnn${called}"'
    one = product(f"({made}, u8[0]{{0}})", call, first, second)
    assert product_flops(*one) == CONVOLUTION
    assert product_dtype(*one) == "float32"


def test_grouped_and_dilated_convolutions():
    grouped = "convolution(), window={size=3x3}, dim_labels=b01f_01io->b01f, feature_group_count=4"
    one = product("f32[2,8,8,32]", grouped, "f32[2,10,10,16]", "f32[3,3,4,32]")
    assert product_flops(*one) == 2 * (2 * 8 * 8 * 32) * 9 * 4
    assert groups(one[0]) == 4
    # As TPUs map a convolution over 4 lanes: another axis, of which each window meets one place.
    lanes = "convolution(), window={size=3x3x4 stride=1x1x3 pad=1_1x1_1x0_0 lhs_dilate=1x1x4}, \
dim_labels=2b01f_201io->2b01f"
    one = product("bf16[4,10,32,32,16]", lanes, "bf16[4,10,32,32,3]", "bf16[4,3,3,3,16]")
    assert product_flops(*one) == 4 * (2 * 10 * 32 * 32 * 16 * 9 * 3)
    assert groups(one[0]) == 1
    with pytest.raises(ConfigError, match="dim_labels="):
        product_flops(*product("f32[2]", "convolution()", "f32[2]", "f32[2]"))


def test_matrix_products_of_cublas():
    config = '{"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1","2"],"rhs_contracting_dimensions":["0","1"]},\
"precision_config":{"operand_precision":["HIGHEST","HIGHEST"],"algorithm":"ALG_UNSET"}}}'
    for called in ("__cublas$gemm", "__cublas$lt$matmul"):
        call = f'custom-call(), custom_call_target="{called}", backend_config={config}'
        one = product("(f32[5,7], s8[4194304]{0})", call, "f32[5,6,4]", "f32[6,4,7]")
        assert product_flops(*one) == 2 * 5 * 7 * 24
        assert product_dtype(*one) == "float32/highest"


@pytest.mark.parametrize(
    ("first", "second", "more", "expected"),
    [
        ("bf16", "bf16", "", "bfloat16"),
        ("f16", "f16", ", operand_precision={highest,highest}", "float16"),
        ("f64", "f64", "", "float64"),
        ("f8e4m3fn", "f8e4m3fn", "", "f8e4m3fn"),
        ("f32", "bf16", "", "float32"),
        ("f32", "f32", ", operand_precision={high,high}", "float32/high"),
        ("f32", "f32", ", operand_precision={default,default}", "float32"),
        ("f32", "f32", ", operand_precision={default,highest}", "float32/highest"),
        ("f32", "f32", ", algorithm=dot_tf32_tf32_f32", "tensorfloat32"),
        ("f32", "f32", ", algorithm=dot_tf32_tf32_f32_x3", "tensorfloat32/3"),
        ("f32", "f32", ", algorithm=dot_bf16_bf16_f32", "bfloat16"),
        ("f32", "f32", ", algorithm=dot_bf16_bf16_f32_x6", "bfloat16/6"),
        ("f32", "f32", ", algorithm=dot_f32_f32_f32", "float32/highest"),
    ],
)
def test_dtypes_and_precisions(first, second, more, expected):
    call = "dot(), lhs_contracting_dims={1}, rhs_contracting_dims={0}" + more
    one = product("f32[4,6]", call, f"{first}[4,5]", f"{second}[5,6]")
    assert product_dtype(*one) == expected
    assert product_flops(*one) == 2 * 4 * 5 * 6


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(2, 5),
    side=st.sampled_from([6, 8, 10]),  # no smaller than a window, even halved
    channels=st.lists(st.integers(2, 7), min_size=3, max_size=3),
    window=st.integers(2, 3),
    stride=st.integers(1, 2),
)
def test_random_nets_and_their_gradients(batch, side, channels, window, stride):
    """Forward, and as much again for each of the gradients of a kernel and of an input."""
    a, b, c = channels

    def loss(kernels, x):
        return (jnp.tanh(conv(x, kernels[0], stride)).reshape(batch, -1) @ kernels[1]).sum(0) ** 2

    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
    out = side // stride
    kernels = [shape(window, window, a, b), shape(out * out * b, c)]
    gradient = jax.jit(jax.grad(lambda k, x: loss(k, x).sum(), (0, 1)))
    counts = count(gradient.lower(kernels, shape(batch, side, side, a)).compile().as_text(), {})
    one, other = batch * out**2 * window**2 * a * b, batch * out**2 * b * c
    assert counts.flops["float32"] == pytest.approx(2 * 3 * (one + other))
