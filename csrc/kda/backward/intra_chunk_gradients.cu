#include "intra_chunk_gradients.cuh"

#include "../forward/launch.cuh"

namespace kda {

cudaError_t launch_intra_chunk_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Config = IntraChunkGradientsConfig<key_dim(), value_dim(), decltype(element)>;
    // With cu_seqlens, one slot more: it clears rows past the last entry.
    const int64_t slots = params.forward.chunk_slots + (problem.varlen && problem.tokens > 0 ? 1 : 0);
    return launch(intra_chunk_gradients_kernel<Config>, slots * problem.value_heads, Config::kThreads,
                  Config::kSharedBytes, stream, params);
  });
}

}  // namespace kda
