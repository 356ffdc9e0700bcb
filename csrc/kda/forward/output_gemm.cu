#include "launch.cuh"
#include "output_gemm.cuh"

namespace kda {

cudaError_t launch_output_gemm(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.call.problem;
  // With cu_seqlens, one slot more: rows past its last entry are cleared 64 a slot, and may begin inside a chunk.
  const int64_t slots = params.chunk_slots + (problem.varlen && problem.tokens > 0 ? 1 : 0);
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Config = OutputGemmConfig<key_dim(), value_dim(), decltype(element)>;
    return launch(output_gemm_kernel<Config>, slots * problem.value_heads, Config::kThreads, Config::kSharedBytes,
                  stream, params);
  });
}

}  // namespace kda
