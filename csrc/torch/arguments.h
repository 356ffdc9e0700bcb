// The arguments of kda::chunk_fwd as tensors, and how the operators of this library receive them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "kda/types.h"

namespace kda::binding {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type of a tensor. Tensor::scalar_type says the same, but asks libtorch for the number of one type after the other
// until one matches: with some twenty questions a call, half a microsecond.
inline ScalarType type_of(const Tensor& tensor) {
  struct Known {
    int32_t number;
    ScalarType type;
  };
  static const Known known_types[] = {
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16}, {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_float16(), ScalarType::Half},      {aoti_torch_dtype_int32(), ScalarType::Int},
      {aoti_torch_dtype_int64(), ScalarType::Long},        {aoti_torch_dtype_float64(), ScalarType::Double},
  };
  int32_t number = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  for (const Known& known : known_types) {
    if (known.number == number) return known.type;
  }
  return tensor.scalar_type();
}

// Of a [B, T, heads, dim] or [B, T, heads] tensor.
inline TokenStrides token_strides(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides[0], strides[1], strides[2]};
}

// Field by field in the order of the schema (schema.h).
struct ChunkFwdArguments {
  Tensor q;                             // [B, T, H, K]
  Tensor k;                             // [B, T, H, K]
  Tensor v;                             // [B, T, HV, V]
  Tensor g;                             // [B, T, HV, K]
  Tensor beta;                          // [B, T, HV]
  std::optional<Tensor> A_log;          // [HV]
  std::optional<Tensor> dt_bias;        // [HV * K] or [HV, K]
  std::optional<Tensor> initial_state;  // [N, HV, K, V], or [N, HV, V, K] if state_v_first
  std::optional<Tensor> cu_seqlens;     // [N + 1]
  std::optional<double> scale;
  std::optional<double> lower_bound;
  bool use_qk_l2norm;
  bool use_gate;
  bool use_beta_sigmoid;
  bool allow_neg_eigval;
  bool output_final_state;
  bool state_v_first;
  bool output_chunk_states;
  bool check_cu_seqlens;
};

inline constexpr uint64_t kChunkFwdArguments = 19;

// Takes the arguments off the stack of a boxed call. Every entry is read, as each owns what it refers to.
inline ChunkFwdArguments read_arguments(StableIValue* stack) {
  using torch::stable::detail::to;
  using OptionalTensor = std::optional<Tensor>;
  using OptionalDouble = std::optional<double>;
  // Braces evaluate from left to right, so that entries and fields meet in the order of the schema.
  int i = 0;
  return ChunkFwdArguments{
      to<Tensor>(stack[i++]),         to<Tensor>(stack[i++]),         to<Tensor>(stack[i++]),
      to<Tensor>(stack[i++]),         to<Tensor>(stack[i++]),         to<OptionalTensor>(stack[i++]),
      to<OptionalTensor>(stack[i++]), to<OptionalTensor>(stack[i++]), to<OptionalTensor>(stack[i++]),
      to<OptionalDouble>(stack[i++]), to<OptionalDouble>(stack[i++]), to<bool>(stack[i++]),
      to<bool>(stack[i++]),           to<bool>(stack[i++]),           to<bool>(stack[i++]),
      to<bool>(stack[i++]),           to<bool>(stack[i++]),           to<bool>(stack[i++]),
      to<bool>(stack[i++]),
  };
}

// The arguments of kda::chunk_bwd: gradients of the outputs, and the call that they belong to.
struct ChunkBwdArguments {
  Tensor dO;                            // [B, T, HV, V]
  std::optional<Tensor> dfinal_state;   // as final_state
  ChunkFwdArguments forward;            // without requests of outputs
  std::optional<Tensor> intermediates;  // of kda::chunk_fwd_saving; none, or of no bytes: to be computed again
};

inline constexpr uint64_t kChunkBwdArguments = 19;

// As read_arguments, for kda::chunk_bwd.
inline ChunkBwdArguments read_bwd_arguments(StableIValue* stack) {
  using torch::stable::detail::to;
  using OptionalTensor = std::optional<Tensor>;
  using OptionalDouble = std::optional<double>;
  int i = 0;
  ChunkBwdArguments args{
      to<Tensor>(stack[i++]),
      to<OptionalTensor>(stack[i++]),
      {to<Tensor>(stack[i++]), to<Tensor>(stack[i++]), to<Tensor>(stack[i++]), to<Tensor>(stack[i++]),
       to<Tensor>(stack[i++]), to<OptionalTensor>(stack[i++]), to<OptionalTensor>(stack[i++]),
       to<OptionalTensor>(stack[i++]), to<OptionalTensor>(stack[i++]), to<OptionalDouble>(stack[i++]),
       to<OptionalDouble>(stack[i++]), to<bool>(stack[i++]), to<bool>(stack[i++]), to<bool>(stack[i++]),
       to<bool>(stack[i++]), /*output_final_state=*/false, /*state_v_first=*/false, /*output_chunk_states=*/false,
       /*check_cu_seqlens=*/false},
      /*intermediates=*/std::nullopt,
  };
  args.forward.state_v_first = to<bool>(stack[i++]);
  args.intermediates = to<OptionalTensor>(stack[i++]);
  return args;
}

// Sizes that the checks have found consistent.
struct ChunkFwdSizes {
  int64_t batch;        // B
  int64_t tokens;       // T
  int64_t sequences;    // N
  int64_t heads;        // H
  int64_t value_heads;  // HV
  int64_t key_dim;      // K
  int64_t value_dim;    // V
};

// Only valid once check_chunk_fwd has accepted the arguments.
inline ChunkFwdSizes sizes_of(const ChunkFwdArguments& args) {
  const auto q = args.q.sizes();
  const auto v = args.v.sizes();
  const int64_t sequences = args.cu_seqlens ? args.cu_seqlens->size(0) - 1 : q[0];
  return {q[0], q[1], sequences, q[2], v[2], q[3], v[3]};
}

// The kernel library's name of a type; the checks admit no other than these and float64, which only PyTorch operators
// compute.
inline DataType data_type(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    case ScalarType::Half:
      return DataType::kFloat16;
    default:
      return DataType::kFloat32;
  }
}

inline GateKind gate_kind(const ChunkFwdArguments& args) {
  if (!args.use_gate) return GateKind::kLog;
  return args.lower_bound ? GateKind::kSigmoid : GateKind::kSoftplus;
}

// The factor of o.
inline float scale_of(const ChunkFwdArguments& args) {
  return static_cast<float>(args.scale ? *args.scale : 1.0 / std::sqrt(static_cast<double>(args.q.size(3))));
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// A small tensor as the kernels read it: packed. Copies it only if it is not.
inline void make_packed(std::optional<Tensor>& tensor) {
  if (tensor && !tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
}

}  // namespace kda::binding
