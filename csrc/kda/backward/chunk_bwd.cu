// kda::chunk_bwd: from the checked call and its plan to the launches of the stages. The first two are those of the
// forward: only inputs are saved, and what the gradients need besides is computed again.

#include "../device/nvtx_range.h"
#include "kernel_params.h"

namespace kda {
namespace {

ChunkBwdKernelParams kernel_params(const ChunkBwdParams& call, const ChunkBwdPlan& plan) {
  uint8_t* const base = static_cast<uint8_t*>(call.workspace);
  const ChunkBwdWorkspace& workspace = plan.workspace;
  const auto floats = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
  const auto fragments = [&](size_t offset) { return reinterpret_cast<uint4*>(base + offset); };
  const ChunkFwdProblem& problem = call.inputs.problem;

  ChunkBwdKernelParams params = {};
  params.forward.call = call.inputs;
  params.forward.call.o = nullptr;
  params.forward.call.final_state = params.forward.call.chunk_states = nullptr;
  params.forward.W = base + workspace.W;
  params.forward.K_decayed = base + workspace.K_decayed;
  params.forward.Q_gated = base + workspace.Q_gated;
  params.forward.Aqk = base + workspace.Aqk;
  params.forward.U = fragments(workspace.U);
  params.forward.state = fragments(workspace.state);
  params.forward.chunk_decay = floats(workspace.chunk_decay);
  params.forward.inverse = base + workspace.inverse;
  params.forward.chunk_slots = plan.chunk_slots;
  params.forward.vectorized = inputs_are_aligned(call.inputs);

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

}  // namespace

cudaError_t chunk_bwd(const ChunkBwdParams& call, const ChunkBwdPlan& plan, cudaStream_t stream) {
  if (plan.path != ChunkFwdPath::kStaged) return cudaErrorNotSupported;
  const ChunkBwdKernelParams params = kernel_params(call, plan);
  {
    NvtxRange range("kda.intra_chunk_solve");
    const cudaError_t status = launch_intra_chunk_solve(params.forward, stream);
    if (status != cudaSuccess) return status;
  }
  {
    NvtxRange range("kda.state_recurrence");
    const cudaError_t status = launch_state_recurrence(params.forward, plan.value_tile, stream);
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
