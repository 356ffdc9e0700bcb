// kda::chunk_fwd: from the checked call and its plan to the launches of the three stages.

#include "../device/nvtx_range.h"
#include "kernel_params.h"
#include "vectorized.h"

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
  params.chunk_slots = plan.chunk_slots;
  params.vectorized = is_vectorized(call);
  return params;
}

}  // namespace

cudaError_t chunk_fwd(const ChunkFwdParams& call, const ChunkFwdPlan& plan, cudaStream_t stream) {
  if (plan.path != ChunkFwdPath::kStaged) return cudaErrorNotSupported;
  const ChunkFwdKernelParams params = kernel_params(call, plan);
  {
    NvtxRange range("kda.intra_chunk_solve");
    const cudaError_t status = launch_intra_chunk_solve(params, stream);
    if (status != cudaSuccess) return status;
  }
  {
    NvtxRange range("kda.state_recurrence");
    const cudaError_t status = launch_state_recurrence(params, plan.value_tile, stream);
    if (status != cudaSuccess) return status;
  }
  NvtxRange range("kda.output_gemm");
  return launch_output_gemm(params, stream);
}

}  // namespace kda
