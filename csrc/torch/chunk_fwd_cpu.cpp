// kda::chunk_fwd on the CPU: tensors -> checked parameters -> the torch-free implementation on torch's threads.
#include "kda/cpu/chunk_fwd_cpu.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "outputs.h"

namespace kda::binding {

namespace {

cpu::TensorStrides tensor_strides(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides[0], strides[1], strides[2], strides.size() > 3 ? strides[3] : 1};
}

// Of a state tensor whose last four dimensions are [.., HV, K, V], or [.., HV, V, K] if state_v_first.
cpu::StateStrides state_strides(const Tensor& tensor, bool state_v_first) {
  const int64_t last = tensor.dim() - 1;
  return {tensor.stride(last - 3), tensor.stride(last - 2), tensor.stride(state_v_first ? last : last - 1),
          tensor.stride(state_v_first ? last - 1 : last)};
}

std::vector<int64_t> read_offsets(const std::optional<Tensor>& cu_seqlens) {
  std::vector<int64_t> offsets;
  if (!cu_seqlens) return offsets;
  const int64_t stride = cu_seqlens->stride(0);
  for (int64_t n = 0; n < cu_seqlens->size(0); ++n) {
    if (cu_seqlens->scalar_type() == ScalarType::Int) {
      offsets.push_back(static_cast<const int32_t*>(cu_seqlens->data_ptr())[n * stride]);
    } else {
      offsets.push_back(static_cast<const int64_t*>(cu_seqlens->data_ptr())[n * stride]);
    }
  }
  return offsets;
}

cpu::ChunkFwdParams make_params(const ChunkFwdArguments& args, const Outputs& outputs) {
  const ChunkFwdSizes n = sizes_of(args);
  cpu::ChunkFwdParams p;
  p.batch = n.batch;
  p.tokens = n.tokens;
  p.heads = static_cast<int>(n.heads);
  p.value_heads = static_cast<int>(n.value_heads);
  p.key_dim = static_cast<int>(n.key_dim);
  p.value_dim = static_cast<int>(n.value_dim);
  p.activation_type = data_type(args.q.scalar_type());
  p.gate_type = data_type(args.g.scalar_type());
  p.beta_type = data_type(args.beta.scalar_type());
  p.q = args.q.data_ptr();
  p.k = args.k.data_ptr();
  p.v = args.v.data_ptr();
  p.g = args.g.data_ptr();
  p.beta = args.beta.data_ptr();
  p.q_stride = tensor_strides(args.q);
  p.k_stride = tensor_strides(args.k);
  p.v_stride = tensor_strides(args.v);
  p.g_stride = tensor_strides(args.g);
  p.beta_stride = tensor_strides(args.beta);
  p.A_log = static_cast<const float*>(data_or_null(args.A_log));
  p.dt_bias = static_cast<const float*>(data_or_null(args.dt_bias));
  if (args.initial_state) {
    p.initial_state = args.initial_state->data_ptr();
    p.state_type = data_type(args.initial_state->scalar_type());
    p.initial_state_stride = state_strides(*args.initial_state, args.state_v_first);
  }
  p.cu_seqlens = read_offsets(args.cu_seqlens);
  p.scale = scale_of(args);
  p.gate = gate_kind(args);
  p.lower_bound = static_cast<float>(args.lower_bound.value_or(0.0));
  p.qk_l2norm = args.use_qk_l2norm;
  p.beta_sigmoid = args.use_beta_sigmoid;
  p.beta_scale = args.allow_neg_eigval ? 2.0f : 1.0f;
  p.o = outputs.o.data_ptr();
  if (args.output_final_state) {
    p.final_state = static_cast<float*>(outputs.final_state.data_ptr());
    p.final_state_stride = state_strides(outputs.final_state, args.state_v_first);
  }
  if (args.output_chunk_states) {
    p.chunk_states = static_cast<float*>(outputs.chunk_states.data_ptr());
    p.chunk_states_stride = state_strides(outputs.chunk_states, args.state_v_first);
  }
  return p;
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

Outputs compute(ChunkFwdArguments args, cpu::InstructionSet set) {
  make_packed(args.A_log);
  make_packed(args.dt_bias);
  Outputs outputs = make_outputs(args, aoti_torch_device_type_cpu(), 0);
  const cpu::ChunkFwdParams params = make_params(args, outputs);
  if (args.cu_seqlens) {  // rows behind the last sequence, and slots of no chunk
    const ChunkFwdSizes n = sizes_of(args);
    const int64_t token_bytes = n.value_heads * n.value_dim * outputs.o.element_size();
    const int64_t used = params.cu_seqlens.back();
    if (used < n.tokens) {
      std::memset(static_cast<char*>(params.o) + used * token_bytes, 0, (n.tokens - used) * token_bytes);
    }
    if (params.chunk_states) std::memset(params.chunk_states, 0, outputs.chunk_states.numel() * sizeof(float));
  }
  cpu::chunk_fwd(params, set, static_cast<int>(torch::stable::get_num_threads()), parallel_for);
  return outputs;
}

Outputs chunk_fwd_cpu(const ChunkFwdArguments& args) {
  check_chunk_fwd(args);
  if (args.q.scalar_type() == ScalarType::Double) return call_composite(args);
  return compute(args, cpu::best_instruction_set());
}

[[noreturn]] void fail(const std::string& argument, const std::string& problem) {
  throw std::runtime_error("kda::chunk_fwd_cpu: argument `" + argument + "`: " + problem);
}

Outputs chunk_fwd_cpu(const ChunkFwdArguments& args, const std::string& instruction_set) {
  check_chunk_fwd(args, /*padding_allowed=*/true);
  if (args.q.scalar_type() == ScalarType::Double) fail("q", "expected dtype bfloat16, float16 or float32, got float64");
  if (instruction_set.empty()) return compute(args, cpu::best_instruction_set());
  const auto set = cpu::parse_instruction_set(instruction_set);
  if (!set) fail("instruction_set", "expected baseline, avx2, avx512 or nothing, got " + instruction_set);
  if (!cpu::is_supported(*set)) fail("instruction_set", "this machine has no " + instruction_set);
  return compute(args, *set);
}

void boxed_chunk_fwd(StableIValue* stack, uint64_t, uint64_t) {
  return_outputs(chunk_fwd_cpu(read_arguments(stack)), stack);
}

void boxed_chunk_fwd_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const ChunkFwdArguments args = read_arguments(stack);
  const auto instruction_set = torch::stable::detail::to<std::string>(stack[kChunkFwdArguments]);
  return_outputs(chunk_fwd_cpu(args, instruction_set), stack);
}

}  // namespace

}  // namespace kda::binding

STABLE_TORCH_LIBRARY_IMPL(kda, CPU, m) {
  m.impl("chunk_fwd", &kda::binding::boxed_chunk_fwd);
  m.impl("inference_chunk_fwd", &kda::binding::boxed_chunk_fwd);
  m.impl("chunk_fwd_cpu", &kda::binding::boxed_chunk_fwd_cpu);
}
