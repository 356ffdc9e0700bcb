// What the benchmark binaries share: the device, the timing of a call, and how a result is told.
#pragma once

#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>

#include "cuda_objects.h"
#include "inputs.h"
#include "kda/device/nvtx_range.h"
#include "kda/kda.h"
#include "measure.h"
#include "options.h"

namespace bench {

inline constexpr int kExitCheckFailed = 1;
inline constexpr int kExitCannotRun = 2;

struct Device {
  cudaDeviceProp properties;
  int compute_capability = 0;
};

inline Device open_device() {
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

inline kda::ChunkFwdProblem make_problem(const Shape& shape, const Device& device) {
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
  problem.contractive = shape.options.l2norm && shape.options.beta_sigmoid;
  problem.aligned_inputs = has_aligned_inputs(shape, problem.activation_type);
  problem.compute_capability = device.compute_capability;
  problem.sm_count = device.properties.multiProcessorCount;
  return problem;
}

struct Timing {
  Statistics us;  // of one call
  int calls_per_replay = 0;
  int input_sets = 0;
};

// Times call(set, stream) on sets that make_set(seed) returns as unique pointers. Each graph replay calls once on every
// set of inputs; together they exceed the L2 cache, so that no call finds its inputs there. A sample is the time of a
// replay over its calls.
template <class MakeSet, class Call>
Timing time_calls(const Shape& shape, const Device& device, double least_bytes_of_call, cudaStream_t stream,
                  MakeSet&& make_set, Call&& call_set) {
  constexpr double kL2Multiple = 3.0;
  constexpr int kMaxSets = 64, kMinCalls = 4, kFirstSeed = 100;
  const double wanted = kL2Multiple * device.properties.l2CacheSize / least_bytes_of_call;
  const int sets = std::clamp(static_cast<int>(std::ceil(wanted)), 1, kMaxSets);
  const int calls = std::max(sets, kMinCalls);

  auto setup = std::make_unique<kda::NvtxRange>("bench.setup");
  std::vector<decltype(make_set(uint64_t{0}))> inputs;
  for (int i = 0; i < sets; ++i) {
    inputs.push_back(make_set(static_cast<uint64_t>(kFirstSeed + i)));
    inputs.back()->drop_host_copies();
  }
  const auto call = [&](int i, cudaStream_t s) { call_set(*inputs[i % sets], s); };
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

// The work of one call.
struct Work {
  double bytes, flop_per_token_head;
};

// A time of one call in terms of its work and of the memory's speed.
struct Rates {
  double bytes, flop, gbps, tflops, copy_gbps, roofline_us;
  Rates(const Shape& shape, const Work& work, double us, double copy)
      : bytes(work.bytes),
        flop(work.flop_per_token_head * shape.tokens * shape.options.value_heads),
        gbps(bytes / (us * 1e3)),
        tflops(flop / (us * 1e6)),
        copy_gbps(copy),
        roofline_us(bytes / (copy_gbps * 1e3)) {}
};

inline std::string json_escaped(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '"' || c == '\\') escaped += '\\';
    escaped += c;
  }
  return escaped;
}

inline std::string lengths_as_text(const std::vector<int64_t>& lengths, const char* separator) {
  std::string text;
  for (const int64_t length : lengths) text += (text.empty() ? "" : separator) + std::to_string(length);
  return text;
}

// The features that differ from the defaults, as flags.
inline std::string features_as_text(const Options& options) {
  std::string text;
  for (const Switch& feature : kSwitches) {
    if (options.*feature.member == feature.value) text += std::string(text.empty() ? "" : " ") + feature.name;
  }
  return text.empty() ? "defaults" : text;
}

inline void print_call(const Shape& shape, const Device& device, const std::string& plan_json) {
  const Options& options = shape.options;
  std::printf("device        %s, %d SMs, %d MB L2\n", device.properties.name, device.properties.multiProcessorCount,
              device.properties.l2CacheSize >> 20);
  std::printf("shape         batch %d, lengths %s, H %d, HV %d, K %d, V %d, %s, gate %s\n", options.batch,
              lengths_as_text(options.lengths, ",").c_str(), options.heads, options.value_heads, options.key_dim,
              options.value_dim, options.fp16 ? "fp16" : "bf16", name_of(options.gate));
  std::printf("features      %s\n", features_as_text(options).c_str());
  std::printf("plan          %s\n", plan_json.c_str());
}

inline void print_timing(const Options& options, const Timing& timing, const Work& work, const Rates& rates) {
  std::printf("time          %.2f us median, %.2f min, %.2f p90 (%d graph replays of %d calls, %d input sets)\n",
              timing.us.median, timing.us.min, timing.us.p90, options.iterations, timing.calls_per_replay,
              timing.input_sets);
  std::printf("traffic       %.1f GB/s (least traffic %.2f MB)\n", rates.gbps, rates.bytes / 1e6);
  std::printf("arithmetic    %.2f TFLOP/s (%.0f FLOP per token and value head)\n", rates.tflops,
              work.flop_per_token_head);
  std::printf("roofline      %.2f us at %.0f GB/s (a large copy in this run): %.1f %% reached\n", rates.roofline_us,
              rates.copy_gbps, 100 * rates.roofline_us / timing.us.median);
}

// What was measured and what came out, as one JSON object. own: members of the binary's own, each with ", " at its end.
inline std::string as_json(const Shape& shape, const Device& device, const std::string& own, const Timing& timing,
                           const Rates& rates) {
  const Options& options = shape.options;
  const auto boolean = [](bool value) { return value ? "true" : "false"; };
  std::ostringstream json;
  json.precision(10);
  json << "{\"device\": \"" << json_escaped(device.properties.name) << "\", \"lengths\": ["
       << lengths_as_text(options.lengths, ", ") << "], \"batch\": " << options.batch
       << ", \"heads\": " << options.heads << ", \"value_heads\": " << options.value_heads
       << ", \"key_dim\": " << options.key_dim << ", \"value_dim\": " << options.value_dim << ", \"dtype\": \""
       << (options.fp16 ? "fp16" : "bf16") << "\", \"gate\": \"" << name_of(options.gate)
       << "\", \"log_gate\": " << boolean(options.log_gate) << ", \"l2norm\": " << boolean(options.l2norm)
       << ", \"beta_sigmoid\": " << boolean(options.beta_sigmoid)
       << ", \"negative_eigenvalues\": " << boolean(options.negative_eigenvalues)
       << ", \"initial_state\": " << boolean(options.initial_state)
       << ", \"state_v_first\": " << boolean(options.state_v_first) << ", " << own
       << "\"median_us\": " << timing.us.median << ", \"min_us\": " << timing.us.min
       << ", \"p90_us\": " << timing.us.p90 << ", \"iterations\": " << options.iterations
       << ", \"calls_per_replay\": " << timing.calls_per_replay << ", \"input_sets\": " << timing.input_sets
       << ", \"least_bytes\": " << rates.bytes << ", \"flop\": " << rates.flop << ", \"gbps\": " << rates.gbps
       << ", \"tflops\": " << rates.tflops << ", \"copy_gbps\": " << rates.copy_gbps
       << ", \"roofline_us\": " << rates.roofline_us
       << ", \"roofline_fraction\": " << rates.roofline_us / timing.us.median << "}\n";
  return json.str();
}

// Into the file that --json names, if it is given.
inline void write_json(const Options& options, const std::string& json) {
  if (options.json_path.empty()) return;
  std::ofstream file(options.json_path);
  file << json;
  file.close();
  if (!file) throw std::runtime_error("--json: cannot write '" + options.json_path + "'");
  std::printf("json          %s\n", options.json_path.c_str());
}

// main() of a binary: run(options) returns the exit status.
template <size_t kHelpParts, class Run>
int run_program(const char* name, const char* const (&help)[kHelpParts], int argc, char** argv, Run&& run) {
  try {
    const Options options = parse_options(argc, argv);
    if (options.help) {
      for (const char* part : help) std::fputs(part, stdout);
      return 0;
    }
    return run(options);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "%s: %s (--help lists the flags)\n", name, error.what());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
  }
  return kExitCannotRun;
}

}  // namespace bench
