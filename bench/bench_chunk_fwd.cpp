// Checks and times kda::chunk_fwd without torch, for Nsight and for comparisons. See options.h or --help for the flags.
#include <algorithm>
#include <optional>

#include "host_reference.h"
#include "program.h"

namespace bench {
namespace {

// The accuracy contract: relative RMSE against the token recurrence in double precision.
constexpr double kLimitO = 4.5e-3;
constexpr double kLimitState = 4.0e-3;

const char* name_of(const std::optional<kda::ChunkFwdPath>& path) { return path ? kda::name_of(*path) : "auto"; }

// The planner's plan with what the options force.
kda::ChunkFwdPlan make_plan(const kda::ChunkFwdProblem& problem, const Options& options) {
  kda::ChunkFwdPlanOptions forced;
  forced.path = options.path;
  if (options.value_tile != kAsPlanned) forced.value_tile = options.value_tile;
  if (options.clusters != kAsPlanned) forced.clusters = options.clusters;
  if (options.segment_chunks != kAsPlanned) forced.segment_chunks = options.segment_chunks;

  const kda::ChunkFwdPlan plan = kda::plan_chunk_fwd(problem, forced);
  if (forced.path && plan.path != *forced.path) {
    throw std::runtime_error(std::string("--path: ") + name_of(options.path) + " cannot run this case: " + plan.reason);
  }
  if (plan.path == kda::ChunkFwdPath::kComposite) {
    throw std::runtime_error(std::string("no kernel covers this case: ") + plan.reason);
  }
  if (!kda::has_segments(plan.path) && options.segment_chunks > 0) {
    throw std::runtime_error(
        "--segment-chunks: the plan takes a path that has no segments: --path stepwise or fused_cut");
  }
  if (plan.path != kda::ChunkFwdPath::kStaged && options.value_tile != kAsPlanned) {
    throw std::runtime_error("--value-tile: the plan takes a path that has no tiles of V to choose: --path staged");
  }
  if (!kda::has_clusters(plan.path) && options.clusters != kAsPlanned) {
    throw std::runtime_error("--clusters: the plan takes a path that has no clusters: --path fused or fused_cut");
  }
  return plan;
}

// Relative RMSE of each output; 0 for those that were not asked for.
struct Errors {
  double o = 0, final_state = 0, chunk_states = 0;
  [[nodiscard]] bool within_limits() const {  // false for NaN
    return o <= kLimitO && final_state <= kLimitState && chunk_states <= kLimitState;
  }
};

// Clusters of the small case: they hand chains over, if those of the plan that is timed may.
int clusters_to_verify(const Shape& shape, const kda::ChunkFwdPlan& timed) {
  const int64_t chains = shape.sequences * shape.options.value_heads;
  const int64_t most = timed.workspace.total_bytes > 0 ? chains - 1 : chains;
  return static_cast<int>(std::min(timed.clusters, most));
}

// Runs a small case with the sizes, types, gates and features of `options`, on the path and with the tile, the clusters and
// the cut of the plan that is `timed`, and compares it with the host.
Errors verify(Options options, const kda::ChunkFwdPlan& timed, const Device& device, cudaStream_t stream) {
  constexpr int64_t kMaxSegmentChunks = 2;  // so that the small case has several segments
  const kda::NvtxRange range("bench.verify");
  if (options.lengths.size() > 1) {
    options.lengths = {1, 64, 130, 0, 257};  // a lone token, a full chunk, partial chunks, an empty sequence
  } else {
    options.batch = 2;
    options.lengths = {257};
  }
  options.value_heads = options.value_heads / options.heads * 2;
  options.heads = 2;
  options.path = timed.path;
  switch (timed.path) {
    case kda::ChunkFwdPath::kStepwise:
    case kda::ChunkFwdPath::kFusedCut:
      options.segment_chunks = static_cast<int>(std::min(timed.segment_chunks, kMaxSegmentChunks));
      break;
    case kda::ChunkFwdPath::kFused:
      options.clusters = clusters_to_verify(Shape(options), timed);
      break;
    case kda::ChunkFwdPath::kStaged:
      options.value_tile = timed.value_tile;
      break;
    case kda::ChunkFwdPath::kComposite:
      throw std::runtime_error("no kernel covers this case");
  }
  const Shape shape(options);
  const kda::ChunkFwdProblem problem = make_problem(shape, device);
  const kda::ChunkFwdPlan plan = make_plan(problem, options);
  const InputSet inputs(shape, plan.chunk_slots, /*seed=*/1);
  const DeviceBuffer workspace(plan.workspace.total_bytes);
  BENCH_CUDA(kda::chunk_fwd(inputs.params(problem, workspace.get()), plan, stream));
  BENCH_CUDA(cudaStreamSynchronize(stream));
  const HostOutputs expected = token_recurrence(inputs.host_inputs());
  Errors errors;
  errors.o = relative_rmse(inputs.o(), expected.o);
  if (options.final_state) errors.final_state = relative_rmse(inputs.final_state(), expected.final_state);
  if (options.chunk_states) errors.chunk_states = relative_rmse(inputs.chunk_states(), expected.chunk_states);
  return errors;
}

// What the options force upon the plan; empty if nothing.
std::string forced_as_text(const Options& options) {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  if (options.path) add(std::string("path ") + name_of(options.path));
  if (options.value_tile != kAsPlanned) add("value tile " + std::to_string(options.value_tile));
  if (options.clusters != kAsPlanned) add("at most " + std::to_string(options.clusters) + " clusters");
  if (options.segment_chunks != kAsPlanned) add("segments of " + std::to_string(options.segment_chunks) + " chunks");
  return text;
}

// What only this binary has to say, as members of a JSON object.
std::string own_json(const Options& options, const std::string& plan, const Errors& errors) {
  const auto boolean = [](bool value) { return value ? "true" : "false"; };
  const auto if_forced = [](int value) { return value == kAsPlanned ? "null" : std::to_string(value); };
  std::ostringstream json;
  json.precision(10);
  json << "\"final_state\": " << boolean(options.final_state) << ", \"chunk_states\": " << boolean(options.chunk_states)
       << ", \"forced\": {\"path\": \"" << name_of(options.path)
       << "\", \"value_tile\": " << if_forced(options.value_tile) << ", \"clusters\": " << if_forced(options.clusters)
       << ", \"segment_chunks\": " << if_forced(options.segment_chunks) << "}, \"plan\": " << plan
       << ", \"error_o\": " << errors.o << ", \"error_final_state\": " << errors.final_state
       << ", \"error_chunk_states\": " << errors.chunk_states << ", ";
  return json.str();
}

void print_errors(const Errors& errors, const Options& options) {
  std::printf("check         relative RMSE: o %.2e (limit %.1e)", errors.o, kLimitO);
  if (options.final_state) std::printf(", final state %.2e (limit %.1e)", errors.final_state, kLimitState);
  if (options.chunk_states) std::printf(", chunk states %.2e (limit %.1e)", errors.chunk_states, kLimitState);
  std::printf("\n");
}

// Returns the exit status.
int run(const Options& options) {
  if (options.saved) throw UsageError("--saved: it is a flag of bench_chunk_bwd");
  const Shape shape(options);
  const Device device = open_device();
  const Stream stream;
  const kda::ChunkFwdProblem problem = make_problem(shape, device);
  const kda::ChunkFwdPlan plan = make_plan(problem, options);
  const std::string plan_json = kda::to_json(problem, plan);
  print_call(shape, device, plan_json);
  if (const std::string forced = forced_as_text(options); !forced.empty()) {
    std::printf("forced        %s\n", forced.c_str());
  }

  const Errors errors = verify(options, plan, device, stream);
  print_errors(errors, options);
  if (!errors.within_limits()) {
    std::fprintf(stderr, "bench_chunk_fwd: the check FAILED: the error exceeds the contract; nothing was timed\n");
    return kExitCheckFailed;
  }

  const double copy_gbps = copy_bandwidth_gbps(stream);
  const Work work = {least_bytes(shape), flop_per_token_head(shape)};
  const DeviceBuffer workspace(plan.workspace.total_bytes);
  const Timing timing = time_calls(
      shape, device, work.bytes, stream,
      [&](uint64_t seed) { return std::make_unique<InputSet>(shape, plan.chunk_slots, seed); },
      [&](const InputSet& inputs, cudaStream_t s) {
        BENCH_CUDA(kda::chunk_fwd(inputs.params(problem, workspace.get()), plan, s));
      });
  const Rates rates(shape, work, timing.us.median, copy_gbps);
  print_timing(options, timing, work, rates);
  write_json(options, as_json(shape, device, own_json(options, plan_json, errors), timing, rates));
  return 0;
}

constexpr const char* kHelp[] = {R"(bench_chunk_fwd: checks and times kda::chunk_fwd on the first CUDA device

)",
                                 kHelpShape,
                                 kHelpInputs,
                                 R"(  --no-final-state     do not write the final state
  --chunk-states       also write the state at entry of each chunk

Overrides of the plan
  --path PATH          auto, stepwise, fused_cut, fused or staged: fail if the kernels of that path do not cover the case
                                                                                                    (default auto)
  --value-tile N       V columns of one CTA of the state recurrence, of the staged path: a multiple of 64 that divides
                       V, at most 128                                                               (default: the plan's)
  --clusters N         at most N clusters of V / 64 CTAs, to which the chains of (sequence, value head) are dealt out,
                       of the fused path; no more than run side by side and than there are chains   (default: the plan's)
  --segment-chunks N   chunks of 64 tokens of one segment of a cut sequence, of the stepwise path; 0: no cut
                                                                                                    (default: the plan's)
)",
                                 kHelpMeasuring,
                                 R"(
First a small case with the same heads' grouping, sizes, types, gate and features, on the path, with the value tile, with
clusters that hand chains over if those that are timed may, and with the cut (into short segments) is checked against a
token recurrence in double precision on the host: uneven sequences, or two rows if there is no cu_seqlens.
)",
                                 kHelpStatus};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) { return bench::run_program("bench_chunk_fwd", bench::kHelp, argc, argv, bench::run); }
