// Checks and times kda::chunk_fwd without torch, for Nsight and for comparisons. See options.h or --help for the flags.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>

#include "cuda_objects.h"
#include "host_reference.h"
#include "inputs.h"
#include "kda/device/nvtx_range.h"
#include "kda/kda.h"
#include "measure.h"
#include "options.h"

namespace bench {
namespace {

// The accuracy contract: relative RMSE against the token recurrence in double precision.
constexpr double kLimitO = 4.5e-3;
constexpr double kLimitState = 4.0e-3;

constexpr int kExitCheckFailed = 1;
constexpr int kExitCannotRun = 2;

struct Device {
  cudaDeviceProp properties;
  int compute_capability = 0;
};

Device open_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    throw CudaError(std::string("no usable CUDA device") +
                    (status != cudaSuccess ? std::string(": ") + cudaGetErrorString(status) : ""));
  }
  Device device;
  BENCH_CUDA(cudaSetDevice(0));
  BENCH_CUDA(cudaGetDeviceProperties(&device.properties, 0));
  device.compute_capability = device.properties.major * 10 + device.properties.minor;
  return device;
}

kda::ChunkFwdProblem make_problem(const Shape& shape, const Device& device) {
  kda::ChunkFwdProblem problem;
  problem.batch = shape.options.batch;
  problem.tokens = shape.row_tokens();
  problem.sequences = shape.sequences;
  problem.varlen = shape.varlen;
  problem.heads = shape.options.heads;
  problem.value_heads = shape.options.value_heads;
  problem.key_dim = shape.options.key_dim;
  problem.value_dim = shape.options.value_dim;
  problem.activation_type = shape.options.fp16 ? kda::DataType::kFloat16 : kda::DataType::kBFloat16;
  problem.bounded_gate = !shape.options.log_gate && shape.options.gate != GateFamily::kUnbounded;
  problem.aligned_inputs = has_aligned_inputs(shape, problem.activation_type);
  problem.compute_capability = device.compute_capability;
  problem.sm_count = device.properties.multiProcessorCount;
  return problem;
}

// The planner's plan with what the options force.
kda::ChunkFwdPlan make_plan(const kda::ChunkFwdProblem& problem, const Options& options) {
  kda::ChunkFwdPlanOptions forced;
  if (options.path == PathChoice::kStaged) forced.path = kda::ChunkFwdPath::kStaged;
  if (options.path == PathChoice::kFused) forced.path = kda::ChunkFwdPath::kFused;
  const bool tile_fits = options.path == PathChoice::kStaged || is_fused_value_tile(options.value_tile);
  if (options.value_tile != kAsPlanned && tile_fits) forced.value_tile = options.value_tile;
  if (options.segment_chunks != kAsPlanned) forced.segment_chunks = options.segment_chunks;

  kda::ChunkFwdPlan plan = kda::plan_chunk_fwd(problem, forced);
  if (forced.path && plan.path != *forced.path) {
    throw std::runtime_error(std::string("--path: ") + name_of(options.path) + " cannot run this case: " + plan.reason);
  }
  if (plan.path == kda::ChunkFwdPath::kComposite) {
    throw std::runtime_error(std::string("no kernel covers this case: ") + plan.reason);
  }
  if (plan.path == kda::ChunkFwdPath::kFused && options.segment_chunks != kAsPlanned) {
    throw std::runtime_error("--segment-chunks: the plan takes the fused path, which cuts no sequences: --path staged");
  }
  if (options.value_tile != kAsPlanned && plan.value_tile != options.value_tile) {
    if (plan.path == kda::ChunkFwdPath::kFused) {
      throw std::runtime_error("--value-tile: expected 64 or 128 for the fused path, which the plan takes, got " +
                               std::to_string(options.value_tile));
    }
    plan.value_tile = options.value_tile;  // one that the planner could not be given before it had chosen the path
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

// Runs a small case with the sizes, types, gates and features of `options`, on the path and with the tile and the cut of the
// plan that is `timed`, and compares it with the host.
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
  options.value_tile = timed.value_tile;
  if (timed.path == kda::ChunkFwdPath::kFused) {
    options.path = PathChoice::kFused;
  } else {
    options.path = PathChoice::kStaged;
    options.segment_chunks = static_cast<int>(std::min(timed.segment_chunks, kMaxSegmentChunks));
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

struct Timing {
  Statistics us;  // of one call
  int calls_per_replay = 0;
  int input_sets = 0;
};

// Each graph replay calls once on every set of inputs; together they exceed the L2 cache, so that no call finds its
// inputs there. A sample is the time of a replay over its calls.
Timing time_calls(const Shape& shape, const Device& device, const kda::ChunkFwdProblem& problem,
                  const kda::ChunkFwdPlan& plan, cudaStream_t stream) {
  constexpr double kL2Multiple = 3.0;
  constexpr int kMaxSets = 64, kMinCalls = 4;
  const double wanted = kL2Multiple * device.properties.l2CacheSize / least_bytes(shape);
  const int sets = std::clamp(static_cast<int>(std::ceil(wanted)), 1, kMaxSets);
  const int calls = std::max(sets, kMinCalls);

  auto setup = std::make_unique<kda::NvtxRange>("bench.setup");
  std::vector<std::unique_ptr<InputSet>> inputs;
  for (int i = 0; i < sets; ++i) {
    inputs.push_back(std::make_unique<InputSet>(shape, plan.chunk_slots, /*seed=*/100 + i));
    inputs.back()->drop_host_copies();
  }
  const DeviceBuffer workspace(plan.workspace.total_bytes);
  const auto call = [&](int i, cudaStream_t s) {
    BENCH_CUDA(kda::chunk_fwd(inputs[i % sets]->params(problem, workspace.get()), plan, s));
  };
  call(0, stream);  // loads the kernels, which a capture must not do
  BENCH_CUDA(cudaStreamSynchronize(stream));
  const Graph graph(stream, [&](cudaStream_t s) {
    for (int i = 0; i < calls; ++i) call(i, s);
  });
  for (int i = 0; i < shape.options.warmup; ++i) graph.launch(stream);
  BENCH_CUDA(cudaStreamSynchronize(stream));
  setup.reset();

  std::vector<double> samples;
  for (int i = 0; i < shape.options.iterations; ++i) {
    const kda::NvtxRange range("bench.timed_replay");
    Event start, stop;
    start.record(stream);
    graph.launch(stream);
    stop.record(stream);
    samples.push_back(stop.us_since(start) / calls);
  }
  return {summarize(samples), calls, sets};
}

// A time of one call in terms of its work and of the memory's speed.
struct Rates {
  double bytes, flop, gbps, tflops, copy_gbps, roofline_us;
  Rates(const Shape& shape, double us, double copy)
      : bytes(least_bytes(shape)),
        flop(flop_per_token_head(shape) * shape.tokens * shape.options.value_heads),
        gbps(bytes / (us * 1e3)),
        tflops(flop / (us * 1e6)),
        copy_gbps(copy),
        roofline_us(bytes / (copy_gbps * 1e3)) {}
};

std::string json_escaped(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '"' || c == '\\') escaped += '\\';
    escaped += c;
  }
  return escaped;
}

std::string lengths_as_text(const std::vector<int64_t>& lengths, const char* separator) {
  std::string text;
  for (const int64_t length : lengths) text += (text.empty() ? "" : separator) + std::to_string(length);
  return text;
}

// The features that differ from the defaults, as flags.
std::string features_as_text(const Options& options) {
  std::string text;
  for (const Switch& feature : kSwitches) {
    if (options.*feature.member == feature.value) text += std::string(text.empty() ? "" : " ") + feature.name;
  }
  return text.empty() ? "defaults" : text;
}

// What the options force upon the plan; empty if nothing.
std::string forced_as_text(const Options& options) {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  if (options.path != PathChoice::kAuto) add(std::string("path ") + name_of(options.path));
  if (options.value_tile != kAsPlanned) add("value tile " + std::to_string(options.value_tile));
  if (options.segment_chunks != kAsPlanned) add("segments of " + std::to_string(options.segment_chunks) + " chunks");
  return text;
}

// What was measured and what came out, as one JSON object.
std::string as_json(const Shape& shape, const Device& device, const std::string& plan, const Errors& errors,
                    const Timing& timing, const Rates& rates) {
  const Options& options = shape.options;
  const auto boolean = [](bool value) { return value ? "true" : "false"; };
  const auto if_forced = [](int value) { return value == kAsPlanned ? "null" : std::to_string(value); };
  std::ostringstream json;
  json.precision(10);
  json << "{\"device\": \"" << json_escaped(device.properties.name) << "\", \"lengths\": ["
       << lengths_as_text(options.lengths, ", ") << "], \"batch\": " << options.batch
       << ", \"heads\": " << options.heads << ", \"value_heads\": " << options.value_heads
       << ", \"key_dim\": " << options.key_dim << ", \"value_dim\": " << options.value_dim << ", \"dtype\": \""
       << (options.fp16 ? "fp16" : "bf16") << "\", \"gate\": \"" << name_of(options.gate)
       << "\", \"log_gate\": " << boolean(options.log_gate) << ", \"l2norm\": " << boolean(options.l2norm)
       << ", \"negative_eigenvalues\": " << boolean(options.negative_eigenvalues)
       << ", \"initial_state\": " << boolean(options.initial_state)
       << ", \"final_state\": " << boolean(options.final_state)
       << ", \"chunk_states\": " << boolean(options.chunk_states)
       << ", \"state_v_first\": " << boolean(options.state_v_first) << ", \"forced\": {\"path\": \""
       << name_of(options.path) << "\", \"value_tile\": " << if_forced(options.value_tile)
       << ", \"segment_chunks\": " << if_forced(options.segment_chunks) << "}, \"plan\": " << plan
       << ", \"error_o\": " << errors.o << ", \"error_final_state\": " << errors.final_state
       << ", \"error_chunk_states\": " << errors.chunk_states << ", \"median_us\": " << timing.us.median
       << ", \"min_us\": " << timing.us.min << ", \"p90_us\": " << timing.us.p90
       << ", \"iterations\": " << options.iterations << ", \"calls_per_replay\": " << timing.calls_per_replay
       << ", \"input_sets\": " << timing.input_sets << ", \"least_bytes\": " << rates.bytes
       << ", \"flop\": " << rates.flop << ", \"gbps\": " << rates.gbps << ", \"tflops\": " << rates.tflops
       << ", \"copy_gbps\": " << rates.copy_gbps << ", \"roofline_us\": " << rates.roofline_us
       << ", \"roofline_fraction\": " << rates.roofline_us / timing.us.median << "}\n";
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
  const Shape shape(options);
  const Device device = open_device();
  const Stream stream;
  const kda::ChunkFwdProblem problem = make_problem(shape, device);
  const kda::ChunkFwdPlan plan = make_plan(problem, options);
  const std::string plan_json = kda::to_json(problem, plan);
  std::printf("device        %s, %d SMs, %d MB L2\n", device.properties.name, device.properties.multiProcessorCount,
              device.properties.l2CacheSize >> 20);
  std::printf("shape         batch %d, lengths %s, H %d, HV %d, K %d, V %d, %s, gate %s\n", options.batch,
              lengths_as_text(options.lengths, ",").c_str(), options.heads, options.value_heads, options.key_dim,
              options.value_dim, options.fp16 ? "fp16" : "bf16", name_of(options.gate));
  std::printf("features      %s\n", features_as_text(options).c_str());
  std::printf("plan          %s\n", plan_json.c_str());
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
  const Timing timing = time_calls(shape, device, problem, plan, stream);
  const Rates rates(shape, timing.us.median, copy_gbps);
  std::printf("time          %.2f us median, %.2f min, %.2f p90 (%d graph replays of %d calls, %d input sets)\n",
              timing.us.median, timing.us.min, timing.us.p90, options.iterations, timing.calls_per_replay,
              timing.input_sets);
  std::printf("traffic       %.1f GB/s (least traffic %.2f MB)\n", rates.gbps, rates.bytes / 1e6);
  std::printf("arithmetic    %.2f TFLOP/s (%.0f FLOP per token and value head)\n", rates.tflops,
              flop_per_token_head(shape));
  std::printf("roofline      %.2f us at %.0f GB/s (a large copy in this run): %.1f %% reached\n", rates.roofline_us,
              copy_gbps, 100 * rates.roofline_us / timing.us.median);

  if (options.json_path.empty()) return 0;
  std::ofstream file(options.json_path);
  file << as_json(shape, device, plan_json, errors, timing, rates);
  file.close();
  if (!file) throw std::runtime_error("--json: cannot write '" + options.json_path + "'");
  std::printf("json          %s\n", options.json_path.c_str());
  return 0;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  try {
    const bench::Options options = bench::parse_options(argc, argv);
    if (options.help) {
      std::fputs(bench::kHelp, stdout);
      return 0;
    }
    return bench::run(options);
  } catch (const bench::UsageError& error) {
    std::fprintf(stderr, "bench_chunk_fwd: %s (--help lists the flags)\n", error.what());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_chunk_fwd: %s\n", error.what());
  }
  return bench::kExitCannotRun;
}
