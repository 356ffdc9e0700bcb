// The fused forward: one kernel from q, k, v, g and beta to o and the final state.
//
// Grid: one CTA a multiprocessor, all of them resident at once (a cooperative launch). The first are scans: scan_schedule.cuh says which steps of which
// chains each takes (fused_consumer.cuh). All others are makers, four groups a CTA, each for one scan: a group makes the images of every so
// manieth of its steps (fused_producer.cuh). Images go through a ring for each scan in device memory, that is, through the second-level cache: a
// multiprocessor has the code of one role only, which its instruction cache holds, and the roles share the multiprocessors by their needs.
//
// Shared memory (bytes, K = V = 128): of makers four times 56320 (step_factors.cuh), of scans five stages of 41984.
// Registers: makers 128 a thread; scans 216 for each of two groups, 24 for the rest.
// Bound by the makers' instructions; by the chain of a step's products where chains are few: docs/performance.md.
#pragma once

#include "fused_consumer.cuh"
#include "fused_producer.cuh"

namespace kda {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    fused_scan_kernel(const __grid_constant__ StepKernelParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int64_t scans = params.scans;
  const bool is_scan = blockIdx.x < scans;
  auto* const stretches = reinterpret_cast<ScanStretch*>(shared + Config::kStretchOffset);
  auto& search = *reinterpret_cast<StretchSearch*>(shared + Config::kSearchOffset);
  const int group = threadIdx.x / Config::kGroupThreads, thread = threadIdx.x % Config::kGroupThreads;
  const int warp = thread >> 5, lane = thread & 31;
  const FusedStages<Config> stages{shared};

  if (threadIdx.x == 0) {
    if (is_scan) {
      for (int stage = 0; stage < Config::kStages; ++stage) {
        ptx::mbarrier_init(stages.full(stage), 1);
        ptx::mbarrier_init(stages.empty(stage), Config::kConsumers);
      }
    } else {
      for (int maker = 0; maker < Config::kMakers; ++maker) {
        ptx::mbarrier_init(ptx::shared_address(shared) + maker * Config::kMakerBytes + Config::Factors::kBarrier, 1);
      }
    }
    ptx::fence_mbarrier_init();
  }

  if (!is_scan) {
    const int64_t first_maker = (blockIdx.x - scans) * Config::kMakers;
    find_stretches<Config::kMakers>(params.call, first_maker, scans, stretches, search);
    const int64_t makers = (gridDim.x - scans) * Config::kMakers, maker = first_maker + group, scan = maker % scans;
    const int first = static_cast<int>(maker / scans);
    const int stride = static_cast<int>((makers - scan + scans - 1) / scans);
    FusedProducer<Config>{params,
                          stretches[group],
                          FusedRing::of_scan<Config::kImageBytes>(params, scan),
                          shared + group * Config::kMakerBytes,
                          first,
                          stride,
                          1 + group,
                          thread,
                          lane}
        .run();
    return;
  }

  const int64_t scan = scans - 1 - blockIdx.x;
  find_stretches<1>(params.call, scan, scans, stretches, search);
  if (group >= Config::kScanGroups) {
    ptx::setmaxnreg_dec<Config::kIdleRegisters>();
    if (threadIdx.x == Config::kConsumers) {
      load_fused_stages<Config>(params, stretches[0], FusedRing::of_scan<Config::kImageBytes>(params, scan), stages);
    }
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    FusedConsumer<Config>{params, stretches[0], stages, scan, group, thread, warp, lane}.run();
  }
}

}  // namespace kda
