#include "reverse_recurrence.cuh"

#include "../forward/launch.cuh"

namespace kda {
namespace {

template <typename Config>
cudaError_t launch_config(const ChunkBwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  const int64_t ctas = problem.sequences * problem.value_heads * (problem.value_dim / Config::kRows);
  constexpr int kStages = stages_of_ring<Config>();
  return launch(reverse_recurrence_kernel<Config>, ctas, Config::kThreads, recurrence_shared_bytes<Config>(kStages),
                stream, params, kStages);
}

template <int K, typename Element>
cudaError_t launch_groups(const ChunkBwdKernelParams& params, int value_tile, cudaStream_t stream) {
  return value_tile == kRecurrenceRows ? launch_config<ReverseRecurrenceConfig<K, Element, 1>>(params, stream)
                                       : launch_config<ReverseRecurrenceConfig<K, Element, 2>>(params, stream);
}

}  // namespace

cudaError_t launch_reverse_recurrence(const ChunkBwdKernelParams& params, int value_tile, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_element(problem, [&](auto element) {
    using Element = decltype(element);
    if (problem.key_dim == 128) return launch_groups<128, Element>(params, value_tile, stream);
    if (problem.key_dim == 64) return launch_groups<64, Element>(params, value_tile, stream);
    return cudaErrorNotSupported;
  });
}

}  // namespace kda
