#include "intra_chunk_gradients.cuh"

#include <algorithm>

#include "../forward/launch.cuh"

namespace kda {

cudaError_t launch_intra_chunk_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Element = decltype(element);
    const auto launch_kind = [&](auto kind) {
      using Config = IntraChunkGradientsConfig<key_dim(), value_dim(), Element, kind.value>;
      const int64_t ctas = std::min<int64_t>(params.forward.chunk_slots * problem.value_heads,
                                             int64_t{std::max(problem.sm_count, 1)} * Config::kCtasPerSm);
      return launch_grid(intra_chunk_gradients_kernel<Config>,
                         {ctas, Config::kThreads, Config::kSharedBytes, 1, /*overlaps=*/true}, stream, params);
    };
    const bool is_plain = params.forward.vectorized && params.dq_parts == nullptr;
    return for_call_kind<Element>(params.forward.call, is_plain, launch_kind);
  });
}

}  // namespace kda
