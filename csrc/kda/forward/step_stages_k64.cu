#include "step_launch.cuh"

namespace kda {

cudaError_t launch_step_factors_k64(const StepKernelParams& params, cudaStream_t stream) {
  return launch_step_factors_of<64>(params, stream);
}

cudaError_t launch_segment_summary_k64(const StepKernelParams& params, cudaStream_t stream) {
  return launch_segment_summary_of<64>(params, stream);
}

cudaError_t launch_state_scan_k64(const StepKernelParams& params, cudaStream_t stream) {
  return launch_state_scan_of<64>(params, stream);
}

}  // namespace kda
