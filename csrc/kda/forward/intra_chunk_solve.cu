#include "intra_chunk_solve.cuh"
#include "launch.cuh"

namespace kda {

cudaError_t launch_intra_chunk_solve(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  const bool bounded_gate = params.call.gate == GateKind::kSigmoid && params.call.qk_l2norm &&
                            params.call.lower_bound >= DecayScan::kMinLogGate;
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    const auto launch_config = [&](auto config) {
      using Config = decltype(config);
      return launch(intra_chunk_solve_kernel<Config>, params.chunk_slots * problem.value_heads, Config::kThreads,
                    Config::kSharedBytes, stream, params);
    };
    using Element = decltype(element);
    if (!params.vectorized)
      return launch_config(IntraChunkSolveConfig<key_dim(), value_dim(), Element, false, false>());
    if (!bounded_gate) return launch_config(IntraChunkSolveConfig<key_dim(), value_dim(), Element, true, false>());
    return launch_config(IntraChunkSolveConfig<key_dim(), value_dim(), Element, true, true>());
  });
}

}  // namespace kda
