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

// The stepwise path with the cut that is best for it.
[[nodiscard]] CutEstimate estimate_stepwise(const ChunkFwdProblem& problem);

// Chunks of the segments that the recurrences over chunks of a backward take, or of a forward that saves for it; 0: no cut.
[[nodiscard]] int64_t choose_segment_chunks(const ChunkFwdProblem& problem);

// The fused kernel on so many clusters, which walk through equal shares of all steps.
[[nodiscard]] double estimate_fused_us(const ChunkFwdProblem& problem, int64_t clusters);

// The same where it cuts chains anywhere, with the cut that is best for the stepwise stages after it.
[[nodiscard]] CutEstimate estimate_fused_cut(const ChunkFwdProblem& problem, int64_t clusters);

}  // namespace kda
