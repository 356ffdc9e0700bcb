#include "intra_chunk_solve.cuh"

#include "launch.cuh"

namespace kda {

cudaError_t launch_intra_chunk_solve(const ChunkFwdKernelParams& stage, cudaStream_t stream) {
  const ChunkFwdProblem& problem = stage.call.problem;
  const int64_t tiles = stage.chunk_slots * problem.value_heads;
  if (tiles == 0) return cudaSuccess;
  IntraChunkSolveParams params = {stage, ChunkDivisors(stage), {}};
  params.stage.vectorized = copy_engine_reaches(problem) && stage.vectorized;
  if (params.stage.vectorized) {
    const cudaError_t status = make_tensor_maps(params.maps, stage.call);
    if (status != cudaSuccess) return status;
  }
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Element = decltype(element);
    const auto launch_kind = [&](auto kind) {
      using Config = IntraChunkSolveConfig<key_dim(), value_dim(), Element, kind.value>;
      return launch(intra_chunk_solve_kernel<Config>, solve_ctas(problem, tiles), Config::kThreads,
                    Config::kSharedBytes, stream, params);
    };
    return for_call_kind<Element>(stage.call, params.stage.vectorized, launch_kind);
  });
}

}  // namespace kda
