// A scan of the fused forward: warpgroups that carry 64 rows each of the transposed state through the steps of a stretch (step_consumer.cuh), and the
// thread that keeps their stages filled from the ring.
#pragma once

#include "fused_config.cuh"

namespace kda {

template <typename Config>
struct FusedStages {
  uint8_t* const shared;
  __device__ __forceinline__ uint8_t* stage(int n) const { return shared + n % Config::kStages * Config::kStageBytes; }
  __device__ __forceinline__ uint32_t full(int n) const {
    return ptx::shared_address(shared) + Config::kBarrierOffset + 16 * (n % Config::kStages);
  }
  __device__ __forceinline__ uint32_t empty(int n) const { return full(n) + 8; }
  __device__ __forceinline__ static uint32_t parity(int n) { return n / Config::kStages & 1; }
};

// Called by one thread.
template <typename Config>
__device__ __forceinline__ void load_fused_stages(const StepKernelParams& params, const ScanStretch& stretch,
                                                  const FusedRing& ring, const FusedStages<Config>& stages) {
  StepWalk walk(params.call, stretch);
  for (int n = 0; !walk.done(); ++n, walk.skip(1)) {
    if (n >= Config::kStages) {
      ptx::mbarrier_wait_parity(stages.empty(n), Config::kStages > 0 ? stages.parity(n) ^ 1 : 0);
      ring.tell_taken(n - Config::kStages + 1);  // its place in the ring has long been read
    }
    ring.wait_until_made(n);
    ptx::fence_proxy_async();
    const uint32_t to = ptx::shared_address(stages.stage(n)), full = stages.full(n);
    ptx::mbarrier_arrive_expect_tx(full, Config::kImageBytes + Config::kValueTileBytes);
    ptx::cp_async_bulk_load(to, ring.images + n % kFusedRingSlots * int64_t{Config::kImageBytes}, Config::kImageBytes,
                            full);
#pragma unroll
    for (int block = 0; block < Config::V / 64; ++block) {  // boxes of the tensor map have 64 columns
      ptx::cp_async_bulk_tensor_load(to + Config::kValues + block * Config::ValueTile::kBlockBytes, &params.v, 0,
                                     walk.token, block, walk.pieces.piece.value_head, walk.pieces.piece.batch, full);
    }
  }
}

template <typename Config>
struct FusedConsumer {
  static constexpr int K = Config::K, C = Config::C;
  using Consumer = StepConsumer<Config, StepResult::kOutputs>;
  using Writer = OutputWriter<Config>;

  const StepKernelParams& params;
  const ScanStretch& stretch;
  const FusedStages<Config> stages;
  const int64_t scan;
  const int group, thread, warp, lane;

  __device__ __forceinline__ void sync() const { ptx::barrier_sync(1 + group, Config::kGroupThreads); }

  // First row of V of the group, and of the warp.
  __device__ __forceinline__ int group_row() const { return 64 * group; }
  __device__ __forceinline__ int warp_row() const { return group_row() + 16 * warp; }

  // States that are handed on lie in fragments, [scans, V / 16, K / 8, 32 lanes].
  __device__ __forceinline__ float4* handoff(int64_t index) const {
    return params.handoff_states + (index * (Config::V / 16) + warp_row() / 16) * (K / 8) * 32;
  }
  __device__ __forceinline__ uint32_t* handoff_flag(int64_t index) const {
    return params.handoff_flags + index * Config::kScanGroups + group;
  }

  __device__ __forceinline__ void load_entry(StateFragments<K>& state, const ScanPiece& piece) const {
    if (piece.is_begin()) {
      load_initial_state(state, params.call, piece.sequence, piece.value_head, warp_row(), lane);
      return;
    }
    if (thread == 0) {
      while (ptx::load_acquire(handoff_flag(scan + 1)) == 0) __nanosleep(100);
    }
    sync();
    state.load_fragments(handoff(scan + 1), lane);
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
    state.store_fragments(handoff(scan), lane);
    __threadfence();
    sync();
    if (thread == 0) ptx::store_release(handoff_flag(scan), 1);
  }

  __device__ __forceinline__ void store_chunk_state(StateFragments<K>& state, const ScanPiece& piece, int step) const {
    const ChunkFwdParams& call = params.call;
    const SequenceRange range = {piece.batch, piece.begin, piece.end};
    const int64_t slot = first_chunk_slot(call, piece.sequence, range) + step / (kChunkTokens / C);
    store_state(call.chunk_states, slot * call.problem.value_heads + piece.value_head, state, call, warp_row(), lane);
  }

  // The stage of a step, when it is full.
  __device__ __forceinline__ uint8_t* wait_for(int index) const {
    ptx::mbarrier_wait_parity(stages.full(index), stages.parity(index));
    return stages.stage(index);
  }

  __device__ __forceinline__ void run() const {
    const ChunkFwdParams& call = params.call;
    Consumer consumer(group_row(), warp, lane);
    int index = 0;
    for (PieceWalk walk(call, stretch); !walk.done(); walk.next()) {
      const ScanPiece& piece = walk.piece;
      load_entry(consumer.state, piece);
      if (piece.end_step > piece.first_step) {
        Writer writer(call, piece.batch, piece.token_of(piece.first_step), piece.value_head, group_row(), thread);
        typename Consumer::PackedOutput output;  // of the step before
        const auto store_output = [&](int step, int at) {
          writer.store(output, stages.stage(at) + Config::kValues + group * Writer::kTileBytes, piece.tokens(step));
          ptx::fence_proxy_async_shared();  // the copy engine writes next
          ptx::mbarrier_arrive(stages.empty(at));
        };
        consumer.enter();
        for (int step = piece.first_step; step < piece.end_step; ++step, ++index) {
          if (__builtin_expect(call.chunk_states != nullptr, 0) && step % (kChunkTokens / C) == 0)
            store_chunk_state(consumer.state, piece, step);
          const bool follows = step > piece.first_step;
          consumer.begin(wait_for(index));
          consumer.pack_output(output, stages.stage(follows ? index - 1 : index));
          consumer.advance(stages.stage(index), piece.tokens(step), true, [&] {
            if (follows) store_output(step - 1, index - 1);
          });
        }
        consumer.pack_output(output, stages.stage(index - 1));
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
