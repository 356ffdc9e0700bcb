// KDA token by token in double precision: the ground truth of the benchmarks' check. With S [K, V] the state,
//   S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kda/plan.h"

namespace bench {

enum class HostGate {
  kLog,       // g is the log-gate
  kSoftplus,  // -exp(A_log) * softplus(g + dt_bias)
  kSigmoid,   // lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
};

// Inputs as the kernel gets them, widened to double. States are [K, V] whatever their layout on the device.
struct HostInputs {
  std::vector<int64_t> lengths;       // tokens of each sequence, N
  int heads, value_heads;             // H, HV
  int key_dim, value_dim;             // K, V
  std::vector<double> q, k;           // [T, H, K]
  std::vector<double> v;              // [T, HV, V]
  std::vector<double> g;              // [T, HV, K]
  std::vector<double> beta;           // [T, HV], logits or beta itself
  std::vector<double> A_log;          // [HV]; not read for kLog
  std::vector<double> dt_bias;        // [HV, K]; not read for kLog
  std::vector<double> initial_state;  // [N, HV, K, V]
  double scale;
  HostGate gate;
  double lower_bound;  // kSigmoid only
  bool beta_sigmoid;   // beta is beta_scale * sigmoid(logit), else what it is
  double beta_scale;
  bool l2norm;        // q and k are to be normalised
  bool chunk_states;  // whether these are wanted
};

struct HostOutputs {
  std::vector<double> o;             // [T, HV, V]
  std::vector<double> final_state;   // [N, HV, K, V]
  std::vector<double> chunk_states;  // [chunks of all sequences, HV, K, V], at entry of each, sequence by sequence
};

inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
inline double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// The logarithm of the decay, for a gate logit with dt_bias added and A = exp(A_log).
inline double log_decay(HostGate gate, double lower_bound, double A, double x) {
  if (gate == HostGate::kLog) return x;
  return gate == HostGate::kSoftplus ? -A * softplus(x) : lower_bound * sigmoid(A * x);
}

// x * rsqrt(sum x^2 + 1e-6)
inline std::vector<double> l2_normalized(const double* x, int size) {
  constexpr double kEpsilon = 1e-6;
  double sum = 0;
  for (int d = 0; d < size; ++d) sum += x[d] * x[d];
  std::vector<double> y(x, x + size);
  for (double& value : y) value /= std::sqrt(sum + kEpsilon);
  return y;
}

inline int64_t chunks_of(int64_t tokens) { return (tokens + kda::kChunkTokens - 1) / kda::kChunkTokens; }

// A token of a value head after the transforms.
struct HostToken {
  std::vector<double> q, k;       // [K], normalised if that is asked for
  std::vector<double> log_alpha;  // [K]
  double beta;
  const double* v;  // [V]
};

inline HostToken token_at(const HostInputs& in, int64_t t, int hv) {
  const int K = in.key_dim, V = in.value_dim, H = in.heads, HV = in.value_heads, h = hv / (HV / H);
  const double *q = in.q.data() + (t * H + h) * K, *k = in.k.data() + (t * H + h) * K;
  const bool logits = in.gate != HostGate::kLog;
  const double A = logits ? std::exp(in.A_log[hv]) : 1.0;
  HostToken token;
  token.q = in.l2norm ? l2_normalized(q, K) : std::vector<double>(q, q + K);
  token.k = in.l2norm ? l2_normalized(k, K) : std::vector<double>(k, k + K);
  token.log_alpha.assign(in.g.begin() + (t * HV + hv) * K, in.g.begin() + (t * HV + hv + 1) * K);
  for (int d = 0; d < K; ++d) {
    const double x = token.log_alpha[d] + (logits ? in.dt_bias[hv * K + d] : 0.0);
    token.log_alpha[d] = log_decay(in.gate, in.lower_bound, A, x);
  }
  token.beta = in.beta[t * HV + hv];
  if (in.beta_sigmoid) token.beta = in.beta_scale * sigmoid(token.beta);
  token.v = in.v.data() + (t * HV + hv) * V;
  return token;
}

// S_{t-1} -> S_t, and the corrected values u [V] that the token writes; faded [K, V] is Diag(alpha) S_{t-1}, if wanted.
inline void advance(double* S, std::vector<double>& u, const HostToken& token, int K, int V, double* faded = nullptr) {
  for (int j = 0; j < V; ++j) u[j] = token.beta * token.v[j];
  for (int d = 0; d < K; ++d) {
    const double alpha = std::exp(token.log_alpha[d]);
    for (int j = 0; j < V; ++j) {
      S[d * V + j] *= alpha;
      u[j] -= token.beta * token.k[d] * S[d * V + j];
    }
  }
  if (faded != nullptr) std::copy_n(S, K * V, faded);
  for (int d = 0; d < K; ++d) {
    for (int j = 0; j < V; ++j) S[d * V + j] += token.k[d] * u[j];
  }
}

inline HostOutputs token_recurrence(const HostInputs& in) {
  const int K = in.key_dim, V = in.value_dim, HV = in.value_heads;
  HostOutputs out;
  out.o.resize(in.v.size());
  out.final_state = in.initial_state;
  int64_t chunks = 0;
  for (const int64_t length : in.lengths) chunks += chunks_of(length);
  if (in.chunk_states) out.chunk_states.resize(chunks * HV * K * V);
  std::vector<double> u(V);
  int64_t first = 0, first_chunk = 0;
  for (size_t n = 0; n < in.lengths.size(); first_chunk += chunks_of(in.lengths[n]), first += in.lengths[n++]) {
    for (int hv = 0; hv < HV; ++hv) {
      double* S = out.final_state.data() + (n * HV + hv) * K * V;
      for (int64_t t = first; t < first + in.lengths[n]; ++t) {
        if (in.chunk_states && (t - first) % kda::kChunkTokens == 0) {
          const int64_t chunk = first_chunk + (t - first) / kda::kChunkTokens;
          std::copy_n(S, K * V, out.chunk_states.begin() + (chunk * HV + hv) * K * V);
        }
        const HostToken token = token_at(in, t, hv);
        advance(S, u, token, K, V);
        double* o = out.o.data() + (t * HV + hv) * V;
        for (int d = 0; d < K; ++d) {
          for (int j = 0; j < V; ++j) o[j] += in.scale * token.q[d] * S[d * V + j];
        }
      }
    }
  }
  return out;
}

// RMS of the difference over RMS of the expected; infinite if a value is not finite.
inline double relative_rmse(const std::vector<double>& actual, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isfinite(actual[i])) return std::numeric_limits<double>::infinity();
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return size > 0 ? std::sqrt(error / size) : (error > 0 ? std::numeric_limits<double>::infinity() : 0.0);
}

}  // namespace bench
