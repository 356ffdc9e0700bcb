// From checked tensors to what the CUDA kernels take, for both passes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <cstddef>

#include "arguments.h"
#include "kda/kda.h"

namespace kda::binding {

// A contiguous tensor on the device. The C function is called as it is: it costs a third of a call through the
// dispatcher.
template <size_t kRank>
Tensor empty_cuda(const std::array<int64_t, kRank>& sizes, int32_t dtype, int32_t device_index) {
  std::array<int64_t, kRank> strides;
  int64_t stride = 1;
  for (size_t i = kRank; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kRank, sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cuda(), device_index, &handle));
  return Tensor(handle);
}

// Copies small arguments that are not packed (A_log, dt_bias, cu_seqlens).
void make_parameters_packed(ChunkFwdArguments& args);

// Everything of the parameters but outputs and workspace. The arguments must outlive their use on the stream.
[[nodiscard]] ChunkFwdParams input_params(const ChunkFwdArguments& args, const ChunkFwdProblem& problem);

}  // namespace kda::binding
