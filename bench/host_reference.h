// KDA token by token in double precision: the ground truth of the benchmarks' check. With S [K, V] the state,
//   S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace bench {

// Inputs as the kernel gets them (raw logits of the gate and of beta), widened to double.
struct HostInputs {
  std::vector<int64_t> lengths;       // tokens of each sequence, N
  int heads, value_heads;             // H, HV
  int key_dim, value_dim;             // K, V
  std::vector<double> q, k;           // [T, H, K]
  std::vector<double> v;              // [T, HV, V]
  std::vector<double> g;              // [T, HV, K]
  std::vector<double> beta;           // [T, HV]
  std::vector<double> A_log;          // [HV]
  std::vector<double> dt_bias;        // [HV, K]
  std::vector<double> initial_state;  // [N, HV, K, V]
  double scale;
  bool softplus_gate;  // -exp(A_log) * softplus(g + dt_bias), else lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
  double lower_bound;
};

struct HostOutputs {
  std::vector<double> o;            // [T, HV, V]
  std::vector<double> final_state;  // [N, HV, K, V]
};

inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
inline double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// x * rsqrt(sum x^2 + 1e-6)
inline std::vector<double> l2_normalized(const double* x, int size) {
  constexpr double kEpsilon = 1e-6;
  double sum = 0;
  for (int d = 0; d < size; ++d) sum += x[d] * x[d];
  std::vector<double> y(x, x + size);
  for (double& value : y) value /= std::sqrt(sum + kEpsilon);
  return y;
}

inline HostOutputs token_recurrence(const HostInputs& in) {
  const int K = in.key_dim, V = in.value_dim, H = in.heads, HV = in.value_heads;
  HostOutputs out;
  out.o.resize(in.v.size());
  out.final_state = in.initial_state;
  std::vector<double> u(V);
  int64_t first = 0;
  for (size_t n = 0; n < in.lengths.size(); first += in.lengths[n++]) {
    for (int hv = 0; hv < HV; ++hv) {
      double* S = out.final_state.data() + (n * HV + hv) * K * V;
      const int h = hv / (HV / H);
      for (int64_t t = first; t < first + in.lengths[n]; ++t) {
        const std::vector<double> q = l2_normalized(in.q.data() + (t * H + h) * K, K);
        const std::vector<double> k = l2_normalized(in.k.data() + (t * H + h) * K, K);
        const double* v = in.v.data() + (t * HV + hv) * V;
        const double* g = in.g.data() + (t * HV + hv) * K;
        const double beta = sigmoid(in.beta[t * HV + hv]), A = std::exp(in.A_log[hv]);
        for (int j = 0; j < V; ++j) u[j] = beta * v[j];
        for (int d = 0; d < K; ++d) {
          const double x = g[d] + in.dt_bias[hv * K + d];
          const double alpha = std::exp(in.softplus_gate ? -A * softplus(x) : in.lower_bound * sigmoid(A * x));
          for (int j = 0; j < V; ++j) {
            S[d * V + j] *= alpha;
            u[j] -= beta * k[d] * S[d * V + j];
          }
        }
        double* o = out.o.data() + (t * HV + hv) * V;
        for (int d = 0; d < K; ++d) {
          for (int j = 0; j < V; ++j) {
            S[d * V + j] += k[d] * u[j];
            o[j] += in.scale * q[d] * S[d * V + j];
          }
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
