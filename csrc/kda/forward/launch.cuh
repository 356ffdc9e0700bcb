// Launching a kernel with dynamic shared memory on a stream, and choosing instantiations.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>
#include <utility>

#include "../device/elements.cuh"
#include "kernel_params.h"

namespace kda {

// One dimension of grid extents is enough for any problem whose workspace fits a device.
struct Grid {
  int64_t ctas;
  int threads;  // of a CTA
  int shared_bytes;
  int cluster_ctas = 1;
  bool overlaps = false;  // may start before the kernel before has ended; it calls ptx::wait_for_kernel_before()
};

template <typename... KernelArguments, typename... Arguments>
cudaError_t launch_grid(void (*kernel)(KernelArguments...), const Grid& grid, cudaStream_t stream,
                        Arguments&&... arguments) {
  constexpr int64_t kMaxGridX = 2147483647;
  if (grid.ctas == 0) return cudaSuccess;
  if (grid.ctas > kMaxGridX) return cudaErrorInvalidConfiguration;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.ctas));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (grid.cluster_ctas > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster_ctas), 1, 1};
  }
  if (grid.overlaps) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <typename... KernelArguments, typename... Arguments>
cudaError_t launch(void (*kernel)(KernelArguments...), int64_t ctas, int threads, int shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  return launch_grid(kernel, {ctas, threads, shared_bytes}, stream, std::forward<Arguments>(arguments)...);
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls f with a value of the activation type.
template <typename Function>
cudaError_t for_element(const ChunkFwdProblem& problem, Function f) {
  if (problem.activation_type == DataType::kBFloat16) return f(BFloat16());
  if (problem.activation_type == DataType::kFloat16) return f(Float16());
  return cudaErrorNotSupported;
}

// Calls f with V, 64 or 128, and a value of the activation type.
template <typename Function>
cudaError_t for_values(const ChunkFwdProblem& problem, Function f) {
  return for_element(problem, [&](auto element) {
    return problem.value_dim == 64 ? f(Constant<64>(), element) : f(Constant<128>(), element);
  });
}

// Calls f(K, V, element) with the head dimensions as compile-time constants and a value of the activation type.
template <typename Function>
cudaError_t for_instantiation(const ChunkFwdProblem& problem, Function f) {
  const auto with_type = [&](auto key_dim, auto value_dim) {
    return for_element(problem, [&](auto element) { return f(key_dim, value_dim, element); });
  };
  if (problem.key_dim == 128 && problem.value_dim == 128) return with_type(Constant<128>(), Constant<128>());
  if (problem.key_dim == 128 && problem.value_dim == 64) return with_type(Constant<128>(), Constant<64>());
  if (problem.key_dim == 64 && problem.value_dim == 128) return with_type(Constant<64>(), Constant<128>());
  if (problem.key_dim == 64 && problem.value_dim == 64) return with_type(Constant<64>(), Constant<64>());
  return cudaErrorNotSupported;
}

}  // namespace kda
