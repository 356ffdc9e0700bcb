// U0 of a chunk where the recurrence of the state makes it (state_recurrence.cuh): rows of V on their way to a stage of the ring, and its product
// with the inverse.
#pragma once

#include "../device/elements.cuh"
#include "recurrence.cuh"

namespace kda {

// Rows of V on their way to a stage, where U0 is made from them: each mover copies units of 16 bytes; rows past the end of the sequence are zero.
template <typename Config, bool = Config::kMakesValues>
struct MovedValues {
  __device__ __forceinline__ MovedValues(const ChunkFwdParams&, const RecurrenceBlock&, int) {}
};
template <typename Config>
struct MovedValues<Config, true> {
  static constexpr int kUnits = Config::kRowBytes / 16, kRowsAtOnce = Config::kFillers / kUnits;
  const uint16_t* first;  // of the thread's unit in the first row of the segment
  int64_t token_stride;
  int tokens;  // of the segment
  int first_row, unit;

  __device__ __forceinline__ MovedValues(const ChunkFwdParams& call, const RecurrenceBlock& block, int mover)
      : token_stride(call.v_stride.token), first_row(mover / kUnits), unit(mover % kUnits) {
    const SequenceRange range = sequence_range(call, block.segment.sequence);
    const int64_t first_token = range.begin + block.segment.first_chunk * Config::C;
    tokens = static_cast<int>(min(range.end - first_token, block.segment.chunks * Config::C));
    first = static_cast<const uint16_t*>(call.v) + range.batch * call.v_stride.batch + first_token * token_stride +
            block.value_head * call.v_stride.head + block.first_row_tile * 16 + 8 * unit;
  }
  // Arrives at the barrier when the thread's units of the chunk are there.
  __device__ __forceinline__ void copy(uint8_t* values, int chunk, uint32_t barrier, bool aligned) const {
    uint8_t* const destination = values + 16 * unit;
    const uint16_t* const source = first + int64_t{chunk} * Config::C * token_stride;
    const int rows = min(tokens - chunk * Config::C, Config::C);
    if (aligned) {
#pragma unroll 4
      for (int row = first_row; row < Config::C; row += kRowsAtOnce) {
        const bool in_range = row < rows;
        ptx::cp_async_16(ptx::shared_address(destination + row * Config::kRowPitch),
                         source + (in_range ? row : 0) * token_stride, in_range ? 16 : 0);
      }
      ptx::cp_async_mbarrier_arrive_noinc(barrier);
      return;
    }
#pragma unroll 1
    for (int row = first_row; row < Config::C; row += kRowsAtOnce) {
      *reinterpret_cast<uint4*>(destination + row * Config::kRowPitch) =
          row < rows ? load_8x16bit(source + row * token_stride) : uint4{0, 0, 0, 0};
    }
    ptx::mbarrier_arrive(barrier);
  }
};

// -U0^T = (-beta V)^T A^-T of a chunk, for the warpgroup's rows of V.
template <typename Config, bool = Config::kMakesValues>
struct ValueOperands {};  // U0 is there
template <typename Config>
struct ValueOperands<Config, true> {
  static constexpr int C = Config::C;
  uint32_t high[C / 16][4], low[C / 16][4];

  __device__ __forceinline__ void load(uint32_t stage, const uint8_t* stage_data, int warp, int lane) {
    const int matrix = lane >> 3;
    const uint32_t rows =
        stage + Config::kValues + ((lane & 7) + (matrix >> 1) * 8) * Config::kRowPitch + (2 * warp + (matrix & 1)) * 16;
    const float* const betas = reinterpret_cast<const float*>(stage_data + Config::kBeta) + 2 * (lane & 3);
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      uint32_t values[4];
      ptx::ldmatrix_x4_trans(values, rows + 16 * kt * Config::kRowPitch);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 beta = *reinterpret_cast<const float2*>(betas + 16 * kt + 8 * half);
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float2 value = Packed2<typename Config::Element>::to_float2(values[i]);
          const SplitBf16 split(-beta.x * value.x, -beta.y * value.y);
          high[kt][i] = split.high, low[kt][i] = split.low;
        }
      }
    }
  }
  // One group of products, to which others may be added.
  __device__ __forceinline__ void multiply(float (&u)[C / 8][4], uint32_t stage) const {
    wgmma::fence();
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      const uint64_t inverse = wgmma::descriptor(stage + Config::kInverse + 32 * kt, 0);
      wgmma::m64n64k16_bf16<false>(u, high[kt], inverse, kt > 0);
      wgmma::m64n64k16_bf16<false>(u, low[kt], inverse, true);
    }
    wgmma::commit_group();
  }
};

}  // namespace kda
