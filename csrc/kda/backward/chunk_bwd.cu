// kda::chunk_bwd, and the forward that saves for it: from the checked call and its plan to the launches of the stages.
// The first two stages are those of the forward; the backward runs them again unless the forward has saved what they
// left.

#include <cstdlib>

#include "../device/nvtx_range.h"
#include "kernel_params.h"

namespace kda {
namespace {

// What the first two stages take and leave: the intermediates at `base`, and with the regions U0 and beta of the workspace at `at`.
template <typename Workspace>
ChunkFwdKernelParams first_stage_params(const ChunkFwdParams& call, const ChunkBwdPlan& plan, uint8_t* base,
                                        uint8_t* at, const Workspace& workspace, const RecurrenceSegments& segments) {
  ChunkFwdKernelParams params = stage_params(call, plan.intermediates, base, plan.chunk_slots);
  params.inverse = base + plan.intermediates.inverse;
  params.U = reinterpret_cast<uint4*>(at + workspace.U0);
  if (plan.makes_values) params.beta = reinterpret_cast<float*>(at + workspace.beta);
  params.U_rounded = reinterpret_cast<uint4*>(base + plan.intermediates.U);
  params.U_low = reinterpret_cast<uint4*>(base + plan.intermediates.U_low);
  params.Q_gated_low = base + plan.intermediates.Q_gated_low;
  params.segments = segments;
  return params;
}

// The cut of the plan with its regions in the workspace at `base`: those of the recurrences that run.
RecurrenceSegments segments_at(uint8_t* base, const SegmentRegions& at, const ChunkBwdPlan& plan, bool of_state,
                               bool of_gradient) {
  RecurrenceSegments segments = {plan.segment_chunks, plan.segment_slots};
  if (plan.segment_chunks == 0) return segments;
  if (of_state) {
    segments.map = reinterpret_cast<float*>(base + at.map);
    segments.state = reinterpret_cast<float4*>(base + at.state);
  }
  if (of_gradient) {
    segments.transposed_map = reinterpret_cast<float*>(base + at.transposed_map);
    segments.dstate = reinterpret_cast<float4*>(base + at.dstate);
  }
  return segments;
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
  params.forward = first_stage_params(call.inputs, plan, plan.saved ? saved : base + workspace.intermediates, base,
                                      workspace, segments_at(base, workspace.segments, plan, !plan.saved, true));
  params.forward.wants_output = false;
  params.forward.call.o = nullptr;
  params.forward.call.final_state = params.forward.call.chunk_states = nullptr;

#ifdef KDA_TIMELINE
  const char* const timeline = std::getenv("KDA_TIMELINE_BUFFER");  // address and places, in decimal digits
  char* end = nullptr;
  if (timeline != nullptr) params.forward.timeline = reinterpret_cast<void*>(std::strtoull(timeline, &end, 10));
  if (end != nullptr) params.forward.timeline_places = static_cast<uint32_t>(std::strtoul(end, nullptr, 10));
#endif

  params.dO = call.dO;
  params.dfinal_state = call.dfinal_state;
  params.dq = call.dq, params.dk = call.dk, params.dv = call.dv, params.dg = call.dg, params.dbeta = call.dbeta;
  params.dA_log = call.dA_log, params.ddt_bias = call.ddt_bias, params.dinitial_state = call.dinitial_state;
  params.dstate = base + workspace.dstate;
  params.dU = fragments(workspace.dU);
  params.dstate_low = fragments(workspace.dstate_low);
  params.dU_low = fragments(workspace.dU_low);
  params.by_levels = reinterpret_cast<uint32_t*>(base + workspace.by_levels);
  if (plan.gradients_beside) {
    params.early_ctas = plan.early_gradients;
    params.forward.progress = reinterpret_cast<uint32_t*>(base + workspace.progress);
    constexpr int kRecurrences = 2;
    params.forward.followed_ctas = static_cast<uint32_t>(plan.followed_ctas);
    params.progress_wanted = kRecurrences * (problem.value_dim / plan.value_tile);
  }
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

cudaError_t chunk_fwd_saving(const ChunkFwdParams& call, void* intermediates, const ChunkBwdPlan& plan,
                             cudaStream_t stream) {
  if (plan.path != ChunkFwdPath::kStaged) return cudaErrorNotSupported;
  const ChunkSavingWorkspace& workspace = plan.saving_workspace;
  uint8_t* const base = static_cast<uint8_t*>(call.workspace);
  return run_stages(first_stage_params(call, plan, static_cast<uint8_t*>(intermediates), base, workspace,
                                       segments_at(base, workspace.segments, plan, true, false)),
                    plan.state_tile, stream);
}

cudaError_t chunk_bwd(const ChunkBwdParams& call, const ChunkBwdPlan& plan, cudaStream_t stream) {
  if (plan.path != ChunkFwdPath::kStaged) return cudaErrorNotSupported;
  if (plan.saved != (call.intermediates != nullptr) && plan.intermediates.total_bytes > 0) return cudaErrorInvalidValue;
  const ChunkBwdKernelParams params = kernel_params(call, plan);
  const ChunkFwdKernelParams& forward = params.forward;
  const RecurrenceSegments& segments = forward.segments;
  const bool computes_state = !plan.saved;
  StageSequence stages;
  if (computes_state) stages.run("kda.intra_chunk_solve", [&] { return launch_intra_chunk_solve(forward, stream); });
  if (segments.chunks > 0) {
    stages.run("kda.state_summary", [&] { return launch_state_summary(forward, stream); });
    stages.run("kda.reverse_summary", [&] { return launch_reverse_summary(params, stream); });
    SegmentComposeParams compose = {forward.call, segments.chunks, {segments.dstate_maps()}, 1};
    if (computes_state) compose.maps[compose.directions++] = segments.state_maps();
    stages.run("kda.segment_compose", [&] { return launch_segment_compose(compose, stream); });
  }
  if (computes_state) {
    stages.run("kda.state_recurrence", [&] { return launch_state_recurrence(forward, plan.state_tile, stream); });
  }
  const bool overlaps = computes_state && plan.side_by_side;
  stages.run("kda.reverse_recurrence",
             [&] { return launch_reverse_recurrence(params, plan.value_tile, overlaps, stream); });
  stages.run("kda.intra_chunk_gradients", [&] { return launch_intra_chunk_gradients(params, stream); });
  stages.run("kda.level_gradients", [&] { return launch_level_gradients(params, stream); });
  stages.run("kda.reduce_gradients", [&] { return launch_reduce_gradients(params, stream); });
  return stages.status;
}

}  // namespace kda
