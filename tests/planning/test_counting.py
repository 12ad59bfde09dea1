import jax
import jax.numpy as jnp
import pytest
from stand_in import LENGTHS, SIDE, STEPS, WIDTH, compiled_text, forward, step_flops

from jfed.errors import ConfigError
from jfed.planning.counting import Collective, count, count_body

SQUARE = jax.ShapeDtypeStruct((64, 64), jnp.float32)
PRODUCT = 2 * 64**3
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


def compiled(f, *args, **options):
    return jax.jit(f, **options).lower(*args).compile()


def total(counts):
    return sum(counts.flops.values())


@pytest.fixture(scope="module")
def training():
    return compiled_text(1)


def test_training_steps_with_loops_in_them_in_closed_form(training):
    counts = count(training, LENGTHS)
    assert counts.flops == {"float32": pytest.approx(STEPS * step_flops())}
    assert counts.unknown == []
    assert count_body(training, "steps", LENGTHS).flops == {"float32": pytest.approx(step_flops())}
    # Forward, and the gradients of input and kernel.
    block = 3 * forward(4, 2 * WIDTH, 2 * WIDTH)
    assert total(count_body(training, "ode1", LENGTHS)) == pytest.approx(block)


def test_lengths_are_those_of_each_scope(training):
    more = count_body(training, "steps", LENGTHS | {"ode0": 7})
    added = 3 * 5 * forward(8, WIDTH, WIDTH)
    assert total(more) == pytest.approx(step_flops() + added)
    # As many steps in more turns.
    often = count(training, LENGTHS | {"turns": STEPS, "steps": 1})
    seldom = count(training, LENGTHS | {"turns": 1, "steps": STEPS})
    values = sum((3 * 3 * a * b) for a, b in [(3, 6), (6, 6), (6, 12), (12, 12)]) + 120
    assert total(often) == total(seldom)
    # A client begins: parameters are multiplied; it delivers: they are added.
    more = (STEPS - 1) * 2 * values
    assert often.vector_flops - seldom.vector_flops == pytest.approx(more, rel=0.1)


def test_loops_of_unknown_length_are_named_and_count_once(training):
    counts = count(training, {"turns": 1, "steps": STEPS, "ode0": 1})
    assert [one.op_name.split("/")[-2:] for one in counts.unknown] == [
        ["jvp(ode1)", "while"],
        ["transpose(jvp(ode1))", "while"],
    ]
    same = count(training, {"turns": 1, "steps": STEPS, "ode0": 1, "ode1": 1})
    assert total(counts) == total(same)


@pytest.mark.slow
def test_lanes_that_are_mapped_do_so_many_times_the_work():
    text = compiled_text(2)
    assert total(count_body(text, "steps", LENGTHS)) == pytest.approx(2 * step_flops())


def test_a_program_without_loops_agrees_with_xla():
    def mlp(x, a, b):
        return jnp.tanh(jnp.tanh(x @ a) @ b).sum(0)

    program = compiled(mlp, SQUARE, SQUARE, SQUARE)
    counts, xla = count(program.as_text(), {}), program.cost_analysis()
    assert total(counts) + counts.vector_flops == pytest.approx(
        xla["flops"] + xla["transcendentals"], rel=0.01
    )
    assert counts.bytes == pytest.approx(xla["bytes accessed"], rel=0.01)


def test_bytes_of_a_product_and_what_follows_it():
    text = compiled(
        lambda x, w, b: jnp.tanh(x @ w) + b,
        jax.ShapeDtypeStruct((256, 128), jnp.float32),
        jax.ShapeDtypeStruct((128, 96), jnp.float32),
        jax.ShapeDtypeStruct((256, 96), jnp.float32),
    ).as_text()
    x, w, y = 4 * 256 * 128, 4 * 128 * 96, 4 * 256 * 96
    apart = (x + w + y) + (y + y + y)  # as one kernel, or as two
    assert count(text, {}).bytes in (apart, x + w + y + y)


def test_loops_whose_length_xla_knows():
    def f(x, ws):
        with jax.named_scope("layers"):
            x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]
        with jax.named_scope("five"):
            return jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ ws[i]), x)

    ws = jax.ShapeDtypeStruct((7, 64, 64), jnp.float32)
    text = compiled(f, SQUARE, ws).as_text()
    for lengths in ({}, {"layers": 100, "five": 100}):
        counts = count(text, lengths)
        assert total(counts) == (7 + 5) * PRODUCT
        assert counts.unknown == []
        assert counts.host_waits == 0


def test_a_loop_of_known_length_in_one_that_is_not():
    def f(x, n):
        def inner(i, x):
            return jnp.tanh(x @ x)

        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, n, lambda i, x: jax.lax.fori_loop(0, 30, inner, x), x)

    text = compiled(f, SQUARE, NUMBER).as_text()
    counts = count(text, {"outer": 2.5})
    assert total(counts) == pytest.approx(2.5 * 30 * PRODUCT)
    assert counts.host_waits == 3.5
    assert total(count_body(text, "outer", {})) == 30 * PRODUCT
    with pytest.raises(ConfigError, match="no loop in a scope 'innner'"):
        count_body(text, "innner", {})


def test_a_scope_does_not_reach_into_the_loops_of_its_loop_or_branch():
    """The inner loop has no scope of its own: it is neither `outer` nor `branch`."""

    def f(x, n):
        def search(x):
            return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ x), x)

        with jax.named_scope("branch"):
            x = jax.lax.cond(n > 5, search, lambda x: x, x)
        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, n, lambda i, x: search(x), x)

    counts = count(compiled(f, SQUARE, NUMBER).as_text(), {"outer": 50, "branch": 9})
    assert len(counts.unknown) == 2
    assert total(counts) == (1 + 50) * PRODUCT


def test_of_branches_the_costliest_counts():
    def f(x, n):
        x = jax.lax.cond(n > 5, lambda x: x @ x @ x @ x, lambda x: jnp.sin(x @ x), x)
        return jax.lax.cond(n > 7, lambda x: jnp.cos(x), lambda x: x @ x @ x, x)

    assert total(count(compiled(f, SQUARE, NUMBER).as_text(), {})) == (3 + 2) * PRODUCT


def test_lengths_out_of_range(training):
    with pytest.raises(ConfigError, match="length of 'steps' must be a number, 0 or more, got -1"):
        count(training, LENGTHS | {"steps": -1})


def test_updates_and_reads_of_slices_do_not_move_the_whole_array():
    def f(rows, table, at):
        def body(i, carry):
            kept, x = carry
            x = jnp.sin(x + table[at[i]])
            return jax.lax.dynamic_update_index_in_dim(kept, x, i, 0), x

        return jax.lax.fori_loop(0, 200, body, (rows, table[0]))

    rows = jax.ShapeDtypeStruct((200, 1000), jnp.float32)
    at = jax.ShapeDtypeStruct((200,), jnp.int32)
    text = compiled(f, rows, rows, at, donate_argnums=0).as_text()
    whole, row = 200 * 4000, 4000
    passes = count(text, {}).bytes / 200
    assert 3 * row < passes < 10 * row < whole


TPU = """HloModule jit_f, is_scheduled=true

%fused (p0: f32[64,256]) -> f32[64,256] {
  %p0 = f32[64,256]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %tanh.1 = f32[64,256]{1,0:T(8,128)} tanh(%p0)
}

%body (p: (s32[], f32[64,256], s32[])) -> (s32[], f32[64,256], s32[]) {
  %p = (s32[]{:T(128)}, f32[64,256]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %copy.1 = s32[]{:T(128)S(6)} copy(%i)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%copy.1, %one)
  %x = f32[64,256]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %n = s32[]{:T(128)} get-tuple-element(%p), index=2
  %start = (f32[64,256]{1,0:T(8,128)S(1)}, f32[64,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[64,256]{1,0:T(8,128)S(1)} copy-done(%start)
  %y = f32[64,256]{1,0:T(8,128)} fusion(%done), kind=kLoop, calls=%fused
  ROOT %t = (s32[]{:T(128)}, f32[64,256]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %y, %n)
}

%condition (q: (s32[], f32[64,256], s32[])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[64,256]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %m = s32[]{:T(128)} get-tuple-element(%q), index=2
  ROOT %lt = pred[]{:T(512)} compare(%j, %m), direction=LT
}

ENTRY %main (x: f32[64,256]) -> f32[64,256] {
  %x = f32[64,256]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(3)
  %first = s32[]{:T(128)} copy(%zero)
  %limit = s32[]{:T(128)} constant(13)
  %t = (s32[]{:T(128)}, f32[64,256]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%first, %x, %limit)
  %w = (s32[]{:T(128)}, f32[64,256]{1,0:T(8,128)}, s32[]{:T(128)}) while(%t), \
condition=%condition, body=%body, metadata={op_name="jit(f)/ten/while"}
  %y = f32[64,256]{1,0:T(8,128)} get-tuple-element(%w), index=1
  %part = ((f32[64,256]{1,0:T(8,128)}), f32[8,256]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%y), slice={[0:8], [0:256]}
  %got = f32[8,256]{1,0:T(8,128)S(1)} slice-done(%part)
  ROOT %sum = f32[64,256]{1,0:T(8,128)} all-reduce(%y), replica_groups={{0,1}}, to_apply=%condition
}
"""


def test_a_tpu_program():
    """Of a pass: the copy reads main memory, the fusion writes it; the rest is in vector memory."""
    array, word = 64 * 256 * 4, 128 * 4
    counts = count(TPU, {"ten": 1000})  # 3 to 13: ten passes; the text has no known_trip_count
    loop = 10 * (array + array + word)  # the counter is copied into scalar memory
    after = array // 8 + 2 * array  # a slice is fetched; the all-reduce
    assert counts.bytes == word + loop + after
    assert counts.vector_flops == 10 * 64 * 256
    assert counts.collectives == [Collective("all-reduce", array, 1.0)]
    unknown = TPU.replace("constant(13)", "parameter(1)")
    assert count(unknown, {"ten": 4}).vector_flops == 4 * 64 * 256
    assert [one.op_name for one in count(unknown, {}).unknown] == ["jit(f)/ten/while"]
    by_two = TPU.replace("constant(1)", "constant(2)")
    assert count(by_two, {"ten": 5}).vector_flops == 5 * 64 * 256


GPU = """HloModule jit_f, is_scheduled=true

%gemm (p0: bf16[64,32], p1: bf16[32,16]) -> f32[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%update (b: f32[100,16], u: f32[64,16], k: s32[]) -> f32[100,16] {
  %b = f32[100,16]{1,0} parameter(0)
  %u = f32[64,16]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %row = f32[1,16]{1,0} slice(%u), slice={[0:1], [0:16]}
  ROOT %dus = f32[100,16]{1,0} dynamic-update-slice(%b, %row, %k, %k)
}

%not (n: pred[]) -> pred[] {
  %n = pred[] parameter(0)
  ROOT %r = pred[] not(%n)
}

%check (q: (pred[], f32[100,16])) -> pred[] {
  %q = (pred[], f32[100,16]{1,0}) parameter(0)
  %g = pred[] get-tuple-element(%q), index=0
  ROOT %f = pred[] fusion(%g), kind=kLoop, calls=%not
}

%pass (q: (pred[], f32[100,16])) -> (pred[], f32[100,16]) {
  %q = (pred[], f32[100,16]{1,0}) parameter(0)
  %g = pred[] get-tuple-element(%q), index=0
  %b = f32[100,16]{1,0} get-tuple-element(%q), index=1
  %copy.1 = f32[100,16]{1,0} copy(%b), metadata={op_name="jit(f)/dyn/while/body/neg"}
  ROOT %t = (pred[], f32[100,16]{1,0}) tuple(%g, %copy.1)
}

%yes (a: f32[100,16]) -> f32[100,16] {
  %a = f32[100,16]{1,0} parameter(0)
  ROOT %c = f32[100,16]{1,0} copy(%a)
}

%no (a: f32[100,16]) -> f32[100,16] {
  ROOT %a = f32[100,16]{1,0} parameter(0)
}

%later (a: f32[100,16]) -> f32[100,16] {
  %a = f32[100,16]{1,0} parameter(0)
  ROOT %c = f32[100,16]{1,0} copy(%a)
}

ENTRY %main (x: bf16[64,32], w: bf16[32,16], k: s32[], g: pred[]) -> f32[100,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %g = pred[] parameter(3)
  %empty = f32[100,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %y = f32[64,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm, \
backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %b = f32[100,16]{1,0} fusion(%empty, %y, %k), kind=kLoop, calls=%update
  %as = ((f32[100,16]{1,0}), f32[100,16]{1,0}) async-start(%b), calls=%later
  %ad = f32[100,16]{1,0} async-done(%as)
  %ars = f32[100,16]{1,0} all-reduce-start(%ad), to_apply=%not
  %ard = f32[100,16]{1,0} all-reduce-done(%ars)
  %c = f32[100,16]{1,0} conditional(%g, %ard, %ard), true_computation=%yes, \
false_computation=%no
  %t = (pred[], f32[100,16]{1,0}) tuple(%g, %c)
  %w2 = (pred[], f32[100,16]{1,0}) while(%t), condition=%check, body=%pass
  ROOT %z = f32[100,16]{1,0} get-tuple-element(%w2), index=1
}
"""


def test_a_gpu_program():
    counts = count(GPU, {"dyn": 6})
    assert counts.flops == {"bfloat16": 2 * 64 * 32 * 16}
    buffer, row = 100 * 16 * 4, 16 * 4
    product = 2 * (64 * 32 + 32 * 16) + 4 * 64 * 16
    update = row + 4 + row  # one row of the product, where it goes, and the row written
    copied = 2 * buffer * (1 + 1 + 6)  # asynchronously; in a branch; in the loop
    assert counts.bytes == product + update + copied + 2 * buffer + 7 * 2  # all-reduce, condition
    assert counts.kernels == 1 + 1 + 1 + 1 + 1 + 6 + 7
    assert counts.host_waits == 1 + 7  # the branch; the loop's condition
    assert counts.collectives == [Collective("all-reduce", buffer, 1.0)]
    # XLA lost the loop's own name: it is that of what is inside.
    assert counts.unknown == []
    assert count(GPU, {"dyn": 0}).kernels == counts.kernels - 6 - 6


@pytest.mark.parametrize(
    "noted", ['{"known_trip_count":{"n":"4"}}', '"{\\"known_trip_count\\":{\\"n\\":\\"4\\"}}"']
)
def test_known_trip_counts_as_gpus_and_older_programs_have_them(noted):
    text = GPU.replace("body=%pass", f"body=%pass, backend_config={noted}")
    counts = count(text, {"dyn": 6})
    assert counts.host_waits == 1  # the host knows how often the loop runs
    assert counts.kernels == 5 + 4


def test_a_computation_that_is_missing():
    with pytest.raises(ConfigError, match="calls 'gone', which its text does not have"):
        count(GPU.replace("calls=%later", "calls=%gone"), {})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("target", "compiler"),
    [
        ("h100", "needs_gpu_compiler"),
        ("t4", "needs_gpu_compiler"),
        ("v5e", "needs_tpu_compiler"),
    ],
)
def test_training_steps_compiled_for_accelerators(target, compiler, dtype, request):
    request.getfixturevalue(compiler)
    targets = pytest.importorskip("jfed.planning.targets")
    device = targets.open_target(target).devices[0]
    text = compiled_text(1, device, jnp.dtype(dtype))
    counts = count(text, LENGTHS)
    expected = step_flops()
    if (target, dtype) == ("t4", "bfloat16"):
        # XLA writes the zeros of the input gradient with stride 2, and multiplies them.
        expected += 3 * forward(SIDE // 2, WIDTH, 2 * WIDTH)
    # Small products may be filled up with zeros to multiples of eight.
    assert total(counts) == pytest.approx(STEPS * expected, rel=0.01)
    assert counts.unknown == []
    assert max(counts.flops, key=counts.flops.get) in (
        dtype,
        "bfloat16",
        "float32" if target == "t4" else dtype,
    )
    waits = 2 * (3 + 6)  # both loops forward and backward
    assert count_body(text, "steps", LENGTHS).host_waits == waits


@pytest.mark.parametrize(
    "started",
    [
        "((f32[16,32], f32[32,64]), f32[16,64], u32[]) fusion-start(%x, %w), kind=kCustom, "
        "calls=%gemm",
        "((f32[16,32], f32[32,64]), f32[16,64], u32[]) dot-start(%x, %w), "
        "lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "((f32[16,32], f32[32,64]), f32[16,64], u32[]) call-start(%x, %w), to_apply=%gemm",
        "((f32[16,32], f32[32,64]), (f32[16,64], s8[4096])) custom-call-start(%x, %w), "
        'custom_call_target="__cublas$gemm", '
        'backend_config={"lhs_contracting_dimensions":["1"],"x":1}',
        "((f32[16,32], f32[32,64]), f32[16,64], u32[]) async-start(%x, %w), calls=%gemm",
    ],
)
def test_asynchronous_operations_as_xla_prints_them(started):
    counts = count(
        f"""HloModule m

%gemm (a: f32[16,32], b: f32[32,64]) -> f32[16,64] {{
  %a = f32[16,32] parameter(0)
  %b = f32[32,64] parameter(1)
  ROOT %d = f32[16,64] dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (x: f32[16,32], w: f32[32,64]) -> f32[16,64] {{
  %x = f32[16,32] parameter(0)
  %w = f32[32,64] parameter(1)
  %s = {started}
  ROOT %r = f32[16,64] {started.partition("-start")[0].split()[-1]}-done(%s)
}}
""",
        {},
    )
    assert counts.flops == {"float32": 2 * 16 * 32 * 64}
    assert counts.bytes == 4 * (16 * 32 + 32 * 64 + 16 * 64)
    assert counts.kernels == 1


@pytest.mark.parametrize("library", ["__cublas$lt$matmul", "__cudnn$convForward"])
def test_scratch_memory_of_libraries_is_not_moved(library):
    counts = count(
        f"""HloModule m

ENTRY %main (x: f32[1,1,8,32], w: f32[1,1,32,64]) -> f32[1,1,8,64] {{
  %x = f32[1,1,8,32] parameter(0)
  %w = f32[1,1,32,64] parameter(1)
  %c = (f32[1,1,8,64], s8[4194304]) custom-call(%x, %w), custom_call_target="{library}", \
window={{size=1x1}}, dim_labels=b01f_01io->b01f
  ROOT %r = f32[1,1,8,64] get-tuple-element(%c), index=0
}}
""",
        {},
    )
    assert counts.bytes == 4 * (8 * 32 + 32 * 64 + 8 * 64)


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("f32[8] all-reduce(%x), replica_groups={{0,1}}", 32),
        ("f32[8] all-reduce(%x), replica_groups={{0},{1}}", 0),
        ("f32[8] all-reduce(%x), replica_groups=[4,2]<=[8]", 32),
        ("f32[16] all-gather(%x), replica_groups={{0,1}}, dimensions={0}", 32),
        ("f32[32] all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", 96),
        ("(f32[8], f32[8], u32[], u32[]) collective-permute-start(%x), "
         "source_target_pairs={{0,1},{1,0}}", 32),
    ],
)  # fmt: skip
def test_what_a_device_sends(operation, sent):
    counts = count(
        "HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n"
        f"  ROOT %r = {operation}\n}}\n",
        {},
    )
    assert counts.sent == sent


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tuple(%next, %y, %n)", "tuple(%next, %y, %grown)"),  # the limit grows as well
        ("add(%copy.1, %one)", "add(%n, %one)"),  # not the counter, and one
    ],
)
def test_a_loop_whose_length_only_looks_constant_is_not_taken_for_one(before, after):
    assert before in TPU
    text = TPU.replace(before, after)
    n = "  %n = s32[]{:T(128)} get-tuple-element(%p), index=2\n"
    grown = "  %grown = s32[]{:T(128)} add(%n, %one)\n"
    text = (
        text.replace(n, "")
        .replace("  %one =", n + "  %one =")
        .replace("  %next =", grown + "  %next =")
    )
    assert not count(text, {"ten": 7}).unknown
    assert [one.name for one in count(text, {}).unknown] == ["w"]
