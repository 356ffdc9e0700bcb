// Stage 5 of the backward: sums over what stage 4 leaves in parts, each in a fixed order, so that the same call gives
// the same bits.
//   reduce_heads       dq, dk of a key head: over the value heads of its group
//   reduce_parameters  dA_log, ddt_bias: over the chunk slots, and dA_log over the channels
//
// Bound by memory traffic: each part is read once.
#pragma once

#include "../device/elements.cuh"
#include "../device/ptx.cuh"
#include "kernel_params.h"

namespace kda {

struct ReduceConfig {
  static constexpr int kThreads = 256;            // of reduce_heads
  static constexpr int kParameterThreads = 1024;  // of reduce_parameters
};

__device__ __forceinline__ float4 add(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Four channels of one token and key head a thread.
template <typename Element>
__global__ void __launch_bounds__(ReduceConfig::kThreads)
    reduce_heads_kernel(const __grid_constant__ ChunkBwdKernelParams params) {
  ptx::launch_dependents();
  ptx::wait_for_kernel_before();  // before any return: who waits for this kernel relies on those before it, too
  const ChunkFwdProblem& problem = params.forward.call.problem;
  const int group = problem.value_heads / problem.heads, quads = problem.key_dim / 4;
  const int64_t index = blockIdx.x * int64_t{ReduceConfig::kThreads} + threadIdx.x;
  if (index >= problem.batch * problem.tokens * problem.heads * quads) return;
  const int64_t row = index / quads;  // token and key head; its value heads are adjacent
  const int64_t first = row * group * quads + index % quads;
  const auto sum = [&](const float* parts) {
    const float4* source = reinterpret_cast<const float4*>(parts) + first;
    float4 total = source[0];
    for (int head = 1; head < group; ++head) total = add(total, source[head * quads]);
    return uint2{Packed2<Element>::from_floats(total.x, total.y), Packed2<Element>::from_floats(total.z, total.w)};
  };
  static_cast<uint2*>(params.dq)[index] = sum(params.dq_parts);
  static_cast<uint2*>(params.dk)[index] = sum(params.dk_parts);
}

// One CTA a value head: kParameterThreads / K strips of slots for each channel.
template <int K>
__global__ void __launch_bounds__(ReduceConfig::kParameterThreads)
    reduce_parameters_kernel(const __grid_constant__ ChunkBwdKernelParams params) {
  constexpr int kStrips = ReduceConfig::kParameterThreads / K;
  ptx::wait_for_kernel_before();
  __shared__ float sums[2][kStrips][K];
  const int value_heads = params.forward.call.problem.value_heads, head = blockIdx.x;
  const int channel = threadIdx.x % K, strip = threadIdx.x / K;
  float rate = 0.0f, bias = 0.0f;
#pragma unroll 8  // loads are on their way side by side; the order of the sums is the same
  for (int64_t slot = strip; slot < params.forward.chunk_slots; slot += kStrips) {
    const int64_t part = (slot * value_heads + head) * K + channel;
    rate += params.dA_log_parts[part];
    bias += params.ddt_bias_parts[part];
  }
  sums[0][strip][channel] = rate;
  sums[1][strip][channel] = bias;
  __syncthreads();
  if (strip == 0) {
    for (int i = 1; i < kStrips; ++i) {
      rate += sums[0][i][channel];
      bias += sums[1][i][channel];
    }
    if (params.ddt_bias != nullptr) params.ddt_bias[head * K + channel] = bias;
    sums[0][0][channel] = rate;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    float total = 0.0f;
    for (int c = threadIdx.x; c < K; c += 32) total += sums[0][0][c];
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
    if (threadIdx.x == 0 && params.dA_log != nullptr) params.dA_log[head] = total;
  }
}

}  // namespace kda
