// kda::chunk_bwd and kda::chunk_fwd_saving on CUDA: tensors -> checked parameters -> plan -> kernels on the current
// stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "checks.h"
#include "coverage.h"
#include "kda/kda.h"
#include "outputs.h"
#include "params_cuda.h"
#include "plan_arguments.h"
#include "runtime_cuda.h"

namespace kda::binding {

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr size_t kGradients = 8;  // dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial_state
using Gradients = std::array<Tensor, kGradients>;

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// A contiguous tensor like `input`.
template <size_t kRank>
Tensor empty_like_packed(const Tensor& input, int32_t device) {
  std::array<int64_t, kRank> sizes;
  for (size_t i = 0; i < kRank; ++i) sizes[i] = input.size(i);
  return empty_tensor(sizes, dtype_of(input), aoti_torch_device_type_cuda(), device);
}

Tensor absent_gradient(const ChunkFwdArguments& args, int32_t device) {
  return empty_tensor(std::array<int64_t, 1>{0}, dtype_of(args.q), aoti_torch_device_type_cuda(), device);
}

// A_log and dt_bias come in several shapes; their gradients are packed alike.
Tensor parameter_gradient(const std::optional<Tensor>& parameter, const ChunkFwdArguments& args, int32_t device) {
  if (!parameter) return absent_gradient(args, device);
  switch (parameter->dim()) {
    case 1:
      return empty_like_packed<1>(*parameter, device);
    case 2:
      return empty_like_packed<2>(*parameter, device);
    case 3:
      return empty_like_packed<3>(*parameter, device);
    case 4:
      return empty_like_packed<4>(*parameter, device);
    default: {
      const Tensor flat = empty_tensor(std::array<int64_t, 1>{parameter->numel()}, dtype_of(*parameter),
                                       aoti_torch_device_type_cuda(), device);
      return torch::stable::view(flat, parameter->sizes());
    }
  }
}

Gradients make_gradients(const ChunkFwdArguments& args, int32_t device) {
  return {empty_like_packed<4>(args.q, device),
          empty_like_packed<4>(args.k, device),
          empty_like_packed<4>(args.v, device),
          empty_like_packed<4>(args.g, device),
          empty_like_packed<3>(args.beta, device),
          parameter_gradient(args.A_log, args, device),
          parameter_gradient(args.dt_bias, args, device),
          args.initial_state ? empty_like_packed<4>(*args.initial_state, device) : absent_gradient(args, device)};
}

// As the kernels read it: of the given type, packed, and at a multiple of 16 bytes.
Tensor make_readable(const Tensor& gradient, ScalarType type) {
  constexpr uintptr_t kAlignment = 16;
  Tensor result = gradient;
  if (result.scalar_type() != type) result = torch::stable::to(result, type);
  if (!result.is_contiguous()) result = torch::stable::contiguous(result);
  if (reinterpret_cast<uintptr_t>(result.data_ptr()) % kAlignment != 0) result = torch::stable::clone(result);
  return result;
}

void call_composite(StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("kda::chunk_bwd_composite", "", stack, TORCH_ABI_VERSION));
}

std::array<StableIValue, kChunkBwdArguments> to_stack(const ChunkBwdArguments& args) {
  const ChunkFwdArguments& f = args.forward;
  return {from(args.dO),
          from(args.dfinal_state),
          from(f.q),
          from(f.k),
          from(f.v),
          from(f.g),
          from(f.beta),
          from(f.A_log),
          from(f.dt_bias),
          from(f.initial_state),
          from(f.cu_seqlens),
          from(f.scale),
          from(f.lower_bound),
          from(f.use_qk_l2norm),
          from(f.use_gate),
          from(f.use_beta_sigmoid),
          from(f.allow_neg_eigval),
          from(f.state_v_first),
          from(std::optional<Tensor>())};  // the composite computes everything
}

Gradients chunk_bwd_by_composite(const ChunkBwdArguments& args) {
  auto stack = to_stack(args);
  call_composite(stack.data());
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]),
          to<Tensor>(stack[4]), to<Tensor>(stack[5]), to<Tensor>(stack[6]), to<Tensor>(stack[7])};
}

bool has_intermediates(const ChunkBwdArguments& args) { return args.intermediates && args.intermediates->numel() > 0; }

Gradients run_plan(ChunkBwdArguments args, const ChunkFwdProblem& problem, const ChunkBwdPlan& plan) {
  ChunkFwdArguments& inputs = args.forward;
  const int32_t device = inputs.q.get_device_index();
  const DeviceScope scope(device);
  make_parameters_packed(inputs);
  Gradients gradients = make_gradients(inputs, device);
  const Tensor dO = make_readable(args.dO, inputs.v.scalar_type());
  std::optional<Tensor> dfinal_state;
  if (args.dfinal_state) dfinal_state = make_readable(*args.dfinal_state, ScalarType::Float);

  std::optional<Tensor> intermediates;
  if (plan.saved) intermediates = make_readable(*args.intermediates, ScalarType::Byte);

  ChunkBwdParams params;
  params.inputs = input_params(inputs, problem);
  params.dO = dO.data_ptr();
  if (dfinal_state) params.dfinal_state = static_cast<const float*>(dfinal_state->data_ptr());
  if (intermediates) params.intermediates = intermediates->data_ptr();
  params.dq = gradients[0].data_ptr();
  params.dk = gradients[1].data_ptr();
  params.dv = gradients[2].data_ptr();
  params.dg = gradients[3].data_ptr();
  params.dbeta = gradients[4].data_ptr();
  if (inputs.A_log) params.dA_log = static_cast<float*>(gradients[5].data_ptr());
  if (inputs.dt_bias) params.ddt_bias = static_cast<float*>(gradients[6].data_ptr());
  if (inputs.initial_state) params.dinitial_state = gradients[7].data_ptr();

  const ScratchMemory workspace(plan.workspace.total_bytes);
  params.workspace = workspace.data();
  check_cuda(chunk_bwd(params, plan, current_stream(device)), "kda::chunk_bwd: launching the kernels");
  return gradients;
}

Gradients chunk_bwd_cuda(ChunkBwdArguments args) {
  check_chunk_bwd(args);
  if (layout_reason(args.forward)) return chunk_bwd_by_composite(args);
  const ChunkFwdProblem problem = problem_of(args.forward, cuda_device(args.forward.q.get_device_index()));
  const ChunkBwdPlan plan = plan_chunk_bwd(problem, args.forward.use_gate, has_intermediates(args));
  if (plan.path == ChunkFwdPath::kComposite) return chunk_bwd_by_composite(args);
  return run_plan(std::move(args), problem, plan);
}

Gradients chunk_bwd_planned_cuda(ChunkBwdArguments args, std::optional<int64_t> segment_chunks,
                                 std::optional<int64_t> value_tile) {
  constexpr const char* kPlanned = "kda::chunk_bwd_planned";
  check_chunk_bwd(args);
  const ChunkFwdArguments& inputs = args.forward;
  const ChunkBwdPlanOptions options = {checked_value_tile(kPlanned, value_tile, inputs.v.size(3)),
                                       checked_segment_chunks(kPlanned, segment_chunks)};
  if (const char* reason = composite_reason(inputs); *reason != '\0') {
    throw std::runtime_error(std::string(kPlanned) + ": no kernel covers this call: " + reason);
  }
  const ChunkFwdProblem problem = problem_of(inputs, cuda_device(inputs.q.get_device_index()));
  const ChunkBwdPlan plan = plan_chunk_bwd(problem, inputs.use_gate, has_intermediates(args), options);
  if (value_tile && plan.value_tile != *value_tile) {
    refuse_plan_argument(kPlanned, "value_tile",
                         "expected none or 64 where sequences are cut, got " + std::to_string(*value_tile));
  }
  return run_plan(std::move(args), problem, plan);
}

// The forward, and the bytes that it saves: of no use where the composite computes, but of the size that the fake
// states, which knows neither the device's capability nor strides.
std::pair<Outputs, Tensor> chunk_fwd_saving_cuda(ChunkFwdArguments args) {
  check_chunk_fwd(args);
  const int32_t device = args.q.get_device_index();
  const ChunkFwdProblem problem = problem_of(args, cuda_device(device));
  const ChunkBwdPlan plan = plan_chunk_bwd(problem, args.use_gate, /*saved=*/true);
  const ScalarType type = type_of(args.q);
  const bool has_kernels = type == ScalarType::BFloat16 || type == ScalarType::Half;
  const DeviceScope scope(device);
  Tensor intermediates =
      empty_tensor(std::array<int64_t, 1>{has_kernels ? static_cast<int64_t>(intermediate_bytes(problem)) : 0},
                   aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), device);
  if (layout_reason(args) || plan.path == ChunkFwdPath::kComposite) return {call_composite(args), intermediates};

  make_parameters_packed(args);
  Outputs outputs = make_outputs(args, aoti_torch_device_type_cuda(), device);
  if (problem.batch == 0) return {std::move(outputs), std::move(intermediates)};
  const cudaStream_t stream = current_stream(device);
  ChunkFwdParams params = forward_params(args, problem, outputs, stream);
  const ScratchMemory workspace(plan.saving_workspace.total_bytes);
  params.workspace = workspace.data();
  check_cuda(chunk_fwd_saving(params, intermediates.data_ptr(), plan, stream),
             "kda::chunk_fwd_saving: launching the kernels");
  return {std::move(outputs), std::move(intermediates)};
}

void boxed_chunk_fwd_saving_cuda(StableIValue* stack, uint64_t, uint64_t) {
  const auto [outputs, intermediates] = chunk_fwd_saving_cuda(read_arguments(stack));
  return_outputs(outputs, stack);
  stack[3] = from(intermediates);
}

void return_gradients(const Gradients& gradients, StableIValue* stack) {
  for (size_t i = 0; i < kGradients; ++i) stack[i] = from(gradients[i]);
}

void boxed_chunk_bwd_cuda(StableIValue* stack, uint64_t, uint64_t) {
  return_gradients(chunk_bwd_cuda(read_bwd_arguments(stack)), stack);
}

void boxed_chunk_bwd_planned_cuda(StableIValue* stack, uint64_t, uint64_t) {
  // Every entry is read before anything can throw, as each owns what it refers to.
  ChunkBwdArguments args = read_bwd_arguments(stack);
  const auto segment_chunks = to<std::optional<int64_t>>(stack[kChunkBwdArguments]);
  const auto value_tile = to<std::optional<int64_t>>(stack[kChunkBwdArguments + 1]);
  return_gradients(chunk_bwd_planned_cuda(std::move(args), segment_chunks, value_tile), stack);
}

}  // namespace

}  // namespace kda::binding

STABLE_TORCH_LIBRARY_IMPL(kda, CUDA, m) {
  m.impl("chunk_bwd", &kda::binding::boxed_chunk_bwd_cuda);
  m.impl("chunk_bwd_planned", &kda::binding::boxed_chunk_bwd_planned_cuda);
  m.impl("chunk_fwd_saving", &kda::binding::boxed_chunk_fwd_saving_cuda);
}
