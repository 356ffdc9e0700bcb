#include "fused_launch.cuh"

namespace kda {

template cudaError_t launch_fused_cut<128>(const StepKernelParams& params, cudaStream_t stream);

}  // namespace kda
