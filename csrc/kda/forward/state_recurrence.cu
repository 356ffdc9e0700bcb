#include "state_recurrence.cuh"

#include "launch.cuh"

namespace kda {
namespace {

template <int K, int kGroups, bool kSaves>
cudaError_t launch_config(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  using Config = StateRecurrenceConfig<K, kGroups, kSaves>;
  const ChunkFwdProblem& problem = params.call.problem;
  const int64_t ctas =
      problem.sequences * problem.value_heads * (problem.value_dim / (kRecurrenceRows * Config::kGroups));
  constexpr int kStages = stages_of_ring<Config>();
  return launch(state_recurrence_kernel<Config>, ctas, Config::kThreads, recurrence_shared_bytes<Config>(kStages),
                stream, params, kStages);
}

template <int K, int kGroups>
cudaError_t launch_groups(const ChunkFwdKernelParams& params, cudaStream_t stream) {
  return params.inverse != nullptr ? launch_config<K, kGroups, true>(params, stream)
                                   : launch_config<K, kGroups, false>(params, stream);
}

template <int K>
cudaError_t launch_for_key_dim(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  return value_tile == kRecurrenceRows ? launch_groups<K, 1>(params, stream) : launch_groups<K, 2>(params, stream);
}

}  // namespace

cudaError_t launch_state_recurrence(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  if (params.call.problem.key_dim == 128) return launch_for_key_dim<128>(params, value_tile, stream);
  if (params.call.problem.key_dim == 64) return launch_for_key_dim<64>(params, value_tile, stream);
  return cudaErrorNotSupported;
}

}  // namespace kda
