// The states at the ends of the segments of a cut sequence, from the affine map of each segment (state_recurrence.cuh):
//   S_end[0] as it is,      S_end[s] = M_s S_end[s - 1] + B_s,
// at fp32-like accuracy. segment_state holds B and is replaced by S_end, which is the entry of the next segment. The end of the last
// segment is the final state and is left to the recurrence.
//
// Grid: one CTA for each (sequence, value head, 16 columns of V); K / 16 warps. A CTA keeps 16 rows of S^T and goes through the segments:
//   S_end^T [16, K] = S^T [16, K] M^T [K, K] + B^T
// Each warp computes 16 of the K columns; the rows meet in shared memory. The products run on tensor cores in tf32, each fp32
// operand split in two (three products). M^T goes from global memory to registers, a segment ahead.
//
// Bound by the chain over segments: its products, and 4 K^2 bytes of M^T a CTA from the second-level cache.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/triangular_inverse.cuh"
#include "kernel_params.h"

namespace kda {

template <int K_>
struct SegmentComposeConfig {
  static constexpr int K = K_;
  static constexpr int kRows = 16;
  static constexpr int kWarps = K / 16, kThreads = 32 * kWarps;
  static constexpr int kStride = K + 16;  // of a row of S^T in shared memory: two rows of float4 touch all banks once
  static constexpr int kRowsBytes = kRows * kStride * 4;
  static constexpr int kSharedBytes = 2 * kRowsBytes;  // the state before and after a segment
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    segment_compose_kernel(const __grid_constant__ ChunkFwdKernelParams params) {
  constexpr int K = Config::K, kStride = Config::kStride;
  extern __shared__ __align__(16) float rows_shared[];
  const ChunkFwdParams& call = params.call;
  const int value_heads = call.problem.value_heads, row_tiles = call.problem.value_dim / Config::kRows;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = lane >> 2, member = lane & 3;
  const int row_tile = static_cast<int>(blockIdx.x % row_tiles);
  const int value_head = static_cast<int>(blockIdx.x / row_tiles % value_heads);
  const int64_t sequence = blockIdx.x / row_tiles / value_heads;

  const SegmentRange range = segment_range(call, sequence, params.segment_chunks);
  const int64_t ends = range.segments - 1;  // states that are wanted; the first is there
  if (ends < 2) return;

  // This warp's part of the state at the end of segment s: columns 16 * warp .. + 15 as two accumulator fragments.
  const auto state_at = [&](int64_t s) {
    const int64_t tile = (range.first_slot + s) * value_heads + value_head;
    return params.segment_state + ((tile * row_tiles + row_tile) * (K / 8) + 2 * warp) * 32 + lane;
  };
  // Lane (group, member) of fragment (kt, n): M^T[16 kt + 4 member .. + 3][8 n + group].
  struct Inputs {
    float4 map[K / 16][2], offset[2];
  };
  const auto load = [&](Inputs& inputs, int64_t s) {
    const int64_t tile = (range.first_slot + s) * value_heads + value_head;
    const float4* const map = reinterpret_cast<const float4*>(params.segment_map + tile * K * K) + 2 * warp * 32 + lane;
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
#pragma unroll
      for (int n = 0; n < 2; ++n) inputs.map[kt][n] = map[(kt * (K / 8) + n) * 32];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) inputs.offset[n] = state_at(s)[n * 32];
  };
  const auto share = [&](float* rows, int n, const float4& fragment) {
    float* const upper = rows + group * kStride + 16 * warp + 8 * n + 2 * member;
    *reinterpret_cast<float2*>(upper) = {fragment.x, fragment.y};
    *reinterpret_cast<float2*>(upper + 8 * kStride) = {fragment.z, fragment.w};
  };

  float* before = rows_shared;
  float* after = rows_shared + Config::kRows * kStride;
#pragma unroll
  for (int n = 0; n < 2; ++n) share(before, n, state_at(0)[n * 32]);
  Inputs inputs;
  load(inputs, 1);
  for (int64_t s = 1; s < ends; ++s) {
    __syncthreads();
    Inputs next;
    if (s + 1 < ends) load(next, s + 1);

    // Two sums for each fragment, so that half as many products wait for each other. Inside 16 channels the contraction takes them in
    // the order of the lanes' float4: product `half` takes 4 member + 2 half and the next.
    float acc[2][2][4] = {};
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      const float4 upper = *reinterpret_cast<const float4*>(before + group * kStride + 16 * kt + 4 * member);
      const float4 lower = *reinterpret_cast<const float4*>(before + (group + 8) * kStride + 16 * kt + 4 * member);
      const float a[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a_high[4], a_low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const SplitTf32 split(a[half][i]);
          a_high[i] = split.high, a_low[i] = split.low;
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float4& b = inputs.map[kt][n];
          const SplitTf32 b0(half == 0 ? b.x : b.z), b1(half == 0 ? b.y : b.w);
          const uint32_t b_high[2] = {b0.high, b1.high}, b_low[2] = {b0.low, b1.low};
          ptx::mma_m16n8k8_tf32(acc[n][half], a_low, b_high);
          ptx::mma_m16n8k8_tf32(acc[n][half], a_high, b_low);
          ptx::mma_m16n8k8_tf32(acc[n][half], a_high, b_high);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float4& offset = inputs.offset[n];
      const float4 end = {acc[n][0][0] + acc[n][1][0] + offset.x, acc[n][0][1] + acc[n][1][1] + offset.y,
                          acc[n][0][2] + acc[n][1][2] + offset.z, acc[n][0][3] + acc[n][1][3] + offset.w};
      state_at(s)[n * 32] = end;
      share(after, n, end);
    }
    float* const swapped = before;
    before = after;
    after = swapped;
    inputs = next;
  }
}

}  // namespace kda
