// The intra-chunk solve's configuration: shared-memory map and what its parts know. See intra_chunk_solve.cuh for the kernel.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/triangular_inverse.cuh"
#include "call_kind.h"
#include "chunk_divisors.cuh"
#include "step_operands.cuh"
#include "step_params.h"

namespace kda {

struct IntraChunkSolveParams {
  ChunkFwdKernelParams stage;
  ChunkDivisors divisors;
  TensorMaps maps;  // if stage.vectorized
};

// Where a chunk of a head is. In shared memory: of the chunk that a CTA works at, of the next one, and of the one after that.
struct SolvePlace {
  ChunkLocation location;  // without tokens: there is none
  uint32_t tile;           // slot * HV + value_head
  int value_head, key_head;
  TileOfTurn at;       // in the order in which the grid goes through the tiles
  int first_of_chain;  // the index of (sequence, value head), if this is its first chunk and Q_gated_low is wanted; else -1
};
inline constexpr int kSolvePlaces = 4;

// A chunk is two steps, of a group of four warps each.
template <int K_, int V_, typename Element_, CallKind kKind_ = CallKind::kAny>
struct IntraChunkSolveConfig : StepTiles<K_> {
  using Tiles = StepTiles<K_>;
  using Tiles::C, Tiles::K, Tiles::kKeyTileBytes;
  using Element = Element_;
  static constexpr CallKind kKind = kKind_;
  static constexpr int V = V_;
  static constexpr int kSteps = 2, kGroupThreads = 128, kThreads = kSteps * kGroupThreads, kBarrierThreads = kThreads,
                       kWarps = kThreads / 32;
  static_assert(kWarps == kSolveWarps);
  static constexpr int kCtasPerSm = kSolveCtasPerSm;
  static constexpr bool kNormalizes = true;
  static_assert(kSteps * C == kChunkTokens);

  using GatedTile = BlockedTile<kChunkTokens>;       // [chunk][K], [chunk][V]
  using ChunkPairTile = SwizzledTile<kChunkTokens>;  // [chunk][chunk]
  static constexpr int kChunkKeyTileBytes = kChunkTokens * K * 2, kChunkPairTileBytes = kChunkTokens * kChunkTokens * 2;

  // Of each step: its rows, then the operands of its pairs; over the second gates what a pair across the steps takes of the earlier step.
  // The later step comes first.
  static constexpr int kRawQ = 0, kRawK = kKeyTileBytes, kRawG = 2 * kKeyTileBytes, kSecondGate = 3 * kKeyTileBytes;
  static constexpr int kRawBytes = 4 * kKeyTileBytes;
  static constexpr int kRowsOfStepBytes = C * 128;  // of a tile of the chunk

  // Log-decay of each group of tokens, of each step   [groups, K] fp32
  static constexpr int kTokenGroups = kGroupThreads / (K / 2), kTokensPerThread = C / kTokenGroups;
  static constexpr int kTotals = 0;  // of the step's scratch
  static constexpr int kScratch = kSteps * kRawBytes, kScratchBytes = kTokenGroups * K * 4;
  // K ⊙ e^G, then W; Q ⊙ e^G of the later step (by levels: of both). Tiles of the chunk: a step has its rows of them.
  static constexpr int kGated = kScratch + kSteps * kScratchBytes;
  static constexpr int kGatedQueries = kChunkKeyTileBytes;  // from kGated
  // Aqk; then Tinv as the sum of two parts. Of rows 0 .. 31 the low part is where the high one has nothing, of 32 .. 63 in rows 64 .. 95.
  static constexpr int kTinv = kGated + 2 * kChunkKeyTileBytes, kAqk = kTinv;
  static constexpr int kTinvBytes = 3 * kChunkPairTileBytes / 2;
  // V, over Q ⊙ e^G.
  static constexpr bool kValuesFit = V <= K;
  static constexpr int kValues = kValuesFit ? kGated + kGatedQueries : kTinv + kTinvBytes;
  // Akk, then its inverse   [chunk, 68] fp32: over the gates of the earlier step, which are the last to be copied for the next chunk, and the totals.
  static constexpr bool kSolveFits = kRawBytes - kRawG + kSteps * kScratchBytes >= SolveMatrix::kBytes;
  static constexpr int kAfterValues = kTinv + kTinvBytes + (kValuesFit ? 0 : kChunkTokens * V * 2);
  static constexpr int kSolve = kSolveFits ? kRawBytes + kRawG : kAfterValues;

  static constexpr int kRowValues = kAfterValues + (kSolveFits ? 0 : SolveMatrix::kBytes);  // of each step
  static constexpr int kRowValuesBytes = 6 * C * 4;
  static constexpr int kEarlierDecay = kRowValues + kSteps * kRowValuesBytes;  // e^{G_C} of the earlier step   [K] fp32
  // Of the next chunk:
  static constexpr int kNextBeta = kEarlierDecay + K * 4;         // beta as it came   [chunk] words
  static constexpr int kNextBias = kNextBeta + kChunkTokens * 4;  // GateConstants   [K] fp32
  static constexpr int kNextRate = kNextBias + K * 4;
  static constexpr int kBarriers = kNextRate + 16;  // of copies
  static constexpr int kPlaces = (kBarriers + 3 * 8 + 15) / 16 * 16;
  static constexpr int kSharedBytes = kPlaces + kSolvePlaces * sizeof(SolvePlace);
  static_assert(kGated % 1024 == 0 && kValues % 1024 == 0 && kPlaces % 16 == 0);
  static_assert(kCtasPerSm * (kSharedBytes + 1024) <= 228 * 1024);
};

}  // namespace kda
