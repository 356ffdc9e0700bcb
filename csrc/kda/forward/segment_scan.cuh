// What the kernels that go through the steps of a segment share: where a segment lies, and the ring of stages that is filled from
// the images of step_factors.cuh.
#pragma once

#include "../device/chunk_location.cuh"
#include "step_consumer.cuh"
#include "step_params.h"

namespace kda {

// A segment of one value head, in steps.
struct SegmentOfSteps {
  SegmentLocation location;
  SequenceRange range;  // of the sequence
  int64_t slot;
  int64_t first_token;      // of the segment
  int64_t first_step_slot;  // likewise
  int all_tokens;           // likewise
  int steps, value_head;

  __device__ __forceinline__ SegmentOfSteps(const StepKernelParams& params, int64_t slot, int value_head, int lane)
      : location(locate_segment(params.call, slot, params.segment_chunks, lane)),
        range(sequence_range(params.call, location.sequence)),
        slot(slot),
        value_head(value_head) {
    constexpr int kStepsPerChunk = kChunkTokens / kStepTokens;
    first_token = range.begin + location.first_chunk * kChunkTokens;
    first_step_slot =
        first_slot_of(params.call, location.sequence, range, kStepTokens) + location.first_chunk * kStepsPerChunk;
    all_tokens = static_cast<int>(min(range.end - first_token, location.chunks * kChunkTokens));
    steps = (all_tokens + kStepTokens - 1) / kStepTokens;
  }

  // Tokens of a step: kStepTokens but for the last of the sequence.
  __device__ __forceinline__ int tokens(int step) const { return min(all_tokens - step * kStepTokens, kStepTokens); }

  // Index of (sequence, value head).
  __device__ __forceinline__ int64_t chain(int value_heads) const {
    return location.sequence * value_heads + value_head;
  }
  // Its index in arrays [segment slots, HV].
  __device__ __forceinline__ int64_t tile(int value_heads) const { return slot * value_heads + value_head; }
};

// Stages that are filled in turn, by one thread. Stage n is that of the n-th step since the ring was made.
template <typename Config>
struct StageRing {
  static constexpr int K = Config::K;
  uint8_t* const shared;

  __device__ __forceinline__ uint32_t full(int n) const {
    return ptx::shared_address(shared) + Config::kBarrierOffset + 16 * (n % Config::kStages);
  }
  __device__ __forceinline__ uint32_t empty(int n) const { return full(n) + 8; }
  __device__ __forceinline__ static uint32_t parity(int n) { return n / Config::kStages & 1; }
  __device__ __forceinline__ uint8_t* stage(int n) const { return shared + n % Config::kStages * Config::kStageBytes; }

  // Called by one thread.
  __device__ __forceinline__ void init(int readers) const {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), readers);
    }
    ptx::fence_mbarrier_init();
  }

  // Called by one thread: stage n, as soon as it is free. kResult: what is wanted of the step; first_value_column < 0: no V.
  template <StepResult kResult>
  __device__ __forceinline__ void fill(const StepKernelParams& params, const SegmentOfSteps& segment, int n, int step,
                                       int first_value_column) const {
    const int value_heads = params.call.problem.value_heads;
    const int64_t image_index = (segment.first_step_slot + step) * value_heads + segment.value_head;
    const uint8_t* const image = params.images + image_index * Config::kImageBytes;
    const uint32_t to = ptx::shared_address(stage(n)), barrier = full(n);
    if (n >= Config::kStages) ptx::mbarrier_wait_parity(empty(n), parity(n) ^ 1);
    const bool has_values = first_value_column >= 0;
    constexpr bool kWhole = kResult == StepResult::kOutputs;
    constexpr int kBytes = Config::kImageBytes - (kWhole ? 0 : Config::kKeyTileBytes);
    ptx::mbarrier_arrive_expect_tx(barrier, kBytes + (has_values ? Config::kValueTileBytes : 0));
    if constexpr (kWhole) {
      ptx::cp_async_bulk_load(to, image, Config::kImageBytes, barrier);
    } else {  // the rows of k of each block of 64 channels, and what follows q
      constexpr int kBlockBytes = Config::GatedTile::kBlockBytes;
#pragma unroll
      for (int offset = Config::kGated; offset < Config::kKeysDecayed; offset += kBlockBytes) {
        ptx::cp_async_bulk_load(to + offset, image + offset, kBlockBytes / 2, barrier);
      }
      ptx::cp_async_bulk_load(to + Config::kKeysDecayed, image + Config::kKeysDecayed,
                              Config::kImageBytes - Config::kKeysDecayed, barrier);
    }
    if (has_values) {  // boxes of the tensor map have 64 columns
      const int token = static_cast<int>(segment.first_token) + step * kStepTokens;
#pragma unroll
      for (int block = 0; block < Config::kRows / 64; ++block) {
        ptx::cp_async_bulk_tensor_load(to + Config::kValues + block * Config::ValueTile::kBlockBytes, &params.maps.v, 0,
                                       token, first_value_column / 64 + block, segment.value_head,
                                       static_cast<int>(segment.range.batch), barrier);
      }
    }
  }

  // Stage n, when it is full.
  __device__ __forceinline__ uint8_t* wait(int n) const {
    ptx::mbarrier_wait_parity(full(n), parity(n));
    return stage(n);
  }

  // The thread does not read stage n any more. One lane could say so for its warp, but racecheck does not see that order.
  __device__ __forceinline__ void release(int n) const { ptx::mbarrier_arrive(empty(n)); }
};

}  // namespace kda
