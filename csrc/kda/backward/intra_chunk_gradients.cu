#include "intra_chunk_gradients.cuh"

#include <algorithm>

#include "../forward/launch.cuh"
#include "../forward/tensor_map.h"

namespace kda {

namespace {

cudaError_t make_tensor_maps(GradientTensorMaps& maps, const ChunkBwdKernelParams& params) {
  const ChunkFwdParams& call = params.forward.call;
  const ChunkFwdProblem& p = call.problem;
  const auto contiguous = [&](int64_t heads, int64_t dim) {
    return TokenStrides{p.tokens * heads * dim, heads * dim, dim};
  };
  struct Map {
    CUtensorMap& map;
    TokenTensor tensor;
  };
  const auto of_keys = [&](CUtensorMap& map, const void* base, const TokenStrides& strides) {
    return Map{map, {base, strides, p.batch, p.tokens, p.heads, p.key_dim, p.activation_type}};
  };
  const auto of_gates = [&](CUtensorMap& map, const void* base, const TokenStrides& strides) {
    return Map{map, {base, strides, p.batch, p.tokens, p.value_heads, p.key_dim, call.gate_type}};
  };
  const auto of_values = [&](CUtensorMap& map, const void* base) {
    const TokenStrides strides = contiguous(p.value_heads, p.value_dim);
    return Map{map, {base, strides, p.batch, p.tokens, p.value_heads, p.value_dim, p.activation_type}};
  };
  const Map all[] = {
      of_keys(maps.q, call.q, call.q_stride),
      of_keys(maps.k, call.k, call.k_stride),
      of_gates(maps.g, call.g, call.g_stride),
      of_values(maps.dO, params.dO),
      of_keys(maps.dq, params.dq, contiguous(p.heads, p.key_dim)),
      of_keys(maps.dk, params.dk, contiguous(p.heads, p.key_dim)),
      of_values(maps.dv, params.dv),
      of_gates(maps.dg, params.dg, contiguous(p.value_heads, p.key_dim)),
  };
  for (const Map& m : all) {
    const cudaError_t status = encode_tensor_map(m.map, m.tensor, kChunkTokens, static_cast<int>(m.tensor.dim));
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_intra_chunk_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream) {
  const ChunkFwdProblem& problem = params.forward.call.problem;
  const int64_t tiles = params.forward.chunk_slots * problem.value_heads;
  if (tiles == 0) return cudaSuccess;
  IntraChunkGradientsParams of_kernel = {params, ChunkDivisors(params.forward), {}};
  return for_instantiation(problem, [&](auto key_dim, auto value_dim, auto element) {
    using Element = decltype(element);
    const auto launch_kind = [&](auto kind) {
      using Config = IntraChunkGradientsConfig<key_dim(), value_dim(), Element, kind.value>;
      if (Config::kTensorCopies) {
        const cudaError_t status = make_tensor_maps(of_kernel.maps, params);
        if (status != cudaSuccess) return status;
      }
      const int64_t ctas = std::min<int64_t>(tiles, int64_t{std::max(problem.sm_count, 1)} * Config::kCtasPerSm);
      return launch_grid(intra_chunk_gradients_kernel<Config>,
                         {ctas, Config::kThreads, Config::kSharedBytes, 1, /*overlaps=*/true}, stream, of_kernel);
    };
    const bool is_plain =
        problem.tokens > 0 && copy_engine_reaches(problem) && params.forward.vectorized && params.dq_parts == nullptr;
    return for_call_kind<Element>(params.forward.call, is_plain, launch_kind);
  });
}

}  // namespace kda
