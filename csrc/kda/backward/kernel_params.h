// What the backward kernels receive: the checked call and the addresses that the plan gave to its intermediates.
#pragma once

#include "../forward/kernel_params.h"

namespace kda {

struct ChunkBwdKernelParams {
  // The call of the forward and the intermediates of its first two stages, saved or computed again.
  ChunkFwdKernelParams forward;

  uint32_t progress_wanted;  // forward.progress of a chunk that both recurrences have left

  int64_t early_ctas;  // of stage 4, if it works beside the recurrences: those that find room from the beginning

  const void* dO;             // [B, T, HV, V] contiguous, activation type
  const float* dfinal_state;  // or null
  void *dq, *dk, *dv, *dg, *dbeta;
  float *dA_log, *ddt_bias;  // or null
  void* dinitial_state;      // or null

  // Workspace regions; see ChunkBwdWorkspace.
  uint8_t* dstate;  // [slots, HV] tiles of dS'^T [V, K], bf16, swizzled
  uint4* dU;        // [slots, HV, V / 16, C / 16, 32 lanes] operand fragments
  // What those leave out in the last chunk of a sequence, if there is a gradient of its final state:
  uint4* dstate_low;                     // [N, HV, V / 16, K / 16, 32 lanes]
  uint4* dU_low;                         // [N, HV, V / 16, C / 16, 32 lanes]
  uint32_t* by_levels;                   // [slots, HV]: whether a chunk's gradients are left to the levels of pairs
  float *dA_log_parts, *ddt_bias_parts;  // [slots, HV, K], or null
  float *dq_parts, *dk_parts;            // [B, T, HV, K], or null: a key head has one value head
};

// Launches of the stages, for the K, V and types of the call. Each returns the error of its launch.
// What becomes of the gradient in each segment of a cut, from zero; it runs beside the summary of the state.
cudaError_t launch_reverse_summary(const ChunkBwdKernelParams& params, cudaStream_t stream);
// overlaps: the kernel before is the recurrence of the state, and both run side by side.
cudaError_t launch_reverse_recurrence(const ChunkBwdKernelParams& params, int value_tile, bool overlaps,
                                      cudaStream_t stream);
cudaError_t launch_intra_chunk_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream);
cudaError_t launch_level_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream);
cudaError_t launch_reduce_gradients(const ChunkBwdKernelParams& params, cudaStream_t stream);

}  // namespace kda
