// What the planner expects of the paths of kda::chunk_fwd: models of their times, in microseconds, with constants that were measured on an H200
// (docs/lab-notebook.md). Pure functions, like the plan.
#pragma once

#include <optional>

#include "plan.h"

namespace kda {

// Rows of S^T or M^T of a warpgroup of the kernels that go through steps.
inline constexpr int kScanRows = 64;

// Rows of S^T of a CTA that composes the maps.
inline constexpr int kComposeRows = 16;

struct StepwiseEstimate {
  int64_t segment_chunks;  // of the best cut; 0: none
  double us;
};

// The stepwise path with the cut that is best for it.
[[nodiscard]] StepwiseEstimate estimate_stepwise(const ChunkFwdProblem& problem);

struct FusedEstimate {
  int64_t scans, makers;  // CTAs of the grid
  double us;
};

// The fused kernel with the grid that is estimated to be the fastest, with at most most_scans scans.
[[nodiscard]] FusedEstimate estimate_fused(const ChunkFwdProblem& problem, std::optional<int64_t> most_scans);

}  // namespace kda
