// Launches of the stepwise stages for one K; one translation unit for each, so that they compile side by side.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "segment_summary.cuh"
#include "state_scan.cuh"
#include "step_factors.cuh"

namespace kda {

template <int K>
cudaError_t launch_step_factors(const StepKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  const int64_t steps = params.step_slots * problem.value_heads;
  const auto launch_config = [&](auto config) {
    using Config = decltype(config);
    if (params.left.cuts == nullptr) {
      return launch(step_factors_kernel<Config, false>, steps, Config::kGroupThreads, Config::kSharedBytes, stream,
                    params);
    }
    constexpr int64_t kMostOfCta = 4, kMost = int64_t{1} << 31;
    if (steps >= kMost) return cudaErrorInvalidConfiguration;
    // No fewer CTAs than run side by side twice.
    const int64_t resident = int64_t{problem.sm_count} * Config::kCtasPerSm;
    const int64_t of_cta = std::clamp(steps / (2 * resident), int64_t{1}, kMostOfCta);
    return launch_grid(step_factors_kernel<Config, true>,
                       {(steps + of_cta - 1) / of_cta, Config::kGroupThreads, Config::kSharedBytes, /*cluster_ctas=*/1,
                        /*overlaps=*/true},
                       stream, params);
  };
  return for_element(problem, [&](auto element) {
    using Element = decltype(element);
    return for_call_kind<Element>(params.call, true, [&](auto kind) {
      if constexpr (K == 128) {
        // A CTA of eight warps takes 6 microseconds rather than 9, until memory bounds them all; measured up to 3072 steps on 132 multiprocessors.
        constexpr int64_t kFewStepsPerSm = 16;
        if (steps <= kFewStepsPerSm * problem.sm_count)
          return launch_config(StepFactorsConfig<K, 8, Element, kind()>());
      }
      return launch_config(StepFactorsConfig<K, 4, Element, kind()>());
    });
  });
}

template <int K>
cudaError_t launch_segment_summary(const StepKernelParams& params, cudaStream_t stream) {
  return for_values(params.call.problem, [&](auto value_dim, auto element) {
    using Config = SegmentSummaryConfig<K, value_dim(), decltype(element)>;
    constexpr int kClusterCtas = (K + value_dim()) / 64;
    const int64_t ctas = params.segment_slots * params.call.problem.value_heads * kClusterCtas;
    return launch_grid(segment_summary_kernel<Config>,
                       {ctas, Config::kThreads, Config::kSharedBytes, kClusterCtas, true}, stream, params);
  });
}

template <int K>
cudaError_t launch_state_scan(const StepKernelParams& params, cudaStream_t stream) {
  return for_values(params.call.problem, [&](auto value_dim, auto element) {
    using Config = StateScanConfig<K, value_dim(), decltype(element)>;
    const int64_t ctas = params.segment_slots * params.call.problem.value_heads;
    return launch_grid(state_scan_kernel<Config>, {ctas, Config::kThreads, Config::kSharedBytes, 1, true}, stream,
                       params);
  });
}

}  // namespace kda
