"""Texts of small programs compiled for accelerators, shortened."""

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
