// The transposed state of one warp, S^T: 16 rows of V and all K channels, as fp32 MMA accumulators.
#pragma once

#include "../device/elements.cuh"

namespace kda {

// acc[n] covers channels 8 n .. 8 n + 7, in the accumulator layout of mma.m16n8.
template <int K>
struct StateFragments {
  float acc[K / 8][4];

  // Calls f(value, row, channel) for each element; row is 0..15.
  template <typename Function>
  __device__ __forceinline__ void for_each(int lane, Function f) {
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(acc[n][i], (lane >> 2) + (i >> 1) * 8, 8 * n + 2 * (lane & 3) + (i & 1));
    }
  }

  __device__ __forceinline__ void load(const void* source, DataType type, int64_t row_stride, int64_t channel_stride,
                                       int lane) {
    for_each(lane, [&](float& value, int row, int channel) {
      value = load_1(source, row * row_stride + channel * channel_stride, type);
    });
  }

  __device__ __forceinline__ void store(float* destination, int64_t row_stride, int64_t channel_stride, int lane) {
    for_each(lane, [&](float value, int row, int channel) {
      destination[row * row_stride + channel * channel_stride] = value;
    });
  }

  // The accumulators as they lie in registers: K / 8 fragments of 32 float4.
  __device__ __forceinline__ void load_fragments(const float4* source, int lane) {
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
      const float4 fragment = source[n * 32 + lane];
      acc[n][0] = fragment.x, acc[n][1] = fragment.y, acc[n][2] = fragment.z, acc[n][3] = fragment.w;
    }
  }

  __device__ __forceinline__ void store_fragments(float4* destination, int lane) const {
#pragma unroll
    for (int n = 0; n < K / 8; ++n) destination[n * 32 + lane] = {acc[n][0], acc[n][1], acc[n][2], acc[n][3]};
  }

  // Whether every element of this warp's rows is smaller than `limit` in magnitude. NaN is not.
  __device__ __forceinline__ bool is_below(float limit) const {
    bool below = true;
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) below = below && fabsf(acc[n][i]) < limit;
    }
    return __all_sync(0xffffffffu, below);
  }

  // The A operands of mma.m16n8k16 and wgmma: element k-step kt, as bf16.
  __device__ __forceinline__ void to_operands(uint32_t (&a)[K / 16][4]) const {
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      a[kt][0] = pack_bf16(acc[2 * kt][0], acc[2 * kt][1]);
      a[kt][1] = pack_bf16(acc[2 * kt][2], acc[2 * kt][3]);
      a[kt][2] = pack_bf16(acc[2 * kt + 1][0], acc[2 * kt + 1][1]);
      a[kt][3] = pack_bf16(acc[2 * kt + 1][2], acc[2 * kt + 1][3]);
    }
  }
};

}  // namespace kda
