"""Bytes, FLOPs and cycles of compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from mmsr1_jax.apps.plan import hlo, traffic
from mmsr1_jax.apps.plan.traffic import KernelCost
from tests.apps.compiled_texts import GPU, TPU


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# As outside of tests, see `conftest.py`: a scatter is a kernel, not a loop.
AS_USUAL = {"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else None


def measured(function, *arguments, donate=(), **keywords):
    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile(AS_USUAL)
    return traffic.measure(compiled.as_text(), **keywords)


def test_a_product_reads_its_operands_and_writes_its_result():
    program = measured(jnp.matmul, array(64, 128), array(128, 256))
    assert program.bytes == 4 * (64 * 128 + 128 * 256 + 64 * 256)
    assert program.flops == 2 * 64 * 128 * 256


def test_a_scan_counts_its_body_once_per_layer():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    program = measured(layers, array(16, 128), array(5, 128, 128))
    assert program.unknown_loops == ()
    assert program.flops == 5 * 2 * 16 * 128 * 128
    (product,) = [i for i in program.instructions if i.flops]
    assert product.runs == 5
    assert product.bytes == 4 * (16 * 128 + 128 * 128 + 16 * 128)
    (taken,) = [i for i in program.instructions if "dynamic_slice" in i.where]
    assert taken.runs == 5
    # One layer of the stack and an index are read, not the whole stack.
    assert (taken.read, taken.written) == (4 * 128 * 128 + 4, 4 * 128 * 128)


def test_a_loop_that_counts_is_counted_where_the_compiler_does_not_state_it():
    def loop(x):
        def step(state):
            return state[0] + 3, jnp.sin(state[1]) + state[1][::-1]

        return jax.lax.while_loop(lambda state: state[0] < 20, step, (jnp.int32(2), x))

    text = jax.jit(loop).lower(array(1000)).compile(AS_USUAL).as_text()
    assert text.count("known_trip_count") == 1
    silent = text.replace('"known_trip_count":{"n":"6"}', '"other":{}')
    assert "known_trip_count" not in silent
    for program in map(traffic.measure, (text, silent)):
        (body,) = [i for i in program.instructions if i.bytes > 7000 and "body/add" in i.where]
        assert body.runs == 6  # at 2, 5, .., 17


def test_an_update_in_place_counts_the_update_only():
    def update(cache, new, index):
        return jax.lax.dynamic_update_slice(cache, new, (index, 0))

    program = measured(update, array(1024, 256), array(2, 256), array(dtype=jnp.int32), donate=0)
    assert program.bytes == 4 * (2 * 2 * 256) + 4  # `new` is read and written, the index read


def test_a_scatter_in_place_counts_the_update_only():
    program = measured(
        lambda table, rows, new: table.at[rows].set(new),
        array(4096, 128), array(8, dtype=jnp.int32), array(8, 128), donate=0,
    )  # fmt: skip
    assert program.bytes < 1.1 * (2 * 4 * 8 * 128)


def test_a_gather_reads_the_rows_that_it_takes():
    program = measured(
        lambda table, rows: table[rows] * 2, array(4096, 128), array(8, dtype=jnp.int32)
    )
    assert program.bytes == 4 * (2 * 8 * 128) + 4 * 8


def test_a_copy_of_a_cache_is_wasteful_and_a_product_is_not():
    cache = array(64, 128, 256)
    size = 4 * 64 * 128 * 256

    sizes = {"cache_bytes": size, "layer_bytes": size}
    (found,) = traffic.wasteful(measured(lambda cache: cache.transpose(2, 0, 1), cache), **sizes)
    assert (found.read, found.written) == (size, size)

    product = measured(lambda cache, x: cache @ x, cache, array(256))
    assert product.bytes > size
    assert traffic.wasteful(product, **sizes) == []


def test_a_loop_of_unknown_length_is_named_and_takes_a_given_count():
    def loop(x, count):
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.sin(x) + x[::-1], x)

    arguments = array(1000), array(dtype=jnp.int32)
    once = measured(loop, *arguments)
    assert once.unknown_loops == ("jit(loop)/while",)
    given = measured(loop, *arguments, trips={"loop)/while": 7})
    assert given.unknown_loops == ()
    (body,) = [i for i in once.instructions if i.where.endswith("body/add") and i.bytes > 100]
    (repeated,) = [i for i in given.instructions if i.name == body.name]
    assert (body.runs, repeated.runs) == (1, 7)
    assert body.bytes == 2 * 4 * 1000


def test_the_costliest_branch_counts_unless_fractions_are_given():
    def branch(predicate, x):
        return jax.lax.cond(predicate, lambda x: x @ x, lambda x: x + 1.0, x)

    arguments = array(dtype=jnp.bool_), array(256, 256)
    product = 2 * 256**3
    program = measured(branch, *arguments)
    assert program.flops == product
    assert [index for _, index in program.branches] == [1]
    assert measured(branch, *arguments, branches={"cond": (0.75, 0.25)}).flops == product / 4


def test_products_with_padding_do_not_count_in_convolutions():
    dimensions = ("NWC", "WIO", "NWC")
    program = measured(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (2,), "SAME", dimension_numbers=dimensions
        ),
        array(2, 10, 3), array(3, 3, 4),
    )  # fmt: skip
    # Five outputs of three products each, one of them with the padding at the end.
    assert program.flops == 2 * (2 * 4 * 3) * (5 * 3 - 1)


def test_a_tpu_program_counts_main_memory_cycles_and_kernels_as_they_state():
    program = traffic.measure(TPU)
    by_name = {i.name: i for i in program.instructions}
    weights, x, y = 2 * 3584 * 512, 2 * 48 * 3584, 2 * 48 * 512
    assert {by_name[name].runs for name in ("copy-start", "fusion.1", "kernel.1")} == {28}
    assert by_name["copy-start"].bytes == weights  # read; written to on-chip memory
    assert by_name["fusion.1"].bytes == x + y  # the weights are on the chip already
    assert by_name["fusion.1"].flops == 2 * 48 * 3584 * 512
    assert program.cycles == 28 * 2000
    (kernel,) = program.of_kind("kernel")
    assert (kernel.bytes, kernel.flops) == (123456, 900)
    assert kernel.where == "jit(step)/while/body/decode/pallas_call"
    given = traffic.measure(TPU, kernels={"decode/pallas_call": KernelCost(1000.0, 7.0)})
    assert [(k.bytes, k.flops) for k in given.of_kind("kernel")] == [(1000, 7)]


# Prefetches of parts of a matrix into on-chip memory: a slice of the matrix itself, and one of its
# bytes; then a copy back to main memory, and a slice of what is on the chip already.
PREFETCH = """HloModule jit_step, is_scheduled=true

ENTRY %main (w: bf16[4736,3584]) -> bf16[1184,3584] {
  %w = bf16[4736,3584]{1,0:T(8,128)(2,1)} parameter(0)
  %bytes = s8[33947648]{0:T(1024)(128)(4,1)} bitcast(%w)
  %slice-start = ((bf16[4736,3584]{1,0:T(8,128)(2,1)}), bf16[1184,3584]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:1184], [0:3584]}
  %slice-start.1 = ((s8[33947648]{0:T(1024)(128)(4,1)}), s8[4194304]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%bytes), slice={[0:4194304]}
  %slice-done = bf16[1184,3584]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %slice-done.1 = s8[4194304]{0:T(1024)(128)(4,1)S(1)} slice-done(%slice-start.1)
  %copy-start = (bf16[1184,3584]{1,0:T(8,128)(2,1)}, bf16[1184,3584]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%slice-done)
  %slice-start.2 = ((s8[4194304]{0:T(1024)(128)(4,1)S(1)}), s8[1024]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%slice-done.1), slice={[0:1024]}
  %slice-done.2 = s8[1024]{0:T(1024)(128)(4,1)S(1)} slice-done(%slice-start.2)
  ROOT %copy-done = bf16[1184,3584]{1,0:T(8,128)(2,1)} copy-done(%copy-start)
}
"""  # noqa: E501


def test_an_asynchronous_slice_counts_what_it_takes_and_its_end_is_listed():
    program = traffic.measure(PREFETCH)
    by_name = {i.name: i for i in program.instructions}
    part = 2 * 1184 * 3584
    assert (by_name["slice-start"].read, by_name["slice-start"].written) == (part, 0)
    assert (by_name["slice-start.1"].read, by_name["slice-start.1"].written) == (4194304, 0)
    assert (by_name["copy-start"].read, by_name["copy-start"].written) == (0, part)
    assert program.bytes == 2 * part + 4194304
    assert [i.name for i in program.of_kind("copy")] == [
        "slice-start",
        "slice-start.1",
        "copy-start",
    ]
    waits = {i.name: (i.start, i.bytes) for i in program.of_kind("wait")}
    assert waits == {
        "slice-done": ("slice-start", 0), "slice-done.1": ("slice-start.1", 0),
        "slice-done.2": ("slice-start.2", 0), "copy-done": ("copy-start", 0),
    }  # fmt: skip


def test_a_gpu_program_counts_slices_updates_and_libraries():
    program = traffic.measure(GPU)
    by_name = {i.name: i for i in program.instructions}
    product = by_name["gemm_fusion_dot"]
    assert product.read == 2 * 16 * 896 + 2 * 896 * 64 + 4  # one layer of 28
    assert product.flops == 2 * 16 * 64 * 896
    assert by_name["cublas"].flops == 2 * 16 * 16 * 64
    update = by_name["update"]
    assert (update.read, update.written) == (2 * 64 + 4, 2 * 64 + 2 * 64)
    (kernel,) = program.of_kind("kernel")
    assert kernel.bytes == 2 * (2 * 16 * 64)


def test_types_with_memory_spaces():
    text = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s4[8]{0}, f8e4m3fn[2]{0}, u32[], token[])"
    arrays = hlo.arrays(text)
    assert arrays == (
        hlo.Array("bf16", (2, 3), 1),
        hlo.Array("s4", (8,)),
        hlo.Array("f8e4m3fn", (2,)),
        hlo.Array("u32", ()),
    )
    assert [(a.bytes, a.memory_bytes) for a in hlo.arrays(text)] == [
        (12, 0),
        (4, 4),
        (2, 2),
        (4, 4),
    ]


def test_other_text_is_rejected():
    with pytest.raises(ValueError, match="no entry computation"):
        traffic.measure("module @jit_step {}")
