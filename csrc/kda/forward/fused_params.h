// What the fused forward receives, and its launches.
#pragma once

#include <cuda.h>

#include "kernel_params.h"

namespace kda {

// Tokens of one step of the fused scan: the chunk of its formulas. 32 rather than 64: half the pairs and half the solve for each
// token, and a range of the gates that one reference token in the middle can serve (see fused_pairs.cuh).
inline constexpr int kStepTokens = 32;

// The maps describe the tensors as encode_tensor_map() does, for copies of a step of one head; every row of 16 bytes is aligned.
struct FusedScanParams {
  ChunkFwdParams call;
  CUtensorMap q, k, g, v;
};

cudaError_t launch_fused_scan_k64(const FusedScanParams& params, int value_tile, cudaStream_t stream);
cudaError_t launch_fused_scan_k128(const FusedScanParams& params, int value_tile, cudaStream_t stream);

}  // namespace kda
