// kda::chunk_fwd on CUDA: tensors -> checked ChunkFwdParams -> plan -> kernels on the current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <initializer_list>
#include <string>

#include "checks.h"
#include "coverage.h"
#include "kda/kda.h"
#include "params_cuda.h"
#include "runtime_cuda.h"

namespace kda::binding {

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr uint64_t kOutputs = 3;  // o, final_state, chunk_states

struct Outputs {
  Tensor o, final_state, chunk_states;
};

// [.., K, V], or [.., V, K] with state_v_first.
std::array<int64_t, 2> state_matrix(const ChunkFwdSizes& n, bool state_v_first) {
  return state_v_first ? std::array{n.value_dim, n.key_dim} : std::array{n.key_dim, n.value_dim};
}

Outputs make_outputs(const ChunkFwdArguments& args, const ChunkFwdProblem& problem, int32_t device) {
  const ChunkFwdSizes n = sizes_of(args);
  const auto [rows, columns] = state_matrix(n, args.state_v_first);
  const int32_t float32 = aoti_torch_dtype_float32();
  int32_t activation = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(args.v.get(), &activation));
  const auto absent = [&] { return empty_cuda(std::array<int64_t, 1>{0}, float32, device); };

  Tensor o = empty_cuda(std::array{n.batch, n.tokens, n.value_heads, n.value_dim}, activation, device);
  Tensor final_state = args.output_final_state
                           ? empty_cuda(std::array{n.sequences, n.value_heads, rows, columns}, float32, device)
                           : absent();
  if (!args.output_chunk_states) return {std::move(o), std::move(final_state), absent()};

  // [B, chunks, HV, ..]; with cu_seqlens the slots of all sequences in one row.
  const int64_t slots = problem.varlen ? chunk_slots(problem) : (n.tokens + kChunkTokens - 1) / kChunkTokens;
  return {std::move(o), std::move(final_state),
          empty_cuda(std::array{n.batch, slots, n.value_heads, rows, columns}, float32, device)};
}

ChunkFwdParams make_params(const ChunkFwdArguments& args, const ChunkFwdProblem& problem, const Outputs& outputs) {
  ChunkFwdParams p = input_params(args, problem);
  p.o = outputs.o.data_ptr();
  if (args.output_final_state) p.final_state = static_cast<float*>(outputs.final_state.data_ptr());
  if (args.output_chunk_states) p.chunk_states = static_cast<float*>(outputs.chunk_states.data_ptr());
  return p;
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

Outputs chunk_fwd_cuda(ChunkFwdArguments args) {
  check_chunk_fwd(args);
  const int32_t device = args.q.get_device_index();
  if (layout_reason(args)) return call_composite(args);
  const ChunkFwdProblem problem = problem_of(args, cuda_device(device));
  const ChunkFwdPlan plan = plan_chunk_fwd(problem);
  if (plan.path == ChunkFwdPath::kComposite) return call_composite(args);

  const DeviceScope scope(device);
  make_parameters_packed(args);
  Outputs outputs = make_outputs(args, problem, device);
  if (problem.batch == 0) return outputs;

  const cudaStream_t stream = current_stream(device);
  ChunkFwdParams params = make_params(args, problem, outputs);
  if (params.chunk_states && problem.varlen) {  // the kernels leave unused slots as they are
    check_cuda(cudaMemsetAsync(params.chunk_states, 0, outputs.chunk_states.numel() * sizeof(float), stream),
               "kda::chunk_fwd: clearing chunk_states");
  }
  const auto workspace_bytes = static_cast<int64_t>(plan.workspace.total_bytes);
  const Tensor workspace = empty_cuda(std::array{workspace_bytes}, aoti_torch_dtype_uint8(), device);
  params.workspace = workspace.data_ptr();
  check_cuda(chunk_fwd(params, plan, stream), "kda::chunk_fwd: launching the kernels");
  return outputs;
}

void boxed_chunk_fwd_cuda(StableIValue* stack, uint64_t, uint64_t) {
  static_assert(kOutputs <= kChunkFwdArguments, "the stack of a boxed call holds the larger of the two");
  const Outputs outputs = chunk_fwd_cuda(read_arguments(stack));
  stack[0] = from(outputs.o);
  stack[1] = from(outputs.final_state);
  stack[2] = from(outputs.chunk_states);
}

}  // namespace

}  // namespace kda::binding

STABLE_TORCH_LIBRARY_IMPL(kda, CUDA, m) { m.impl("chunk_fwd", &kda::binding::boxed_chunk_fwd_cuda); }
