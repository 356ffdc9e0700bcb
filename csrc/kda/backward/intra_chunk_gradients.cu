#include "intra_chunk_gradients.cuh"

#include <algorithm>

#include "../forward/launch.cuh"

namespace kda {

cudaError_t launch_intra_chunk_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Config = IntraChunkGradientsConfig<key_dim(), value_dim(), decltype(element)>;
    // With cu_seqlens, one slot more: it clears rows past the last entry.
    const int64_t slots = params.forward.chunk_slots + (problem.varlen && problem.tokens > 0 ? 1 : 0);
    const int64_t ctas =
        std::min<int64_t>(slots * problem.value_heads, int64_t{std::max(problem.sm_count, 1)} * Config::kCtasPerSm);
    return launch_grid(intra_chunk_gradients_kernel<Config>,
                       {ctas, Config::kThreads, Config::kSharedBytes, 1, /*overlaps=*/true}, stream, params, slots);
  });
}

}  // namespace kda
