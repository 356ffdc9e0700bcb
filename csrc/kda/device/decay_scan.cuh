// Decay factors of a 16-token tile when every token's log-gate is known to be at least kMinLogGate: one reference for
// the whole tile.
//
// With G the log-gate accumulated from the tile's first token, in base 2, G lies in [-16 * 5 * log2(e), 0] = [-115.4,
// 0]. Measured from the middle of that range both factors of a pair are within 2^58 of 1, which bf16 and fp32 hold at
// full precision:
//   exp(G_i - G_j) = 2^(G_i + kReference) * 2^(-G_j - kReference).
// So one product covers all pairs of the tile, where the general scheme (decay_tree.cuh) takes four. The proof needs
// normalised q and k (|q|, |k| <= 1) besides the bound on the gate: products of pairs i < j, which are dropped, may
// overflow; no other can.
//
// Lanes hold tokens as in decay_tree.cuh.
#pragma once

#include "ptx.cuh"

namespace kda {

struct DecayScan {
  static constexpr float kMinLogGate = -5.0f;                              // per token, natural logarithm
  static constexpr float kReference = 58.0f;                               // >= 16 * 5 * log2(e) / 2
  static constexpr float kUp = 288230376151711744.0f, kDown = 1.0f / kUp;  // 2^58, 2^-58

  // Log-gates of the tile's tokens to their running sums, token 0 first.
  static __device__ __forceinline__ void accumulate(float (&log2_alpha)[2][8], int lane) {
#pragma unroll
    for (int rows = 1; rows <= 4; rows *= 2) {
      const bool has_earlier = lane >= 4 * rows;
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float earlier = __shfl_up_sync(0xffffffffu, log2_alpha[hi][c], 4 * rows);
          if (has_earlier) log2_alpha[hi][c] += earlier;
        }
      }
    }
    const int last_row_lane = 28 + (lane & 3);
#pragma unroll
    for (int c = 0; c < 8; ++c) log2_alpha[1][c] += __shfl_sync(0xffffffffu, log2_alpha[0][c], last_row_lane);
  }

  static __device__ __forceinline__ float prefix(float log2_decay) { return ptx::ex2(log2_decay + kReference); }
  static __device__ __forceinline__ float inverse(float log2_decay) { return ptx::ex2(-log2_decay - kReference); }
};

}  // namespace kda
