#include "segment_compose.cuh"

#include "launch.cuh"

namespace kda {
namespace {

template <int K>
cudaError_t launch_for_key_dim(const SegmentComposeParams& params, cudaStream_t stream) {
  using Config = SegmentComposeConfig<K>;
  const ChunkFwdProblem& problem = params.call.problem;
  const int64_t ctas =
      problem.sequences * problem.value_heads * (problem.value_dim / Config::kRows) * params.directions;
  return launch_grid(segment_compose_kernel<Config>, {ctas, Config::kThreads, Config::kSharedBytes, 1, true}, stream,
                     params);
}

}  // namespace

cudaError_t launch_segment_compose(const SegmentComposeParams& params, cudaStream_t stream) {
  if (params.call.problem.key_dim == 128) return launch_for_key_dim<128>(params, stream);
  if (params.call.problem.key_dim == 64) return launch_for_key_dim<64>(params, stream);
  return cudaErrorNotSupported;
}

}  // namespace kda
