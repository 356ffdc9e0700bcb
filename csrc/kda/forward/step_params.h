// What the kernels of the forward that work step by step receive, and their launches.
#pragma once

#include <cuda.h>

#include "kernel_params.h"

namespace kda {

// They describe the tensors of a call as encode_tensor_map() does, for copies of a step of one head; every row of 16 bytes is aligned.
struct TensorMaps {
  CUtensorMap q, k, g, v;
};

struct StepKernelParams {
  ChunkFwdParams call;
  TensorMaps maps;

  // Of the fused kernel:
  int64_t clusters;  // of the grid
  float4*
      handoff_states;  // [clusters, V / 16, K / 8, 32 lanes] fragments of S^T where a chain goes from one cluster to another
  uint32_t* handoff_flags;  // [clusters, V / 64] whether these rows are there; null if no chain is shared

  // Of the fused kernel where it cuts chains, and of the stages after it (forgetting.cuh):
  LeftChains left;

  // Of the stepwise stages:
  uint8_t* images;          // [step slots, HV] StepImage
  float* segment_map;       // [segment slots, HV, K / 16, K / 8] tiles of M^T [16, 8], column by column
  float4* segment_state;    // [segment slots, HV, V / 16, K / 8, 32 lanes] fragments of S^T at the end of a segment
  uint32_t* segment_faded;  // [segment slots, HV] whether nothing of the state at the entry is left: M is 0
  int64_t step_slots;
  int64_t segment_chunks;  // chunks of one segment; 0: sequences are not cut
  int64_t segment_slots;   // of a cut; else the number of sequences
};

[[nodiscard]] cudaError_t make_tensor_maps(TensorMaps& maps, const ChunkFwdParams& call);

// Launches for one K, 64 or 128; each is instantiated in a file of its own. Each returns the error of its launch.
template <int K>
cudaError_t launch_fused_scan(const StepKernelParams& params, cudaStream_t stream);
// The same with stretches that begin anywhere in a chain, of those chains whose gates forget all that was before.
template <int K>
cudaError_t launch_fused_cut(const StepKernelParams& params, cudaStream_t stream);

// The stages of the stepwise path, in order; the second and the third only if sequences are cut.
template <int K>
cudaError_t launch_step_factors(const StepKernelParams& params, cudaStream_t stream);
template <int K>
cudaError_t launch_segment_summary(const StepKernelParams& params, cudaStream_t stream);
template <int K>
cudaError_t launch_state_scan(const StepKernelParams& params, cudaStream_t stream);

}  // namespace kda
