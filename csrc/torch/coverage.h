// What the CUDA kernels cover of the calls that the operators accept.
#pragma once

#include "arguments.h"
#include "kda/plan.h"

namespace kda::binding {

struct Device {
  int compute_capability = 0;  // major * 10 + minor
  int sm_count = 0;
};

// The planner's view of a checked call.
[[nodiscard]] ChunkFwdProblem problem_of(const ChunkFwdArguments& args, const Device& device);

// Why the kernels cannot read the tensors as they lie in memory, whatever the plan is; null if they can.
[[nodiscard]] const char* layout_reason(const ChunkFwdArguments& args);

// Why no kernel computes a checked call, as a clause; empty if one does, and on the CPU, where that is as it should be.
[[nodiscard]] const char* composite_reason(const ChunkFwdArguments& args);

// The attributes of the CUDA device `index`. Thread-safe; asks the driver once a device.
[[nodiscard]] Device cuda_device(int32_t index);

}  // namespace kda::binding
