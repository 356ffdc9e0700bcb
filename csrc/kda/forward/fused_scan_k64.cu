#include "fused_launch.cuh"

namespace kda {

cudaError_t launch_fused_scan_k64(const StepKernelParams& params, int value_tile, cudaStream_t stream) {
  return launch_fused_scan_of<64>(params, value_tile, stream);
}

}  // namespace kda
