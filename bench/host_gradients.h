// The gradients of KDA token by token in double precision, backwards through the recurrence of host_reference.h: the
// ground truth of the backward's check. With Sd = Diag(alpha) S_{t-1} and u = beta (v - Sd^T k), from dS_t and do:
//   dS_t += scale q do^T        dq = scale S_t do       du = dS_t^T k        dbeta = du . u / beta      dv = beta du
//   dk = dS_t u - beta Sd du    dSd = dS_t - beta k du^T     dalpha = rowsum(dSd * S_{t-1})     dS_{t-1} = Diag(alpha) dSd
#pragma once

#include "host_reference.h"

namespace bench {

struct HostOutputGradients {
  std::vector<double> o;            // [T, HV, V]
  std::vector<double> final_state;  // [N, HV, K, V]
};

// Of every input, in its shape in HostInputs. Those of A_log and dt_bias are empty for HostGate::kLog.
struct HostGradients {
  std::vector<double> q, k, v, g, beta, A_log, dt_bias, initial_state;
};

// d of x from that of x / |x|, added to `sum`. epsilon of the norm as in l2_normalized().
inline void add_unnormalized(double* sum, const std::vector<double>& dy, const std::vector<double>& y,
                             const double* x) {
  constexpr double kEpsilon = 1e-6;
  double squares = kEpsilon, dot = 0;
  for (size_t d = 0; d < y.size(); ++d) {
    squares += x[d] * x[d];
    dot += y[d] * dy[d];
  }
  for (size_t d = 0; d < y.size(); ++d) sum[d] += (dy[d] - y[d] * dot) / std::sqrt(squares);
}

// What d(log alpha) gives for the logit (with its bias), and for A_log.
struct GateGradient {
  double logit, A_log;
};

inline GateGradient gate_gradient(const HostInputs& in, double A, double x, double dlog_alpha) {
  if (in.gate == HostGate::kLog) return {dlog_alpha, 0.0};
  if (in.gate == HostGate::kSoftplus) return {-dlog_alpha * A * sigmoid(x), -dlog_alpha * A * softplus(x)};
  const double s = sigmoid(A * x), slope = in.lower_bound * s * (1 - s) * A;
  return {dlog_alpha * slope, dlog_alpha * slope * x};
}

// The gradients of one sequence and value head: forwards with every state kept, then backwards.
class HostSequenceGradients {
 public:
  HostSequenceGradients(const HostInputs& in, const HostOutputGradients& from, HostGradients& to, int64_t sequence,
                        int64_t first, int value_head)
      : in_(in),
        from_(from),
        to_(to),
        K(in.key_dim),
        V(in.value_dim),
        length_(in.lengths[sequence]),
        first_(first),
        state_offset_((sequence * in.value_heads + value_head) * K * V),
        value_head_(value_head) {}

  void run() {
    std::vector<double> S(in_.initial_state.begin() + state_offset_, in_.initial_state.begin() + state_offset_ + K * V);
    std::vector<double> u(V);
    for (int64_t t = 0; t < length_; ++t) {
      before_.push_back(S);
      advance(S.data(), u, token_at(in_, first_ + t, value_head_), K, V);
    }
    std::vector<double> dS(from_.final_state.begin() + state_offset_,
                           from_.final_state.begin() + state_offset_ + K * V);
    for (int64_t t = length_; t-- > 0;) step_back(dS, t);
    std::copy(dS.begin(), dS.end(), to_.initial_state.begin() + state_offset_);
  }

 private:
  // dS: of the state after token t of the sequence, then of the state before it.
  void step_back(std::vector<double>& dS, int64_t t) {
    const int64_t row = (first_ + t) * in_.value_heads + value_head_;
    const HostToken token = token_at(in_, first_ + t, value_head_);
    const double* const dO = from_.o.data() + row * V;
    std::vector<double> S = before_[t], faded(K * V), u(V), du(V), dq(K), dk(K);
    advance(S.data(), u, token, K, V, faded.data());
    for (int d = 0; d < K; ++d) {
      for (int j = 0; j < V; ++j) {
        double& ds = dS[d * V + j];
        ds += in_.scale * token.q[d] * dO[j];
        dq[d] += in_.scale * S[d * V + j] * dO[j];
        dk[d] += ds * u[j];
        du[j] += ds * token.k[d];
      }
    }
    std::vector<double> prediction(V);  // what the state held under the key
    for (int d = 0; d < K; ++d) {
      for (int j = 0; j < V; ++j) prediction[j] += token.k[d] * faded[d * V + j];
    }
    double dbeta = 0;
    for (int j = 0; j < V; ++j) {
      dbeta += du[j] * (token.v[j] - prediction[j]);
      to_.v[row * V + j] = token.beta * du[j];
    }
    std::vector<double> dlog_alpha(K);
    for (int d = 0; d < K; ++d) {
      const double alpha = std::exp(token.log_alpha[d]);
      double dalpha = 0;
      for (int j = 0; j < V; ++j) {
        dk[d] -= token.beta * faded[d * V + j] * du[j];
        const double dfaded = dS[d * V + j] - token.beta * token.k[d] * du[j];
        dalpha += dfaded * before_[t][d * V + j];
        dS[d * V + j] = alpha * dfaded;
      }
      dlog_alpha[d] = alpha * dalpha;
    }
    store_transforms(token, row, first_ + t, dq, dk, dlog_alpha, dbeta);
  }

  void store_transforms(const HostToken& token, int64_t row, int64_t t, const std::vector<double>& dq,
                        const std::vector<double>& dk, const std::vector<double>& dlog_alpha, double dbeta) {
    const int64_t key_row = (t * in_.heads + value_head_ / (in_.value_heads / in_.heads)) * K;
    const auto add = [&](std::vector<double>& sum, const std::vector<double>& gradient,
                         const std::vector<double>& transformed, const std::vector<double>& x) {
      if (in_.l2norm) return add_unnormalized(sum.data() + key_row, gradient, transformed, x.data() + key_row);
      for (int d = 0; d < K; ++d) sum[key_row + d] += gradient[d];
    };
    add(to_.q, dq, token.q, in_.q);
    add(to_.k, dk, token.k, in_.k);
    const double s = in_.beta_sigmoid ? sigmoid(in_.beta[row]) : 0.0;
    to_.beta[row] = in_.beta_sigmoid ? dbeta * in_.beta_scale * s * (1 - s) : dbeta;
    const bool logits = in_.gate != HostGate::kLog;
    const double A = logits ? std::exp(in_.A_log[value_head_]) : 1.0;
    for (int d = 0; d < K; ++d) {
      const double x = in_.g[row * K + d] + (logits ? in_.dt_bias[value_head_ * K + d] : 0.0);
      const GateGradient gate = gate_gradient(in_, A, x, dlog_alpha[d]);
      to_.g[row * K + d] = gate.logit;
      if (logits) {
        to_.A_log[value_head_] += gate.A_log;
        to_.dt_bias[value_head_ * K + d] += gate.logit;
      }
    }
  }

  const HostInputs& in_;
  const HostOutputGradients& from_;
  HostGradients& to_;
  const int K, V;
  const int64_t length_, first_, state_offset_;
  const int value_head_;
  std::vector<std::vector<double>> before_;  // states before each token, [K, V]
};

inline HostGradients token_gradients(const HostInputs& in, const HostOutputGradients& from) {
  HostGradients to;
  to.q.resize(in.q.size());
  to.k.resize(in.k.size());
  to.v.resize(in.v.size());
  to.g.resize(in.g.size());
  to.beta.resize(in.beta.size());
  if (in.gate != HostGate::kLog) {
    to.A_log.resize(in.A_log.size());
    to.dt_bias.resize(in.dt_bias.size());
  }
  to.initial_state.resize(in.initial_state.size());
  int64_t first = 0;
  for (size_t n = 0; n < in.lengths.size(); first += in.lengths[n++]) {
    for (int hv = 0; hv < in.value_heads; ++hv) HostSequenceGradients(in, from, to, n, first, hv).run();
  }
  return to;
}

}  // namespace bench
