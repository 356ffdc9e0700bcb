#include "params_cuda.h"

#include <torch/csrc/stable/ops.h>

#include "runtime_cuda.h"

namespace kda::binding {

void make_parameters_packed(ChunkFwdArguments& args) {
  make_packed(args.A_log);
  make_packed(args.dt_bias);
  make_packed(args.cu_seqlens);
}

ChunkFwdParams input_params(const ChunkFwdArguments& args, const ChunkFwdProblem& problem) {
  ChunkFwdParams p;
  p.problem = problem;
  p.q = args.q.data_ptr();
  p.k = args.k.data_ptr();
  p.v = args.v.data_ptr();
  p.g = args.g.data_ptr();
  p.beta = args.beta.data_ptr();
  p.q_stride = token_strides(args.q);
  p.k_stride = token_strides(args.k);
  p.v_stride = token_strides(args.v);
  p.g_stride = token_strides(args.g);
  p.beta_stride = token_strides(args.beta);
  p.gate_type = data_type(type_of(args.g));
  p.beta_type = data_type(type_of(args.beta));

  p.A_log = static_cast<const float*>(data_or_null(args.A_log));
  p.dt_bias = static_cast<const float*>(data_or_null(args.dt_bias));
  if (args.initial_state) {
    p.initial_state = args.initial_state->data_ptr();
    p.initial_state_stride_sequence = args.initial_state->stride(0);
    p.initial_state_stride_head = args.initial_state->stride(1);
    p.state_type = data_type(type_of(*args.initial_state));
  }
  p.state_v_first = args.state_v_first;
  if (args.cu_seqlens) {
    p.cu_seqlens = args.cu_seqlens->data_ptr();
    p.cu_seqlens_int64 = type_of(*args.cu_seqlens) == ScalarType::Long;
  }

  p.scale = scale_of(args);
  p.gate = gate_kind(args);
  p.lower_bound = static_cast<float>(args.lower_bound.value_or(0.0));
  p.qk_l2norm = args.use_qk_l2norm;
  p.beta_sigmoid = args.use_beta_sigmoid;
  p.beta_scale = args.allow_neg_eigval ? 2.0f : 1.0f;
  return p;
}

ChunkFwdParams forward_params(const ChunkFwdArguments& args, const ChunkFwdProblem& problem, const Outputs& outputs,
                              cudaStream_t stream) {
  ChunkFwdParams p = input_params(args, problem);
  p.o = outputs.o.data_ptr();
  if (args.output_final_state) p.final_state = static_cast<float*>(outputs.final_state.data_ptr());
  if (!args.output_chunk_states) return p;
  p.chunk_states = static_cast<float*>(outputs.chunk_states.data_ptr());
  if (problem.varlen) {
    check_cuda(cudaMemsetAsync(p.chunk_states, 0, outputs.chunk_states.numel() * sizeof(float), stream),
               "kda::chunk_fwd: clearing chunk_states");
  }
  return p;
}

}  // namespace kda::binding
