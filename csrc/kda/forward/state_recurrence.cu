#include "state_recurrence.cuh"

#include "launch.cuh"

namespace kda {
namespace {

// blocks: of rows of V, and of a map in a summary.
template <typename Config>
cudaError_t launch_config(const ChunkFwdKernelParams& params, int blocks, cudaStream_t stream) {
  const int64_t ctas = params.segments.slots * params.call.problem.value_heads * blocks;
  constexpr int kStages = stages_of_ring<Config>();
  return launch_grid(state_recurrence_kernel<Config>,
                     {ctas, Config::kThreads, recurrence_shared_bytes<Config>(kStages), 1, /*overlaps=*/true}, stream,
                     params, kStages);
}

template <int K, int kGroups>
cudaError_t launch_groups(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  const int blocks = params.call.problem.value_dim / (kRecurrenceRows * kGroups);
  if (params.inverse == nullptr) return launch_config<StateRecurrenceConfig<K, kGroups, false>>(params, blocks, stream);
  if constexpr (kGroups == 1) {
    return launch_config<StateRecurrenceConfig<K, 1, true>>(params, blocks, stream);
  } else {  // for a backward it makes U0
    return for_element(params.call.problem, [&](auto element) {
      return launch_config<StateRecurrenceConfig<K, kGroups, true, false, decltype(element)>>(params, blocks, stream);
    });
  }
}

template <int K>
cudaError_t launch_for_key_dim(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  return value_tile == kRecurrenceRows ? launch_groups<K, 1>(params, stream) : launch_groups<K, 2>(params, stream);
}

template <int K>
cudaError_t launch_summary(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  const int values = params.segments.state != nullptr ? params.call.problem.value_dim : 0;
  return launch_config<StateRecurrenceConfig<K, 1, false, true>>(params, (values + K) / kRecurrenceRows, stream);
}

}  // namespace

cudaError_t launch_state_summary(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  if (params.call.problem.key_dim == 128) return launch_summary<128>(params, stream);
  if (params.call.problem.key_dim == 64) return launch_summary<64>(params, stream);
  return cudaErrorNotSupported;
}

cudaError_t launch_state_recurrence(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  if (params.call.problem.key_dim == 128) return launch_for_key_dim<128>(params, value_tile, stream);
  if (params.call.problem.key_dim == 64) return launch_for_key_dim<64>(params, value_tile, stream);
  return cudaErrorNotSupported;
}

}  // namespace kda
