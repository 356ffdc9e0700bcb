// Decay factors of a 16-token tile, as products of alpha = exp(g) over aligned blocks of 1, 2, 4, 8 and 16 tokens.
//
// For a pair of tokens i > j whose indices differ first (from the top) in bit h, with r the first token of the upper
// half-block:
//   exp(G_i - G_j) = prod(alpha_r .. alpha_i) * prod(alpha_{j+1} .. alpha_{r-1}) = P_h[i] * R_h[j].
// Every factor is a product of numbers in [0, 1]: nothing overflows, no difference of cumulative sums is taken, and a
// hard reset (g = -inf, alpha = 0) needs no special case. Blocks double by one exchange between lanes:
//   P_2h = P_h * (upper half ? total_h of the lower half : 1),   R_2h = R_h * (lower half ? total_h of the upper half :
//   1).
//
// A lane holds rows lane / 4 (index 0) and lane / 4 + 8 (index 1) of the tile, for 8 channels: row bit 0, 1, 2 are lane
// bits 2, 3, 4, and row bit 3 is the index.
#pragma once

namespace kda {

struct DecayTree {
  float prefix[2][8];  // P_h: product from the first token of the row's block of h tokens to the row, inclusive
  float suffix[2][8];  // R_h: product from the token after the row to the end of the block; prefix * suffix is the
                       // block's total

  // Blocks of one token.
  __device__ __forceinline__ explicit DecayTree(const float (&alpha)[2][8]) {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        prefix[hi][c] = alpha[hi][c];
        suffix[hi][c] = 1.0f;
      }
    }
  }

  // From blocks of kBlock tokens to blocks of 2 * kBlock; kBlock in {1, 2, 4}.
  template <int kBlock>
  __device__ __forceinline__ void double_blocks(int lane) {
    constexpr int kLaneBit = 4 * kBlock;
    const bool upper = lane & kLaneBit;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float sibling = __shfl_xor_sync(0xffffffffu, prefix[hi][c] * suffix[hi][c], kLaneBit);
        if (upper) {
          prefix[hi][c] *= sibling;
        } else {
          suffix[hi][c] *= sibling;
        }
      }
    }
  }

  // From blocks of 8 tokens to the whole tile.
  __device__ __forceinline__ void join_halves() {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float lower = prefix[0][c] * suffix[0][c], upper = prefix[1][c] * suffix[1][c];
      prefix[1][c] *= lower;
      suffix[0][c] *= upper;
    }
  }

  // The factor of a row at the level of blocks of kBlock tokens: P where the row is in the upper half of its pair of
  // blocks (it is the i of its pairs), R where it is in the lower half (it is the j).
  template <int kBlock>
  __device__ __forceinline__ float factor(int hi, int c, int lane) const {
    const bool upper = kBlock == 8 ? hi == 1 : (lane & (4 * kBlock)) != 0;
    return upper ? prefix[hi][c] : suffix[hi][c];
  }
};

struct Multiply {
  static __device__ __forceinline__ float apply(float a, float b) { return a * b; }
};

struct Add {
  static __device__ __forceinline__ float apply(float a, float b) { return a + b; }
};

// Combines 8 channel values over the 8 lanes of equal lane % 4 (the rows of a tile); each lane is left with the result
// of channel lane / 4. Seven exchanges.
template <typename Operation>
__device__ __forceinline__ float combine_rows(const float (&values)[8], int lane) {
  float four[4], two[2];
  const bool upper16 = lane & 16, upper8 = lane & 8, upper4 = lane & 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float received = __shfl_xor_sync(0xffffffffu, upper16 ? values[c] : values[c + 4], 16);
    four[c] = Operation::apply(upper16 ? values[c + 4] : values[c], received);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float received = __shfl_xor_sync(0xffffffffu, upper8 ? four[c] : four[c + 2], 8);
    two[c] = Operation::apply(upper8 ? four[c + 2] : four[c], received);
  }
  const float received = __shfl_xor_sync(0xffffffffu, upper4 ? two[0] : two[1], 4);
  return Operation::apply(upper4 ? two[1] : two[0], received);
}

}  // namespace kda
