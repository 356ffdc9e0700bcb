// The transposed state of one warp, S^T: 16 rows of V and all K channels, as fp32 MMA accumulators.
#pragma once

#include "../device/elements.cuh"
#include "../device/ptx.cuh"
#include "../kda.h"

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

  // The same with the element's place in a matrix of `element_bytes` an element, whose first one that is this warp's lies at `first`. Addresses
  // go on by additions: their code is run once a sequence, and waits for instructions rather than for memory.
  template <typename Byte, typename Function>
  __device__ __forceinline__ void for_each_in(Byte* first, int element_bytes, int64_t row_stride,
                                              int64_t channel_stride, int lane, Function f) {
    const int64_t channel_bytes = channel_stride * element_bytes, row_bytes = row_stride * element_bytes;
    Byte* const even = first + (lane >> 2) * row_bytes + 2 * (lane & 3) * channel_bytes;
    Byte* rows[2] = {even, even + 8 * row_bytes};
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(acc[n][i], rows[i >> 1] + (i & 1) * channel_bytes);
      // Else the compiler finds all addresses first, and has no registers for them.
      for (Byte*& row : rows) row = ptx::opaque(row + 8 * channel_bytes);
    }
  }

  __device__ __forceinline__ void load(const void* source, DataType type, int64_t row_stride, int64_t channel_stride,
                                       int lane) {
    const uint8_t* const first = static_cast<const uint8_t*>(source);
    if (type == DataType::kFloat32) {
      for_each_in(first, 4, row_stride, channel_stride, lane,
                  [](float& value, const uint8_t* place) { value = *reinterpret_cast<const float*>(place); });
      return;
    }
    const bool is_bf16 = type == DataType::kBFloat16;
    for_each_in(first, 2, row_stride, channel_stride, lane, [&](float& value, const uint8_t* place) {
      const uint16_t bits = *reinterpret_cast<const uint16_t*>(place);
      value = is_bf16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
    });
  }

  template <typename T>
  __device__ __forceinline__ void store(T* destination, int64_t row_stride, int64_t channel_stride, int lane) {
    for_each_in(reinterpret_cast<uint8_t*>(destination), sizeof(T), row_stride, channel_stride, lane,
                [](float value, uint8_t* place) { *reinterpret_cast<T*>(place) = T(value); });
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

// Where the rows of a warp of a state tensor [.., K, V] or [.., V, K] lie.
struct StateStrides {
  int64_t row, channel;
  __device__ __forceinline__ StateStrides(const ChunkFwdParams& call)
      : row(call.state_v_first ? call.problem.key_dim : 1), channel(call.state_v_first ? 1 : call.problem.value_dim) {}
};

// Rows first_row .. of the initial state of a sequence; zeros if there is none.
template <int K>
__device__ __forceinline__ void load_initial_state(StateFragments<K>& state, const ChunkFwdParams& call,
                                                   int64_t sequence, int value_head, int first_row, int lane) {
  if (call.initial_state == nullptr) {
    state.for_each(lane, [](float& value, int, int) { value = 0.0f; });
    return;
  }
  const StateStrides stride(call);
  const int64_t first = sequence * call.initial_state_stride_sequence + value_head * call.initial_state_stride_head +
                        first_row * stride.row;
  const int element_bytes = call.state_type == DataType::kFloat32 ? 4 : 2;
  state.load(static_cast<const uint8_t*>(call.initial_state) + first * element_bytes, call.state_type, stride.row,
             stride.channel, lane);
}

// Into matrix `index` of a tensor of states in fp32.
template <int K>
__device__ __forceinline__ void store_state(float* states, int64_t index, StateFragments<K>& state,
                                            const ChunkFwdParams& call, int first_row, int lane) {
  const StateStrides stride(call);
  state.store(states + index * K * call.problem.value_dim + first_row * stride.row, stride.row, stride.channel, lane);
}

// Where the fragments of 16 rows of one of the tiles [V, K] lie.
template <int K>
__device__ __forceinline__ float4* fragments_at(float4* tiles, int64_t tile, int V, int row_tile) {
  return tiles + (tile * (V / 16) + row_tile) * (K / 8) * 32;
}

// What a summary of a segment begins with (segment_summary.cuh, state_recurrence.cuh): rows first_row .. of the identity, which become those of
// the transposed map, or no state.
template <int K>
__device__ __forceinline__ void begin_summary(StateFragments<K>& state, bool is_map, int first_row, int lane) {
  state.for_each(
      lane, [&](float& value, int row, int channel) { value = is_map && first_row + row == channel ? 1.0f : 0.0f; });
}

// Tile `row_tile` of 16 rows of a transposed map, one of the tiles [K, K]. Rows r of a tile of 16 x 8 are contiguous: what
// segment_compose.cuh takes as an operand is one float4 a lane.
template <int K>
__device__ __forceinline__ void store_map(StateFragments<K>& rows, float* maps, int64_t tile, int row_tile, int lane) {
  float* const map = maps + (tile * (K / 16) + row_tile) * 16 * K;
  rows.for_each(lane, [&](float value, int row, int channel) { map[channel * 16 + row] = value; });
}

}  // namespace kda
