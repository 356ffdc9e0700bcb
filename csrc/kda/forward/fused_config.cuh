// The fused forward's configuration: roles, shared-memory maps, barriers, the ring in device memory. See fused_scan.cuh for the kernel.
#pragma once

#include "scan_schedule.cuh"
#include "state_scan.cuh"
#include "step_factors.cuh"

namespace kda {

// K: channels of a key. V: width of a value row.
template <int K_, int V_, typename Element_>
struct FusedConfig : StepStage<K_, V_> {
  using Stage = StepStage<K_, V_>;
  using Stage::C, Stage::K, Stage::kStageBytes;
  static constexpr int V = V_;
  using Element = Element_;

  static constexpr int kGroupThreads = 128, kThreads = 4 * kGroupThreads;

  // Of a CTA that makes images: groups that work by themselves.
  using Factors = StepFactorsConfig<K, kGroupThreads / 32, Element>;
  static constexpr int kMakers = 4;
  static_assert(kMakers * kGroupThreads == kThreads);
  static constexpr int kMakerBytes = (Factors::kSharedBytes + 1023) / 1024 * 1024;

  // Of a CTA that scans: a group for each 64 rows of S^T, then one whose first thread loads. The rest goes home, and leaves its registers.
  static constexpr int kScanGroups = V / 64, kConsumers = kScanGroups * kGroupThreads;
  static constexpr int kIdleRegisters = 24, kConsumerRegisters = 216;
  static_assert(kScanGroups * kConsumerRegisters + (4 - kScanGroups) * kIdleRegisters <= 65536 / kGroupThreads);
  static constexpr int kSpareBytes = 4096;  // barriers, stretches, the search for them
  static constexpr int kMostStages = (227 * 1024 - kSpareBytes) / kStageBytes, kStages = kMostStages < 5 ? kMostStages : 5;
  static_assert(kStages >= 3);

  static constexpr int kScanBytes = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kMakers * kMakerBytes > kScanBytes ? kMakers * kMakerBytes : kScanBytes;
  static constexpr int kStretchOffset = kBarrierOffset + 16 * kStages;
  static constexpr int kSearchOffset = kStretchOffset + kMakers * static_cast<int>(sizeof(ScanStretch));
  static constexpr int kSharedBytes = kSearchOffset + static_cast<int>(sizeof(StretchSearch));
  static_assert(kSharedBytes <= 227 * 1024);
};

// The images on their way: those of a scan's stretch go through kFusedRingSlots places in turn. A maker tells that one is there, the scan up to which
// of them it has got. By `n`, the index of a step in its stretch.
struct FusedRing {
  uint8_t* images;  // of the scan   [kFusedRingSlots] StepImage
  uint32_t* made;   // [kFusedRingSlots] 1 + index of the step whose image is there
  uint32_t* taken;  // how many the scan has got

  template <int kImageBytes>
  static __device__ __forceinline__ FusedRing of_scan(const StepKernelParams& params, int64_t scan) {
    uint32_t* const flags = params.ring_flags + scan * (kFusedRingSlots + 1);
    return {params.images + scan * kFusedRingSlots * int64_t{kImageBytes}, flags, flags + kFusedRingSlots};
  }

  __device__ __forceinline__ void wait_until_free(int n) const {
    while (static_cast<int>(ptx::load_acquire(taken)) + kFusedRingSlots <= n) __nanosleep(64);
  }
  __device__ __forceinline__ void wait_until_made(int n) const {
    while (ptx::load_acquire(made + n % kFusedRingSlots) != static_cast<uint32_t>(n + 1)) __nanosleep(32);
  }
  __device__ __forceinline__ void tell_made(int n) const {
    ptx::store_release(made + n % kFusedRingSlots, static_cast<uint32_t>(n + 1));
  }
  __device__ __forceinline__ void tell_taken(int count) const { ptx::store_release(taken, static_cast<uint32_t>(count)); }
};

}  // namespace kda
