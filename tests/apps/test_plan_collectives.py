"""Collectives are counted once, by the groups of devices that take part."""

import pytest

from mmsr1_jax.apps.plan import collectives, traffic
from tests.apps.compiled_texts import GPU, TPU


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
    assert program.gathers((2048, 2048), "") == 1 and program.gathers((2048, 512), "") == 0
    (product,) = [i for i in program.instructions if i.flops]
    assert (product.kind, product.name, product.links) == ("other", "fusion.26", 0)
    assert (product.flops, product.cycles) == (2 * 2048 * 1024 * 2048, 61000)
    assert (product.read, product.written) == (2 * factor, whole)
    assert [(i.name, i.start) for i in program.of_kind("wait")] == [
        ("async-collective-done", "async-collective-start")
    ]
    assert program.bytes == part + 2 * whole + 2 * factor


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
