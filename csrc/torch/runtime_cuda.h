// What the binding needs of CUDA: the current stream and device as torch sees them, and errors by name.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

namespace kda::binding {

// Throws std::runtime_error "<action> failed: <name>: <description>" unless `status` is cudaSuccess.
void check_cuda(cudaError_t status, const char* action);

// The stream that torch has made current on the device.
[[nodiscard]] cudaStream_t current_stream(int32_t device_index);

// Makes a device current for torch and for the CUDA runtime inside this library, and gives torch its own back at the
// end.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device_index);
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace kda::binding
