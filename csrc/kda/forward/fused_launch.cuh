// Launches of the fused forward for one K; one translation unit for each, so that they compile side by side.
#pragma once

#include "fused_scan.cuh"
#include "launch.cuh"

namespace kda {

template <int K, ChainCut kCut>
cudaError_t launch_fused(const StepKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  return for_values(problem, [&](auto value_dim, auto element) {
    using Element = decltype(element);
    return for_call_kind<Element>(params.call, true, [&](auto kind) {
      // Gates that have no bound take another path.
      constexpr CallKind kKind = kind() == CallKind::kRaw ? CallKind::kRaw : CallKind::kAny;
      using Config = FusedConfig<K, value_dim(), Element, kKind, kCut>;
      if (params.handoff_flags != nullptr) {
        const size_t bytes = params.clusters * Config::kCtas * sizeof(uint32_t);
        const cudaError_t status = cudaMemsetAsync(params.handoff_flags, 0, bytes, stream);
        if (status != cudaSuccess) return status;
      }
      return launch_grid(fused_scan_kernel<Config>,
                         {params.clusters * Config::kCtas, Config::kThreads, Config::kSharedBytes, Config::kCtas},
                         stream, params);
    });
  });
}

template <int K>
cudaError_t launch_fused_scan(const StepKernelParams& params, cudaStream_t stream) {
  return launch_fused<K, ChainCut::kHandOver>(params, stream);
}
template <int K>
cudaError_t launch_fused_cut(const StepKernelParams& params, cudaStream_t stream) {
  return launch_fused<K, ChainCut::kForget>(params, stream);
}

}  // namespace kda
