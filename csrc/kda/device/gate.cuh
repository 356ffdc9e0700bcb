// Activations of the gate and of beta. Every exponential formed here has an argument <= 0.
#pragma once

#include "../kda.h"
#include "ptx.cuh"

namespace kda {

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float sigmoid(float x) {
  const float e = ptx::ex2(-fabsf(x) * kLog2E);
  const float inverse = ptx::rcp(1.0f + e);
  return x >= 0.0f ? inverse : e * inverse;
}

// max(x, 0) + log(1 + e^-|x|): relative accuracy is kept where the result is tiny, which is where memory is long.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// The log-gate in base 2, log2(alpha), from one element of the tensor `g`.
struct GateActivation {
  GateKind kind;
  float decay_rate;    // exp(A_log) of this head, or 1
  float lower_bound;   // kSigmoid only

  __device__ __forceinline__ float log2_alpha(float g, float dt_bias) const {
    if (kind == GateKind::kLog) return g * kLog2E;
    if (kind == GateKind::kSigmoid) return lower_bound * kLog2E * sigmoid(decay_rate * (g + dt_bias));
    return -decay_rate * kLog2E * softplus(g + dt_bias);
  }
};

}  // namespace kda
