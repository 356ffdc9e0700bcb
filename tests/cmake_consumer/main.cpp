// Plans a call and links the kernels: what an application does with the installed library.
#include <kda/kda.h>

#include <cstdio>

int main() {
  kda::ChunkFwdProblem problem;
  problem.tokens = 8192;
  problem.heads = problem.value_heads = 96;
  problem.compute_capability = 90;
  problem.sm_count = 132;
  const kda::ChunkFwdPlan plan = kda::plan_chunk_fwd(problem);
  std::printf("%s\n", kda::to_json(problem, plan).c_str());

  // A composite plan is refused before any device is touched, so this links and runs the launcher without a GPU.
  kda::ChunkFwdParams params;
  params.problem = kda::ChunkFwdProblem();
  const cudaError_t status = kda::chunk_fwd(params, kda::plan_chunk_fwd(params.problem), nullptr);
  return status == cudaErrorNotSupported ? 0 : 1;
}
