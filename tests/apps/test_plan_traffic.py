"""Bytes, FLOPs and cycles of compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from mmsr1_jax.apps.plan import collectives, hlo, traffic
from mmsr1_jax.apps.plan.traffic import KernelCost


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# As outside of tests, see `conftest.py`: a scatter is a kernel, not a loop.
AS_USUAL = {"xla_cpu_use_fusion_emitters": True}


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


# Lines of programs for a TPU: a loop that counts in twos and whose body copies to on-chip memory,
# multiplies by weights there, and calls a kernel; then a reduce-scatter in the form of a fusion.
TPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(s32[])->s32[]}

FileNames
1 "model.py"

%fused_computation (param_0: bf16[48,3584], param_1: bf16[3584,512]) -> bf16[48,512] {
  %param_0 = bf16[48,3584]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[3584,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[48,512]{1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), dim_labels=bf_io->bf
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%all-reduce-scatter (input: f32[48,512]) -> f32[12,512] {
  %input = f32[48,512]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[48,512]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[12,512]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={12,512}
}

%condition (arguments: (s32[], bf16[48,3584])) -> pred[] {
  %limit = s32[]{:T(128)} constant(56)
  %arguments = (s32[]{:T(128)}, bf16[48,3584]{1,0:T(8,128)(2,1)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%arguments), index=0
  ROOT %less = pred[]{:T(512)} compare(%index, %limit), direction=LT
}

%body (arguments.1: (s32[], bf16[48,3584], bf16[3584,512], bf16[48,512])) -> (s32[], bf16[48,3584], bf16[3584,512], bf16[48,512]) {
  %arguments.1 = (s32[]{:T(128)}, bf16[48,3584]{1,0:T(8,128)(2,1)}, bf16[3584,512]{1,0:T(8,128)(2,1)}, /*index=3*/bf16[48,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%arguments.1), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%index.1, %two)
  %x.1 = bf16[48,3584]{1,0:T(8,128)(2,1)} get-tuple-element(%arguments.1), index=1
  %weights = bf16[3584,512]{1,0:T(8,128)(2,1)} get-tuple-element(%arguments.1), index=2
  %copy-start = (bf16[3584,512]{1,0:T(8,128)(2,1)S(1)}, bf16[3584,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%weights)
  %copy-done = bf16[3584,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fusion.1 = bf16[48,512]{1,0:T(8,128)(2,1)} fusion(%x.1, %copy-done), kind=kOutput, calls=%fused_computation, metadata={op_name="jit(step)/while/body/dot_general"}, backend_config={"window_config":{"estimated_cycles":"2000"}}
  %kernel.1 = bf16[48,512]{1,0:T(8,128)(2,1)} custom-call(%fusion.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={

}}, metadata={op_name="jit(step)/while/body/decode/pallas_call"}, backend_config={"custom_call_config":{"body":"TUxJ==","cost_estimate":{"flops":"900","transcendentals":"10","bytes_accessed":"123456"}}}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[48,3584]{1,0:T(8,128)(2,1)}, bf16[3584,512]{1,0:T(8,128)(2,1)}, bf16[48,512]{1,0:T(8,128)(2,1)}) tuple(%next, %x.1, %weights, %kernel.1)
}

ENTRY %main (x: bf16[48,3584], w: bf16[3584,512], z: bf16[48,512], y: f32[48,512]) -> f32[12,512] {
  %zero.1 = s32[]{:T(128)} constant(0)
  %x.2 = bf16[48,3584]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[3584,512]{1,0:T(8,128)(2,1)} parameter(1)
  %z.1 = bf16[48,512]{1,0:T(8,128)(2,1)} parameter(2)
  %y.1 = f32[48,512]{1,0:T(8,128)} parameter(3)
  %start = (s32[]{:T(128)}, bf16[48,3584]{1,0:T(8,128)(2,1)}, bf16[3584,512]{1,0:T(8,128)(2,1)}, bf16[48,512]{1,0:T(8,128)(2,1)}) tuple(%zero.1, %x.2, %w.1, %z.1)
  %while.1 = (s32[]{:T(128)}, bf16[48,3584]{1,0:T(8,128)(2,1)}, bf16[3584,512]{1,0:T(8,128)(2,1)}, bf16[48,512]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %fusion.2 = f32[12,512]{1,0:T(8,128)} fusion(%y.1), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


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


def test_a_reduce_scatter_receives_its_operand_once():
    (collective,) = traffic.measure(TPU).of_kind("collective")
    operand = 4 * 48 * 512
    assert collective.bytes == operand + operand / 4
    assert collective.links == operand * 3 / 4


# An asynchronous collective of a TPU: three fusions with the same channel, one of which is a
# product that hides it.
ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true

%fused_start (param_0: bf16[1,2048,512]) -> (bf16[1,2048,512], bf16[1,2048,2048], s32[2], u32[]) {
  %param_0 = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.19 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=8, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={2}, use_global_device_ids=true
  ROOT %custom-call.4 = (bf16[1,2048,512]{2,1,0:T(8,128)(2,1)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.19), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.26 (param_0.1: bf16[1,2048,512], param_1.1: bf16[1,2048,2048], param_2.1: s32[2], param_3.1: u32[], param_4.1: bf16[2048,1024], param_5.1: bf16[1024,2048]) -> (bf16[2048,2048], bf16[1,2048,512], bf16[1,2048,2048], bf16[1,2048,2048], s32[2], u32[]) {
  %param_0.1 = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.1 = s32[2]{0:S(4)} parameter(2)
  %param_3.1 = u32[]{:S(2)} parameter(3)
  %param_4.1 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(4)
  %param_5.1 = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(5)
  %convolution.13 = bf16[2048,2048]{1,0:T(8,128)(2,1)} convolution(%param_4.1, %param_5.1), dim_labels=bf_io->bf
  %all-gather.21 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=8, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={2}, use_global_device_ids=true
  ROOT %tuple.56 = (bf16[2048,2048]{1,0:T(8,128)(2,1)}, bf16[1,2048,512]{2,1,0:T(8,128)(2,1)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, /*index=5*/u32[]{:S(2)}) tuple(%convolution.13, %param_0.1, %param_1.1, %all-gather.21, %param_2.1, /*index=5*/%param_3.1)
}

%fused_done (param_0.2: bf16[1,2048,512], param_1.2: bf16[1,2048,2048], param_2.2: s32[2], param_3.2: u32[]) -> bf16[1,2048,2048] {
  %param_0.2 = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.23 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=8, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={2}, use_global_device_ids=true
  %param_2.2 = s32[2]{0:S(4)} parameter(2)
  %param_3.2 = u32[]{:S(2)} parameter(3)
  ROOT %custom-call.6 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} custom-call(%param_0.2, %param_1.2, %all-gather.23, %param_2.2, %param_3.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[1,2048,512], x: bf16[2048,1024], y: bf16[1024,2048]) -> (bf16[1,2048,2048], bf16[2048,2048]) {
  %w = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %y = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %async-collective-start = (bf16[1,2048,512]{2,1,0:T(8,128)(2,1)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%fused_start
  %operand = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=0
  %gathered = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %context = s32[2]{0:S(4)} get-tuple-element(%async-collective-start), index=2
  %flag = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=3
  %fusion.26 = (bf16[2048,2048]{1,0:T(8,128)(2,1)}, bf16[1,2048,512]{2,1,0:T(8,128)(2,1)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}, bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, /*index=5*/u32[]{:S(2)}) fusion(%operand, %gathered, %context, %flag, %x, /*index=5*/%y), kind=kOutput, calls=%async_collective_fusion.26, backend_config={"window_config":{"estimated_cycles":"61000"}}
  %product = bf16[2048,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.26), index=0
  %operand.1 = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%fusion.26), index=1
  %gathered.1 = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} get-tuple-element(%fusion.26), index=2
  %context.1 = s32[2]{0:S(4)} get-tuple-element(%fusion.26), index=4
  %flag.1 = u32[]{:S(2)} get-tuple-element(%fusion.26), index=5
  %async-collective-done = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} fusion(%operand.1, %gathered.1, %context.1, %flag.1), kind=kCustom, calls=%fused_done
  ROOT %tuple = (bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}) tuple(%async-collective-done, %product)
}
"""  # noqa: E501


def test_an_asynchronous_collective_counts_once_and_the_product_that_hides_it_is_one():
    program = traffic.measure(ASYNCHRONOUS)
    part, whole, factor = 2 * 2048 * 512, 2 * 2048 * 2048, 2 * 2048 * 1024
    (gather,) = program.collectives
    assert (gather.kind, gather.name) == ("collective", "async-collective-start")
    assert (gather.read, gather.written, gather.links) == (part, whole, whole * 3 / 4)
    assert program.link_bytes == gather.links
    assert program.gathers((2048, 2048)) == 1 and program.gathers((2048, 512)) == 0
    (product,) = [i for i in program.instructions if i.flops]
    assert (product.kind, product.name, product.links) == ("other", "fusion.26", 0)
    assert (product.flops, product.cycles) == (2 * 2048 * 1024 * 2048, 61000)
    assert (product.read, product.written) == (2 * factor, whole)
    assert [(i.name, i.start) for i in program.of_kind("wait")] == [
        ("async-collective-done", "async-collective-start")
    ]
    assert program.bytes == part + 2 * whole + 2 * factor


# Lines of programs for a GPU: a fused product, a cuBLAS call, a Triton kernel, an update in place
# that is one of two results of a fusion, and asynchronous collectives.
GPU = """HloModule jit_step, is_scheduled=true

%fused_dot (p0: bf16[16,896], p1: bf16[28,896,64], p2: s32[]) -> bf16[16,64] {
  %p0 = bf16[16,896]{1,0} parameter(0)
  %p1 = bf16[28,896,64]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %layer = bf16[1,896,64]{2,1,0} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,896,64}
  %weights = bf16[896,64]{1,0} bitcast(%layer)
  ROOT %dot.1 = bf16[16,64]{1,0} dot(%p0, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_update (q0: bf16[4096,64], q1: bf16[1,64], q2: s32[]) -> (bf16[4096,64], bf16[1,64]) {
  %q0 = bf16[4096,64]{1,0} parameter(0)
  %q1 = bf16[1,64]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %new = bf16[1,64]{1,0} negate(%q1)
  %dynamic-update-slice.1 = bf16[4096,64]{1,0} dynamic-update-slice(%q0, %new, %q2, %zero.1)
  ROOT %tuple.1 = (bf16[4096,64]{1,0}, bf16[1,64]{1,0}) tuple(%dynamic-update-slice.1, %new)
}

ENTRY %main (x: bf16[16,896], w: bf16[28,896,64], i: s32[], c: bf16[4096,64], n: bf16[1,64]) -> bf16[16,896] {
  %x = bf16[16,896]{1,0} parameter(0)
  %w = bf16[28,896,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = bf16[4096,64]{1,0} parameter(3)
  %n = bf16[1,64]{1,0} parameter(4)
  %gemm_fusion_dot = bf16[16,64]{1,0} fusion(%x, %w, %i), kind=kCustom, calls=%fused_dot, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %cublas = (bf16[16,16]{1,0}, s8[4096]{0}) custom-call(%gemm_fusion_dot, %gemm_fusion_dot), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %kernel = bf16[16,64]{1,0} custom-call(%gemm_fusion_dot), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/decode/pallas_call"}
  %update = (bf16[4096,64]{1,0}, bf16[1,64]{1,0}) fusion(%c, %n, %i), kind=kLoop, calls=%fused_update
  %gather-start = (bf16[16,64]{1,0}, bf16[16,512]{1,0}) all-gather-start(%kernel), channel_id=1, replica_groups=[4,8]<=[32], dimensions={1}
  %gather = bf16[16,512]{1,0} all-gather-done(%gather-start)
  %reduce-start = bf16[16,896]{1,0} all-reduce-start(%x), channel_id=2, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %reduce = bf16[16,896]{1,0} all-reduce-done(%reduce-start)
}
"""  # noqa: E501


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


def test_asynchronous_collectives_count_once():
    program = traffic.measure(GPU)
    gather, reduction = program.of_kind("collective")
    assert (gather.read, gather.written) == (2 * 16 * 64, 2 * 16 * 512)
    assert gather.links == 2 * 16 * 512 * 7 / 8
    assert (reduction.read, reduction.written) == (2 * 16 * 896,) * 2
    assert reduction.links == 2 * (2 * 16 * 896) * 3 / 4
    assert gather.asynchronous and reduction.asynchronous
    waits = {i.name: i.start for i in program.of_kind("wait")}
    assert waits == {"gather": "gather-start", "reduce": "reduce-start"}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,1,2,3}}", [(0, 1, 2, 3)]),
        ("replica_groups={{0},{1}}", [(0,), (1,)]),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[8]", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=[2,2]<=[2,1,2]T(2,1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
        ("replica_groups={}", []),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", [(0, 1), (1, 2), (2, 0)]),
    ],
)
def test_groups_of_devices(groups, expected):
    assert list(collectives.device_groups(f"channel_id=1, {groups}, x=1")) == expected


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
