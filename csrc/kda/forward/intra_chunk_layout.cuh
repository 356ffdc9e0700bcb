// The intra-chunk solve's configuration: shared-memory map and what its parts know. See intra_chunk_solve.cuh for the kernel.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/triangular_inverse.cuh"
#include "step_operands.cuh"
#include "step_params.h"

namespace kda {

struct IntraChunkSolveParams {
  ChunkFwdKernelParams stage;
  TensorMaps maps;  // if stage.vectorized
};

constexpr int max_of(int a, int b) { return a > b ? a : b; }

// A chunk is two steps, of a group of four warps each.
template <int K_, int V_, typename Element_>
struct IntraChunkSolveConfig : StepTiles<K_> {
  using Tiles = StepTiles<K_>;
  using Tiles::C, Tiles::K, Tiles::kKeyTileBytes;
  using Element = Element_;
  static constexpr int V = V_;
  static constexpr int kSteps = 2, kGroupThreads = 128, kThreads = kSteps * kGroupThreads, kBarrierThreads = kThreads,
                       kWarps = kThreads / 32;
  static constexpr int kCtasPerSm = 2;
  static constexpr bool kNormalizes = true;
  static_assert(kSteps * C == kChunkTokens);

  using GatedTile = BlockedTile<kChunkTokens>;       // [chunk][K], [chunk][V]
  using ChunkPairTile = SwizzledTile<kChunkTokens>;  // [chunk][chunk]
  static constexpr int kChunkKeyTileBytes = kChunkTokens * K * 2, kChunkPairTileBytes = kChunkTokens * kChunkTokens * 2;

  // Of each step: its rows, then the operands of its pairs; over the second gates what a pair across the steps takes of the earlier step.
  static constexpr int kRawQ = 0, kRawK = kKeyTileBytes, kRawG = 2 * kKeyTileBytes, kSecondGate = 3 * kKeyTileBytes;
  static constexpr int kRawBytes = 4 * kKeyTileBytes;
  // In the place of all rows, when pairs have been multiplied.
  static constexpr int kSolve = 0;  // Akk, then its inverse   [chunk, 68] fp32
  static constexpr int kAqk = (kSolve + SolveMatrix::kBytes + 1023) / 1024 * 1024;
  static constexpr int kTinvHigh = kAqk + kChunkPairTileBytes;
  static constexpr int kTinvLow = kTinvHigh + kChunkPairTileBytes;
  static constexpr int kValues = kTinvLow + kChunkPairTileBytes;
  static constexpr int kReusedBytes = kValues + kChunkTokens * V * 2;
  // K ⊙ e^G, then W; Q ⊙ e^G of the later step. Tiles of the chunk: a step has its rows of them.
  static constexpr int kGated = max_of(kSteps * kRawBytes, (kReusedBytes + 1023) / 1024 * 1024);
  static constexpr int kGatedQueries = kChunkKeyTileBytes;  // from kGated
  static constexpr int kRowsOfStepBytes = C * 128;

  // Of each step.
  static constexpr int kTokenGroups = kGroupThreads / (K / 2), kTokensPerThread = C / kTokenGroups;
  static constexpr int kTotals = 0;  // log-decay of each group of tokens   [groups, K] fp32
  static constexpr int kRowValues = kTotals + kTokenGroups * K * 4;
  static constexpr int kScratchBytes = kRowValues + 6 * C * 4;
  static constexpr int kScratch = kGated + 2 * kChunkKeyTileBytes;

  static constexpr int kEarlierDecay = kScratch + kSteps * kScratchBytes;  // e^{G_C} of the earlier step   [K] fp32
  static constexpr int kBeta = kEarlierDecay + K * 4;                      // [chunk] fp32
  static constexpr int kBarriers = kBeta + kChunkTokens * 4;               // of the rows of q, k and g, and of V
  static constexpr int kChunk = kBarriers + 2 * 8, kChunkBytes = 32;       // where it is
  static constexpr int kSharedBytes = kChunk + kChunkBytes;
  static_assert(kCtasPerSm * (kSharedBytes + 1024) <= 228 * 1024);
};

}  // namespace kda
