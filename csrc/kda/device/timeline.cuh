// Marks of what a CTA does when and where, for a timeline inside kernels (tools/timeline.py, docs/profiling.md). Only in a build with KDA_TIMELINE=1:
// elsewhere nothing is left of them.
#pragma once

#include <cstdint>

#include "../forward/kernel_params.h"

namespace kda {

// Numbers are those of tools/timeline.py.
enum class Mark : uint32_t {
  kSolveBegin = 10,      // a CTA of stage 1
  kSolveChunk = 11,      // index: tile
  kSolveEnd = 12,        // a CTA
  kStateBegin = 20,      // a CTA of the state recurrence, when stage 1 is there
  kStateChunks = 21,     // stored to this one
  kReverseBegin = 30,    // a CTA of the reverse recurrence
  kReverseChunks = 31,   // stored to this one, counted from the end of the sequence
  kGradientsBegin = 40,  // a CTA of stage 4
  kGradientsWait = 41,   // for a tile of both recurrences
  kGradientsThere = 42,  // it is there
  kGradientsChunk = 43,  // index: tile
  kGradientsEnd = 44,    // a CTA
};

// By one thread.
__device__ __forceinline__ void mark([[maybe_unused]] const ChunkFwdKernelParams& params, [[maybe_unused]] Mark what,
                                     [[maybe_unused]] uint32_t index) {
#ifdef KDA_TIMELINE
  // The first word counts, and from the second place on there is a mark at each.
  struct alignas(32) Place {
    unsigned long long nanoseconds;
    uint32_t what, index, cta, multiprocessor;
  };
  if (params.timeline == nullptr) return;
  const uint32_t at = atomicAdd(static_cast<uint32_t*>(params.timeline), 1u) + 1;
  if (at >= params.timeline_places) return;
  Place place = {0, static_cast<uint32_t>(what), index, blockIdx.x, 0};
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(place.nanoseconds));
  asm volatile("mov.u32 %0, %smid;" : "=r"(place.multiprocessor));
  static_cast<Place*>(params.timeline)[at] = place;
#endif
}

}  // namespace kda
