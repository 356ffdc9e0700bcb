// What the planner expects of the paths of kda::chunk_fwd: models of their times, in microseconds, with constants that were measured on an H200
// (docs/lab-notebook.md). Pure functions, like the plan.
#pragma once

#include "plan.h"

namespace kda {

// Rows of S^T or M^T of a warpgroup of the kernels that go through steps.
inline constexpr int kScanRows = 64;

// Rows of S^T of a CTA that composes the maps.
inline constexpr int kComposeRows = 16;

struct CutEstimate {
  int64_t segment_chunks;  // of the best cut; 0: none
  double us;
};

// With gates that forget within a few steps, and with others. A plan does not know which they are.
struct GatesEstimate {
  double steep_us, slow_us;

  [[nodiscard]] double mean() const { return (steep_us + slow_us) / 2; }
  [[nodiscard]] bool is_better_than(const GatesEstimate& other) const {  // in geometric mean
    return steep_us * slow_us < other.steep_us * other.slow_us;
  }
};

// The stepwise path with the cut that is best for it, and with a cut.
[[nodiscard]] CutEstimate estimate_stepwise(const ChunkFwdProblem& problem);
[[nodiscard]] GatesEstimate estimate_stepwise(const ChunkFwdProblem& problem, int64_t segment_chunks);

// Chunks of the segments that the recurrences over chunks of a backward take, or of a forward that saves for it; 0: no cut.
[[nodiscard]] int64_t choose_segment_chunks(const ChunkFwdProblem& problem);

// The fused kernel on so many clusters, which walk through equal shares of all steps.
[[nodiscard]] double estimate_fused_us(const ChunkFwdProblem& problem, int64_t clusters);

// The same where it cuts chains anywhere, before the stepwise path, which takes so long alone.
[[nodiscard]] GatesEstimate estimate_fused_cut(const ChunkFwdProblem& problem, int64_t clusters,
                                               const GatesEstimate& stepwise);

}  // namespace kda
