// What the binding needs of CUDA: the current stream and device as torch sees them, and errors by name.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstddef>
#include <cstdint>
#include <optional>

namespace kda::binding {

// Throws std::runtime_error "<action> failed: <name>: <description>" unless `status` is cudaSuccess.
void check_cuda(cudaError_t status, const char* action);

// The stream that torch has made current on the device.
[[nodiscard]] cudaStream_t current_stream(int32_t device_index);

// Makes a device current for torch and for the CUDA runtime inside this library, and gives torch its own back at the
// end if it was another.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device_index);
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Memory of torch's caching allocator on torch's current device and stream: like that of a tensor, at a third of its host
// time. It may be given back while kernels that use it are still queued on the stream, as that of a tensor may. With KDA_FILL_WORKSPACES in the environment it is
// full of NaN, for tests.
class ScratchMemory {
 public:
  explicit ScratchMemory(size_t bytes);
  ~ScratchMemory();
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;

  // Aligned to 256 bytes; null if there are none.
  [[nodiscard]] void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

}  // namespace kda::binding
