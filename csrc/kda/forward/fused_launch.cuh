// Launches of the fused forward for one K; one translation unit for each, so that they compile side by side.
#pragma once

#include "fused_scan.cuh"
#include "launch.cuh"

namespace kda {

template <int K>
cudaError_t launch_fused_scan(const StepKernelParams& params, int value_tile, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  const auto launch_config = [&](auto config) {
    using Config = decltype(config);
    const int64_t ctas = problem.sequences * problem.value_heads * (Config::V / Config::kRows);
    return launch(fused_scan_kernel<Config>, ctas, Config::kThreads, Config::kSharedBytes, stream, params);
  };
  return for_element(problem, [&](auto element) {
    using Element = decltype(element);
    if (problem.value_dim == 64) return launch_config(FusedConfig<K, 64, 64, Element>());
    if (value_tile == 64) return launch_config(FusedConfig<K, 128, 64, Element>());
    return launch_config(FusedConfig<K, 128, 128, Element>());
  });
}

}  // namespace kda
