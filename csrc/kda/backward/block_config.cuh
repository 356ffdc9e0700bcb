// The configuration of intra_chunk_gradients.cuh, with its shared-memory map.
#pragma once

#include "gradients_rows.cuh"

namespace kda {

template <int K_, int V_, typename Element_>
struct IntraChunkGradientsConfig {
  static constexpr int K = K_, V = V_, C = kChunkTokens;
  using Element = Element_;
  static constexpr int kTiles = C / 16;  // of tokens
  static constexpr int kBlockTokens = 32;
  static constexpr int kGroups = K / 16;  // of 16 channels, one a warp
  static constexpr int kWarps = kGroups, kThreads = 32 * kWarps;

  using KeyTile = SwizzledTile<K>;    // [C][K]
  using ValueTile = SwizzledTile<V>;  // [C][V]
  using PairTile = SwizzledTile<C>;   // [C][C]
  static constexpr int kKeyTileBytes = C * K * 2, kValueTileBytes = C * V * 2, kPairTileBytes = C * C * 2;

  static constexpr int kOutputGradient = 0;                     // dO
  static constexpr int kY = kOutputGradient + kValueTileBytes;  // Y
  static constexpr int kU = kY + kValueTileBytes;               // U
  static constexpr int kQuery = kU + kValueTileBytes;           // q, then dq
  static constexpr int kKey = kQuery + kKeyTileBytes;           // k, then dk
  static constexpr int kDqk = kKey + kKeyTileBytes;             // see store_pairs()
  static constexpr int kDkk = kDqk + kPairTileBytes;            // likewise
  static constexpr int kInverse = kDqk;                         // before them
  static constexpr int kTokens = kDkk + kPairTileBytes;         // arrays over tokens, below

  // Arrays [C] of fp32.
  enum TokenArray {
    kBeta,          // after its activation
    kBetaBound,     // the same here
    kQueryNorm,     // 1 / |q|, or 1
    kKeyNorm,       // 1 / |k|, or 1
    kAskScale,      // what scales dO S^T, Y S^T and U dS'^T of a token
    kPredictScale,  //
    kWriteScale,    //
    kDiagonal,      // the diagonal of Dqk
    kQueryRadial,   // what of q and k the normalisation takes off dq and dk
    kKeyRadial,
    kTokenArrays,
  };
  static constexpr int kBetaParts = kTokens + kTokenArrays * C * 4;  // [V / 16][C]
  static constexpr int kDotParts = kBetaParts + V / 16 * C * 4;      // [kWarps][2][kBlockTokens]: of q . dq and k . dk
  static constexpr int kDotBytes = 2 * kBlockTokens * 4;             // of a warp
  static constexpr int kTotals = kDotParts + kWarps * kDotBytes;     // [kTiles][K]: log2 of the decay over each tile
  static constexpr int kLargest = kTotals + kTiles * K * 4;  // [kWarps]: the largest pair in magnitude; and one word
  static constexpr int kKept = kLargest + (kWarps + 4) * 4;  // see kept_sums()
  // Sums of the second block, private to a lane, one tile each: over rows of dO and Y of that block, if they are as large.
  static constexpr int kKeptBytes = kThreads * 32;
  static constexpr bool kKeepsInRows = kValueTileBytes / 2 >= kKeptBytes;
  static constexpr int kept_offset(int i) {
    return kKeepsInRows ? (i == 0 ? kOutputGradient : kY) + kValueTileBytes / 2 : kKept + i * kKeptBytes;
  }
  static constexpr int kSharedBytes = kKept + (kKeepsInRows ? 0 : 2 * kKeptBytes);
  static constexpr int kMostCtas = 512 / kThreads,
                       kCtasThatFit = 228 * 1024 / (kSharedBytes + 1024);  // 128 registers a thread
  static constexpr int kCtasPerSm = kMostCtas < kCtasThatFit ? kMostCtas : kCtasThatFit;
  static_assert(kCtasPerSm >= 2);
};

// log2 range on either side of the middle of a block: 64 sums of pairs of at most 1 times q or k of at most 2^8 stay in fp32.
inline constexpr float kMaxLog2Range = 112.0f;
inline constexpr float kMaxSquaredNorm = 65536.0f;

}  // namespace kda
