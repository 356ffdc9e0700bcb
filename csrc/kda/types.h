// What the kernels on all devices and the planner agree on.
#pragma once

#include <cstdint>

namespace kda {

// Tokens of one chunk; C in the formulas, and the distance of the states in chunk_states.
inline constexpr int kChunkTokens = 64;

// Under the root of the normalisation x * rsqrt(sum x^2 + epsilon).
inline constexpr float kL2NormEpsilon = 1e-6f;

enum class DataType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// How the log-gate is obtained from the tensor `g`.
enum class GateKind : int32_t {
  kLog = 0,       // g is the log-gate, in (-inf, 0]
  kSoftplus = 1,  // -exp(A_log) * softplus(g + dt_bias)
  kSigmoid = 2,   // lower_bound * sigmoid(exp(A_log) * (g + dt_bias)); A_log optional
};

}  // namespace kda
