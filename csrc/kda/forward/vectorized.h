// Whether the inputs of a call lie in memory so that kernels can load 8 elements at once.
#pragma once

#include <cstdint>

#include "../kda.h"

namespace kda {

// Whether every group of 8 elements whose index in the last dimension is a multiple of 8 starts at a multiple of 16
// bytes.
[[nodiscard]] inline bool is_vectorized(const void* base, const TokenStrides& stride, DataType type) {
  constexpr int64_t kVectorBytes = 16;
  const int64_t bytes = type == DataType::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 && stride.batch * bytes % kVectorBytes == 0 &&
         stride.token * bytes % kVectorBytes == 0 && stride.head * bytes % kVectorBytes == 0;
}

// The same for all of q, k, v and g.
[[nodiscard]] inline bool is_vectorized(const ChunkFwdParams& call) {
  const DataType activation_type = call.problem.activation_type;
  return is_vectorized(call.q, call.q_stride, activation_type) &&
         is_vectorized(call.k, call.k_stride, activation_type) &&
         is_vectorized(call.v, call.v_stride, activation_type) && is_vectorized(call.g, call.g_stride, call.gate_type);
}

}  // namespace kda
