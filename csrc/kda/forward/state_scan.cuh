// The last stage of the stepwise forward: o and the final state, from the images of the steps (step_factors.cuh) and V. The formulas are
// those of step_consumer.cuh.
//
// Grid: one CTA for each (segment slot, value head): it goes through the steps of its segment, which is the whole sequence if sequences
// are not cut; otherwise from the state that segment_compose.cuh left.
// Roles: one warpgroup for each 64 rows of V, which carries these rows of S^T in fp32 accumulators; and one that keeps a ring of stages filled, as
// deep as shared memory allows. O of a step goes out by way of the place of its V.
// Shared memory of one stage (bytes, K = V = 128): gated operands 24576, Tinv and Aqk 8192, vectors 1024, V 8192.
// Bound by memory at many heads: 33 KiB of an image and 16 KiB of V and o for a step; at few heads by the chain of the products of a step.
#pragma once

#include "forgetting.cuh"
#include "segment_scan.cuh"

namespace kda {

template <int K_, int V_, typename Element_>
struct StateScanConfig : StepStage<K_, V_> {
  using Stage = StepStage<K_, V_>;
  using Stage::K, Stage::kStageBytes;
  static constexpr int V = V_;
  using Element = Element_;
  static constexpr bool kHasRegisters = true;  // see StepConsumer
  static constexpr int kGroups = V / 64, kGroupThreads = 128;
  static constexpr int kConsumers = kGroups * kGroupThreads, kThreads = kConsumers + kGroupThreads;
  static constexpr int kCtasPerSm = 2 / kGroups;
  // Registers of a thread after the roles have parted: in all those that they were launched with.
  static constexpr int kLoaderRegisters = 24;
  static constexpr int kLaunchRegisters = 65536 / (kCtasPerSm * kThreads) / 8 * 8;
  static constexpr int kConsumerRegisters = (kLaunchRegisters * (kGroups + 1) - kLoaderRegisters) / kGroups / 8 * 8;
  static constexpr int kBudget = 228 * 1024 / kCtasPerSm - 1024 - 256;
  static constexpr int kStages = kBudget / kStageBytes;
  static constexpr int kBarrierOffset = kStages * kStageBytes;
  static constexpr int kSharedBytes = kBarrierOffset + kStages * 16;
  static_assert(kStages >= 2 && kStages * 16 <= 128);
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    state_scan_kernel(const __grid_constant__ StepKernelParams params) {
  constexpr int K = Config::K, V = Config::V, C = Config::C;
  using Consumer = StepConsumer<Config, StepResult::kOutputs>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.call;
  const int value_heads = call.problem.value_heads;
  const int lane = threadIdx.x & 31;
  const SegmentOfSteps segment(params, blockIdx.x / value_heads, static_cast<int>(blockIdx.x % value_heads), lane);
  const WhatIsLeft left = find_left(params.left, segment.chain(value_heads), lane);
  if (!left.anything) return;
  ptx::wait_for_kernel_before();  // before any other return: who waits for this kernel relies on those before it, too
  if (!segment.location.is_used || !left.chain) return;
  const int steps = segment.steps;
  const StageRing<Config> ring{shared};
  if (threadIdx.x == 0) ring.init(Config::kConsumers);
  __syncthreads();

  if (threadIdx.x >= Config::kConsumers) {
    ptx::setmaxnreg_dec<Config::kLoaderRegisters>();
    if (threadIdx.x == Config::kConsumers) {
      for (int step = 0; step < steps; ++step) ring.template fill<StepResult::kOutputs>(params, segment, step, step, 0);
    }
    return;
  }
  ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
  const int group = threadIdx.x / Config::kGroupThreads, thread = threadIdx.x % Config::kGroupThreads;
  const int warp = thread >> 5, first_row = 64 * group, warp_row = first_row + 16 * warp;
  StateFragments<K> state;
  if (segment.location.is_first) {
    load_initial_state(state, call, segment.location.sequence, segment.value_head, warp_row, lane);
  } else {  // the end of the segment before
    const int64_t tile = segment.tile(value_heads) - value_heads;
    state.load_fragments(fragments_at<K>(params.segment_state, tile, V, warp_row / 16), lane);
  }

  const Consumer advance{first_row, warp, lane};
  OutputWriter<Config> writer(call, segment.range.batch, segment.first_token, segment.value_head, first_row, thread);
  typename Consumer::PackedOutput output;  // of the step before, stored while the products of the next one run
  uint32_t operands[K / 16][4];
  state.to_operands(operands);
  const auto store_output = [&](int step) {
    uint8_t* const tile = ring.stage(step) + Config::kValues + group * OutputWriter<Config>::kTileBytes;
    writer.store(output, tile, segment.tokens(step));
  };
  for (int step = 0; step < steps; ++step) {
    if (call.chunk_states != nullptr && step % (kChunkTokens / C) == 0) {
      const int64_t slot = segment.location.first_chunk_slot + step / (kChunkTokens / C);
      store_state(call.chunk_states, slot * value_heads + segment.value_head, state, call, warp_row, lane);
    }
    uint8_t* const stage = ring.wait(step);
    advance.advance(state, operands, output, stage, segment.tokens(step), true, [&] {
      if (step == 0) return;
      store_output(step - 1);
      ptx::fence_proxy_async_shared();  // the copy engine writes next
      ring.release(step - 1);
    });
  }
  if (steps > 0) store_output(steps - 1);

  if (segment.location.is_last) {
    if (call.final_state != nullptr) {
      store_state(call.final_state, segment.location.sequence * value_heads + segment.value_head, state, call, warp_row,
                  lane);
    }
    if (call.cu_seqlens != nullptr && segment.location.sequence == call.problem.sequences - 1) {
      writer.clear_rows_past(call, segment.range.end, segment.value_head, first_row);
    }
  }
}

}  // namespace kda
