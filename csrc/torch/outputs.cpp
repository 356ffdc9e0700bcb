#include "outputs.h"

#include <utility>

#include "coverage.h"
#include "kda/plan.h"

namespace kda::binding {

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// [.., K, V], or [.., V, K] with state_v_first.
std::array<int64_t, 2> state_matrix(const ChunkFwdSizes& n, bool state_v_first) {
  return state_v_first ? std::array{n.value_dim, n.key_dim} : std::array{n.key_dim, n.value_dim};
}

}  // namespace

Outputs make_outputs(const ChunkFwdArguments& args, int32_t device_type, int32_t device_index) {
  const ChunkFwdSizes n = sizes_of(args);
  const auto [rows, columns] = state_matrix(n, args.state_v_first);
  const int32_t float32 = aoti_torch_dtype_float32();
  int32_t activation = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(args.v.get(), &activation));
  const auto make = [&](const auto& sizes, int32_t dtype) {
    return empty_tensor(sizes, dtype, device_type, device_index);
  };
  const auto absent = [&] { return make(std::array<int64_t, 1>{0}, float32); };

  Tensor o = make(std::array{n.batch, n.tokens, n.value_heads, n.value_dim}, activation);
  Tensor final_state =
      args.output_final_state ? make(std::array{n.sequences, n.value_heads, rows, columns}, float32) : absent();
  if (!args.output_chunk_states) return {std::move(o), std::move(final_state), absent()};

  // [B, chunks, HV, ..]; with cu_seqlens the slots of all sequences in one row.
  const int64_t slots =
      args.cu_seqlens ? chunk_slots(problem_of(args, Device{})) : (n.tokens + kChunkTokens - 1) / kChunkTokens;
  return {std::move(o), std::move(final_state),
          make(std::array{n.batch, slots, n.value_heads, rows, columns}, float32)};
}

Outputs call_composite(const ChunkFwdArguments& args) {
  std::array<StableIValue, kChunkFwdArguments> stack{
      from(args.q),
      from(args.k),
      from(args.v),
      from(args.g),
      from(args.beta),
      from(args.A_log),
      from(args.dt_bias),
      from(args.initial_state),
      from(args.cu_seqlens),
      from(args.scale),
      from(args.lower_bound),
      from(args.use_qk_l2norm),
      from(args.use_gate),
      from(args.use_beta_sigmoid),
      from(args.allow_neg_eigval),
      from(args.output_final_state),
      from(args.state_v_first),
      from(args.output_chunk_states),
      from(args.check_cu_seqlens),
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("kda::chunk_fwd_composite", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

void return_outputs(const Outputs& outputs, StableIValue* stack) {
  stack[0] = from(outputs.o);
  stack[1] = from(outputs.final_state);
  stack[2] = from(outputs.chunk_states);
}

}  // namespace kda::binding
