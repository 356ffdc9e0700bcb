// A consumer group of the fused forward: one warpgroup that carries 64 rows of the transposed state through the steps
// (step_consumer.cuh).
#pragma once

#include "fused_config.cuh"
#include "step_consumer.cuh"

namespace kda {

template <typename Config>
struct FusedConsumer {
  static constexpr int K = Config::K, C = Config::C;
  using Consumer = StepConsumer<Config, StepResult::kOutputs>;

  const ChunkFwdParams& call;
  const ScanItem& item;
  uint8_t* const shared;
  const int consumer;  // which group
  const int thread, warp, lane;

  static constexpr int kBarrier = 1 + Config::kProducerGroups;  // + consumer
  __device__ __forceinline__ void sync() const { ptx::barrier_sync(kBarrier + consumer, Config::kGroupThreads); }

  // First row of V of the group, and of the warp.
  __device__ __forceinline__ int group_row() const { return item.first_row + 64 * consumer; }
  __device__ __forceinline__ int warp_row() const { return group_row() + 16 * warp; }

  __device__ __forceinline__ void run() const {
    const uint32_t shared_base = ptx::shared_address(shared);
    const int value_heads = call.problem.value_heads;
    StateFragments<K> state;
    load_initial_state(state, call, item.sequence, item.value_head, warp_row(), lane);
    const int64_t first_slot = first_chunk_slot(call, item.sequence, item.range);

    const Consumer advance{64 * consumer, warp, lane};
    OutputWriter<Config> writer(call, item.range.batch, item.range.begin, item.value_head, group_row(), thread);
    typename Consumer::PackedOutput output;  // of the step before, stored while the products of the next one run
    // A buffer is used again two steps later, and the barrier of the step between says that it has been read.
    const auto store_output = [&](int step) {
      uint8_t* const tile =
          shared + Config::kOutputOffset + consumer * Config::kOutputBytes + step % 2 * Config::kOutputTileBytes;
      writer.store(output, tile, item.tokens(step), [&] { sync(); });
    };
    for (int step = 0; step < item.steps; ++step) {
      const int stage_index = step % Config::kStages, use = step / Config::kStages;
      uint8_t* const stage = shared + stage_index * Config::kStageBytes;
      if (call.chunk_states != nullptr && step % (kChunkTokens / C) == 0) {
        const int64_t slot = first_slot + step / (kChunkTokens / C);
        store_state(call.chunk_states, slot * value_heads + item.value_head, state, call, warp_row(), lane);
      }
      uint32_t operands[K / 16][4];
      state.to_operands(operands);
      ptx::mbarrier_wait_parity(Config::full(shared_base, stage_index), use & 1);
      advance.advance(state, operands, output, stage, item.tokens(step), true, [&] {
        if (step > 0) store_output(step - 1);
      });
      ptx::mbarrier_arrive(Config::empty(shared_base, stage_index));
    }
    if (item.steps > 0) store_output(item.steps - 1);

    if (call.final_state != nullptr) {
      store_state(call.final_state, item.sequence * value_heads + item.value_head, state, call, warp_row(), lane);
    }
    if (call.cu_seqlens != nullptr && item.sequence == call.problem.sequences - 1) {
      writer.clear_rows_past(call, item.range.end, item.value_head, group_row());
    }
  }
};

}  // namespace kda
