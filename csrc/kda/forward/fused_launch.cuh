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
    const cudaError_t status = cudaMemsetAsync(params.ring_flags, 0, params.flag_bytes, stream);
    if (status != cudaSuccess) return status;
    Grid grid{params.ctas, Config::kThreads, Config::kSharedBytes};
    grid.is_resident = true;
    return launch_grid(fused_scan_kernel<Config>, grid, stream, params);
  };
  return for_element(problem, [&](auto element) {
    using Element = decltype(element);
    if (problem.value_dim == 64) return launch_config(FusedConfig<K, 64, Element>());
    return launch_config(FusedConfig<K, 128, Element>());
  });
}

}  // namespace kda
