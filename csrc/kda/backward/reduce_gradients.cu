#include "reduce_gradients.cuh"

#include "../forward/launch.cuh"

namespace kda {

cudaError_t launch_reduce_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto, auto element) {
    using Element = decltype(element);
    if (params.dq_parts != nullptr) {
      const int64_t quads = problem.batch * problem.tokens * problem.heads * (problem.key_dim / 4);
      const int64_t ctas = (quads + ReduceConfig::kThreads - 1) / ReduceConfig::kThreads;
      const cudaError_t status = launch_grid(reduce_heads_kernel<Element>,
                                             {ctas, ReduceConfig::kThreads, 0, 1, /*overlaps=*/true}, stream, params);
      if (status != cudaSuccess) return status;
    }
    if (params.dA_log == nullptr && params.ddt_bias == nullptr) return cudaSuccess;
    return launch_grid(reduce_parameters_kernel<key_dim()>,
                       {problem.value_heads, ReduceConfig::kParameterThreads, 0, 1, /*overlaps=*/true}, stream, params);
  });
}

}  // namespace kda
