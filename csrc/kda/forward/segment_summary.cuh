// The affine map of each segment of a cut sequence, S_end = M S_entry + B, for segment_compose.cuh.
//
// B is the state at the end of the segment from S = 0, or of the first segment from the initial state, which needs no M. M is what becomes of
// the identity without V: its K columns take the part of values. The last segment needs neither.
//
// Gates that forget make M vanish within few tokens. For keys of norm 1 and beta in [0, 2] the norm of the map of any tokens is at most 1, so
// if the map of the segment's last tokens is negligible, M is too, and what B was before those tokens is lost as well: both are done after
// these few steps. This is looked at in the map itself, for each head and segment; no bound on the gates is trusted.
//
// Grid: for each (segment slot, value head) a cluster of CTAs of one warpgroup each: one for 64 rows of M^T, one for 64 rows of B^T. They tell
// each other whether their rows are negligible.
// Shared memory and registers: two stages, 168 a thread (K = 128): three CTAs share a multiprocessor. Bound by the chain of the products of a step.
#pragma once

#include "forgetting.cuh"
#include "segment_scan.cuh"

namespace kda {

template <int K_, int V_, typename Element_>
struct SegmentSummaryConfig : StepStage<K_, 64> {
  using Stage = StepStage<K_, 64>;
  using Stage::K, Stage::kStageBytes;
  static constexpr bool kHasRegisters = false;  // see StepConsumer
  static constexpr int V = V_;
  using Element = Element_;
  static constexpr int kThreads = 128, kStages = 2;
  // Registers allow no more (K = 128: the state takes 64, its bf16 copy 32, products 32, operands 16).
  static constexpr int kCtasPerSm = K == 128 ? 3 : 4;
  static constexpr int kBarrierOffset = kStages * kStageBytes;
  static constexpr int kFlags = kBarrierOffset + kStages * 16;  // one for each CTA of a cluster
  static constexpr int kSharedBytes = kFlags + 4 * 4;
  static_assert(kCtasPerSm * (kSharedBytes + 1024 + 128) <= 228 * 1024);
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    segment_summary_kernel(const __grid_constant__ StepKernelParams params) {
  constexpr int K = Config::K, V = Config::V, kMapTiles = K / 64, kCtas = kMapTiles + V / 64;
  using Consumer = StepConsumer<Config, StepResult::kState>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.call;
  const int value_heads = call.problem.value_heads;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int rank = static_cast<int>(blockIdx.x % kCtas);
  const bool is_map = rank < kMapTiles;
  const int first_row = 64 * (is_map ? rank : rank - kMapTiles), warp_row = first_row + 16 * warp;
  const SegmentOfSteps segment(params, blockIdx.x / kCtas / value_heads,
                               static_cast<int>(blockIdx.x / kCtas % value_heads), lane);
  const WhatIsLeft left = find_left(params.left, segment.chain(value_heads), lane);
  if (!left.anything) return;
  ptx::launch_dependents();
  ptx::wait_for_kernel_before();  // before any other return: who waits for this kernel relies on those before it, too
  if (!segment.location.is_used || segment.location.is_last) return;
  const int64_t tile = segment.tile(value_heads);
  if (!left.chain) {
    if (rank == 0 && thread == 0) params.segment_faded[tile] = 1;  // there is nothing to compose
    return;
  }

  const StageRing<Config> ring{shared};
  if (thread == 0) ring.init(Config::kThreads);
  ptx::cluster_sync();       // they write into each other's shared memory
  int filled = 0, read = 0;  // stages so far, the former by thread 0
  const Consumer advance{0, warp, lane};
  StateFragments<K> state;
  typename Consumer::PackedOutput no_output;

  const bool may_fade = is_contractive(call);
  const int tail = min(kTailSteps, segment.steps);
  bool faded = false;
  for (int pass = may_fade ? 0 : 1; pass < 2 && !faded; ++pass) {  // the last steps, then all of them
    if (pass == 1 && is_map && segment.location.is_first) break;
    const int first_step = pass == 0 ? segment.steps - tail : 0;
    const auto fill = [&](int step) {
      if (thread == 0 && step < segment.steps) {
        ring.template fill<StepResult::kState>(params, segment, filled++, step, is_map ? -1 : first_row);
      }
    };
    for (int step = 0; step < Config::kStages; ++step) fill(first_step + step);
    if (!is_map && pass == 1 && segment.location.is_first) {
      load_initial_state(state, call, segment.location.sequence, segment.value_head, warp_row, lane);
    } else {
      begin_summary(state, is_map, warp_row, lane);
    }
    uint32_t operands[K / 16][4];
    state.to_operands(operands);
    for (int step = first_step; step < segment.steps; ++step) {
      uint8_t* const stage = ring.wait(read);
      advance.advance(state, operands, no_output, stage, segment.tokens(step), !is_map, [] {});
      ring.release(read++);
      fill(step + Config::kStages);
    }
    if (pass == 0) {
      const bool is_negligible = !is_map || __syncthreads_and(state.is_below(kNegligibleMap));
      faded = ptx::cluster_all<kCtas>(is_negligible, ptx::shared_address(shared + Config::kFlags), thread);
    }
  }

  if (!is_map) {
    state.store_fragments(fragments_at<K>(params.segment_state, tile, V, warp_row / 16), lane);
  } else if (!faded && !segment.location.is_first) {
    store_map(state, params.segment_map, tile, warp_row / 16, lane);
  }
  if (rank == 0 && thread == 0) params.segment_faded[tile] = faded;
}

}  // namespace kda
