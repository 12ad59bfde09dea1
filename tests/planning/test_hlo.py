import jax
import jax.numpy as jnp
import pytest

from jfed.errors import ConfigError
from jfed.planning.hlo import parse

PRODUCT = """HloModule jit_f, entry_computation_layout={(f32[8,4]{1,0})->f32[8,2]}

FileNames
1 "/home/me/model.py"

FunctionNames
1 "f, { and g"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%double (a.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  ROOT %sum = f32[] add(%a.1, %a.1)
}

ENTRY %main.3 (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
  %x = f32[8,4]{1,0:T(8,128)S(1)} parameter(0), metadata={op_name="x, (the \\"input\\")"}
  %w = f32[4,2]{0,1} parameter(1)
  %c = f32[] constant(2), metadata={op_name="c" source_file="/a b/c.py" source_line=7}
  %d = s32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %both = ((f32[8,4]{1,0}), (f32[4,2]{0,1}, /*index=2*/f32[])) tuple(%x, %w, /*index=2*/%c)
  ROOT %y = f32[8,2]{1,0} dot(f32[8,4]{1,0} %x, f32[4,2]{0,1} %w), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(f)/dot" stack_frame_id=1}, \
backend_config={"a":["}"]}
}
"""


def test_instructions_of_a_text():
    program = parse(PRODUCT)
    assert set(program.computations) == {"double", "main.3"}
    assert program.entry.name == "main.3"
    y = program.entry.root
    assert (y.name, y.opcode, y.operands) == ("y", "dot", ("x", "w"))
    assert y.axes("lhs_contracting_dims") == (1,)
    assert y.attributes["backend_config"] == '{"a":["}"]}'
    assert y.op_name == "jit(f)/dot"
    x, w, c, d, both = list(program.entry)[:-1]
    assert x.literal == "0"
    assert x.op_name.startswith("x, (the")
    assert d.operands == ()
    assert d.literal == "{ { 1, 2 }, { 3, 4 } }"
    assert both.operands == ("x", "w", "c")
    assert [shape.dims for shape in both.shapes] == [(8, 4), (4, 2), ()]
    assert w.shapes[0].order == (0, 1)
    assert (x.shapes[0].space, w.shapes[0].space) == (1, 0)
    assert program.source(y) == "/home/me/model.py:12"
    assert program.source(c) == "/a b/c.py:7"
    assert program.source(d) == ""


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[10,3]{1,0}", 10 * 3 * 4),
        ("pred[7]", 7),
        ("s4[5]{0}", 3),  # two to a byte
        ("c64[]", 8),
        ("token[]", 0),
        # The two fastest axes fill tiles of 8 x 128.
        ("f32[4,3,16,20]{3,2,1,0:T(8,128)}", 4 * 3 * 16 * 128 * 4),
        ("f32[300,20]{0,1:T(8,128)}", 24 * 384 * 4),
        ("bf16[4,10,16]{2,1,0:T(8,128)(2,1)S(1)}", 4 * 16 * 128 * 2),
        ("s32[]{:T(128)}", 128 * 4),
    ],
)
def test_bytes_of_shapes(shape, size):
    program = parse(f"HloModule m\n\nENTRY %e () -> x {{\n  ROOT %a = {shape} iota()\n}}\n")
    assert program.entry.root.shapes[0].bytes == size


def test_a_program_of_jax_has_the_shapes_of_its_arguments_and_results():
    def f(x, n):
        with jax.named_scope("here"):
            return jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x) + i.astype(x.dtype), x), n + 1

    x = jax.ShapeDtypeStruct((5, 6), jnp.bfloat16)
    compiled = jax.jit(f).lower(x, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    program = parse(compiled.as_text())
    parameters = {i.literal: i.shapes[0] for i in program.entry if i.opcode == "parameter"}
    assert [(parameters[i].dtype, parameters[i].dims) for i in "01"] == [
        ("bf16", (5, 6)),
        ("s32", ()),
    ]
    assert [shape.dims for shape in program.entry.root.shapes] == [(5, 6), ()]
    (loop,) = (i for c in program.computations.values() for i in c if i.opcode == "while")
    assert loop.op_name == "jit(f)/here/while"
    for of in ("body", "condition"):
        assert program.computation(loop.called(of)[0]).root
    assert program.source(loop).rpartition(":")[0].endswith("test_hlo.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with HloModule"),
        ("module @jit_f {\n}", "begins with HloModule, got 'module @jit_f"),
        ("HloModule m\n", "no ENTRY"),
        (PRODUCT[: PRODUCT.index("  ROOT %y")], "ends within its computation 'main.3'"),
        (PRODUCT.replace("ROOT %sum", "%sum"), "'double' of the compiled program has no ROOT"),
        (PRODUCT.replace("%c = f32[] constant(2)", "%c is 2"), "cannot read this line.*is 2"),
        (PRODUCT.replace("add(%a.1, %a.1)", "add(%a.1, %a.1"), "cannot read this line"),
        (PRODUCT.replace("%c = f32[]", "%c = f32[a]"), "cannot read this line"),
        (PRODUCT.replace("add(%a.1, %a.1)", "add(%a.1, %b)"), "sum in double uses 'b'"),
    ],
)
def test_malformed_text(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
