// The fused forward: one kernel from q, k, v, g and beta to o and the final state; nothing else goes through device memory.
//
// Grid: one CTA for each (sequence, value head, tile of kRows rows of V).
// Roles: two producer groups (fused_producer.cuh) make the factors of a step of 32 tokens each, taking turns; one consumer group for
// each 64 rows of V (fused_consumer.cuh) carries the state through the steps, in fp32 accumulators for the whole sequence.
// They meet in a ring of three stages with a full and an empty barrier each.
//
// Shared memory (bytes, K = V = kRows = 128): 3 stages of 41984 (gated operands 16384 and 8192, Tinv and Aqk 8192, V 8192, vectors);
// for each producer group 32768 (rows of q, k, g, then gates and pair operands in their place) and 7168 (the solve, totals, values of the
// rows); for each consumer group 8192 (O).
// Registers: producers 96, consumers 160 a thread (K = 128: the state takes 64 of them, its bf16 copy 32).
// Bound by the latency of the producers, of which registers allow eight warps: docs/performance.md.
#pragma once

#include "fused_consumer.cuh"
#include "fused_producer.cuh"

namespace kda {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    fused_scan_kernel(const __grid_constant__ StepKernelParams params) {
  const ChunkFwdParams& call = params.call;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t shared_base = ptx::shared_address(shared);
  constexpr int kRowTiles = Config::V / Config::kRows;
  const int value_heads = call.problem.value_heads;
  const int64_t head_index = blockIdx.x / kRowTiles;
  ScanItem item;
  item.first_row = static_cast<int>(blockIdx.x % kRowTiles) * Config::kRows;
  item.value_head = static_cast<int>(head_index % value_heads);
  item.key_head = item.value_head / (value_heads / call.problem.heads);
  item.sequence = head_index / value_heads;
  item.range = sequence_range(call, item.sequence);
  item.steps = static_cast<int>((item.range.end - item.range.begin + kStepTokens - 1) / kStepTokens);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::mbarrier_init(Config::full(shared_base, stage), Config::kGroupThreads + 1);  // one more for V
      ptx::mbarrier_init(Config::empty(shared_base, stage), Config::kConsumerGroups * Config::kGroupThreads);
    }
    for (int producer = 0; producer < Config::kProducerGroups; ++producer) {
      ptx::mbarrier_init(Config::raw_full(shared_base, producer), 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int group = threadIdx.x / Config::kGroupThreads, thread = threadIdx.x % Config::kGroupThreads;
  const int warp = thread >> 5, lane = thread & 31;
  if (group < Config::kProducerGroups) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    FusedProducer<Config>{params, call, item, shared, group, thread, warp, lane}.run();
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    FusedConsumer<Config>{call, item, shared, group - Config::kProducerGroups, thread, warp, lane}.run();
  }
}

}  // namespace kda
