// The inverse of a unit lower triangular matrix I + A in shared memory, 32 x 32 or 64 x 64, at fp32 accuracy.
//
// Blocks on the diagonal, of 8 or 16 rows, are inverted by forward substitution in fp32; off-diagonal blocks follow from
//   [ L11  0  ]^-1   [  T11            0  ]
//   [ A21 L22 ]    = [ -T22 A21 T11   T22 ]
// for larger and larger blocks. Products on tensor cores are in tf32, each fp32 operand split in two (x = high + low, three products),
// which keeps about 21 bits. Nothing is truncated and nothing assumes normalised keys.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace kda {

// Row-major fp32 matrix in shared memory; the padding makes operand loads free of bank conflicts.
template <int Rows>
struct SolveMatrixOf {
  static constexpr int kStride = Rows + 4;
  static constexpr int kBytes = Rows * kStride * 4;
  float* data;

  __device__ __forceinline__ float& at(int row, int column) const { return data[row * kStride + column]; }
  __device__ __forceinline__ SolveMatrixOf block(int row, int column) const { return {&at(16 * row, 16 * column)}; }
};

using SolveMatrix = SolveMatrixOf<64>;
using SolveMatrix32 = SolveMatrixOf<32>;

// x = high + low + an error below 2^-21 |x|: the tensor core reads the upper 19 bits of each and drops the rest.
struct SplitTf32 {
  uint32_t high, low;
  __device__ __forceinline__ explicit SplitTf32(float x) {
    constexpr uint32_t kTf32Bits = 0xffffe000u;
    high = __float_as_uint(x) & kTf32Bits;
    low = __float_as_uint(x - __uint_as_float(high));
  }
};

// acc (16 x 16, as two 16 x 8 accumulators) += a * b for 16 x 16 blocks in shared memory; one warp.
template <typename Matrix>
__device__ __forceinline__ void multiply_add_16x16(float (&acc)[2][4], Matrix a, Matrix b, int lane) {
  const int group = lane >> 2, member = lane & 3;
#pragma unroll
  for (int k = 0; k < 16; k += 8) {
    const SplitTf32 a0(a.at(group, k + member)), a1(a.at(group + 8, k + member));
    const SplitTf32 a2(a.at(group, k + member + 4)), a3(a.at(group + 8, k + member + 4));
    const uint32_t a_high[4] = {a0.high, a1.high, a2.high, a3.high};
    const uint32_t a_low[4] = {a0.low, a1.low, a2.low, a3.low};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const SplitTf32 b0(b.at(k + member, 8 * n + group)), b1(b.at(k + member + 4, 8 * n + group));
      const uint32_t b_high[2] = {b0.high, b1.high}, b_low[2] = {b0.low, b1.low};
      ptx::mma_m16n8k8_tf32(acc[n], a_low, b_high);
      ptx::mma_m16n8k8_tf32(acc[n], a_high, b_low);
      ptx::mma_m16n8k8_tf32(acc[n], a_high, b_high);
    }
  }
}

template <typename Matrix>
__device__ __forceinline__ void store_16x16(Matrix block, const float (&acc)[2][4], float sign, int lane) {
  const int group = lane >> 2, member = lane & 3;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int column = 8 * n + 2 * member;
    *reinterpret_cast<float2*>(&block.at(group, column)) = {sign * acc[n][0], sign * acc[n][1]};
    *reinterpret_cast<float2*>(&block.at(group + 8, column)) = {sign * acc[n][2], sign * acc[n][3]};
  }
}

// Replaces a unit lower triangular 16 x 16 block by its inverse; entries on and above the diagonal are not read. Lane c
// computes column c % 16; one warp. The two halves of the warp may be given different blocks.
template <typename Matrix>
__device__ __forceinline__ void invert_16x16(Matrix block, int lane) {
  const int column = lane & 15;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int i = 1; i < 16; ++i) {
#pragma unroll
    for (int m = 0; m < 16; m += 4) {
      if (m < i) {
        const float4 row = *reinterpret_cast<const float4*>(&block.at(i, m));
        x[i] -= row.x * x[m];
        if (m + 1 < i) x[i] -= row.y * x[m + 1];
        if (m + 2 < i) x[i] -= row.z * x[m + 2];
        if (m + 3 < i) x[i] -= row.w * x[m + 3];
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; ++i) block.at(i, column) = x[i];
  __syncwarp();
}

// Replaces the strictly lower triangular A by T = (I + A)^-1, in place: the 16 x 16 blocks on and below the diagonal are written.
// One warp.
__device__ __forceinline__ void invert_unit_lower_32x32(SolveMatrix32 matrix, int lane) {
  invert_16x16(matrix.block(lane >> 4, lane >> 4), lane);
  const SolveMatrix32 off_diagonal = matrix.block(1, 0);
  float y[2][4] = {};
  multiply_add_16x16(y, off_diagonal, matrix.block(0, 0), lane);
  __syncwarp();
  store_16x16(off_diagonal, y, 1.0f, lane);
  __syncwarp();
  float t[2][4] = {};
  multiply_add_16x16(t, matrix.block(1, 1), off_diagonal, lane);
  __syncwarp();
  store_16x16(off_diagonal, t, -1.0f, lane);
}

// Replaces a unit lower triangular 8 x 8 block by its inverse; entries on and above the diagonal are not read. Lane c computes column c % 8; one warp.
template <typename Matrix>
__device__ __forceinline__ void invert_diagonal_8x8(Matrix block, int lane) {
  const int column = lane & 7;
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int m = 0; m < 8; m += 4) {
    float4 rows[8];
#pragma unroll
    for (int i = m + 1; i < 8; ++i) rows[i] = *reinterpret_cast<const float4*>(&block.at(i, m));
#pragma unroll
    for (int i = m + 1; i < 8; ++i) x[i] -= rows[i].x * x[m];
#pragma unroll
    for (int i = m + 2; i < 8; ++i) x[i] -= rows[i].y * x[m + 1];
#pragma unroll
    for (int i = m + 3; i < 8; ++i) x[i] -= rows[i].z * x[m + 2];
#pragma unroll
    for (int i = m + 4; i < 8; ++i) x[i] -= rows[i].w * x[m + 3];
  }
  __syncwarp();
  if (lane < 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) block.at(i, column) = x[i];
  }
}

// Element (row, column) of T_21 of a 16 x 16 matrix whose blocks on the diagonal are inverted already: row = lane / 4, column = lane % 4, or 4 more. One warp.
template <typename Matrix>
__device__ __forceinline__ float invert_off_diagonal_8x8(Matrix pair, int row, int column, int lane) {
  float y = 0.0f, t = 0.0f;
#pragma unroll
  for (int k = 0; k < 8; k += 4) {
    const float4 a = *reinterpret_cast<const float4*>(&pair.at(8 + row, k));
    y += a.x * pair.at(k, column) + a.y * pair.at(k + 1, column);
    y += a.z * pair.at(k + 2, column) + a.w * pair.at(k + 3, column);
  }
#pragma unroll
  for (int k = 0; k < 8; k += 4) {
    const float4 a = *reinterpret_cast<const float4*>(&pair.at(8 + row, 8 + k));
    const float elements[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) t -= elements[i] * __shfl_sync(0xffffffffu, y, 4 * (k + i) + (lane & 3));
  }
  return t;
}

// Elements (row, column) and (row + 8, column) of T_21 of a 32 x 32 matrix with blocks of 16; one warp has four columns. T_11 and T_22 have nothing in their
// upper right quarter. is_left: of T_11, so that all of its rows count. rows_of_t11(k): a matrix in which its rows k .. k + 3 are; lower_of_t22(k): where
// row 8 + `row` of T_22 has columns k .. k + 3.
template <typename Matrix, typename Rows, typename Lower>
__device__ __forceinline__ void invert_off_diagonal_16x16(float (&t)[2], Matrix matrix, int row, int column, int lane,
                                                          bool is_left, Rows rows_of_t11, Lower lower_of_t22) {
  float y[2] = {};
#pragma unroll
  for (int k = 0; k < 16; k += 4) {
    if (k < 8 && !is_left) continue;
    const Matrix rows = rows_of_t11(k);
    const float4 a = *reinterpret_cast<const float4*>(&matrix.at(16 + row, k));
    const float4 b = *reinterpret_cast<const float4*>(&matrix.at(24 + row, k));
    const float x[4] = {rows.at(k, column), rows.at(k + 1, column), rows.at(k + 2, column), rows.at(k + 3, column)};
    y[0] += a.x * x[0] + a.y * x[1], y[1] += b.x * x[0] + b.y * x[1];
    y[0] += a.z * x[2] + a.w * x[3], y[1] += b.z * x[2] + b.w * x[3];
  }
#pragma unroll
  for (int k = 0; k < 16; k += 4) {
    const float4 b = *reinterpret_cast<const float4*>(lower_of_t22(k));
    const float lower[4] = {b.x, b.y, b.z, b.w};
    float upper[4] = {};
    if (k < 8) {
      const float4 a = *reinterpret_cast<const float4*>(&matrix.at(16 + row, 16 + k));
      upper[0] = a.x, upper[1] = a.y, upper[2] = a.z, upper[3] = a.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = __shfl_sync(0xffffffffu, y[k / 8], 4 * ((k + i) % 8) + (lane & 3));
      if (k < 8) t[0] -= upper[i] * value;
      t[1] -= lower[i] * value;
    }
  }
}

// Diagonal blocks of 8 and then of 16 of a 32 x 32 matrix, by four warps: store(pair, column, t) takes element (lane / 4, column) of the off-diagonal block of
// `pair`, 16 x 16, of which a warp has four columns. sync(): a barrier of the four; the blocks are there after the last.
template <typename Matrix, typename Sync, typename Store>
__device__ __forceinline__ void invert_blocks_of_16(Matrix matrix, int warp, int lane, Sync sync, Store store) {
  invert_diagonal_8x8(Matrix{&matrix.at(8 * warp, 8 * warp)}, lane);
  sync();
  const Matrix pair = {&matrix.at(16 * (warp >> 1), 16 * (warp >> 1))};
  const int column = 4 * (warp & 1) + (lane & 3);
  store(pair, column, invert_off_diagonal_8x8(pair, lane >> 2, column, lane));
  sync();
}

// The same by a group of four warps, none of which waits for another for long. Blocks of 8, then of 16, then the whole:
//   T_21 = -T_22 A_21 T_11,
// of which a warp takes a few columns, so that A_21 T_11 stays in its registers. sync(): a barrier of the group; the result is there after one more.
template <typename Matrix, typename Sync>
__device__ __forceinline__ void invert_unit_lower_32x32(Matrix matrix, int warp, int lane, Sync sync) {
  const int row = lane >> 2;
  invert_blocks_of_16(matrix, warp, lane, sync, [&](Matrix pair, int column, float t) {
    sync();
    pair.at(8 + row, column) = t;
  });
  // The 16 x 16 block, of each four columns a warp.
  const int column = 4 * warp + (lane & 3);
  float t[2] = {};
  invert_off_diagonal_16x16(
      t, matrix, row, column, lane, warp < 2, [&](int) { return matrix; },
      [&](int k) { return &matrix.at(24 + row, 16 + k); });
  sync();
  matrix.at(16 + row, column) = t[0];
  matrix.at(24 + row, column) = t[1];
}

// acc (16 x 8) += a * b for a 16 x 8 block, of an upper and a lower one of 8 x 8, and an 8 x 8 block in shared memory; one warp. kUpperIsZero: the upper one
// is not read.
template <bool kUpperIsZero, typename Matrix>
__device__ __forceinline__ void multiply_add_16x8(float (&acc)[4], Matrix upper, Matrix lower, Matrix b, int lane) {
  const int group = lane >> 2, member = lane & 3;
  const SplitTf32 a0(kUpperIsZero ? 0.0f : upper.at(group, member)), a1(lower.at(group, member));
  const SplitTf32 a2(kUpperIsZero ? 0.0f : upper.at(group, member + 4)), a3(lower.at(group, member + 4));
  const SplitTf32 b0(b.at(member, group)), b1(b.at(member + 4, group));
  const uint32_t a_high[4] = {a0.high, a1.high, a2.high, a3.high}, a_low[4] = {a0.low, a1.low, a2.low, a3.low};
  const uint32_t b_high[2] = {b0.high, b1.high}, b_low[2] = {b0.low, b1.low};
  ptx::mma_m16n8k8_tf32(acc, a_low, b_high);
  ptx::mma_m16n8k8_tf32(acc, a_high, b_low);
  ptx::mma_m16n8k8_tf32(acc, a_high, b_high);
}

// The inverse of a 64 x 64 matrix as invert_unit_lower_64x64() leaves it. No block is written where others may still read A: the off-diagonal block T_21
// of 8 or 16 rows lies above the diagonal, in the place of T_12, which is zero; what is elsewhere above the diagonal is of any value.
struct InverseBlocks {
  SolveMatrix matrix;

  // How far up and to the right, in units of 8, the block of row r and column c <= r, in units of 8, lies.
  static __device__ __forceinline__ constexpr int shift(int r, int c) {
    const int differing = r ^ c;
    return differing & 4 ? 0 : (differing & 2 ? 2 : differing);
  }
  __device__ __forceinline__ SolveMatrix block(int r, int c) const {
    const int up = shift(r, c);
    return {&matrix.at(8 * (r - up), 8 * (c + up))};
  }
};

// From the strictly lower triangular A to T = (I + A)^-1, over it; see InverseBlocks. What is above the diagonal blocks of 8 is not read. By eight
// warps, after a barrier of all of them. sync(): a barrier of all; the result is there after one more.
template <typename Sync>
__device__ __forceinline__ void invert_unit_lower_64x64(SolveMatrix whole, int warp, int lane, Sync sync) {
  const int half = warp >> 2, of_half = warp & 3;
  const SolveMatrix matrix = whole.block(2 * half, 2 * half);  // 32 x 32
  const int row = lane >> 2;
  invert_blocks_of_16(matrix, of_half, lane, sync,
                      [&](SolveMatrix pair, int column, float t) { pair.at(row, 8 + column) = t; });
  {  // the 16 x 16 block: lane has elements (row, lane % 4) and (row + 8, lane % 4) of four columns
    const int column = 4 * of_half + (lane & 3);
    const bool is_left = of_half < 2;  // of T_11
    const int to_lower_rows =
        is_left ? 8 - 8 * SolveMatrix::kStride : 0;  // of its block of rows 8 .. 15, see InverseBlocks
    float t[2] = {};
    invert_off_diagonal_16x16(
        t, matrix, row, column, lane, is_left,
        [&](int k) { return SolveMatrix{matrix.data + (k < 8 ? 0 : to_lower_rows)}; },
        [&](int k) { return k < 8 ? &matrix.at(16 + row, 24 + k) : &matrix.at(24 + row, 16 + k); });
    matrix.at(row, 16 + column) = t[0];
    matrix.at(8 + row, 16 + column) = t[1];
  }
  sync();
  // The 32 x 32 block: of each 16 rows eight columns a warp. A_21 T_11 goes above the diagonal.
  const InverseBlocks inverse = {whole};
  const auto eight = [&](int r, int c) { return SolveMatrix{&whole.at(8 * r, 8 * c)}; };
  const auto store = [&](SolveMatrix place, const float(&acc)[4], float sign) {
    float* const first = &place.at(lane >> 2, 2 * (lane & 3));
    *reinterpret_cast<float2*>(first) = {sign * acc[0], sign * acc[1]};
    *reinterpret_cast<float2*>(first + 8 * SolveMatrix::kStride) = {sign * acc[2], sign * acc[3]};
  };
  const int column = of_half;  // in units of 8
  float y[4] = {}, t[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < column) continue;
    multiply_add_16x8<false>(y, eight(4 + 2 * half, k), eight(5 + 2 * half, k), inverse.block(k, column), lane);
  }
  store(eight(2 * half, 4 + column), y, 1.0f);
  sync();
  const auto multiply = [&](auto upper_rows) {
    constexpr int kRow = 4 + 2 * decltype(upper_rows)::value;
#pragma unroll
    for (int k = 4; k <= kRow; ++k) {
      multiply_add_16x8<false>(t, inverse.block(kRow, k), inverse.block(kRow + 1, k), eight(k - 4, 4 + column), lane);
    }
    const SolveMatrix last = inverse.block(kRow + 1, kRow + 1);
    multiply_add_16x8<true>(t, last, last, eight(kRow - 3, 4 + column), lane);
  };
  if (half == 0) {
    multiply(std::integral_constant<int, 0>());
  } else {
    multiply(std::integral_constant<int, 1>());
  }
  store(eight(4 + 2 * half, column), t, -1.0f);
}

}  // namespace kda
