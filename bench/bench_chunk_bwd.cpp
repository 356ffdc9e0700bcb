// Checks and times kda::chunk_bwd without torch, for Nsight and for comparisons. See kHelp or --help for the flags.
#include <algorithm>
#include <utility>

#include "gradient_set.h"
#include "host_gradients.h"
#include "program.h"

namespace bench {
namespace {

// The gradients that are checked, with the limits of the accuracy contract (kda_cuda/accuracy.py): relative RMSE against
// the token recurrence in double precision.
struct Checked {
  const char* name;
  std::vector<double> HostGradients::* member;
  double limit;
};
constexpr Checked kChecked[] = {
    {"dq", &HostGradients::q, 6e-3},
    {"dk", &HostGradients::k, 6e-3},
    {"dv", &HostGradients::v, 6e-3},
    {"dg", &HostGradients::g, 1e-2},
    {"dbeta", &HostGradients::beta, 6e-3},
    {"dA_log", &HostGradients::A_log, 6e-3},
    {"ddt_bias", &HostGradients::dt_bias, 6e-3},
    {"dinitial_state", &HostGradients::initial_state, 6e-3},
};
using Errors = std::vector<std::pair<Checked, double>>;  // of the gradients that there are

kda::ChunkBwdPlan make_plan(const kda::ChunkFwdProblem& problem, const Options& options) {
  kda::ChunkBwdPlanOptions forced;
  if (options.value_tile != kAsPlanned) forced.value_tile = options.value_tile;
  if (options.segment_chunks != kAsPlanned) forced.segment_chunks = options.segment_chunks;
  const kda::ChunkBwdPlan plan = kda::plan_chunk_bwd(problem, !options.log_gate, options.saved, forced);
  if (plan.path == kda::ChunkFwdPath::kComposite) {
    throw std::runtime_error(std::string("no kernel covers this case: ") + plan.reason);
  }
  return plan;
}

void check_flags(const Options& options) {
  const auto refuse = [](bool given, const char* flag) {
    if (given)
      throw UsageError(std::string(flag) + ": it is a flag of bench_chunk_fwd; the backward has no such choice");
  };
  refuse(options.path.has_value(), "--path");
  refuse(options.clusters != kAsPlanned, "--clusters");
  refuse(!options.final_state, "--no-final-state");
  refuse(options.chunk_states, "--chunk-states");
  if (options.segment_chunks > 0 && options.value_tile > kValueRowsOfGroup) {
    throw UsageError("--value-tile: expected 64 where sequences are cut, got " + std::to_string(options.value_tile));
  }
}

// Runs a small case with the sizes, types, gates and features of `options` and compares it with the host. Of enough value
// heads that a sum over all tokens of a head, whose terms cancel, is not a single draw.
Errors verify(Options options, const kda::ChunkBwdPlan& timed, const Device& device, cudaStream_t stream) {
  constexpr int kValueHeads = 32;
  const kda::NvtxRange range("bench.verify");
  if (options.lengths.size() > 1) {
    options.lengths = {1, 64, 70, 0, 270};  // a lone token, a full chunk, partial chunks, an empty sequence
  } else {
    options.batch = 2;
    options.lengths = {270};
  }
  constexpr int64_t kMaxSegmentChunks = 1;  // so that the small case has several segments, if any
  options.segment_chunks = static_cast<int>(std::min(timed.segment_chunks, kMaxSegmentChunks));
  const int group = options.value_heads / options.heads;
  options.heads = std::max(kValueHeads / group, 1);
  options.value_heads = options.heads * group;
  const Shape shape(options);
  const kda::ChunkFwdProblem problem = make_problem(shape, device);
  const kda::ChunkBwdPlan plan = make_plan(problem, options);
  GradientSet set(shape, plan, /*seed=*/1);
  const DeviceBuffer workspace(plan.workspace.total_bytes);
  set.save_intermediates(problem, plan, stream);
  BENCH_CUDA(kda::chunk_bwd(set.params(problem, workspace.get()), plan, stream));
  BENCH_CUDA(cudaStreamSynchronize(stream));

  const HostGradients expected = token_gradients(set.inputs().host_inputs(), set.host_output_gradients());
  const HostGradients actual = set.gradients();
  Errors errors;
  for (const Checked& checked : kChecked) {
    const std::vector<double>& gradient = actual.*checked.member;
    if (!gradient.empty()) errors.emplace_back(checked, relative_rmse(gradient, expected.*checked.member));
  }
  return errors;
}

bool within_limits(const Errors& errors) {  // false for NaN
  return std::all_of(errors.begin(), errors.end(), [](const auto& found) { return found.second <= found.first.limit; });
}

std::string own_json(const Options& options, const std::string& plan, const Errors& errors) {
  std::ostringstream json;
  json.precision(10);
  json << "\"saved\": " << (options.saved ? "true" : "false") << ", \"plan\": " << plan << ", ";
  for (const auto& [checked, error] : errors) json << "\"error_" << checked.name << "\": " << error << ", ";
  return json.str();
}

// Returns the exit status.
int run(const Options& options) {
  check_flags(options);
  const Shape shape(options);
  const Device device = open_device();
  const Stream stream;
  const kda::ChunkFwdProblem problem = make_problem(shape, device);
  const kda::ChunkBwdPlan plan = make_plan(problem, options);
  const std::string plan_json = kda::to_json(plan);
  print_call(shape, device, plan_json);

  const Errors errors = verify(options, plan, device, stream);
  std::printf("check         relative RMSE:");
  for (const auto& [checked, error] : errors) std::printf(" %s %.2e (%.0e)", checked.name, error, checked.limit);
  std::printf("\n");
  if (!within_limits(errors)) {
    std::fprintf(stderr, "bench_chunk_bwd: the check FAILED: an error exceeds the contract; nothing was timed\n");
    return kExitCheckFailed;
  }

  const double copy_gbps = copy_bandwidth_gbps(stream);
  const Work work = {backward_least_bytes(shape), backward_flop_per_token_head(shape)};
  const DeviceBuffer workspace(plan.workspace.total_bytes);
  const Timing timing = time_calls(
      shape, device, work.bytes, stream,
      [&](uint64_t seed) {
        auto set = std::make_unique<GradientSet>(shape, plan, seed);
        set->save_intermediates(problem, plan, stream);
        return set;
      },
      [&](const GradientSet& set, cudaStream_t s) {
        BENCH_CUDA(kda::chunk_bwd(set.params(problem, workspace.get()), plan, s));
      });
  const Rates rates(shape, work, timing.us.median, copy_gbps);
  print_timing(options, timing, work, rates);
  write_json(options, as_json(shape, device, own_json(options, plan_json, errors), timing, rates));
  return 0;
}

constexpr const char* kHelp[] = {
    R"(bench_chunk_bwd: checks and times kda::chunk_bwd on the first CUDA device

)",
    kHelpShape,
    kHelpInputs,
    R"(  --saved              the forward has saved its intermediates: the backward starts with its third stage
  --segment-chunks N   cut sequences into segments of N chunks; 0: not                              (default: as planned)
  --value-tile N       64 or 128 columns of V for a CTA of an uncut recurrence                      (default: as planned)

The board's backward with processed inputs has --log-gate --no-l2norm --no-beta-sigmoid.
)",
    kHelpMeasuring,
    R"(
First a small case with the same heads' grouping, sizes, types, gate and features is checked against the gradients of a
token recurrence in double precision on the host: uneven sequences, or two rows if there is no cu_seqlens.
)",
    kHelpStatus};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) { return bench::run_program("bench_chunk_bwd", bench::kHelp, argc, argv, bench::run); }
