// What the benchmarks count and how they sum up samples.
#pragma once

#include <algorithm>
#include <vector>

#include "inputs.h"

namespace bench {

struct Statistics {
  double median = 0, min = 0, p90 = 0;
};

inline Statistics summarize(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const size_t n = samples.size();
  const double median = n % 2 ? samples[n / 2] : 0.5 * (samples[n / 2 - 1] + samples[n / 2]);
  return {median, samples.front(), samples[std::min(n - 1, n * 9 / 10)]};
}

// Bytes of g and beta.
inline double gate_bytes(const Shape& s) {
  const auto element = [](bool fp32) { return fp32 ? sizeof(float) : kActivationBytes; };
  return static_cast<double>(s.g_elements() * element(s.options.log_gate)) +
         static_cast<double>(s.beta_elements() * element(!s.options.beta_sigmoid));
}

// Bytes that any implementation moves: q, k, v, g, beta and the initial state in, o and the asked for states out.
inline double least_bytes(const Shape& s) {
  const Options& o = s.options;
  const double activations = 2.0 * s.qk_elements() + 2.0 * s.v_elements(), gate = gate_bytes(s);
  const double states = (o.initial_state ? 1.0 : 0.0) * s.state_elements() +
                        (o.final_state ? 1.0 : 0.0) * s.state_elements() +
                        (o.chunk_states ? 1.0 : 0.0) * s.chunks() * s.head_states_elements();
  return activations * kActivationBytes + gate + states * sizeof(float);
}

// Dense products of the chunk form, per token and value head with C = 64: Akk and Aqk (4CK), Tinv times K and V (2CK +
// 2CV), Aqk U (2CV), and three with the state (6KV). The solve itself is not counted.
inline double flop_per_token_head(const Shape& s) {
  const double C = kda::kChunkTokens, K = s.options.key_dim, V = s.options.value_dim;
  return 6 * C * K + 4 * C * V + 6 * K * V;
}

// The same of the backward, as the board counts it: the forward's inputs and outputs, do and the gradient of the final
// state in, the gradients of all inputs out.
inline double backward_least_bytes(const Shape& s) {
  const double activations = 4.0 * s.qk_elements() + 4.0 * s.v_elements();  // q, k, v, o, do, dq, dk, dv
  const double states = (s.options.initial_state ? 4.0 : 2.0) * s.state_elements();
  return activations * kActivationBytes + 2 * gate_bytes(s) + states * sizeof(float);
}

// Dense products of the backward, as the board counts them: nothing that is computed again.
inline double backward_flop_per_token_head(const Shape& s) {
  const double C = kda::kChunkTokens, K = s.options.key_dim, V = s.options.value_dim;
  return 8 * C * K + 8 * C * V + 12 * K * V;
}

// GB/s of a device-to-device copy, reads and writes both counted: what the board's memory gives in this run.
inline double copy_bandwidth_gbps(cudaStream_t stream) {
  constexpr size_t kBytes = size_t{1} << 31;
  constexpr int kCopies = 20;
  const DeviceBuffer source(kBytes), target(kBytes);
  BENCH_CUDA(cudaMemsetAsync(source.get(), 1, kBytes, stream));
  std::vector<double> samples;
  for (int i = 0; i < kCopies; ++i) {
    Event start, stop;
    start.record(stream);
    BENCH_CUDA(cudaMemcpyAsync(target.get(), source.get(), kBytes, cudaMemcpyDeviceToDevice, stream));
    stop.record(stream);
    samples.push_back(stop.us_since(start));
  }
  return 2.0 * kBytes / (summarize(samples).median * 1e3);
}

}  // namespace bench
