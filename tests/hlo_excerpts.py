"""Lines of real train steps as the TPU compiler writes them (libtpu 0.0.41, XL, fsdp over 4 or 16).

Left out: instructions that neither call nor are collectives, most operands, all `backend_config`.
"""

# v5e: gathers in pieces in the fusions of other work, or plain; reduce-scatters as fusions.
V5E = """\
HloModule jit__lambda, is_scheduled=true

%add.6.clone (x.1: f32[], y.1: f32[]) -> f32[] {
  ROOT %add.9 = f32[]{:T(128)} add(%x.1, %y.1)
}

%wide.region_17.24_spmd.clone (wide.param.1: (s32[], bf16[8,575,1280])) -> pred[] {
  %constant.1187.clone.2 = s32[]{:T(128)} constant(32)
  ROOT %lt.91 = pred[]{:T(512)} compare(%get-tuple-element.3118, %constant.1187.clone.2), direction=LT, metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while/cond/lt"}
}

%fused_computation.1171 (param_0.4284: bf16[1,320,5120]) -> (bf16[1,320,5120], bf16[1,1280,5120], s32[2], u32[]) {
  %all-gather.129 = bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.4284), channel_id=135, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=(0,4,8,12,1,5,9,13,2,6,10,14,3,7,11,15) {'axis_0'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="2"}, metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while/body/closed_call/blocks/mlp/fc1/dot_general"}
  ROOT %custom-call.30 = (bf16[1,320,5120]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.129), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.675 (param_0.4287: bf16[1,320,5120]) -> (bf16[8,575,3,20,64], bf16[1,1280,5120]) {
  %all-gather.131 = bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.4287), channel_id=135, dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while/body/closed_call/blocks/mlp/fc1/dot_general"}
}

%fused_computation.1176 (param_0.4316: bf16[1,320,5120]) -> bf16[1,1280,5120] {
  %all-gather.139 = bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.4316), channel_id=135, dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while/body/closed_call/blocks/mlp/fc1/dot_general"}
  ROOT %custom-call.32 = bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%param_0.4316, %param_1.5687, %all-gather.139), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1.clone.clone (input.5: f32[5120,1280]) -> f32[5120,320] {
  %all-reduce.123 = f32[5120,1280]{0,1:T(8,128)} all-reduce(%input.5), channel_id=41, replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, use_global_device_ids=true, to_apply=%add.6.clone, frontend_attributes={from-cross-replica-sharding="true"}
  ROOT %dynamic-slice.204 = f32[5120,320]{0,1:T(8,128)S(1)} dynamic-slice(%all-reduce.123, %constant.2056, %multiply.484), dynamic_slice_sizes={5120,320}
}

%wide.region_6.23_spmd.clone.sunk (wide.param.2: (s32[], bf16[8,575,1280])) -> (s32[], bf16[8,575,1280]) {
  %all-gather.198 = bf16[1,1280,3,20,64]{4,3,2,0,1:T(8,128)(2,1)S(1)} all-gather(%dynamic-slice_convert_fusion.26), channel_id=130, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=1,'axis_3'=1,'axis_4'=4], device_ids=(0,4,8,12,1,5,9,13,2,6,10,14,3,7,11,15) {'axis_0'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={async_collective_name="all-gather-start.4"}, metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while/body/closed_call/blocks/attn/qkv/dot_general"}
  %async-collective-start.2 = (bf16[1,320,5120]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%dynamic-slice_convert_fusion.25), kind=kCustom, calls=%fused_computation.1171
  %fusion.675 = (bf16[8,575,3,20,64]{1,4,3,2,0:T(8,128)(2,1)S(1)}, bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)S(1)}) fusion(%get-tuple-element.4059), kind=kOutput, calls=%async_collective_fusion.675, metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while/body/closed_call/blocks/attn/qkv/dot_general"}
  %async-collective-done.2 = bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.4060), kind=kCustom, calls=%fused_computation.1176
  %fusion.642 = f32[5120,320]{0,1:T(8,128)} fusion(%get-tuple-element.3958), kind=kCustom, calls=%all-reduce-scatter.1.clone.clone, metadata={op_name="jit(<lambda>)/transpose(jvp(CausalFusion))/while/body/closed_call/checkpoint/blocks/mlp/fc2/dot_general"}
  %all-reduce.126 = (f32[1280]{0:T(1024)S(1)}, f32[1280]{0:T(1024)}, /*index=2*/f32[1280]{0:T(1024)}) all-reduce(%dynamic-update-slice.84, %dynamic-update-slice.85, %dynamic-update-slice.86), channel_id=141, use_global_device_ids=true, to_apply=%add.6.clone
}

ENTRY %main.99_spmd (param.1: f32[1001,5120], param.2: s32[8]) -> f32[1001,5120] {
  %while.69 = (s32[]{:T(128)}, bf16[8,575,1280]{2,1,0:T(8,128)(2,1)}) while(%tuple.456), condition=%wide.region_17.24_spmd.clone, body=%wide.region_6.23_spmd.clone.sunk, metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while"}
  %all-to-all.5 = bf16[8,16,5120]{2,0,1:T(8,128)(2,1)S(1)} all-to-all(%copy.223), channel_id=89, replica_groups=mesh['axis_0'=1,'axis_1'=16] {'axis_1'}, dimensions={1}, metadata={op_name="jit(<lambda>)/transpose(jvp(CausalFusion))/CausalFusion.condition_tokens/convert_element_type"}
}
"""

# v4 with xla_enable_async_all_gather=true: pairs of start and done.
V4 = """\
HloModule jit__lambda, is_scheduled=true

ENTRY %main.99_spmd (param.1: f32[80,5120]) -> f32[1280,5120] {
  %all-gather-start.6 = (bf16[1,80,5120]{2,1,0:T(8,128)(2,1)}, bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)}) all-gather-start(%dynamic-slice_convert_fusion.22), channel_id=127, replica_groups=mesh['axis_0'=16,'axis_1'=8] {'axis_0'}, dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while/body/closed_call/blocks/mlp/fc1/dot_general"}
  %all-gather-done.6 = bf16[1,1280,5120]{2,1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start.6), metadata={op_name="jit(<lambda>)/jvp(CausalFusion)/while/body/closed_call/blocks/mlp/fc1/dot_general"}
}
"""
