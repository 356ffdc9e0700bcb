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

// log(1 + e) for e in [0, 1], to fp32 relative accuracy also where e is tiny: 2 atanh(z) with z = e / (2 + e) <= 1/3,
// as its series up to z^13.
__device__ __forceinline__ float log1p_unit(float e) {
  const float z = e * ptx::rcp(2.0f + e), z2 = z * z;
  float series = 2.0f / 13.0f;
  series = fmaf(series, z2, 2.0f / 11.0f);
  series = fmaf(series, z2, 2.0f / 9.0f);
  series = fmaf(series, z2, 2.0f / 7.0f);
  series = fmaf(series, z2, 2.0f / 5.0f);
  series = fmaf(series, z2, 2.0f / 3.0f);
  series = fmaf(series, z2, 2.0f);
  return series * z;
}

// log(1 + e^x). The result is tiny, and must be accurate, where memory is long.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1p_unit(ptx::ex2(-fabsf(x) * kLog2E)); }

}  // namespace kda
