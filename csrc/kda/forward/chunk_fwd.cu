// kda::chunk_fwd: from the checked call and its plan to the launches of the stages.

#include "../device/nvtx_range.h"
#include "forgetting.cuh"
#include "step_params.h"

namespace kda {
namespace {

template <int K>
cudaError_t run_stepwise(const StepKernelParams& params, cudaStream_t stream) {
  StageSequence stages;
  if (params.left.cuts != nullptr) {
    stages.run("kda.fused_cut", [&] { return launch_fused_cut<K>(params, stream); });
  }
  stages.run("kda.step_factors", [&] { return launch_step_factors<K>(params, stream); });
  if (params.segment_chunks > 0) {
    stages.run("kda.segment_summary", [&] { return launch_segment_summary<K>(params, stream); });
    const SegmentMaps maps = {params.segment_map, params.segment_state, params.segment_faded, /*is_reversed=*/false};
    stages.run("kda.segment_compose", [&] {
      return launch_segment_compose({params.call, params.segment_chunks, {maps}, 1, params.left}, stream);
    });
  }
  stages.run("kda.state_scan", [&] { return launch_state_scan<K>(params, stream); });
  return stages.status;
}

template <int K>
cudaError_t run_steps(const ChunkFwdParams& call, const ChunkFwdPlan& plan, cudaStream_t stream) {
  StepKernelParams params = {};
  params.call = call;
  const cudaError_t status = make_tensor_maps(params.maps, params.call);
  if (status != cudaSuccess) return status;
  uint8_t* const base = static_cast<uint8_t*>(call.workspace);
  params.clusters = plan.clusters;
  if (plan.path == ChunkFwdPath::kFused) {
    if (plan.workspace.total_bytes > 0) {
      params.handoff_states = reinterpret_cast<float4*>(base + plan.workspace.handoff_states);
      params.handoff_flags = reinterpret_cast<uint32_t*>(base + plan.workspace.handoff_flags);
    }
    return run_stage("kda.fused_scan", [&] { return launch_fused_scan<K>(params, stream); });
  }
  if (plan.path == ChunkFwdPath::kFusedCut) {
    params.left = {reinterpret_cast<uint2*>(base + plan.workspace.left_chains), static_cast<int>(plan.clusters)};
  }
  params.images = base + plan.workspace.step_images;
  params.step_slots = plan.step_slots;
  params.segment_chunks = plan.segment_chunks;
  params.segment_slots = plan.segment_slots;
  if (plan.segment_chunks > 0) {
    params.segment_map = reinterpret_cast<float*>(base + plan.workspace.segment_map);
    params.segment_state = reinterpret_cast<float4*>(base + plan.workspace.segment_state);
    params.segment_faded = reinterpret_cast<uint32_t*>(base + plan.workspace.segment_faded);
  }
  return run_stepwise<K>(params, stream);
}

}  // namespace

cudaError_t run_stages(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  const RecurrenceSegments& segments = params.segments;
  StageSequence stages;
  stages.run("kda.intra_chunk_solve", [&] { return launch_intra_chunk_solve(params, stream); });
  if (segments.chunks > 0) {
    stages.run("kda.state_summary", [&] { return launch_state_summary(params, stream); });
    stages.run("kda.segment_compose", [&] {
      return launch_segment_compose({params.call, segments.chunks, {segments.state_maps()}, 1}, stream);
    });
  }
  stages.run("kda.state_recurrence", [&] { return launch_state_recurrence(params, value_tile, stream); });
  stages.run("kda.output_gemm", [&] { return launch_output_gemm(params, stream); });
  return stages.status;
}

cudaError_t chunk_fwd(const ChunkFwdParams& call, const ChunkFwdPlan& plan, cudaStream_t stream) {
  switch (plan.path) {
    case ChunkFwdPath::kComposite:
      return cudaErrorNotSupported;
    case ChunkFwdPath::kStaged: {
      uint8_t* const base = static_cast<uint8_t*>(call.workspace);
      ChunkFwdKernelParams params = stage_params(call, plan.workspace, base, plan.chunk_slots);
      params.U = reinterpret_cast<uint4*>(base + plan.workspace.U);
      return run_stages(params, plan.value_tile, stream);
    }
    case ChunkFwdPath::kFusedCut:
      // The plan was made for a problem that says so: a state that tokens may enlarge would be dropped.
      if (!is_contractive(call)) return cudaErrorInvalidValue;
      [[fallthrough]];
    case ChunkFwdPath::kFused:
    case ChunkFwdPath::kStepwise:
      return call.problem.key_dim == 128 ? run_steps<128>(call, plan, stream) : run_steps<64>(call, plan, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace kda
