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
  using Cut = typename Config::Cut;

  static constexpr int kBarrier = 1 + Config::kProducerGroups;
  __device__ __forceinline__ void sync() const { ptx::barrier_sync(kBarrier, Config::kGroupThreads); }

  // First row of V of the group, and of the warp.
  __device__ __forceinline__ int group_row() const { return static_cast<int>(rank) * Config::kRows; }
  __device__ __forceinline__ int warp_row() const { return group_row() + 16 * warp; }
  __device__ __forceinline__ uint8_t* stage(int index) const {
    return shared + Config::stage_of(index) * Config::kStageBytes;
  }

  // Tells a barrier of the stage's maker: by each thread if that is this CTA, else by each warp.
  __device__ __forceinline__ void release(uint32_t barrier, int index) const {
    const uint32_t maker = Config::maker_of(Config::stage_of(index));
    if (maker == rank) {
      ptx::mbarrier_arrive(barrier);
    } else {
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive_at_cta(ptx::map_to_cta(barrier, maker));
    }
  }
  __device__ __forceinline__ void release_stage(int index) const {
    release(Config::empty(ptx::shared_address(shared), Config::stage_of(index)), index);
  }
  __device__ __forceinline__ void release_values(int index) const {
    ptx::fence_proxy_async_shared();  // the copy engine writes next
    release(Config::values_empty(ptx::shared_address(shared), Config::stage_of(index)), index);
  }

  // States that are handed on lie in fragments, [stretches, V / 16, K / 8, 32 lanes].
  __device__ __forceinline__ float4* handoff(int64_t index) const {
    return params.handoff_states + (index * (Config::V / 16) + warp_row() / 16) * (K / 8) * 32;
  }
  __device__ __forceinline__ uint32_t* handoff_flag(int64_t index) const {
    return params.handoff_flags + index * Config::kCtas + rank;
  }

  __device__ __forceinline__ void load_entry(StateFragments<K>& state, const ScanPiece& piece) const {
    if (Cut::kForgets && piece.map_rows >= 0) {
      begin_summary(state, true, piece.map_rows + warp_row(), lane);
      return;
    }
    if (piece.is_begin()) {
      load_initial_state(state, params.call, piece.sequence, piece.value_head, warp_row(), lane);
      return;
    }
    if constexpr (Cut::kForgets) {
      begin_summary(state, false, 0, lane);
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
    if constexpr (Cut::kForgets) return;
    state.store_fragments(handoff(stretch_index), lane);
    __threadfence();
    sync();
    if (thread == 0) ptx::store_release(handoff_flag(stretch_index), 1);
  }

  // Says of the chain that goes on behind a cut whether it is left to other kernels, from the rows of the map here. is_negligible: of all warps' rows so far.
  __device__ __forceinline__ void judge_map(bool is_negligible, const ScanPiece& piece) const {
    const bool is_left = ptx::barrier_any(kBarrier, Config::kGroupThreads, !is_negligible);
    if (thread != 0) return;
    const int64_t chain = piece.sequence * params.call.problem.value_heads + piece.value_head;
    (&params.left.cuts[stretch_index].x)[rank] = is_left ? static_cast<uint32_t>(chain) + 1 : 0;
  }

  __device__ __forceinline__ void store_chunk_state(StateFragments<K>& state, const ScanPiece& piece, int step) const {
    const ChunkFwdParams& call = params.call;
    const SequenceRange range = {piece.batch, piece.begin, piece.end};
    const int64_t slot = first_chunk_slot(call, piece.sequence, range) + step / (kChunkTokens / C);
    store_state(call.chunk_states, slot * call.problem.value_heads + piece.value_head, state, call, warp_row(), lane);
  }

  __device__ __forceinline__ void run() const {
    const ChunkFwdParams& call = params.call;
    const Consumer advance{0, warp, lane};
    int index = 0;
    bool map_is_negligible = true;
    for (PieceWalk<Cut> walk(call, stretch); !walk.done(); walk.next()) {
      const ScanPiece& piece = walk.piece;
      StateFragments<K> state;
      load_entry(state, piece);
      const int first_result = Cut::kForgets ? piece.first_result : piece.first_step;
      Writer writer(call, piece.batch, piece.token_of(first_result), piece.value_head, group_row(), thread);
      typename Consumer::PackedOutput output;  // of the step before, stored while the products of the next one run
      const auto store_output = [&](int step, int at) {
        writer.store(output, stage(at) + Config::kValues, piece.tokens(step));
      };
      uint32_t operands[K / 16][4];
      state.to_operands(operands);
      for (int step = piece.first_step; step < piece.end_step; ++step, ++index) {
        if (__builtin_expect(call.chunk_states != nullptr, 0) && step % (kChunkTokens / C) == 0 && step >= first_result)
          store_chunk_state(state, piece, step);
        ptx::mbarrier_wait_parity(Config::full(ptx::shared_address(shared), Config::stage_of(index)),
                                  Config::parity_of(index));
        const bool follows = step > piece.first_step, has_result = step > first_result;
        advance.advance(state, operands, output, stage(index), piece.tokens(step), true, [&] {
          if (has_result) store_output(step - 1, index - 1);
        });
        release_stage(index);
        if (follows) release_values(index - 1);
      }
      if (piece.end_step > piece.first_step) {
        if (piece.end_step > first_result) store_output(piece.end_step - 1, index - 1);
        release_values(index - 1);
      }
      if constexpr (Cut::kForgets) {
        if (piece.map_rows >= 0) {
          map_is_negligible = map_is_negligible && state.is_below(kNegligibleMap);
          if (piece.map_rows + Cut::kMapRows == Cut::kMaps * Cut::kMapRows) judge_map(map_is_negligible, piece);
          continue;
        }
      }
      store_exit(state, piece);
      if (call.cu_seqlens != nullptr && piece.is_end() && piece.sequence == call.problem.sequences - 1) {
        writer.clear_rows_past(call, piece.end, piece.value_head, group_row());
      }
    }
  }
};

}  // namespace kda
