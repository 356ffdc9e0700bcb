#include "step_launch.cuh"

namespace kda {

template cudaError_t launch_step_factors<128>(const StepKernelParams& params, cudaStream_t stream);
template cudaError_t launch_segment_summary<128>(const StepKernelParams& params, cudaStream_t stream);
template cudaError_t launch_state_scan<128>(const StepKernelParams& params, cudaStream_t stream);

}  // namespace kda
