// kda::chunk_fwd on CUDA: tensors -> checked ChunkFwdParams -> plan -> kernels on the current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "checks.h"
#include "coverage.h"
#include "kda/kda.h"
#include "outputs.h"
#include "params_cuda.h"
#include "plan_arguments.h"
#include "runtime_cuda.h"

namespace kda::binding {

namespace {

Outputs run_plan(ChunkFwdArguments args, const ChunkFwdProblem& problem, const ChunkFwdPlan& plan) {
  const int32_t device = args.q.get_device_index();
  const DeviceScope scope(device);
  make_parameters_packed(args);
  Outputs outputs = make_outputs(args, aoti_torch_device_type_cuda(), device);
  if (problem.batch == 0) return outputs;

  const cudaStream_t stream = current_stream(device);
  ChunkFwdParams params = forward_params(args, problem, outputs, stream);
  const ScratchMemory workspace(plan.workspace.total_bytes);
  params.workspace = workspace.data();
  check_cuda(chunk_fwd(params, plan, stream), "kda::chunk_fwd: launching the kernels");
  return outputs;
}

Outputs chunk_fwd_cuda(ChunkFwdArguments args) {
  check_chunk_fwd(args);
  if (layout_reason(args)) return call_composite(args);
  const ChunkFwdProblem problem = problem_of(args, cuda_device(args.q.get_device_index()));
  const ChunkFwdPlan plan = plan_chunk_fwd(problem);
  if (plan.path == ChunkFwdPath::kComposite) return call_composite(args);
  return run_plan(std::move(args), problem, plan);
}

constexpr const char* kPlanned = "kda::chunk_fwd_planned";

[[noreturn]] void refuse(const char* argument, const std::string& what) {
  refuse_plan_argument(kPlanned, argument, what);
}

// What no path can do is refused here, what the plan's path cannot do in check_plan().
ChunkFwdPlanOptions plan_options(const std::string& path, std::optional<int64_t> segment_chunks,
                                 std::optional<int64_t> value_tile, std::optional<int64_t> clusters,
                                 int64_t value_dim) {
  ChunkFwdPlanOptions options;
  if (path == "staged") {
    options.path = ChunkFwdPath::kStaged;
  } else if (path == "fused") {
    options.path = ChunkFwdPath::kFused;
  } else if (path == "stepwise") {
    options.path = ChunkFwdPath::kStepwise;
  } else if (path == "fused_cut") {
    options.path = ChunkFwdPath::kFusedCut;
  } else if (!path.empty()) {
    refuse("path", "expected stepwise, fused_cut, fused, staged or nothing, got " + path);
  }
  options.segment_chunks = checked_segment_chunks(kPlanned, segment_chunks);
  options.value_tile = checked_value_tile(kPlanned, value_tile, value_dim);
  if (clusters && *clusters < 1) refuse("clusters", "expected at least 1, got " + std::to_string(*clusters));
  options.clusters = clusters;
  return options;
}

// Nothing that was asked for is ignored: the plan has taken all of it, or the call is refused.
void check_plan(const ChunkFwdPlan& plan, const ChunkFwdPlanOptions& options) {
  if (options.path && plan.path != *options.path) refuse("path", plan.reason);
  if (options.value_tile && plan.path != ChunkFwdPath::kStaged) {
    refuse("value_tile",
           "expected none with path stepwise, fused_cut or fused, which have no tiles of V to choose, got " +
               std::to_string(*options.value_tile));
  }
  if (options.clusters && !has_clusters(plan.path)) {
    refuse("clusters", "expected none with path stepwise or staged, got " + std::to_string(*options.clusters));
  }
  if (options.segment_chunks.value_or(0) > 0 && !has_segments(plan.path)) {
    refuse("segment_chunks", "expected none or 0 with path fused or staged, which have no segments, got " +
                                 std::to_string(*options.segment_chunks));
  }
}

Outputs chunk_fwd_planned_cuda(ChunkFwdArguments args, const ChunkFwdPlanOptions& options) {
  if (const char* reason = composite_reason(args); *reason != '\0') {
    throw std::runtime_error(std::string(kPlanned) + ": no kernel covers this call: " + reason);
  }
  const ChunkFwdProblem problem = problem_of(args, cuda_device(args.q.get_device_index()));
  const ChunkFwdPlan plan = plan_chunk_fwd(problem, options);
  check_plan(plan, options);
  return run_plan(std::move(args), problem, plan);
}

void boxed_chunk_fwd_planned_cuda(StableIValue* stack, uint64_t, uint64_t) {
  // Every entry is read before anything can throw, as each owns what it refers to.
  using torch::stable::detail::to;
  ChunkFwdArguments args = read_arguments(stack);
  const auto path = to<std::string>(stack[kChunkFwdArguments]);
  const auto segment_chunks = to<std::optional<int64_t>>(stack[kChunkFwdArguments + 1]);
  const auto value_tile = to<std::optional<int64_t>>(stack[kChunkFwdArguments + 2]);
  const auto clusters = to<std::optional<int64_t>>(stack[kChunkFwdArguments + 3]);
  check_chunk_fwd(args);
  const ChunkFwdPlanOptions options = plan_options(path, segment_chunks, value_tile, clusters, args.v.size(3));
  return_outputs(chunk_fwd_planned_cuda(std::move(args), options), stack);
}

void boxed_chunk_fwd_cuda(StableIValue* stack, uint64_t, uint64_t) {
  return_outputs(chunk_fwd_cuda(read_arguments(stack)), stack);
}

}  // namespace

}  // namespace kda::binding

STABLE_TORCH_LIBRARY_IMPL(kda, CUDA, m) {
  m.impl("chunk_fwd", &kda::binding::boxed_chunk_fwd_cuda);
  m.impl("inference_chunk_fwd", &kda::binding::boxed_chunk_fwd_cuda);
  m.impl("chunk_fwd_planned", &kda::binding::boxed_chunk_fwd_planned_cuda);
}
