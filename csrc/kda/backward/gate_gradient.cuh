// The log-gate of one element with its derivatives. Every exponential formed here has an argument <= 0.
#pragma once

#include "../device/gate.cuh"

namespace kda {

// For x = g + dt_bias.
struct GateElement {
  float log_alpha;  // natural logarithm
  float by_x;       // d log_alpha / dx
  float by_A_log;   // d log_alpha / d A_log

  // decay_rate: exp(A_log), or 1.
  __device__ __forceinline__ GateElement(GateKind kind, float decay_rate, float lower_bound, float x) {
    if (kind == GateKind::kSigmoid) {
      const float logit = decay_rate * x, e = ptx::ex2(-fabsf(logit) * kLog2E);
      const float inverse = ptx::rcp(1.0f + e), smaller = e * inverse;  // sigmoid(-|logit|)
      log_alpha = lower_bound * (logit >= 0.0f ? inverse : smaller);
      const float slope = lower_bound * (inverse * smaller);
      by_x = slope * decay_rate;
      by_A_log = slope != 0.0f ? slope * logit : 0.0f;  // 0 * inf is not 0
    } else if (kind == GateKind::kSoftplus) {
      log_alpha = -decay_rate * softplus(x);
      by_x = -decay_rate * sigmoid(x);
      by_A_log = log_alpha;
    } else {
      log_alpha = x;
      by_x = 1.0f;
      by_A_log = 0.0f;
    }
  }
};

}  // namespace kda
