// The step: 32 tokens of one head, and what a consumer needs of them. Tiles are what ldmatrix and wgmma read and copies write.
#pragma once

#include "../device/elements.cuh"
#include "../device/tile.cuh"
#include "kernel_params.h"

namespace kda {

template <int K_>
struct StepTiles {
  static constexpr int K = K_, C = kStepTokens;
  static constexpr int kKeyTileBytes = C * K * 2;
  using KeyTile = BlockedTile<C>;
  using GatedTile = BlockedTile<2 * C>;          // rows of k, then rows of q: one operand
  static constexpr int kGatedQueries = C * 128;  // bytes to the latter
  static constexpr bool kNormalizes = false;
  using PairTile = BlockedTile<C>;  // two matrices [C, C] side by side
  using ValueTile = BlockedTile<C>;
  static constexpr int kPairTileBytes = C * 128;
  static constexpr int kVectorBytes = K * 4 + 2 * C * 4;  // e^{G_C} [K]; |k|, or 1 [C]; scale / |q|, or scale [C]; fp32
  static constexpr int kKeyNormVector = K * 4, kOutputScaleVector = kKeyNormVector + C * 4;
};

// In the workspace, one for each (step slot, value head).
template <int K_>
struct StepImage : StepTiles<K_> {
  using Tiles = StepTiles<K_>;
  static constexpr int kGated = 0;                                          // K ⊙ e^G above Q ⊙ e^G   [2 C, K]
  static constexpr int kKeysDecayed = kGated + 2 * Tiles::kKeyTileBytes;    // K ⊙ e^{G_C - G}         [C, K]
  static constexpr int kInverseTile = kKeysDecayed + Tiles::kKeyTileBytes;  // Tinv: high part | middle part
  static constexpr int kAqkTile = kInverseTile + Tiles::kPairTileBytes;     // Aqk | Tinv: low part
  static constexpr int kVectors = kAqkTile + Tiles::kPairTileBytes;
  static constexpr int kStepDecay = kVectors;
  static constexpr int kKeyNorm = kVectors + Tiles::kKeyNormVector;
  static constexpr int kOutputScale = kVectors + Tiles::kOutputScaleVector;
  static constexpr int kImageBytes = kVectors + Tiles::kVectorBytes;
  static_assert(kImageBytes == step_image_bytes(K_));
};

// What a consumer keeps of a step in shared memory: the image, and V of its rows.
template <int K_, int kRows_>
struct StepStage : StepImage<K_> {
  using Image = StepImage<K_>;
  static constexpr int kRows = kRows_;
  static constexpr int kValues = (Image::kImageBytes + 1023) / 1024 * 1024;  // V   [C, kRows]
  static constexpr int kValueTileBytes = Image::C * kRows * 2;
  static constexpr int kStageBytes = kValues + kValueTileBytes;
};

}  // namespace kda
