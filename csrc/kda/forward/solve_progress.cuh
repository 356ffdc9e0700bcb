// How recurrences of a backward follow stage 1 while it still works: it goes through the chunks from the ends of the sequences, which have equal
// lengths, to their middle, and tells when all are there but those of its last turn, and then of each of these.
#pragma once

#include "../device/ptx.cuh"
#include "chunk_divisors.cuh"
#include "kernel_params.h"

namespace kda {

// The order of the tiles (chunk slot, value head): turn by turn, and in each a chunk of every chain (sequence, value head).
struct SolveOrder {
  uint32_t chunks, chains;  // of a sequence; sequences * value heads

  __device__ __forceinline__ explicit SolveOrder(const ChunkDivisors& divisors)
      : chunks(divisors.chunks.value()), chains(divisors.chains.value()) {}
  __device__ __forceinline__ explicit SolveOrder(const ChunkFwdKernelParams& params) {
    const ChunkFwdProblem& problem = params.call.problem;
    chunks = static_cast<uint32_t>(params.chunk_slots) / static_cast<uint32_t>(problem.sequences);
    chains = static_cast<uint32_t>(problem.sequences) * problem.value_heads;
  }
  __device__ __forceinline__ uint32_t index_of(uint32_t chunk, uint32_t chain) const {
    const uint32_t turn = chunk < (chunks + 1) / 2 ? 2 * chunk : 2 * (chunks - 1 - chunk) + 1;
    return turn * chains + chain;
  }
  __device__ __forceinline__ uint32_t chunk_at(uint32_t turn) const {
    return turn % 2 == 0 ? turn / 2 : chunks - 1 - turn / 2;
  }
};

struct SolveProgress {
  uint32_t* before_last;  // how many warps have left all but the last turn of tiles
  uint32_t* last;         // [ctas]: how many have left a tile of the last turn
  uint32_t ctas, first_of_last;

  __device__ __forceinline__ explicit SolveProgress(const ChunkFwdKernelParams& params) : ctas(params.followed_ctas) {
    const uint32_t tiles = static_cast<uint32_t>(params.chunk_slots * params.call.problem.value_heads);
    before_last = params.progress + tiles + 1, last = before_last + 1;
    first_of_last = (tiles - 1) / ctas * ctas;
  }

  // By whole warps that have stored their part of the index-th tile.
  __device__ __forceinline__ void tell(uint32_t index) const {
    if (index + ctas < first_of_last) return;
    __syncwarp();
    if ((threadIdx.x & 31) == 0)
      ptx::add_release(index < first_of_last ? before_last : last + (index - first_of_last), 1);
  }
  // Whether a tile is there.
  __device__ __forceinline__ bool has(uint32_t index) const {
    if (index < first_of_last) return ptx::load_acquire(before_last) >= ctas * kSolveWarps;
    return ptx::load_acquire(last + (index - first_of_last)) >= kSolveWarps;
  }
};

// What a recurrence knows of the chunks of its chain.
struct SolvedChunks {
  const ChunkFwdKernelParams& params;
  const int chunks;
  const bool is_reversed;  // from the last chunk to the first
  int known = 0;           // how many are there

  // Until the i-th is there, for copies by the copy engine. By a whole warp. rows: of V, of a CTA.
  __device__ __forceinline__ void wait_for(int i, int rows, int lane) {
    if (params.followed_ctas == 0) return;
    const uint32_t chain = blockIdx.x / (static_cast<uint32_t>(params.call.problem.value_dim) / rows);
    while (i >= known) {
      const int next = known + lane;
      const uint32_t chunk = is_reversed ? chunks - 1 - next : next;
      const bool is_there = next < chunks && SolveProgress(params).has(SolveOrder(params).index_of(chunk, chain));
      const unsigned missing = ~__ballot_sync(0xffffffffu, is_there);
      known += missing == 0 ? 32 : __ffs(missing) - 1;
      if (i >= known) __nanosleep(100);
    }
    ptx::fence_proxy_async_global();
  }
};

}  // namespace kda
