#include "intra_chunk_solve.cuh"
#include "launch.cuh"

namespace kda {

cudaError_t launch_intra_chunk_solve(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Config = IntraChunkSolveConfig<key_dim(), value_dim(), decltype(element)>;
    return launch(intra_chunk_solve_kernel<Config>, params.chunk_slots * problem.value_heads, Config::kThreads,
                  Config::kSharedBytes, stream, params);
  });
}

}  // namespace kda
