// What the phases of the gradients by levels share: the configuration with its shared-memory map, and where a lane's
// operands are. See level_gradients.cuh for the kernel.
#pragma once

#include "gradients_rows.cuh"

namespace kda {

template <int K_, int V_, typename Element_>
struct LevelGradientsConfig {
  static constexpr int K = K_, V = V_, C = kChunkTokens;
  using Element = Element_;
  static constexpr bool kUnitNorms = false;
  static constexpr int kTiles = C / 16;   // of tokens
  static constexpr int kGroups = K / 16;  // of 16 channels
  static constexpr int kParts = 2;        // halves of the chunk
  static constexpr int kPartTiles = kTiles / kParts;
  static constexpr int kWarps = kGroups * kParts, kThreads = 32 * kWarps;

  using KeyTile = SwizzledTile<K>;    // [C][K]
  using ValueTile = SwizzledTile<V>;  // [C][V]
  using PairTile = SwizzledTile<C>;   // [C][C]
  static constexpr int kKeyTileBytes = C * K * 2, kValueTileBytes = C * V * 2, kPairTileBytes = C * C * 2;

  // Operands of pairs of different tiles, for each group of channels: k F for the levels 16 and 32 of each tile, and q
  // F of the tiles that are the later one at a level.
  static constexpr int kOperandBytes = 32 * 16;
  static constexpr int kOperands = 12;
  // Private to a lane: four 16-byte units for each tile, and two that take the place of U.
  static constexpr int kLaneUnits = 4;

  static constexpr int kOutputGradient = 0;                     // dO
  static constexpr int kY = kOutputGradient + kValueTileBytes;  // Y
  static constexpr int kU = kY + kValueTileBytes;               // U
  static constexpr int kCumulative = kU;                        // then, of the first half, the gradient of G
  static constexpr int kCumulativeBytes = kWarps * 2 * 32 * 16;
  static constexpr int kQuery =
      kU + (kValueTileBytes > kCumulativeBytes ? kValueTileBytes : kCumulativeBytes);  // q, then dq
  static constexpr int kKey = kQuery + kKeyTileBytes;                                  // k, then dk
  static constexpr int kDqk = kKey + kKeyTileBytes;                                    // see multiply_pairs()
  static constexpr int kDkk = kDqk + kPairTileBytes;                                   // likewise
  static constexpr int kOperandRegion = kDkk + kPairTileBytes;  // first the inverse and dV, then operands of pairs
  static constexpr int kInverse = kOperandRegion;
  static constexpr int kValueGradient = kInverse + kPairTileBytes;  // dV
  static constexpr int kLaneRegion = kOperandRegion + kGroups * kOperands * kOperandBytes;
  static constexpr int kTokens = kLaneRegion + kGroups * kTiles * kLaneUnits * 32 * 16;  // arrays over tokens, below
  static_assert(kPairTileBytes + kValueTileBytes <= kLaneRegion - kOperandRegion, "the inverse and dV fit");

  // Arrays [C] of fp32.
  enum TokenArray {
    kBeta,        // after its activation
    kBetaBound,   // the same, but at least kSmallestBeta in magnitude
    kQueryNorm,   // 1 / |q|, or 1
    kKeyNorm,     // 1 / |k|, or 1
    kDiagonal,    // the diagonal of Dqk
    kQueryDot,    // q . dq
    kKeyDot,      // k . dk
    kPrediction,  // see beta_gradient()
    kTokenArrays,
  };
  static constexpr int kDotParts = 3;                                           // of the last three, one for each group
  static constexpr int kTokenParts = kTokens + kTokenArrays * C * 4;            // [kGroups][kDotParts][C]
  static constexpr int kBetaParts = kTokenParts + kGroups * kDotParts * C * 4;  // [V / 16][C]
  static constexpr int kTotals = kBetaParts + V / 16 * C * 4;                   // [kTiles][K]: decay over each tile
  static constexpr int kCrossing = kTotals + kTiles * K * 4;                    // [kParts][K]: see scale_operands()
  static constexpr int kCarry = kCrossing + kParts * K * 4;  // [K]: sum of the gradients of G of the second half
  static constexpr int kSharedBytes = kCarry + K * 4;
  static_assert(kSharedBytes <= 227 * 1024);
};

template <typename Config>
struct LevelContext : GradientsRows<Config> {
  using Rows = GradientsRows<Config>;
  using Rows::group, Rows::K, Rows::keep, Rows::kept, Rows::lane, Rows::shared, Rows::tile, Rows::V, Rows::warp;

  // Half of the chunk of this warp, and the first tile of that half.
  __device__ __forceinline__ int part() const { return warp / Config::kGroups; }
  __device__ __forceinline__ int first_tile() const { return part() * Config::kPartTiles; }

  __device__ __forceinline__ float* crossing(int part) const {
    return reinterpret_cast<float*>(shared + Config::kCrossing) + part * K;
  }
  __device__ __forceinline__ float* carry() const { return reinterpret_cast<float*>(shared + Config::kCarry); }

  // S or dS' in memory as it comes from rows of its transpose, for operands of the warp's channels and 16 of V each. Places in two units of 16 bytes.
  struct StateInMemory {
    const uint8_t *lower, *upper;  // of the lane
    // The operand is that of the transpose until its matrices are.
    __device__ __forceinline__ uint4 load(int kt) const {
      constexpr int kRow = 2 * K;
      const auto word = [](const uint8_t* at) { return *reinterpret_cast<const uint32_t*>(at); };
      const int first = kt * 16 * kRow;
      return {word(lower + first), word(lower + first + 8 * kRow), word(upper + first), word(upper + first + 8 * kRow)};
    }
    __device__ __forceinline__ ChannelOperand operand(int kt) const {
      return to_operand(transposed_fragment(load(kt)));
    }
  };
  __device__ __forceinline__ StateInMemory state_at(const uint8_t* states) const {
    using StateTile = SwizzledTile<K>;
    const uint8_t* const of_tile = states + tile * (2 * K * V) + 4 * (lane & 3);
    return {of_tile + StateTile::unit_offset(lane >> 2, 2 * group()),
            of_tile + StateTile::unit_offset(lane >> 2, 2 * group() + 1)};
  }

  // acc (16 channels, 16 tokens) += operand (16 channels, V) * rows^T of a [C, V] tile, for 16 of V.
  __device__ __forceinline__ void multiply_state(ChannelTile& acc, const ChannelOperand& operand, int offset, int tt,
                                                 int kt) const {
    this->template multiply<typename Config::ValueTile>(acc, operand, offset, 16 * tt, 16 * kt);
  }

  // Two tiles of values that only this lane sees; which: 0 or 1.
  __device__ __forceinline__ float4* lane_units(int tt, int which) const {
    return reinterpret_cast<float4*>(shared + Config::kLaneRegion) +
           ((group() * Config::kTiles + tt) * Config::kLaneUnits + 2 * which) * 32 + lane;
  }
  // Likewise for one tile of the warp; all have read U.
  __device__ __forceinline__ float4* cumulative_units() const {
    return reinterpret_cast<float4*>(shared + Config::kCumulative) + warp * 2 * 32 + lane;
  }
  // Operands of pairs of different tiles. level: 0 for blocks of 16 tokens, 1 for blocks of 32.
  __device__ __forceinline__ uint4* operand_units(int index) const {
    return reinterpret_cast<uint4*>(shared + Config::kOperandRegion) + (group() * Config::kOperands + index) * 32 +
           lane;
  }
  static __device__ __forceinline__ int key_operand(int level, int tt) { return 4 * level + tt; }
  static __device__ __forceinline__ int query_operand(int level, int tt) {
    return level == 0 ? 8 + (tt >> 1) : 10 + (tt & 1);
  }
  __device__ __forceinline__ void keep(int index, const ChannelOperand& operand) const {
    const uint32_t(&p)[4] = operand.pair;
    *operand_units(index) = {p[0], p[1], p[2], p[3]};
  }
  __device__ __forceinline__ ChannelOperand kept_operand(int index) const { return to_operand(*operand_units(index)); }
  static __device__ __forceinline__ bool is_upper_tile(int level, int tt) { return level == 0 ? tt & 1 : tt >= 2; }
};

}  // namespace kda
