#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "coverage.h"
#include "runtime_cuda.h"

namespace kda::binding {

namespace {

// Functions of libtorch_cuda.so. They are looked up at run time, so that the library loads on a torch without CUDA as
// well; a CUDA tensor exists only where libtorch_cuda.so is loaded.
using GetCurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);
using Allocate = AOTITorchError (*)(uint64_t bytes, void** data);
using Free = AOTITorchError (*)(void* data);

template <typename Function>
Function find_in_torch(const char* name) {
  void* symbol = dlsym(RTLD_DEFAULT, name);
  if (!symbol) {
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(library, name);
  }
  if (!symbol) throw std::runtime_error(std::string("kda-cuda: this torch has no function ") + name);
  return reinterpret_cast<Function>(symbol);
}

struct Allocator {
  Allocate allocate = find_in_torch<Allocate>("aoti_torch_cuda_caching_allocator_raw_alloc");
  Free free = find_in_torch<Free>("aoti_torch_cuda_caching_allocator_raw_delete");
};

const Allocator& torch_allocator() {
  static const Allocator allocator;
  return allocator;
}

int device_attribute(cudaDeviceAttr attribute, int32_t index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, index), "kda-cuda: reading the properties of the device");
  return value;
}

Device query_device(int32_t index) {
  Device device;
  device.compute_capability = device_attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 +
                              device_attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.sm_count = device_attribute(cudaDevAttrMultiProcessorCount, index);
  return device;
}

}  // namespace

void check_cuda(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(action) + " failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

cudaStream_t current_stream(int32_t device_index) {
  static const auto get_current_stream = find_in_torch<GetCurrentStream>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_current_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The CUDA runtime of this library keeps its own current device; it is set on every call rather than trusted.
DeviceScope::DeviceScope(int32_t device_index) {
  int32_t current = -1;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&current));
  if (current != device_index) guard_.emplace(device_index);
  check_cuda(cudaSetDevice(device_index), "kda-cuda: selecting the device");
}

ScratchMemory::ScratchMemory(size_t bytes) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_allocator().allocate(bytes, &data_));
  static const bool is_filled = std::getenv("KDA_FILL_WORKSPACES") != nullptr;
  if (!is_filled || !data_) return;
  int32_t device = -1;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&device));
  check_cuda(cudaMemsetAsync(data_, 0xff, bytes, current_stream(device)), "kda-cuda: filling a workspace");
}

ScratchMemory::~ScratchMemory() {
  if (data_) torch_allocator().free(data_);
}

Device cuda_device(int32_t index) {
  // One word a device: compute capability << 16 | multiprocessors; 0 until asked. Threads that ask at the same time
  // store the same word.
  constexpr int kCachedDevices = 64;
  constexpr uint32_t kSmMask = 0xffff;
  static std::atomic<uint32_t> cache[kCachedDevices];
  if (index < 0 || index >= kCachedDevices) return query_device(index);
  uint32_t word = cache[index].load(std::memory_order_relaxed);
  if (word == 0) {
    const Device device = query_device(index);
    word = static_cast<uint32_t>(device.compute_capability) << 16 | (static_cast<uint32_t>(device.sm_count) & kSmMask);
    cache[index].store(word, std::memory_order_relaxed);
  }
  return {static_cast<int>(word >> 16), static_cast<int>(word & kSmMask)};
}

}  // namespace kda::binding
