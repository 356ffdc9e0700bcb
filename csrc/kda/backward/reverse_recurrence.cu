#include "reverse_recurrence.cuh"

#include "../forward/launch.cuh"

namespace kda {
namespace {

template <typename Config>
cudaError_t launch_config(const ChunkBwdKernelParams& params, bool overlaps, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  const int64_t ctas = params.forward.segments.slots * problem.value_heads * (problem.value_dim / Config::kRows);
  constexpr int kStages = stages_of_ring<Config>();
  return launch_grid(reverse_recurrence_kernel<Config>,
                     {ctas, Config::kThreads, recurrence_shared_bytes<Config>(kStages), 1, overlaps}, stream, params,
                     kStages);
}

// Calls f with K and a value of the activation type.
template <typename Function>
cudaError_t for_key_dim(const ChunkBwdKernelParams& params, Function f) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_element(problem, [&](auto element) {
    if (problem.key_dim == 128) return f(Constant<128>(), element);
    if (problem.key_dim == 64) return f(Constant<64>(), element);
    return cudaErrorNotSupported;
  });
}

}  // namespace

cudaError_t launch_reverse_recurrence(const ChunkBwdKernelParams& params, int value_tile, bool overlaps,
                                      cudaStream_t stream) {
  return for_key_dim(params, [&](auto key_dim, auto element) {
    using Element = decltype(element);
    if (value_tile == kRecurrenceRows) {
      return launch_config<ReverseRecurrenceConfig<key_dim(), Element, 1>>(params, overlaps, stream);
    }
    return launch_config<ReverseRecurrenceConfig<key_dim(), Element, 2>>(params, overlaps, stream);
  });
}

cudaError_t launch_reverse_summary(const ChunkBwdKernelParams& params, cudaStream_t stream) {
  return for_key_dim(params, [&](auto key_dim, auto element) {
    return launch_config<ReverseRecurrenceConfig<key_dim(), decltype(element), 1, true>>(params, true, stream);
  });
}

}  // namespace kda
