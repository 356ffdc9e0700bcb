// Launches of the fused forward for one K; one translation unit for each, so that they compile side by side.
#pragma once

#include "fused_scan.cuh"
#include "launch.cuh"

namespace kda {

template <int K>
cudaError_t launch_fused_scan(const StepKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  const auto launch_config = [&](auto config) {
    using Config = decltype(config);
    if (params.handoff_flags != nullptr) {
      const size_t bytes = params.clusters * Config::kCtas * sizeof(uint32_t);
      const cudaError_t status = cudaMemsetAsync(params.handoff_flags, 0, bytes, stream);
      if (status != cudaSuccess) return status;
    }
    return launch_grid(fused_scan_kernel<Config>,
                       {params.clusters * Config::kCtas, Config::kThreads, Config::kSharedBytes, Config::kCtas}, stream,
                       params);
  };
  return for_element(problem, [&](auto element) {
    using Element = decltype(element);
    if (problem.value_dim == 64) return launch_config(FusedConfig<K, 64, Element>());
    return launch_config(FusedConfig<K, 128, Element>());
  });
}

template <int K>
cudaError_t launch_fused_cut(const StepKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  const auto launch_config = [&](auto config) {
    using Config = decltype(config);
    return launch_grid(fused_scan_kernel<Config>,
                       {params.clusters * Config::kCtas, Config::kThreads, Config::kSharedBytes, Config::kCtas}, stream,
                       params);
  };
  return for_element(problem, [&](auto element) {
    using Element = decltype(element);
    if (problem.value_dim == 64) return launch_config(FusedConfig<K, 64, Element, ChainCut::kForget>());
    return launch_config(FusedConfig<K, 128, Element, ChainCut::kForget>());
  });
}

}  // namespace kda
