// kda::chunk_bwd, and the forward that saves for it: from the checked call and its plan to the launches of the stages.
// The first two stages are those of the forward; the backward runs them again unless the forward has saved what they
// left.

#include "../device/nvtx_range.h"
#include "kernel_params.h"

namespace kda {
namespace {

// What the first two stages take and leave, with the intermediates at `base`.
ChunkFwdKernelParams stage_params(const ChunkFwdParams& call, const ChunkBwdPlan& plan, uint8_t* base) {
  const ChunkIntermediates& at = plan.intermediates;
  ChunkFwdKernelParams params = {};
  params.call = call;
  params.W = base + at.W;
  params.K_decayed = base + at.K_decayed;
  params.Q_gated = base + at.Q_gated;
  params.Aqk = base + at.Aqk;
  params.U = reinterpret_cast<uint4*>(base + at.U);
  params.state = reinterpret_cast<uint4*>(base + at.state);
  params.chunk_decay = reinterpret_cast<float*>(base + at.chunk_decay);
  params.inverse = base + at.inverse;
  params.chunk_slots = plan.chunk_slots;
  params.vectorized = inputs_are_aligned(call);
  return params;
}

ChunkBwdKernelParams kernel_params(const ChunkBwdParams& call, const ChunkBwdPlan& plan) {
  uint8_t* const base = static_cast<uint8_t*>(call.workspace);
  const ChunkBwdWorkspace& workspace = plan.workspace;
  const auto floats = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
  const auto fragments = [&](size_t offset) { return reinterpret_cast<uint4*>(base + offset); };
  const ChunkFwdProblem& problem = call.inputs.problem;

  ChunkBwdKernelParams params = {};
  // Saved intermediates are only read; the type of the kernels' parameters is that of the stages that write them.
  uint8_t* const saved = static_cast<uint8_t*>(const_cast<void*>(call.intermediates));
  params.forward = stage_params(call.inputs, plan, plan.saved ? saved : base + workspace.intermediates);
  params.forward.call.o = nullptr;
  params.forward.call.final_state = params.forward.call.chunk_states = nullptr;

  params.dO = call.dO;
  params.dfinal_state = call.dfinal_state;
  params.dq = call.dq, params.dk = call.dk, params.dv = call.dv, params.dg = call.dg, params.dbeta = call.dbeta;
  params.dA_log = call.dA_log, params.ddt_bias = call.ddt_bias, params.dinitial_state = call.dinitial_state;
  params.dstate = fragments(workspace.dstate);
  params.dU = fragments(workspace.dU);
  if (call.inputs.gate != GateKind::kLog) {
    params.dA_log_parts = floats(workspace.dA_log);
    params.ddt_bias_parts = floats(workspace.ddt_bias);
  }
  if (problem.value_heads > problem.heads) {
    params.dq_parts = floats(workspace.dq);
    params.dk_parts = floats(workspace.dk);
  }
  return params;
}

// Stages 1 and 2.
cudaError_t compute_intermediates(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  {
    NvtxRange range("kda.intra_chunk_solve");
    const cudaError_t status = launch_intra_chunk_solve(params, stream);
    if (status != cudaSuccess) return status;
  }
  NvtxRange range("kda.state_recurrence");
  return launch_state_recurrence(params, value_tile, stream);
}

}  // namespace

cudaError_t chunk_fwd_saving(const ChunkFwdParams& call, const ChunkBwdPlan& plan, cudaStream_t stream) {
  if (plan.path != ChunkFwdPath::kStaged) return cudaErrorNotSupported;
  const ChunkFwdKernelParams params = stage_params(call, plan, static_cast<uint8_t*>(call.workspace));
  const cudaError_t status = compute_intermediates(params, plan.value_tile, stream);
  if (status != cudaSuccess) return status;
  NvtxRange range("kda.output_gemm");
  return launch_output_gemm(params, stream);
}

cudaError_t chunk_bwd(const ChunkBwdParams& call, const ChunkBwdPlan& plan, cudaStream_t stream) {
  if (plan.path != ChunkFwdPath::kStaged) return cudaErrorNotSupported;
  if (plan.saved != (call.intermediates != nullptr) && plan.intermediates.total_bytes > 0) return cudaErrorInvalidValue;
  const ChunkBwdKernelParams params = kernel_params(call, plan);
  if (!plan.saved) {
    const cudaError_t status = compute_intermediates(params.forward, plan.value_tile, stream);
    if (status != cudaSuccess) return status;
  }
  {
    NvtxRange range("kda.reverse_recurrence");
    const cudaError_t status = launch_reverse_recurrence(params, plan.value_tile, stream);
    if (status != cudaSuccess) return status;
  }
  {
    NvtxRange range("kda.intra_chunk_gradients");
    const cudaError_t status = launch_intra_chunk_gradients(params, stream);
    if (status != cudaSuccess) return status;
  }
  NvtxRange range("kda.reduce_gradients");
  return launch_reduce_gradients(params, stream);
}

}  // namespace kda
