// What the kernels on all devices and the planner agree on.
#pragma once

#include <cstdint>

namespace kda {

// Tokens of one chunk; C in the formulas, and the distance of the states in chunk_states.
inline constexpr int kChunkTokens = 64;

// Tokens of one step of the CUDA kernels that work step by step: the chunk of their formulas. 32 rather than 64: half the pairs and half
// the solve for each token, and a range of the gates that one reference token in the middle can serve (see step_operands.cuh).
inline constexpr int kStepTokens = 32;

// Of the fused forward: places for images of each scan, through which those of its steps go in turn. A few more than what its makers and its
// own shared memory hold, and few enough for all of them to stay in the second-level cache.
inline constexpr int kFusedRingSlots = 16;

// Under the root of the normalisation x * rsqrt(sum x^2 + epsilon).
inline constexpr float kL2NormEpsilon = 1e-6f;

enum class DataType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// Element strides of a [B, T, heads, dim] tensor whose last dimension is contiguous. For beta [B, T, HV] likewise.
struct TokenStrides {
  int64_t batch = 0;
  int64_t token = 0;
  int64_t head = 0;
};

// Whether every group of 8 elements whose index in the last dimension is a multiple of 8 starts at a multiple of 16 bytes.
[[nodiscard]] inline bool is_aligned(const void* base, const TokenStrides& stride, DataType type) {
  constexpr int64_t kVectorBytes = 16;
  const int64_t bytes = type == DataType::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 && stride.batch * bytes % kVectorBytes == 0 &&
         stride.token * bytes % kVectorBytes == 0 && stride.head * bytes % kVectorBytes == 0;
}

// How the log-gate is obtained from the tensor `g`.
enum class GateKind : int32_t {
  kLog = 0,       // g is the log-gate, in (-inf, 0]
  kSoftplus = 1,  // -exp(A_log) * softplus(g + dt_bias)
  kSigmoid = 2,   // lower_bound * sigmoid(exp(A_log) * (g + dt_bias)); A_log optional
};

}  // namespace kda
