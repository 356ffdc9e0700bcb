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
int choose_stages(int row_tiles, int64_t ctas, int sm_count) {
  const auto stages_for = [&](int ctas_per_sm) {
    const int budget = kSharedBytesPerSm / ctas_per_sm - kReservedBytesPerCta - Config::extra_bytes(row_tiles);
    return std::min(budget / Config::stage_bytes(row_tiles), Config::kMaxStages);
  };
  const bool alone = row_tiles == Config::kMaxRowTiles || ctas <= sm_count || stages_for(2) < Config::kMinStages;
  return stages_for(alone ? 1 : 2);
}

template <typename Config>
cudaError_t launch_config(const ChunkBwdKernelParams& params, int row_tiles, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  const int64_t ctas =
      problem.sequences * problem.value_heads * (problem.value_dim / (row_tiles * Config::kRowsPerWarp));
  const int stages = choose_stages<Config>(row_tiles, ctas, problem.sm_count);
  return launch(reverse_recurrence_kernel<Config>, ctas, 32 * row_tiles * Config::kKeyParts,
                Config::shared_bytes(row_tiles, stages), stream, params, row_tiles, stages);
}

}  // namespace

cudaError_t launch_reverse_recurrence(const ChunkBwdKernelParams& params, int value_tile, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  return for_instantiation(problem, [&](auto key_dim, auto, auto element) {
    using Whole = ReverseRecurrenceConfig<key_dim(), decltype(element), 1>;
    using Halves = ReverseRecurrenceConfig<key_dim(), decltype(element), 2>;
    const int row_tiles = value_tile / Whole::kRowsPerWarp;
    return row_tiles <= Halves::kMaxRowTiles ? launch_config<Halves>(params, row_tiles, stream)
                                             : launch_config<Whole>(params, row_tiles, stream);
  });
}

}  // namespace kda
