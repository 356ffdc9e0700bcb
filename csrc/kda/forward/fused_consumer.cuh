// The consumer group of the fused forward: one warpgroup that carries 64 rows of the transposed state through the steps of the
// cluster's stretch (step_consumer.cuh).
#pragma once

#include "fused_config.cuh"
#include "step_consumer.cuh"

namespace kda {

template <typename Config>
struct FusedConsumer : FusedRole {
  static constexpr int K = Config::K, C = Config::C;
  using Consumer = StepConsumer<Config, StepResult::kOutputs>;
  using Writer = OutputWriter<Config>;

  __device__ __forceinline__ void sync() const {
    constexpr int kBarrier = 1 + Config::kProducerGroups;
    ptx::barrier_sync(kBarrier, Config::kGroupThreads);
  }

  // First row of V of the group, and of the warp.
  __device__ __forceinline__ int group_row() const { return static_cast<int>(rank) * Config::kRows; }
  __device__ __forceinline__ int warp_row() const { return group_row() + 16 * warp; }
  __device__ __forceinline__ uint8_t* stage(int index) const {
    return shared + Config::stage_of(index) * Config::kStageBytes;
  }

  // Tells the stage's maker that it is free: by each thread if that is this CTA, else by each warp.
  __device__ __forceinline__ void release(int index) const {
    const uint32_t barrier = Config::empty(ptx::shared_address(shared), Config::stage_of(index));
    const uint32_t maker = Config::maker_of(Config::stage_of(index));
    ptx::fence_proxy_async_shared();  // O went out by way of it, and the copy engine writes next
    if (maker == rank) {
      ptx::mbarrier_arrive(barrier);
    } else {
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive_at_cta(ptx::map_to_cta(barrier, maker));
    }
  }

  // States that are handed on lie in fragments, [stretches, V / 16, K / 8, 32 lanes].
  __device__ __forceinline__ float4* handoff(int64_t index) const {
    return params.handoff_states + (index * (Config::V / 16) + warp_row() / 16) * (K / 8) * 32;
  }
  __device__ __forceinline__ uint32_t* handoff_flag(int64_t index) const {
    return params.handoff_flags + index * Config::kCtas + rank;
  }

  __device__ __forceinline__ void load_entry(StateFragments<K>& state, const ScanPiece& piece) const {
    if (piece.is_begin()) {
      load_initial_state(state, params.call, piece.sequence, piece.value_head, warp_row(), lane);
      return;
    }
    if (thread == 0) {
      while (ptx::load_acquire(handoff_flag(stretch_index + 1)) == 0) __nanosleep(100);
    }
    sync();
    state.load_fragments(handoff(stretch_index + 1), lane);
  }

  __device__ __forceinline__ void store_exit(StateFragments<K>& state, const ScanPiece& piece) const {
    const ChunkFwdParams& call = params.call;
    if (piece.is_end()) {
      if (call.final_state != nullptr) {
        const int64_t index = piece.sequence * call.problem.value_heads + piece.value_head;
        store_state(call.final_state, index, state, call, warp_row(), lane);
      }
      return;
    }
    state.store_fragments(handoff(stretch_index), lane);
    __threadfence();
    sync();
    if (thread == 0) ptx::store_release(handoff_flag(stretch_index), 1);
  }

  __device__ __forceinline__ void store_chunk_state(StateFragments<K>& state, const ScanPiece& piece, int step) const {
    const ChunkFwdParams& call = params.call;
    const SequenceRange range = {piece.batch, piece.begin, piece.end};
    const int64_t slot = first_chunk_slot(call, piece.sequence, range) + step / (kChunkTokens / C);
    store_state(call.chunk_states, slot * call.problem.value_heads + piece.value_head, state, call, warp_row(), lane);
  }

  // The stage of a step, when it is full.
  __device__ __forceinline__ uint8_t* wait_for(int index) const {
    ptx::mbarrier_wait_parity(Config::full(ptx::shared_address(shared), Config::stage_of(index)),
                              Config::parity_of(index));
    return stage(index);
  }

  __device__ __forceinline__ void run() const {
    const ChunkFwdParams& call = params.call;
    Consumer consumer(0, warp, lane);
    int index = 0;
    for (PieceWalk walk(call, stretch); !walk.done(); walk.next()) {
      const ScanPiece& piece = walk.piece;
      load_entry(consumer.state, piece);
      if (piece.end_step > piece.first_step) {
        Writer writer(call, piece.batch, piece.token_of(piece.first_step), piece.value_head, group_row(), thread);
        typename Consumer::PackedOutput output;  // of the step before
        const auto store_output = [&](int step, int at) {
          writer.store(output, stage(at) + Config::kValues, piece.tokens(step));
          release(at);
        };
        consumer.enter();
        for (int step = piece.first_step; step < piece.end_step; ++step, ++index) {
          if (__builtin_expect(call.chunk_states != nullptr, 0) && step % (kChunkTokens / C) == 0)
            store_chunk_state(consumer.state, piece, step);
          const bool follows = step > piece.first_step;
          consumer.begin(wait_for(index));
          consumer.pack_output(output, stage(follows ? index - 1 : index));
          consumer.advance(stage(index), piece.tokens(step), true, [&] {
            if (follows) store_output(step - 1, index - 1);
          });
        }
        consumer.pack_output(output, stage(index - 1));
        store_output(piece.end_step - 1, index - 1);
      }
      store_exit(consumer.state, piece);
      if (call.cu_seqlens != nullptr && piece.is_end() && piece.sequence == call.problem.sequences - 1) {
        const Writer writer(call, piece.batch, piece.begin, piece.value_head, group_row(), thread);
        writer.clear_rows_past(call, piece.end, piece.value_head, group_row());
      }
    }
  }
};

}  // namespace kda
