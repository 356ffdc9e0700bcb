// Launches of the stepwise stages for one K; one translation unit for each, so that they compile side by side.
#pragma once

#include "launch.cuh"
#include "segment_summary.cuh"
#include "state_scan.cuh"
#include "step_factors.cuh"

namespace kda {

// Calls f with a value of the activation type.
template <typename Function>
cudaError_t for_element(const ChunkFwdProblem& problem, Function f) {
  if (problem.activation_type == DataType::kBFloat16) return f(BFloat16());
  if (problem.activation_type == DataType::kFloat16) return f(Float16());
  return cudaErrorNotSupported;
}

template <int K>
cudaError_t launch_step_factors_of(const StepKernelParams& params, cudaStream_t stream) {
  return for_element(params.call.problem, [&](auto element) {
    using Config = StepFactorsConfig<K, decltype(element)>;
    return launch(step_factors_kernel<Config>, params.step_slots * params.call.problem.value_heads,
                  Config::kGroupThreads, Config::kSharedBytes, stream, params);
  });
}

// Calls f with the configuration of the kernels that go through segments.
template <int K, typename Function>
cudaError_t for_segment_scan(const ChunkFwdProblem& problem, Function f) {
  return for_element(problem, [&](auto element) {
    using Element = decltype(element);
    if (problem.value_dim == 64) return f(SegmentScanConfig<K, 64, Element>());
    return f(SegmentScanConfig<K, 128, Element>());
  });
}

template <int K>
cudaError_t launch_segment_summary_of(const StepKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  return for_segment_scan<K>(problem, [&](auto config) {
    using Config = decltype(config);
    constexpr int kClusterCtas = (Config::K > Config::V ? Config::K : Config::V) / 64;
    return launch_grid(segment_summary_kernel<Config>,
                       {params.segment_slots * problem.value_heads * kClusterCtas, Config::kThreads,
                        Config::kSharedBytes, kClusterCtas},
                       stream, params);
  });
}

template <int K>
cudaError_t launch_state_scan_of(const StepKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  return for_segment_scan<K>(problem, [&](auto config) {
    using Config = decltype(config);
    return launch(state_scan_kernel<Config>, params.segment_slots * problem.value_heads * (Config::V / 64),
                  Config::kThreads, Config::kSharedBytes, stream, params);
  });
}

}  // namespace kda
