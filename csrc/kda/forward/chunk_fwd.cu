// kda::chunk_fwd: from the checked call and its plan to the launches of the stages.

#include "../device/nvtx_range.h"
#include "kernel_params.h"

namespace kda {
namespace {

ChunkFwdKernelParams kernel_params(const ChunkFwdParams& call, const ChunkFwdPlan& plan) {
  uint8_t* const base = static_cast<uint8_t*>(call.workspace);
  const ChunkFwdWorkspace& workspace = plan.workspace;
  ChunkFwdKernelParams params = {};
  params.call = call;
  params.W = base + workspace.W;
  params.K_decayed = base + workspace.K_decayed;
  params.Q_gated = base + workspace.Q_gated;
  params.Aqk = base + workspace.Aqk;
  params.U = reinterpret_cast<uint4*>(base + workspace.U);
  params.state = reinterpret_cast<uint4*>(base + workspace.state);
  params.chunk_decay = reinterpret_cast<float*>(base + workspace.chunk_decay);
  if (plan.segment_chunks > 0) {
    params.segment_map = reinterpret_cast<float*>(base + workspace.segment_map);
    params.segment_state = reinterpret_cast<float4*>(base + workspace.segment_state);
  }
  params.chunk_slots = plan.chunk_slots;
  params.segment_chunks = plan.segment_chunks;
  params.segment_slots = plan.segment_slots;
  params.vectorized = inputs_are_aligned(call);
  return params;
}

// Launches one kernel under an NVTX range.
template <typename Launch>
cudaError_t run_stage(const char* name, Launch launch) {
  NvtxRange range(name);
  return launch();
}

}  // namespace

cudaError_t chunk_fwd(const ChunkFwdParams& call, const ChunkFwdPlan& plan, cudaStream_t stream) {
  if (plan.path == ChunkFwdPath::kComposite) return cudaErrorNotSupported;
  const ChunkFwdKernelParams params = kernel_params(call, plan);
  if (plan.path == ChunkFwdPath::kFused) {
    return run_stage("kda.fused_scan", [&] { return launch_fused_scan(params, plan.value_tile, stream); });
  }
  cudaError_t status = run_stage("kda.intra_chunk_solve", [&] { return launch_intra_chunk_solve(params, stream); });
  if (status == cudaSuccess && plan.segment_chunks > 0) {
    status =
        run_stage("kda.segment_summary", [&] { return launch_segment_summary(params, plan.segment_tile, stream); });
    if (status == cudaSuccess) {
      status = run_stage("kda.segment_compose", [&] { return launch_segment_compose(params, stream); });
    }
  }
  if (status == cudaSuccess) {
    status =
        run_stage("kda.state_recurrence", [&] { return launch_state_recurrence(params, plan.value_tile, stream); });
  }
  if (status != cudaSuccess) return status;
  return run_stage("kda.output_gemm", [&] { return launch_output_gemm(params, stream); });
}

}  // namespace kda
