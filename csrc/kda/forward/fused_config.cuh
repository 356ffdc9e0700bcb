// The fused forward's configuration: shared-memory map, roles, barriers. See fused_scan.cuh for the kernel.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/triangular_inverse.cuh"
#include "step_layout.cuh"
#include "step_params.h"

namespace kda {

// K: channels of a key. V: width of a value row in memory. kRows: rows of the transposed state of one CTA, 64 a consumer warpgroup.
template <int K_, int V_, int kRows_, typename Element_>
struct FusedConfig : StepStage<K_, kRows_> {
  using Stage = StepStage<K_, kRows_>;
  using Stage::C, Stage::K, Stage::kRows, Stage::kStageBytes, Stage::kKeyTileBytes;
  static constexpr bool kHasRegisters = kRows_ == 64;  // see StepConsumer
  static constexpr int V = V_;
  using Element = Element_;

  // Registers of a thread after the roles have parted: 65536 for all threads.
  static constexpr int kConsumerGroups = kRows / 64, kProducerGroups = 2, kGroupThreads = 128;
  static constexpr int kThreads = (kProducerGroups + kConsumerGroups) * kGroupThreads;
  static constexpr int kProducerRegisters = kConsumerGroups == 2 ? 96 : 168;
  static constexpr int kConsumerRegisters = kConsumerGroups == 2 ? 160 : 168;

  // One stage: what a consumer needs of a step.
  static constexpr int kStages = 3;

  // The rows of q, k and g of a step as they come, one buffer for each producer group. Then, in their place, the gates in fp32 (over g, which
  // has room for fp32) and the operands of the pair products: P q, P k over q, k, and R k over the first of the gates.
  static constexpr int kRawQ = 0, kRawK = kKeyTileBytes, kRawG = 2 * kKeyTileBytes, kSecondGate = 3 * kKeyTileBytes;
  static constexpr int kRawBytes = 4 * kKeyTileBytes;

  // What a producer group has for itself.
  static constexpr int kSolve = 0;  // Akk, then its inverse   [C, 36] fp32
  static constexpr int kSolveBytes = C * SolveMatrix32::kStride * 4;
  static constexpr int kTotals = kSolve + kSolveBytes;  // log-decay of each group of tokens   [groups, K] fp32
  static constexpr int kTokenGroups = kGroupThreads / (K / 2), kTokensPerThread = C / kTokenGroups;
  static constexpr int kRowValues = kTotals + kTokenGroups * K * 4;  // see RowValues; of even and of odd turns
  static constexpr int kRowValuesBytes = 6 * C * 4;
  static constexpr int kProducerBytes = (kRowValues + 2 * kRowValuesBytes + 127) / 128 * 128;

  // What a consumer group works on: O of its 64 columns on its way out, of even and of odd steps.
  static constexpr int kOutputTileBytes = C * 128, kOutputBytes = 2 * kOutputTileBytes;

  static constexpr int kRawOffset = kStages * kStageBytes;
  static constexpr int kProducerOffset = kRawOffset + kProducerGroups * kRawBytes;
  static constexpr int kOutputOffset = kProducerOffset + kProducerGroups * kProducerBytes;
  static constexpr int kBarrierOffset = kOutputOffset + kConsumerGroups * kOutputBytes;
  static constexpr int kBarriers = 2 * kStages + kProducerGroups;
  static constexpr int kSharedBytes = kBarrierOffset + 8 * kBarriers;
  static_assert(kSharedBytes <= 227 * 1024);

  static __device__ __forceinline__ uint32_t full(uint32_t shared, int stage) {
    return shared + kBarrierOffset + 16 * stage;
  }
  static __device__ __forceinline__ uint32_t empty(uint32_t shared, int stage) {
    return shared + kBarrierOffset + 16 * stage + 8;
  }
  static __device__ __forceinline__ uint32_t raw_full(uint32_t shared, int producer) {
    return shared + kBarrierOffset + 16 * kStages + 8 * producer;
  }
};

// The tokens, head and rows of the state that a CTA scans.
struct ScanItem {
  SequenceRange range;
  int64_t sequence;
  int value_head, key_head;
  int first_row;  // of V
  int steps;

  // Tokens of a step: kStepTokens but for the last.
  __device__ __forceinline__ int tokens(int step) const {
    return static_cast<int>(min(range.end - range.begin - int64_t{step} * kStepTokens, int64_t{kStepTokens}));
  }
};

}  // namespace kda
