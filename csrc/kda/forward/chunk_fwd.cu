// kda::chunk_fwd: from the checked call and its plan to the launches of the stages.

#include "../device/nvtx_range.h"
#include "step_params.h"

namespace kda {
namespace {

template <int K>
cudaError_t run_stepwise(const StepKernelParams& params, cudaStream_t stream) {
  cudaError_t status = run_stage("kda.step_factors", [&] { return launch_step_factors<K>(params, stream); });
  if (status == cudaSuccess && params.segment_chunks > 0) {
    status = run_stage("kda.segment_summary", [&] { return launch_segment_summary<K>(params, stream); });
    if (status == cudaSuccess) {
      status = run_stage("kda.segment_compose", [&] { return launch_segment_compose(params, stream); });
    }
  }
  if (status != cudaSuccess) return status;
  return run_stage("kda.state_scan", [&] { return launch_state_scan<K>(params, stream); });
}

template <int K>
cudaError_t run_steps(const ChunkFwdParams& call, const ChunkFwdPlan& plan, cudaStream_t stream) {
  StepKernelParams params = {};
  params.call = call;
  const cudaError_t status = make_tensor_maps(params);
  if (status != cudaSuccess) return status;
  uint8_t* const base = static_cast<uint8_t*>(call.workspace);
  if (plan.path == ChunkFwdPath::kFused) {
    params.clusters = plan.clusters;
    if (plan.workspace.total_bytes > 0) {
      params.handoff_states = reinterpret_cast<float4*>(base + plan.workspace.handoff_states);
      params.handoff_flags = reinterpret_cast<uint32_t*>(base + plan.workspace.handoff_flags);
    }
    return run_stage("kda.fused_scan", [&] { return launch_fused_scan<K>(params, stream); });
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

cudaError_t run_first_stages(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  const cudaError_t status =
      run_stage("kda.intra_chunk_solve", [&] { return launch_intra_chunk_solve(params, stream); });
  if (status != cudaSuccess) return status;
  return run_stage("kda.state_recurrence", [&] { return launch_state_recurrence(params, value_tile, stream); });
}

cudaError_t run_stages(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  const cudaError_t status = run_first_stages(params, value_tile, stream);
  if (status != cudaSuccess) return status;
  return run_stage("kda.output_gemm", [&] { return launch_output_gemm(params, stream); });
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
    case ChunkFwdPath::kFused:
    case ChunkFwdPath::kStepwise:
      return call.problem.key_dim == 128 ? run_steps<128>(call, plan, stream) : run_steps<64>(call, plan, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace kda
