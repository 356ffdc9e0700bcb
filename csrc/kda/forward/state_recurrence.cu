#include "state_recurrence.cuh"

#include <algorithm>

#include "launch.cuh"

namespace kda {
namespace {

// Shared memory of one multiprocessor that kernels can use, less 1 KiB that the system keeps for each CTA (sm_90: 228
// KiB in all).
constexpr int kSharedBytesPerSm = 228 * 1024, kReservedBytesPerCta = 1024;

// Stages of the ring: all that fit when a CTA of 8 warps has a multiprocessor to itself and smaller ones share it by
// two. A grid of no more CTAs than multiprocessors never shares.
template <typename Config>
int choose_stages(int warps, int64_t ctas, int sm_count) {
  const int ctas_per_sm = warps == Config::kMaxWarps || ctas <= sm_count ? 1 : 2;
  const int budget = kSharedBytesPerSm / ctas_per_sm - kReservedBytesPerCta - Config::kBarrierBytes;
  return std::min(budget / Config::stage_bytes(warps), Config::kMaxStages);
}

template <int K>
cudaError_t launch_for_key_dim(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  using Config = StateRecurrenceConfig<K>;
  const ChunkFwdProblem& problem = params.call.problem;
  const int warps = value_tile / Config::kRowsPerWarp;
  const int64_t ctas = problem.sequences * problem.value_heads * (problem.value_dim / value_tile);
  const int stages = choose_stages<Config>(warps, ctas, problem.sm_count);
  return launch(state_recurrence_kernel<Config>, ctas, 32 * warps, Config::shared_bytes(warps, stages), stream, params,
                warps, stages);
}

}  // namespace

cudaError_t launch_state_recurrence(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream) {
  if (params.call.problem.key_dim == 128) return launch_for_key_dim<128>(params, value_tile, stream);
  if (params.call.problem.key_dim == 64) return launch_for_key_dim<64>(params, value_tile, stream);
  return cudaErrorNotSupported;
}

}  // namespace kda
