// The configuration of intra_chunk_gradients.cuh, with its shared-memory map.
#pragma once

#include "../forward/call_kind.h"
#include "gradients_rows.cuh"

namespace kda {

// Where a tile's chunk is, found once for a CTA.
struct ChunkPlace {
  ChunkLocation location;
  int64_t tile, slot;
  int value_head;
  int last_of_chain;  // see GradientsContext
};

template <int K_, int V_, typename Element_, CallKind kKind_ = CallKind::kAny>
struct IntraChunkGradientsConfig {
  static constexpr int K = K_, V = V_, C = kChunkTokens;
  using Element = Element_;
  static constexpr CallKind kKind = kKind_;
  static constexpr bool kTensorCopies = kKind != CallKind::kAny;     // rows of tensors by the copy engine
  static constexpr bool kUnitNorms = kKind == CallKind::kProcessed;  // q and k are taken as they are
  static constexpr int kTiles = C / 16;                              // of tokens
  static constexpr int kBlocks = 2, kBlockTiles = kTiles / kBlocks, kBlockTokens = 16 * kBlockTiles;
  static constexpr int kGroups = K / 16;    // of 16 channels
  static constexpr int kRowTiles = V / 16;  // of V
  static constexpr int kWarps = kGroups * kBlocks, kThreads = 32 * kWarps;

  using KeyTile = BlockedTile<C>;    // [C][K]
  using ValueTile = BlockedTile<C>;  // [C][V]
  using PairTile = SwizzledTile<C>;  // [C][C]
  static constexpr int kKeyTileBytes = C * K * 2, kValueTileBytes = C * V * 2, kPairTileBytes = C * C * 2,
                       kStateBytes = K * V * 2, kGateTileBytes = C * K * 4, kFragmentBytes = 32 * 16;

  // What is copied from memory, in the order of the groups of copies (see intra_chunk_gradients.cuh).
  static constexpr int kGates = 0;                                  // g, GateTile; then log2 of P, see exponents()
  static constexpr int kY = kGates + kGateTileBytes;                // dU as in memory, then Y
  static constexpr int kU = kY + kValueTileBytes;                   // U as in memory, then a tile of it
  static constexpr int kInverse = kU + kValueTileBytes;             // A^-1
  static constexpr int kState = kInverse + kPairTileBytes;          // S as in memory
  static constexpr int kDState = kState + kStateBytes;              // dS' as in memory
  static constexpr int kOutputGradient = kDState + kStateBytes;     // dO
  static constexpr int kQuery = kOutputGradient + kValueTileBytes;  // q, then dq
  static constexpr int kKey = kQuery + kKeyTileBytes;               // k, then dk
  static constexpr int kDqk = kKey + kKeyTileBytes;                 // see store_pairs()
  static constexpr int kDkk = kDqk + kPairTileBytes;                // likewise
  static constexpr int kValueGradient = kDqk;                       // dV, before the pairs
  static_assert(kValueTileBytes <= 2 * kPairTileBytes);
  static constexpr int kTokens = kDkk + kPairTileBytes;  // arrays over tokens, below

  // Arrays [C] of fp32.
  enum TokenArray {
    kBeta,         // after its activation
    kBetaBound,    // the same here
    kQueryNorm,    // 1 / |q|, or 1
    kKeyNorm,      // 1 / |k|, or 1
    kDiagonal,     // the diagonal of Dqk
    kQueryRadial,  // what of q and k the normalisation takes off dq and dk
    kKeyRadial,
    kNextBeta,  // of the next chunk, as it came
    kTokenArrays,
  };
  static constexpr int kBetaParts = kTokens + kTokenArrays * C * 4;  // [V / 16][C]
  static constexpr int kDotParts = kBetaParts + kRowTiles * C * 4;   // [kWarps][2][kBlockTokens]: of q . dq and k . dk
  static constexpr int kDotBytes = 2 * kBlockTokens * 4;             // of a warp
  static constexpr int kTotals = kDotParts + kWarps * kDotBytes;     // [kTiles][K]: log2 of the decay over each tile
  static constexpr int kDecays = kTotals + kTiles * K * 4;           // arrays over channels, below

  // Arrays [K] of fp32: decay factors, and log2 of one.
  enum DecayArray {
    kFromEntry,                      // to the middle of each block, from the chunk's entry
    kToExit = kFromEntry + kBlocks,  // from the middle of each block to the chunk's exit
    kOfChunk = kToExit + kBlocks,
    kLog2Between,  // of the middles of both blocks
    kDecayArrays,
  };
  static constexpr int kChannels = kDecays + kDecayArrays * K * 4;  // arrays over channels, below

  // Arrays [kBlocks][K] of fp32: sums over the tokens of a block.
  enum ChannelArray {
    kCrossing,  // what its tokens write that crosses the chunk
    kGradient,  // of the gradient of G inside the block
    kOfRate,    // for dA_log
    kOfBias,    // for ddt_bias
    kChannelArrays,
  };
  // Of the gate's parameters, of a chunk and of the next one: dt_bias [2][K], exp(A_log) [2] and as much room again.
  static constexpr int kBias = kChannels + kChannelArrays * kBlocks * K * 4, kRate = kBias + 2 * K * 4;
  static constexpr int kLargest = kRate + 16;                  // [kWarps]: the largest pair in magnitude; and one word
  static constexpr int kPlaces = kLargest + (kWarps + 4) * 4;  // [2] of ChunkPlace
  static constexpr int kBarriers = kPlaces + 2 * sizeof(ChunkPlace);  // [4]: see Copies
  static constexpr int kEnd = kBarriers + 4 * 8;

  // dg, when all have read the pairs' operands, if there is room: not for kAny, whose rows threads store.
  static constexpr int kGateGradient = kDState, kGateGradientBytes = C * K * (kKind == CallKind::kProcessed ? 4 : 2);
  static constexpr bool kGateGradientFits = kTensorCopies && kGateGradientBytes <= kStateBytes;

  // g of 16 bits once more, in the place of the pairs, when all have read them: [kWarps][kBlockTokens][16].
  static constexpr int kGatesAgain = kDqk, kGatesOfWarpBytes = kBlockTokens * 16 * 2;
  static_assert(kWarps * kGatesOfWarpBytes <= 2 * kPairTileBytes);

  // Operands of pairs, when all have read the states: of each warp P q and P k, and of each group of channels X k.
  static constexpr int kOperands = kState, kOwnOperands = 2 * kBlockTiles,
                       kOwnOperandBytes = kWarps * kOwnOperands * kFragmentBytes,
                       kCrossOperandBytes = kGroups * kBlockTiles * kFragmentBytes;
  static_assert(kOwnOperandBytes <= 2 * kStateBytes);
  static constexpr bool kCrossOperandsFit = kOwnOperandBytes + kCrossOperandBytes <= 2 * kStateBytes;
  static constexpr int kCrossOperands = kCrossOperandsFit ? kOperands + kOwnOperandBytes : kEnd;
  static constexpr int kSharedBytes = kEnd + (kCrossOperandsFit ? 0 : kCrossOperandBytes);
  static_assert(kSharedBytes <= 227 * 1024);
  static constexpr int kMostCtas = 512 / kThreads,
                       kCtasThatFit = 228 * 1024 / (kSharedBytes + 1024);  // 128 registers a thread
  static constexpr int kCtasPerSm = kMostCtas < kCtasThatFit ? kMostCtas : kCtasThatFit;

  using GateTile = BlockedTile<C>;  // g  [C][K]: blocks of 64 channels of 16 bits, or of 32 of fp32
};

// A block goes by one reference if log2 of its decay on either side of its middle, and squares of the norms of q and k, are in one of two
// ranges: 64 sums of pairs of at most 1 times q or k stay in fp32, 2^(112 + 6 + 8) and 2^(117 + 6 + 4). The wide one is for gates with
// a bound of -5, 16 tokens of which decay by 2^-115.5.
inline constexpr float kMaxLog2Range = 112.0f, kMaxSquaredNorm = 65536.0f;
inline constexpr float kWideLog2Range = 117.0f, kWideSquaredNorm = 256.0f;

}  // namespace kda
