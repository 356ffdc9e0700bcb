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
  int value_tile;
  double us;
};

// The fused kernel: its CTAs, one a multiprocessor, take turns, and each walks through its steps. value_tile: that, instead of the better one.
[[nodiscard]] FusedEstimate estimate_fused(const ChunkFwdProblem& problem, std::optional<int> value_tile);

}  // namespace kda
