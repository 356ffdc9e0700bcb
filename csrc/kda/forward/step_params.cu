#include "step_params.h"

#include "tensor_map.h"

namespace kda {

cudaError_t make_tensor_maps(TensorMaps& of_call, const ChunkFwdParams& call) {
  if (call.problem.tokens == 0) return cudaSuccess;  // there is nothing to describe
  const ChunkFwdProblem& p = call.problem;
  struct Map {
    CUtensorMap& map;
    TokenTensor tensor;
    int columns;  // of a box
  };
  const Map maps[] = {
      {of_call.q, {call.q, call.q_stride, p.batch, p.tokens, p.heads, p.key_dim, p.activation_type}, p.key_dim},
      {of_call.k, {call.k, call.k_stride, p.batch, p.tokens, p.heads, p.key_dim, p.activation_type}, p.key_dim},
      {of_call.g, {call.g, call.g_stride, p.batch, p.tokens, p.value_heads, p.key_dim, call.gate_type}, p.key_dim},
      {of_call.v, {call.v, call.v_stride, p.batch, p.tokens, p.value_heads, p.value_dim, p.activation_type}, 64},
  };
  for (const Map& m : maps) {
    const cudaError_t status = encode_tensor_map(m.map, m.tensor, kStepTokens, m.columns);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace kda
