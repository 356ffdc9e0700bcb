#include "reverse_recurrence.cuh"

#include <algorithm>

#include "../forward/launch.cuh"

namespace kda {
namespace {

// Shared memory of one multiprocessor that kernels can use, less 1 KiB that the system keeps for each CTA (sm_90: 228
// KiB in all).
constexpr int kSharedBytesPerSm = 228 * 1024, kReservedBytesPerCta = 1024;

// Stages of the ring: two CTAs share a multiprocessor if both have the stages they need.
template <typename Config>
int choose_stages(int warps, int64_t ctas, int sm_count) {
  const auto stages_for = [&](int ctas_per_sm) {
    const int budget = kSharedBytesPerSm / ctas_per_sm - kReservedBytesPerCta - Config::kBarrierBytes;
    return std::min(budget / Config::stage_bytes(warps), Config::kMaxStages);
  };
  const bool alone = warps == Config::kMaxWarps || ctas <= sm_count || stages_for(2) < Config::kMinStages;
  return stages_for(alone ? 1 : 2);
}

}  // namespace

cudaError_t launch_reverse_recurrence(const ChunkBwdKernelParams& params, int value_tile, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto, auto element) {
    using Config = ReverseRecurrenceConfig<key_dim(), decltype(element)>;
    const int warps = value_tile / Config::kRowsPerWarp;
    const int64_t ctas = problem.sequences * problem.value_heads * (problem.value_dim / value_tile);
    const int stages = choose_stages<Config>(warps, ctas, problem.sm_count);
    return launch(reverse_recurrence_kernel<Config>, ctas, 32 * warps, Config::shared_bytes(warps, stages), stream,
                  params, warps, stages);
  });
}

}  // namespace kda
