// The outputs of kda::chunk_fwd on any device, and its implementation in PyTorch operators for what nothing else
// covers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "arguments.h"

namespace kda::binding {

struct Outputs {
  Tensor o;             // [B, T, HV, V] in the type of v
  Tensor final_state;   // [N, HV, K, V] or [N, HV, V, K] fp32; [0] if not requested
  Tensor chunk_states;  // [B, slots, HV, ..] fp32; [0] if not requested
};

// A contiguous tensor. The C function is called as it is: it costs a third of a call through the dispatcher.
template <size_t kRank>
Tensor empty_tensor(const std::array<int64_t, kRank>& sizes, int32_t dtype, int32_t device_type, int32_t device_index) {
  std::array<int64_t, kRank> strides;
  int64_t stride = 1;
  for (size_t i = kRank; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(kRank, sizes.data(), strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// Memory for the outputs of a checked call, with any content.
[[nodiscard]] Outputs make_outputs(const ChunkFwdArguments& args, int32_t device_type, int32_t device_index);

// kda::chunk_fwd_composite.
[[nodiscard]] Outputs call_composite(const ChunkFwdArguments& args);

// Leaves the outputs on the stack of a boxed call.
void return_outputs(const Outputs& outputs, StableIValue* stack);

}  // namespace kda::binding
