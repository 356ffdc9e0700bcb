// The fused forward: one kernel from q, k, v, g and beta to o and the final state. But for the state of a chain that two clusters share,
// nothing else goes through device memory.
//
// Grid: clusters of a CTA for each 64 rows of V, as many as run side by side. scan_schedule.cuh says which steps of which chains a cluster takes,
// fused_cut.cuh which it leaves where it cuts chains and they do not forget.
// Roles of a CTA: two producer groups (fused_producer.cuh) make the factors of a step of 32 tokens each; the steps go in turn to all
// producer groups of the cluster, and what is made goes to all of its CTAs through distributed shared memory. One consumer group
// (fused_consumer.cuh) carries 64 rows of the state through all steps, in fp32 accumulators.
// They meet in a ring of four stages with a full and an empty barrier each.
//
// Shared memory (bytes, K = 128): 4 stages of 37888 (gated operands 24576, Tinv and Aqk 8192, vectors, V 4096, in whose place O goes out); for
// each producer group 32768 (rows of q, k, g, then gates and pair operands in their place) and 7168 (the solve, totals, values of the rows).
// Registers: producers 144, consumers 216 a thread (K = 128: the state takes 64 of them, its bf16 copy 32).
// Bound by the chain of a step's products in the consumer, and by the latency of the producers: docs/performance.md.
#pragma once

#include "fused_consumer.cuh"
#include "fused_cut.cuh"
#include "fused_producer.cuh"

namespace kda {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    fused_scan_kernel(const __grid_constant__ StepKernelParams given) {
  StepKernelParams params = given;
  fix<Config::kKind>(params.call);
  using Cut = typename Config::Cut;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t shared_base = ptx::shared_address(shared);
  const int clusters = gridDim.x / Config::kCtas;
  const auto stretch_index = [&] { return clusters - 1 - ptx::opaque(blockIdx.x) / Config::kCtas; };  // not kept
  const uint32_t rank = Config::kCtas == 1 ? 0 : ptx::cluster_cta_rank();

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      // Bytes are counted: of V, and of the image if another CTA makes it; else its makers arrive.
      const bool is_made_here = Config::maker_of(stage) == rank;
      ptx::mbarrier_init(Config::full(shared_base, stage), 1 + (is_made_here ? Config::kGroupThreads : 0));
      // The threads here, and the warps of the other CTAs.
      constexpr int kReaders = Config::kGroupThreads + (Config::kCtas - 1) * (Config::kGroupThreads / 32);
      ptx::mbarrier_init(Config::empty(shared_base, stage), kReaders);
      ptx::mbarrier_init(Config::values_empty(shared_base, stage), kReaders);
    }
    for (int producer = 0; producer < Config::kProducerGroups; ++producer) {
      ptx::mbarrier_init(Config::raw_full(shared_base, producer), 1);
    }
    if constexpr (Cut::kForgets) ptx::mbarrier_init(Config::gates_full(shared_base), 1);
    ptx::fence_mbarrier_init();
  }
  auto& stretch = *reinterpret_cast<ScanStretch*>(shared + Config::kStretchOffset);
  if constexpr (Cut::kForgets) {
    ptx::launch_dependents();
    auto& search = *reinterpret_cast<CutSearch<Config>*>(shared + Config::kSearchOffset);
    static_assert(Config::kSearchOffset % 1024 == 0 && sizeof(search) <= Config::kBarrierOffset);
    const ScanStretch found =
        find_cut_stretch<Config>(params.call, given.maps, stretch_index(), clusters, params.left.cuts[stretch_index()],
                                 rank, Config::gates_full(shared_base), search);
    if (threadIdx.x == 0) stretch = found;
  } else {
    auto& search = *reinterpret_cast<StretchSearch*>(shared + Config::kSearchOffset);
    find_stretch<Cut>(params.call, stretch_index(), clusters, search);
    if (threadIdx.x == 0) stretch = stretch_between(search.ends[0], search.ends[1]);
  }
  ptx::fence_proxy_async_shared();  // the copy engine writes into the place of the search
  ptx::cluster_sync();

  const int group = threadIdx.x / Config::kGroupThreads, thread = threadIdx.x % Config::kGroupThreads;
  const FusedRole role{params, given.maps, stretch, shared,      stretch_index(),
                       rank,   group,      thread,  thread >> 5, thread & 31};
  if (group < Config::kProducerGroups) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    FusedProducer<Config>{role}.run();
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    FusedConsumer<Config>{role}.run();
  }
  ptx::cluster_sync();  // until the other CTAs no longer write here
}

}  // namespace kda
