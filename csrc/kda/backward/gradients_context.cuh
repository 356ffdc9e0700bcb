// What the phases of the intra-chunk gradients share: the configuration with its shared-memory map, and where a lane's
// tokens, channels and operands are. See intra_chunk_gradients.cuh for the kernel.
#pragma once

#include <type_traits>

#include "../device/chunk_location.cuh"
#include "../device/tile.cuh"
#include "channel_tile.cuh"
#include "gate_gradient.cuh"
#include "kernel_params.h"

namespace kda {

template <int K_, int V_, typename Element_>
struct IntraChunkGradientsConfig {
  static constexpr int K = K_, V = V_, C = kChunkTokens;
  using Element = Element_;
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

// Below it a token's gradient of beta is taken without dividing by beta.
inline constexpr float kSmallestBeta = 1e-12f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }

__device__ __forceinline__ ChannelOperand to_operand(const uint4& fragment) {
  return {{fragment.x, fragment.y, fragment.z, fragment.w}};
}

template <typename Config_>
struct IntraChunkGradientsContext {
  using Config = Config_;
  using Element = typename Config::Element;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;

  const ChunkBwdKernelParams& params;
  uint8_t* const shared;
  const int warp, lane, row, member;  // row = lane / 4: channel; member = lane % 4: tokens
  const ChunkLocation location;
  const int value_head;
  const int64_t tile;  // slot * HV + value_head

  __device__ __forceinline__ const ChunkFwdParams& call() const { return params.forward.call; }
  __device__ __forceinline__ int key_head() const {
    return value_head / (call().problem.value_heads / call().problem.heads);
  }

  // Group of channels and half of the chunk of this warp, and the first tile of that half.
  __device__ __forceinline__ int group() const { return warp % Config::kGroups; }
  __device__ __forceinline__ int part() const { return warp / Config::kGroups; }
  __device__ __forceinline__ int first_tile() const { return part() * Config::kPartTiles; }

  __device__ __forceinline__ int channel(int hi) const { return 16 * group() + row + 8 * hi; }
  __device__ __forceinline__ int token(int tt, int block, int parity) const {
    return 16 * tt + 8 * block + 2 * member + parity;
  }

  // Rows of a contiguous tensor over tokens and value heads, or over tokens and key heads.
  __device__ __forceinline__ int64_t value_row(int token) const {
    return (location.batch * call().problem.tokens + location.first_token + token) * call().problem.value_heads +
           value_head;
  }
  __device__ __forceinline__ int64_t key_row(int token) const {
    return (location.batch * call().problem.tokens + location.first_token + token) * call().problem.heads + key_head();
  }

  __device__ __forceinline__ float* tokens(typename Config::TokenArray array) const {
    return reinterpret_cast<float*>(shared + Config::kTokens) + array * C;
  }
  __device__ __forceinline__ float* totals(int tt) const {
    return reinterpret_cast<float*>(shared + Config::kTotals) + tt * K;
  }
  // Values of the lane's four tokens of a tile, by token_index().
  __device__ __forceinline__ void load_tokens(float (&values)[4], typename Config::TokenArray array, int tt) const {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float2 pair = *reinterpret_cast<const float2*>(tokens(array) + token(tt, block, 0));
      values[token_index(block, 0)] = pair.x, values[token_index(block, 1)] = pair.y;
    }
  }
  __device__ __forceinline__ float* crossing(int part) const {
    return reinterpret_cast<float*>(shared + Config::kCrossing) + part * K;
  }
  __device__ __forceinline__ float* carry() const { return reinterpret_cast<float*>(shared + Config::kCarry); }
  __device__ __forceinline__ uint32_t address(int offset) const { return ptx::shared_address(shared + offset); }

  // The 16 channels of the warp and the tokens of a tile, of q or k.
  __device__ __forceinline__ ChannelOperand load_channels(int offset, int tt) const {
    ChannelOperand operand;
    Config::KeyTile::load_a_trans(operand.pair, address(offset), 16 * tt, 16 * group(), lane);
    return operand;
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
  static __device__ __forceinline__ void keep(float4* units, const ChannelTile& values) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float(&v)[4] = values.value[block];
      units[32 * block] = {v[0], v[1], v[2], v[3]};
    }
  }
  static __device__ __forceinline__ ChannelTile kept(const float4* units) {
    ChannelTile values;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float4 v = units[32 * block];
      values.value[block][0] = v.x, values.value[block][1] = v.y;
      values.value[block][2] = v.z, values.value[block][3] = v.w;
    }
    return values;
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

  // g of the lane's elements of a tile. Rows past the end are those of the last token.
  __device__ __forceinline__ ChannelTile load_gate(int tt) const {
    const ChunkFwdParams& c = call();
    const int64_t first = location.batch * c.g_stride.batch + location.first_token * c.g_stride.token +
                          value_head * c.g_stride.head + channel(0);
    int64_t offsets[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      offsets[i] = first + min(token(tt, i >> 1, i & 1), location.tokens - 1) * c.g_stride.token;
    }
    const auto load = [&](auto element) {
      using Gate = decltype(element);
      const Gate* const g = static_cast<const Gate*>(c.g);
      return ChannelTile::make(
          [&](int block, int row, int parity) { return to_float(g[offsets[token_index(block, parity)] + 8 * row]); });
    };
    if (c.gate_type == DataType::kFloat32) return load(0.0f);
    if (c.gate_type == DataType::kBFloat16) return load(BFloat16());
    return load(Float16());
  }
};

}  // namespace kda
