#include "fused_params.h"
#include "tensor_map.h"

namespace kda {
namespace {

cudaError_t make_params(FusedScanParams& params, const ChunkFwdKernelParams& kernel_params, int value_tile) {
  const ChunkFwdParams& call = kernel_params.call;
  params.call = call;
  if (call.problem.tokens == 0) return cudaSuccess;  // there is nothing to describe
  const ChunkFwdProblem& p = call.problem;
  struct Map {
    CUtensorMap& map;
    TokenTensor tensor;
    int columns;  // of a box
  };
  const Map maps[] = {
      {params.q, {call.q, call.q_stride, p.batch, p.tokens, p.heads, p.key_dim, p.activation_type}, p.key_dim},
      {params.k, {call.k, call.k_stride, p.batch, p.tokens, p.heads, p.key_dim, p.activation_type}, p.key_dim},
      {params.g, {call.g, call.g_stride, p.batch, p.tokens, p.value_heads, p.key_dim, call.gate_type}, p.key_dim},
      {params.v, {call.v, call.v_stride, p.batch, p.tokens, p.value_heads, p.value_dim, p.activation_type}, value_tile},
  };
  for (const Map& m : maps) {
    const cudaError_t status = encode_tensor_map(m.map, m.tensor, kStepTokens, m.columns);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_fused_scan(const ChunkFwdKernelParams& kernel_params, int value_tile, cudaStream_t stream) {
  FusedScanParams params;
  const cudaError_t status = make_params(params, kernel_params, value_tile);
  if (status != cudaSuccess) return status;
  switch (kernel_params.call.problem.key_dim) {
    case 64:
      return launch_fused_scan_k64(params, value_tile, stream);
    case 128:
      return launch_fused_scan_k128(params, value_tile, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace kda
