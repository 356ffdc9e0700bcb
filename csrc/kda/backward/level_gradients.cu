#include "level_gradients.cuh"

#include <algorithm>

#include "../forward/launch.cuh"

namespace kda {

cudaError_t launch_level_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Config = LevelGradientsConfig<key_dim(), value_dim(), decltype(element)>;
    const int64_t ctas = std::min<int64_t>(params.forward.chunk_slots * problem.value_heads, problem.sm_count);
    return launch_grid(level_gradients_kernel<Config>,
                       {ctas, Config::kThreads, Config::kSharedBytes, 1, /*overlaps=*/true}, stream, params);
  });
}

}  // namespace kda
