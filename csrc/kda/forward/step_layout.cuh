// The step: 32 tokens of one head, and what a consumer needs of them. Tiles are what ldmatrix and wgmma read and copies write.
#pragma once

#include "../device/elements.cuh"
#include "../device/tile.cuh"
#include "kernel_params.h"

namespace kda {

// Tiles of rows of 128 bytes whose 16-byte units are permuted (unit ^ (row & 7)), one block of Rows rows for every 64 columns of 16 bits: what
// tensor copies with 128-byte swizzle write, and what ldmatrix and wgmma read without bank conflicts.
template <int Rows>
struct BlockedTile : TileOperands<BlockedTile<Rows>> {
  static constexpr int kBlockBytes = Rows * 128;
  static __device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
    return (unit >> 3) * kBlockBytes + row * 128 + (((unit & 7) ^ (row & 7)) << 4);
  }

  static __device__ __forceinline__ uint32_t unit_address(uint32_t tile, int row, int half, int column) {
    return tile + unit_offset(row, (column >> 3) + half);
  }
};

template <int K_>
struct StepTiles {
  static constexpr int K = K_, C = kStepTokens;
  static constexpr int kKeyTileBytes = C * K * 2;
  using KeyTile = BlockedTile<C>;
  using GatedTile = BlockedTile<2 * C>;  // rows of k, then rows of q: one operand
  using PairTile = BlockedTile<C>;       // two matrices [C, C] side by side
  using ValueTile = BlockedTile<C>;
  static constexpr int kPairTileBytes = C * 128;
  static constexpr int kVectorBytes = K * 4 + 2 * C * 4;  // e^{G_C} [K]; |k|, or 1 [C]; scale / |q|, or scale [C]; fp32
  static constexpr int kKeyNormVector = K * 4, kOutputScaleVector = kKeyNormVector + C * 4;
};

// Offsets of the parts of a step as consumers keep it. In memory it is an image of the same parts without V, StepImage.
template <int K_, int kRows_>
struct StepStage : StepTiles<K_> {
  using Tiles = StepTiles<K_>;
  static constexpr int kRows = kRows_;
  static constexpr int kValueTileBytes = Tiles::C * kRows * 2;
  static constexpr int kGated = 0;                                          // K ⊙ e^G above Q ⊙ e^G   [2 C, K]
  static constexpr int kKeysDecayed = kGated + 2 * Tiles::kKeyTileBytes;    // K ⊙ e^{G_C - G}         [C, K]
  static constexpr int kInverseTile = kKeysDecayed + Tiles::kKeyTileBytes;  // Tinv: high part | middle part
  static constexpr int kAqkTile = kInverseTile + Tiles::kPairTileBytes;     // Aqk | Tinv: low part
  static constexpr int kValues = kAqkTile + Tiles::kPairTileBytes;          // V                       [C, kRows]
  static constexpr int kVectors = kValues + kValueTileBytes;
  static constexpr int kStepDecay = kVectors;
  static constexpr int kKeyNorm = kVectors + Tiles::kKeyNormVector;
  static constexpr int kOutputScale = kVectors + Tiles::kOutputScaleVector;
  static constexpr int kStageBytes = (kVectors + Tiles::kVectorBytes + 1023) / 1024 * 1024;
};

// In the workspace, one for each (step slot, value head).
template <int K>
struct StepImage {
  using Tiles = StepTiles<K>;
  static constexpr int kVectors = StepStage<K, 64>::kValues;  // everything before V is as in a stage
  static constexpr int kBytes = kVectors + Tiles::kVectorBytes;
  static_assert(kBytes == step_image_bytes(K));
};

}  // namespace kda
