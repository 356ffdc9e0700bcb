// The last stage of the stepwise forward: o and the final state, from the images of the steps (step_factors.cuh) and V. The formulas are
// those of step_consumer.cuh.
//
// Grid: one CTA of one warpgroup for each (segment slot, value head, 64 rows of V): it carries these rows of S^T in fp32 accumulators
// through the steps of its segment, which is the whole sequence if sequences are not cut; otherwise from the state that
// segment_compose.cuh left.
// Shared memory (bytes, K = 128): two stages of 37888: gated operands 24576, Tinv and Aqk 8192, vectors, V 4096. O of a step goes out by way of
// the place of its V. Registers: 168 a thread. So three CTAs share a multiprocessor, and one's chain of products runs beside the others'.
// Bound by memory at many heads: 33 KiB of an image and 16 KiB of V and o for a step; at few heads by the chain of the products of a step.
#pragma once

#include "segment_scan.cuh"

namespace kda {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    state_scan_kernel(const __grid_constant__ StepKernelParams params) {
  constexpr int K = Config::K, V = Config::V, C = Config::C, kRowTiles = V / 64;
  using Consumer = StepConsumer<Config, StepResult::kOutputs>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.call;
  const int value_heads = call.problem.value_heads;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int first_row = static_cast<int>(blockIdx.x % kRowTiles) * 64, warp_row = first_row + 16 * warp;
  const SegmentOfSteps segment(params, blockIdx.x / kRowTiles / value_heads,
                               static_cast<int>(blockIdx.x / kRowTiles % value_heads), lane);
  if (!segment.location.is_used) return;
  const int steps = segment.steps;

  StageRing<Config> ring{shared, thread};
  ring.init();
  const auto fill = [&](int step) {
    if (thread == 0 && step < steps) ring.template fill<StepResult::kOutputs>(params, segment, step, first_row);
  };
  for (int step = 0; step < Config::kStages; ++step) fill(step);

  StateFragments<K> state;
  if (segment.location.is_first) {
    load_initial_state(state, call, segment.location.sequence, segment.value_head, warp_row, lane);
  } else {  // the end of the segment before
    const int64_t tile = segment.tile(value_heads) - value_heads;
    state.load_fragments(params.segment_state + (tile * (V / 16) + warp_row / 16) * (K / 8) * 32, lane);
  }

  const Consumer advance{0, warp, lane};
  OutputWriter<Config> writer(call, segment.range.batch, segment.first_token, segment.value_head, first_row, thread);
  typename Consumer::PackedOutput output;  // of the step before, stored while the products of the next one run
  for (int step = 0; step < steps; ++step) {
    if (call.chunk_states != nullptr && step % (kChunkTokens / C) == 0) {
      const int64_t slot = segment.location.first_chunk_slot + step / (kChunkTokens / C);
      store_state(call.chunk_states, slot * value_heads + segment.value_head, state, call, warp_row, lane);
    }
    uint32_t operands[K / 16][4];
    state.to_operands(operands);
    uint8_t* const stage = ring.wait(step);
    advance.advance(state, operands, output, stage, segment.tokens(step), true, [&] {
      if (step == 0) return;
      writer.store(output, ring.stage(step - 1) + Config::kValues, C, [] { __syncthreads(); });
      ptx::fence_proxy_async_shared();  // the copy engine writes next
      ring.release(step - 1);
      fill(step - 1 + Config::kStages);
    });
  }
  if (steps > 0) {
    writer.store(output, ring.stage(steps - 1) + Config::kValues, segment.tokens(steps - 1), [] { __syncthreads(); });
  }

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
