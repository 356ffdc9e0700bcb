#include "fused_scan.cuh"
#include "launch.cuh"
#include "tensor_map.h"

namespace kda {
namespace {

cudaError_t make_params(FusedScanParams& params, const ChunkFwdParams& call, bool vectorized, int value_rows) {
  params.call = call;
  if (!vectorized || call.problem.tokens == 0) return cudaSuccess;
  const ChunkFwdProblem& p = call.problem;
  struct Map {
    CUtensorMap& map;
    TokenTensor tensor;
    int columns;
  };
  const Map maps[] = {
      {params.q, {call.q, call.q_stride, p.batch, p.tokens, p.heads, p.key_dim, p.activation_type}, p.key_dim},
      {params.k, {call.k, call.k_stride, p.batch, p.tokens, p.heads, p.key_dim, p.activation_type}, p.key_dim},
      {params.g, {call.g, call.g_stride, p.batch, p.tokens, p.value_heads, p.key_dim, call.gate_type}, p.key_dim},
      {params.v, {call.v, call.v_stride, p.batch, p.tokens, p.value_heads, p.value_dim, p.activation_type}, value_rows},
  };
  for (const Map& m : maps) {
    if (const cudaError_t status = encode_tensor_map(m.map, m.tensor, kStepTokens, m.columns)) return status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_fused_scan(const ChunkFwdKernelParams& kernel_params, int value_tile, cudaStream_t stream) {
  const ChunkFwdProblem& problem = kernel_params.call.problem;
  FusedScanParams params;
  if (const cudaError_t status = make_params(params, kernel_params.call, kernel_params.vectorized, value_tile)) return status;
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Element = decltype(element);
    const auto launch_config = [&](auto config) {
      using Config = decltype(config);
      const int64_t ctas = problem.sequences * problem.value_heads * (Config::V / Config::kRows);
      return launch(fused_scan_kernel<Config>, ctas, Config::kThreads, Config::kSharedBytes, stream, params);
    };
    const auto with_rows = [&](auto vectorized) {
      constexpr bool kVectorized = decltype(vectorized)::value;
#ifdef KDA_DEV
      if constexpr (key_dim() == 128 && value_dim() == 128 && kVectorized && std::is_same_v<Element, BFloat16>) {
        if (value_tile == 128) return launch_config(FusedConfig<128, 128, 128, BFloat16, true>());
        return launch_config(FusedConfig<128, 128, 64, BFloat16, true>());
      }
      return cudaErrorNotSupported;
#else
      if constexpr (value_dim() == 128) {
        if (value_tile == 128) return launch_config(FusedConfig<key_dim(), value_dim(), 128, Element, kVectorized>());
      }
      return launch_config(FusedConfig<key_dim(), value_dim(), 64, Element, kVectorized>());
#endif
    };
    return kernel_params.vectorized ? with_rows(std::true_type()) : with_rows(std::false_type());
  });
}

}  // namespace kda
