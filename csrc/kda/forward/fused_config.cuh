// The fused forward's configuration: shared-memory map, roles, barriers. See fused_scan.cuh for the kernel.
#pragma once

#include "../device/triangular_inverse.cuh"
#include "call_kind.h"
#include "scan_schedule.cuh"
#include "step_layout.cuh"

namespace kda {

// K: channels of a key. V: width of a value row.
template <int K_, int V_, typename Element_, CallKind kKind_, ChainCut kChainCut_>
struct FusedConfig : StepStage<K_, 64> {
  using Stage = StepStage<K_, 64>;
  using Stage::C, Stage::K, Stage::kRows, Stage::kStageBytes, Stage::kKeyTileBytes;
  static constexpr bool kHasRegisters = true;  // see StepConsumer
  static constexpr int V = V_;
  using Element = Element_;
  static constexpr CallKind kKind = kKind_;

  // CTAs of a cluster: one for each 64 rows of the transposed state. They share the work of the producers.
  static constexpr int kCtas = V / kRows;
  static constexpr int kMapRows = kCtas * kRows, kMaps = (K + kMapRows - 1) / kMapRows;
  using Cut = StretchCut<kChainCut_, kMaps, kMapRows>;

  // Registers of a thread after the roles have parted: those that all were launched with.
  static constexpr int kProducerGroups = 2, kGroupThreads = 128, kBarrierThreads = kGroupThreads;
  static constexpr int kThreads = (kProducerGroups + 1) * kGroupThreads;
  static constexpr int kProducerRegisters = 144, kConsumerRegisters = 216;
  static_assert(kProducerGroups * kProducerRegisters + kConsumerRegisters == (kProducerGroups + 1) * 168);

  // One stage: what a consumer needs of a step. A stage is always filled by the same CTA.
  static constexpr int kStages = 4;
  static_assert(kStages % kCtas == 0);

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

  static constexpr int kRawOffset = kStages * kStageBytes;
  static constexpr int kProducerOffset = kRawOffset + kProducerGroups * kRawBytes;
  static constexpr int kBarrierOffset = kProducerOffset + kProducerGroups * kProducerBytes;
  static constexpr int kBarriers = 3 * kStages + kProducerGroups + (Cut::kForgets ? 1 : 0);
  // StretchSearch or CutSearch, before the roles part and stages take its place.
  static constexpr int kSearchOffset = 0;
  static constexpr int kStretchOffset = kBarrierOffset + 8 * kBarriers;
  static constexpr int kSharedBytes = kStretchOffset + static_cast<int>(sizeof(ScanStretch));
  static_assert(kSharedBytes <= 227 * 1024);

  static __device__ __forceinline__ uint32_t full(uint32_t shared, int stage) {
    return shared + kBarrierOffset + 24 * stage;
  }
  static __device__ __forceinline__ uint32_t empty(uint32_t shared, int stage) { return full(shared, stage) + 8; }
  // The place of V: O of the step goes out by way of it, while the next step is on.
  static __device__ __forceinline__ uint32_t values_empty(uint32_t shared, int stage) {
    return full(shared, stage) + 16;
  }
  static __device__ __forceinline__ uint32_t raw_full(uint32_t shared, int producer) {
    return shared + kBarrierOffset + 24 * kStages + 8 * producer;
  }

  // Of the gates before and behind the stretch; kForget.
  static __device__ __forceinline__ uint32_t gates_full(uint32_t shared) { return raw_full(shared, kProducerGroups); }

  // Of a step, by its index in the stretch.
  static __device__ __forceinline__ int stage_of(int index) { return index % kStages; }
  static __device__ __forceinline__ uint32_t parity_of(int index) { return index / kStages & 1; }
  static __device__ __forceinline__ uint32_t maker_of(int stage) { return stage % kCtas; }
};

// Of a thread of the fused forward.
struct FusedRole {
  const StepKernelParams& params;
  const TensorMaps& maps;
  const ScanStretch& stretch;
  uint8_t* shared;
  int stretch_index;
  uint32_t rank;  // of the CTA in its cluster
  int group;      // which of the producers'
  int thread, warp, lane;
};

}  // namespace kda
