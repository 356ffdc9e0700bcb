// What the forward kernels receive: the checked call and the addresses that the plan gave to its intermediates.
#pragma once

#include <cstdint>

#include "../kda.h"

namespace kda {

// The maps of the segments of a cut, and what they are composed with, in the order of the segments or against it.
struct SegmentMaps {
  const float* map;
  float4* state;
  const uint32_t* faded;  // whether a map is 0; null: none is
  bool is_reversed;
};

// Which chains the fused kernel leaves to the stages after it where it cuts chains. Of the cut before each stretch, by each CTA of its cluster: 1 + the
// chain in which it is, if that is left, else 0.
struct LeftChains {
  uint2* cuts;  // null: there was no such kernel, and all are left
  int count;
};

// The cut of the recurrences over chunks: sequences in segments, whose ends come from their affine maps (segment_compose.cuh).
struct RecurrenceSegments {
  int64_t chunks;  // of one segment; 0: sequences are not cut
  int64_t slots;   // grid extent over segments; without a cut the number of sequences

  // A tile for each (segment slot, value head); null where a recurrence is not cut or not run.
  float *map, *transposed_map;  // M and M^T, as StepKernelParams::segment_map
  float4* state;                // as StepKernelParams::segment_state
  float4* dstate;               // the same of the state's gradient, at the beginning of a segment

  [[nodiscard]] SegmentMaps state_maps() const { return {map, state, nullptr, /*is_reversed=*/false}; }
  [[nodiscard]] SegmentMaps dstate_maps() const { return {transposed_map, dstate, nullptr, /*is_reversed=*/true}; }
};

// Warps of a CTA of a recurrence over chunks that move what it takes and leaves (RecurrenceThreads::Mover).
inline constexpr int kMoverWarps = 4;

// Warps of a CTA of stage 1; each counts in SolveProgress.
inline constexpr int kSolveWarps = 8;

struct ChunkFwdKernelParams {
  ChunkFwdParams call;

  // Workspace regions, one tile for each (chunk slot, value head); see ChunkFwdWorkspace.
  uint8_t* W;          // [slots, HV] tiles [C, K], bf16, swizzled
  uint8_t* K_decayed;  // [slots, HV] tiles [C, K], bf16, swizzled
  uint8_t* Q_gated;    // [slots, HV] tiles [C, K], bf16, swizzled
  uint8_t* Aqk;        // [slots, HV] tiles [C, C], bf16, swizzled
  uint4* U;  // [slots, HV, V / 16, C / 8, 32 lanes]: U0 = Tinv V as accumulator fragments (fp32), n-tile by n-tile,
             // replaced by U as operand fragments (bf16), a high and a low one for each 16 tokens, if wants_output
  uint4*
      U_rounded;   // [slots, HV, V / 16, C / 16, 32 lanes]: the high ones alone, for the backward; null as `inverse` is
  uint8_t* state;  // [slots, HV] tiles of S^T [V, K], bf16, swizzled
  float* chunk_decay;  // [slots, HV, K]
  float* beta;         // [slots, HV, C], after its transforms, for a recurrence that makes U0 itself; else null
  // [slots, HV] tiles [C, C], bf16, swizzled: (I + Akk)^-1; null in the forward, unless it saves for the backward, and
  // written for the backward.
  uint8_t* inverse;

  // Of the ends of sequences, one tile for each (sequence, value head), written if `inverse` is: what bf16 leaves out.
  uint4* U_low;  // [N, HV, V / 16, C / 16, 32 lanes] of U in the last chunk, operands B of 16 of V and 16 tokens
  uint8_t* Q_gated_low;  // [N, HV] tiles [C, K], bf16, swizzled: of Q_gated in the first chunk

  int64_t chunk_slots;

  RecurrenceSegments segments;

  // How many CTAs of the recurrences have left what they leave of a chunk, the next tile to take, and words of SolveProgress: of a backward whose stages
  // work beside each other, else null. Cleared by stage 1.
  uint32_t* progress;      // [slots, HV], 1, 1, [followed_ctas]
  uint32_t followed_ctas;  // of stage 1, if the recurrences follow it; else 0

  bool wants_output;  // stage 3 follows
  bool vectorized;    // every 8-element group of q, k, v and g starts at a multiple of 16 bytes
#ifdef KDA_TIMELINE
  void* timeline;  // where marks go, or null; see device/timeline.cuh
  uint32_t timeline_places;
#endif
};

// The parameters with the regions of a plan (ChunkFwdWorkspace, ChunkIntermediates) at `base`.
template <typename Regions>
ChunkFwdKernelParams stage_params(const ChunkFwdParams& call, const Regions& at, uint8_t* base, int64_t chunk_slots) {
  ChunkFwdKernelParams params = {};
  params.call = call;
  params.W = base + at.W;
  params.K_decayed = base + at.K_decayed;
  params.Q_gated = base + at.Q_gated;
  params.Aqk = base + at.Aqk;
  params.state = base + at.state;
  params.chunk_decay = reinterpret_cast<float*>(base + at.chunk_decay);
  params.chunk_slots = chunk_slots;
  params.segments.slots = call.problem.sequences;
  params.wants_output = true;
  params.vectorized = inputs_are_aligned(call);
  return params;
}

struct SegmentComposeParams {
  ChunkFwdParams call;
  int64_t segment_chunks;
  SegmentMaps maps[2];
  int directions;   // how many of them there are
  LeftChains left;  // of a forward that cuts its fused kernel
};

// Launches of the stages, for the K, V and types of the call. Each returns the error of its launch.
cudaError_t launch_intra_chunk_solve(const ChunkFwdKernelParams& params, cudaStream_t stream);
cudaError_t launch_state_recurrence(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream);
// What becomes of the state in each segment of a cut, from zero, where segments.state is wanted, and of the identity.
cudaError_t launch_state_summary(const ChunkFwdKernelParams& params, cudaStream_t stream);
cudaError_t launch_output_gemm(const ChunkFwdKernelParams& params, cudaStream_t stream);

cudaError_t launch_segment_compose(const SegmentComposeParams& params, cudaStream_t stream);

// All of them.
cudaError_t run_stages(const ChunkFwdKernelParams& params, int value_tile, cudaStream_t stream);

}  // namespace kda
