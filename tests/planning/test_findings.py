import jax
import jax.numpy as jnp
import pytest
from stand_in import LENGTHS, STEPS, compiled_text, conv

from jfed.planning.findings import find


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def text_of(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def test_convolutions_in_groups_are_those_that_lanes_make():
    def f(x, kernels, depthwise):
        with jax.named_scope("net"):
            y = jax.vmap(conv)(x, kernels)
        return y, conv(x[0], depthwise, feature_group_count=16)

    args = shape(3, 4, 8, 8, 16), shape(3, 3, 3, 16, 16), shape(3, 3, 1, 16)
    text = text_of(f, *args)
    (found,) = (one for one in find(text, {}, lanes=3) if "convolution" in one.what)
    assert found.what == "a convolution in 3 groups, one a lane"
    assert "net" in found.op_name
    assert found.source.rpartition(":")[0].endswith("stand_in.py")
    assert found.times == 1
    images, kernels = 3 * 4 * 8 * 8 * 16 * 4, 3 * 9 * 16 * 16 * 4
    assert found.bytes == 2 * images + kernels
    assert not [one for one in find(text, {}) if "convolution" in one.what]


def test_products_at_high_precision_and_gathers_by_what_they_move():
    def f(x, table, at, n):
        with jax.named_scope("exact"):
            x = jax.lax.fori_loop(0, n, lambda i, x: jnp.dot(x, x, precision="highest"), x)
        return x @ x, table[at]

    args = shape(64, 64), shape(5000, 64), shape(300, dtype=jnp.int32), shape(dtype=jnp.int32)
    text = text_of(f, *args)
    what = [(one.what, one.times) for one in find(text, {"exact": 10}) if "copied" not in one.what]
    product, gather = ("a float32 product at precision highest", 10), ("a gather", 1)
    assert what == [gather, product] or what == [product, gather]
    # A thousand products make the gather small.
    what = [one.what for one in find(text, {"exact": 1000}) if "copied" not in one.what]
    assert what == [product[0]]
    assert find(text, {"exact": 10}, share=1.0) == []


TPU = """HloModule jit_f, is_scheduled=true

%fused (p: u8[50,4,4,3]) -> u8[50,4,4,3] {
  %p = u8[50,4,4,3]{3,2,1,0} parameter(0)
  ROOT %copy.1 = u8[50,4,4,3]{0,3,2,1} copy(%p), metadata={op_name="jit(f)/images" \
source_file="train.py" source_line=5}
}

%body (q: (f64[20], f32[8,4])) -> (f64[20], f32[8,4]) {
  %q = (f64[20]{0}, f32[8,4]{1,0}) parameter(0)
  %x = f64[20]{0} get-tuple-element(%q), index=0
  %y = f32[8,4]{1,0} get-tuple-element(%q), index=1
  %double = f64[20]{0} add(%x, %x), metadata={op_name="jit(f)/steps/while/body/add"}
  %copy.2 = f32[8,4]{1,0} copy(%y)
  %start = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]) copy-start(%copy.2)
  %done = f32[8,4]{1,0:S(1)} copy-done(%start)
  %back = f32[8,4]{1,0} negate(%done)
  ROOT %t = (f64[20]{0}, f32[8,4]{1,0}) tuple(%double, %back)
}

%condition (q: (f64[20], f32[8,4])) -> pred[] {
  %q = (f64[20]{0}, f32[8,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (images: u8[50,4,4,3], x: f64[20], y: f32[8,4]) -> u8[50,4,4,3] {
  %images = u8[50,4,4,3]{3,2,1,0} parameter(0)
  %x = f64[20]{0} parameter(1)
  %y = f32[8,4]{1,0} parameter(2)
  %copied = f32[8,4]{1,0} copy(%y)
  %t = (f64[20]{0}, f32[8,4]{1,0}) tuple(%x, %copied)
  %w = (f64[20]{0}, f32[8,4]{1,0}) while(%t), condition=%condition, body=%body, \
metadata={op_name="jit(f)/steps/while" source_file="train.py" source_line=9}
  ROOT %new = u8[50,4,4,3]{0,3,2,1} fusion(%images), kind=kLoop, calls=%fused
}
"""


def test_copies_layouts_and_64_bits():
    """The copy outside the loop, and the one that only fetches to vector memory, are none."""
    found = {one.what: one for one in find(TPU, {"steps": 7})}
    assert set(found) == {
        "an array is written anew in another layout",
        "an array is copied in every pass of a loop",
        "64-bit floating point",
    }
    layout = found["an array is written anew in another layout"]
    assert (layout.times, layout.bytes) == (1, 2 * 50 * 4 * 4 * 3)
    assert (layout.op_name, layout.source) == ("jit(f)/images", "train.py:5")
    copy = found["an array is copied in every pass of a loop"]
    assert (copy.times, copy.bytes) == (7, 7 * 2 * 8 * 4 * 4)
    assert (copy.op_name, copy.source) == ("jit(f)/steps/while", "train.py:9")  # the loop's
    wide = found["64-bit floating point"]
    assert (wide.times, wide.bytes) == (7, 7 * 2 * 20 * 8)
    assert [one.bytes for one in find(TPU, {"steps": 7})] == sorted(
        [layout.bytes, copy.bytes, wide.bytes], reverse=True
    )


@pytest.mark.parametrize("order", ["{1,0}", "{0,1}"])
def test_a_transposition_writes_anew_unless_it_is_only_read_otherwise(order):
    opcode = "transpose" if order == "{1,0}" else "bitcast"
    text = f"""HloModule m

ENTRY %main (x: f32[64,32]) -> f32[32,64] {{
  %x = f32[64,32]{{1,0}} parameter(0)
  ROOT %t = f32[32,64]{order} {opcode}(%x), dimensions={{1,0}}
}}
"""
    expected = ["an array is written anew in another layout"] if order == "{1,0}" else []
    assert [one.what for one in find(text, {})] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("needs_gpu_compiler")
def test_lanes_on_a_gpu_make_convolutions_in_groups():
    targets = pytest.importorskip("jfed.planning.targets")
    device = targets.open_target("h100").devices[0]
    found = find(compiled_text(2, device), LENGTHS, lanes=2)
    grouped = [one for one in found if one.what == "a convolution in 2 groups, one a lane"]
    # Forward once a pass of each block, and twice backward; nothing outside the steps.
    times = {
        scope: sum(o.times for o in grouped if scope in o.op_name) for scope in ("ode0", "ode1")
    }
    assert times == {"ode0": 3 * 2 * STEPS, "ode1": 3 * 5 * STEPS}
    assert not [one for one in find(compiled_text(1, device), LENGTHS) if "groups" in one.what]
