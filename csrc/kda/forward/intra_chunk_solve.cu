#include "intra_chunk_solve.cuh"
#include "launch.cuh"

namespace kda {

cudaError_t launch_intra_chunk_solve(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    const auto launch_config = [&](auto config) {
      using Config = decltype(config);
      return launch(intra_chunk_solve_kernel<Config>, params.chunk_slots * problem.value_heads, Config::kThreads,
                    Config::kSharedBytes, stream, params);
    };
    using Element = decltype(element);
    const auto with_norm = [&](auto vectorized) {
      constexpr bool kVectorized = decltype(vectorized)::value;
      if (params.call.qk_l2norm) {
        return launch_config(IntraChunkSolveConfig<key_dim(), value_dim(), Element, kVectorized, true>());
      }
      return launch_config(IntraChunkSolveConfig<key_dim(), value_dim(), Element, kVectorized, false>());
    };
    return params.vectorized ? with_norm(std::true_type()) : with_norm(std::false_type());
  });
}

}  // namespace kda
