#include "step_launch.cuh"

namespace kda {

template cudaError_t launch_step_factors<64>(const StepKernelParams& params, cudaStream_t stream);
template cudaError_t launch_segment_summary<64>(const StepKernelParams& params, cudaStream_t stream);
template cudaError_t launch_state_scan<64>(const StepKernelParams& params, cudaStream_t stream);

}  // namespace kda
