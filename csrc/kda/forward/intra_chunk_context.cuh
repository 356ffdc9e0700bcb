// What the phases of the intra-chunk solve share: the configuration with its shared-memory map, and where a lane's
// tokens, channels and operands are. See intra_chunk_solve.cuh for the kernel.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/elements.cuh"
#include "../device/tile.cuh"
#include "../device/triangular_inverse.cuh"
#include "kernel_params.h"

namespace kda {

constexpr int max_of(int a, int b) { return a > b ? a : b; }

// kVectorized: every 8-element group of q, k, v and g starts at a multiple of 16 bytes.
// kNormalized: q and k are normalised, so that operands with gate factors are at most 1.
template <int K_, int V_, typename Element_, bool kVectorized_, bool kNormalized_>
struct IntraChunkSolveConfig {
  static constexpr int K = K_, V = V_, C = kChunkTokens;
  using Element = Element_;
  static constexpr bool kVectorized = kVectorized_, kNormalized = kNormalized_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kCtasPerSm = 3;
  static constexpr int kSlices = K / 32;

  using KeyTile = BlockedTile<C>;     // [C][K]
  using ValueTile = SwizzledTile<V>;  // [C][V]
  using PairTile = SwizzledTile<C>;   // [C][C]
  static constexpr int kKeyTileBytes = C * K * 2, kValueTileBytes = C * V * 2, kPairTileBytes = C * C * 2;

  // One operand of a 16-token tile, for all channels.
  static constexpr int kTileOperandBytes = 16 * K * 2;
  // Tile 0 is seen by tiles 1, 2, 3; tile 1 by 2, 3; tile 2 by 3.
  static constexpr int kSuffixOperands = 6;

  static constexpr int kRegionA = 0;
  static constexpr int kRegionABytes = max_of(C * K * 4, SolveMatrix::kBytes + kPairTileBytes);
  static constexpr int kAqkOffset = kRegionA + SolveMatrix::kBytes;
  static constexpr int kRegionB = kRegionA + kRegionABytes;
  static constexpr int kRegionBBytes = max_of(kSuffixOperands * kTileOperandBytes, kValueTileBytes + kPairTileBytes);
  static constexpr int kTinvOffset = kRegionB + kValueTileBytes;
  static constexpr int kRegionC = kRegionB + kRegionBBytes;
  static constexpr int kTotals = kRegionC + kKeyTileBytes;  // [4][K] fp32
  static constexpr int kBeta = kTotals + 4 * K * 4;         // [C] fp32
  static constexpr int kKeyRest = kBeta + C * 4;            // [C] fp32
  static constexpr int kSharedBytes = kKeyRest + C * 4;

  static_assert(K % 64 == 0 && V % 64 == 0, "each warp owns whole 16 x 8 tiles of W and 16-row tiles of U0^T");
  static_assert(4 * K * 4 <= kRegionBBytes, "log-decay totals fit region B");
};

template <typename Config_>
struct IntraChunkContext {
  using Config = Config_;
  using Element = typename Config::Element;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;

  const ChunkFwdKernelParams& params;
  uint8_t* const shared;
  const int warp, lane, group, member;  // group = lane / 4: row of the tile; member = lane % 4: channel group
  const ChunkLocation location;
  const int value_head;
  const int64_t tile;  // slot * HV + value_head

  __device__ __forceinline__ int row(int hi) const { return 16 * warp + group + 8 * hi; }
  __device__ __forceinline__ bool valid(int hi) const { return row(hi) < location.tokens; }
  __device__ __forceinline__ int channel(int slice) const { return 32 * slice + 8 * member; }

  // Element offset of the lane's first channel in its row `hi` of q, k or g. Rows past the end have the offset of the
  // last one.
  __device__ __forceinline__ int64_t row_offset(const TokenStrides& stride, int head, int hi) const {
    const int token = min(row(hi), location.tokens - 1);
    return location.batch * stride.batch + (location.first_token + token) * stride.token + head * stride.head +
           channel(0);
  }

  // Private to the lane: 16-byte unit `unit` of 4 of slice `slice` in region A.
  __device__ __forceinline__ uint4* lane_unit(int slice, int unit) const {
    return reinterpret_cast<uint4*>(shared + Config::kRegionA) + ((warp * Config::kSlices + slice) * 4 + unit) * 32 +
           lane;
  }

  __device__ __forceinline__ uint4* suffix_operand(int index, int slice, int k_step) const {
    return reinterpret_cast<uint4*>(shared + Config::kRegionB + index * Config::kTileOperandBytes) +
           (2 * slice + k_step) * 32 + lane;
  }

  __device__ __forceinline__ float* tile_total(int tile_index, int slice) const {
    return reinterpret_cast<float*>(shared + Config::kTotals) + tile_index * K + channel(slice);
  }

  __device__ __forceinline__ float* beta() const { return reinterpret_cast<float*>(shared + Config::kBeta); }
  __device__ __forceinline__ float* key_rest() const { return reinterpret_cast<float*>(shared + Config::kKeyRest); }
  __device__ __forceinline__ SolveMatrix Akk() const { return {reinterpret_cast<float*>(shared + Config::kRegionA)}; }
};

// Which operand copy in region B holds k R of tile `source` for the tile `target` > source.
__device__ __forceinline__ int suffix_operand_index(int source, int target) {
  return source == 0 ? target - 1 : (source == 1 ? target + 1 : 5);
}

}  // namespace kda
