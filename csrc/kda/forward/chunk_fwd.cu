// kda::chunk_fwd: from the checked call and its plan to the launches of the stages.

#include "../device/nvtx_range.h"
#include "step_params.h"

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
  params.vectorized = inputs_are_aligned(call);
  return params;
}

// Launches one kernel under an NVTX range.
template <typename Launch>
cudaError_t run_stage(const char* name, Launch launch) {
  NvtxRange range(name);
  return launch();
}

struct Stage {
  const char* name;
  cudaError_t (*launch)(const StepKernelParams&, cudaStream_t);
};

// The stages one after the other, until one fails.
cudaError_t run_stepwise(const StepKernelParams& params, cudaStream_t stream) {
  const bool wide = params.call.problem.key_dim == 128;
  const Stage factors = {"kda.step_factors", wide ? launch_step_factors_k128 : launch_step_factors_k64};
  const Stage summary = {"kda.segment_summary", wide ? launch_segment_summary_k128 : launch_segment_summary_k64};
  const Stage compose = {"kda.segment_compose", launch_segment_compose};
  const Stage scan = {"kda.state_scan", wide ? launch_state_scan_k128 : launch_state_scan_k64};
  const bool is_cut = params.segment_chunks > 0;
  for (const Stage& stage : {factors, summary, compose, scan}) {
    if (!is_cut && (stage.launch == summary.launch || stage.launch == compose.launch)) continue;
    const cudaError_t status = run_stage(stage.name, [&] { return stage.launch(params, stream); });
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t run_steps(const ChunkFwdParams& call, const ChunkFwdPlan& plan, cudaStream_t stream) {
  StepKernelParams params = {};
  params.call = call;
  const cudaError_t status = make_tensor_maps(params, plan.path == ChunkFwdPath::kFused ? plan.value_tile : 64);
  if (status != cudaSuccess) return status;
  if (plan.path == ChunkFwdPath::kFused) {
    const auto launch = call.problem.key_dim == 128 ? launch_fused_scan_k128 : launch_fused_scan_k64;
    return run_stage("kda.fused_scan", [&] { return launch(params, plan.value_tile, stream); });
  }
  uint8_t* const base = static_cast<uint8_t*>(call.workspace);
  params.images = base + plan.workspace.step_images;
  params.step_slots = plan.step_slots;
  params.segment_chunks = plan.segment_chunks;
  params.segment_slots = plan.segment_slots;
  if (plan.segment_chunks > 0) {
    params.segment_map = reinterpret_cast<float*>(base + plan.workspace.segment_map);
    params.segment_state = reinterpret_cast<float4*>(base + plan.workspace.segment_state);
    params.segment_faded = reinterpret_cast<uint32_t*>(base + plan.workspace.segment_faded);
  }
  return run_stepwise(params, stream);
}

}  // namespace

cudaError_t chunk_fwd(const ChunkFwdParams& call, const ChunkFwdPlan& plan, cudaStream_t stream) {
  if (plan.path == ChunkFwdPath::kComposite) return cudaErrorNotSupported;
  if (plan.path != ChunkFwdPath::kStaged) return run_steps(call, plan, stream);
  const ChunkFwdKernelParams params = kernel_params(call, plan);
  cudaError_t status = run_stage("kda.intra_chunk_solve", [&] { return launch_intra_chunk_solve(params, stream); });
  if (status == cudaSuccess) {
    status =
        run_stage("kda.state_recurrence", [&] { return launch_state_recurrence(params, plan.value_tile, stream); });
  }
  if (status != cudaSuccess) return status;
  return run_stage("kda.output_gemm", [&] { return launch_output_gemm(params, stream); });
}

}  // namespace kda
