// From a number to a chunk, for grids that go through all of them.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/divisor.cuh"
#include "kernel_params.h"

namespace kda {

struct ChunkDivisors {
  Divisor value_heads;
  Divisor chunks;  // of a sequence, and
  Divisor chains;  // sequences * value_heads, if lengths are equal

  ChunkDivisors() = default;
  explicit ChunkDivisors(const ChunkFwdKernelParams& params)
      : value_heads(static_cast<uint32_t>(params.call.problem.value_heads)) {
    const ChunkFwdProblem& problem = params.call.problem;
    if (params.call.cu_seqlens != nullptr || params.chunk_slots == 0) return;
    chunks = Divisor(static_cast<uint32_t>(params.chunk_slots / problem.sequences));
    chains = Divisor(static_cast<uint32_t>(problem.sequences * problem.value_heads));
  }
};

// What a CTA takes turn by turn of a grid that goes through tiles in their order: in each turn one, at a place that is shifted from turn to turn. Else the
// ends of sequences, which take longer, would fall to the same CTAs again and again where a sequence has a multiple of the grid's size in tiles.
struct TileOfTurn {
  static constexpr uint32_t kShift = 37;
  uint32_t first, index;  // of the turn; of the tile

  static __host__ __device__ __forceinline__ TileOfTurn begin(uint32_t index) { return {0, index}; }
  __host__ __device__ __forceinline__ TileOfTurn next(uint32_t ctas, uint32_t shift = kShift) const {
    const uint32_t place = index - first + (ctas > shift ? shift : 0);
    return {first + ctas, first + ctas + (place >= ctas ? place - ctas : place)};
  }
};

// A chunk of a value head; row and chunk if lengths are equal, where sequences are rows of the batch.
struct ChunkIndex {
  uint32_t slot, value_head, row, chunk;

  // The tile of an index in memory, slot by slot.
  __device__ __forceinline__ ChunkIndex(const ChunkDivisors& divisors, uint32_t tile) {
    const auto [of_tile, tile_head] = divisors.value_heads.divide(tile);
    const auto [sequence, sequence_chunk] = divisors.chunks.divide(of_tile);
    slot = of_tile, value_head = tile_head, row = sequence, chunk = sequence_chunk;
  }
  // Of equal lengths: the chain of an index, sequence by sequence.
  __device__ __forceinline__ ChunkIndex(const ChunkDivisors& divisors, uint32_t chain, uint32_t of_chain)
      : chunk(of_chain) {
    const auto [sequence, chain_head] = divisors.value_heads.divide(chain);
    row = sequence, value_head = chain_head, slot = row * divisors.chunks.value() + chunk;
  }
  __device__ __forceinline__ uint32_t tile(const ChunkDivisors& divisors) const {
    return slot * divisors.value_heads.value() + value_head;
  }
  // By a whole warp.
  __device__ __forceinline__ SlotOfSequence found(const ChunkFwdParams& call, int lane) const {
    if (call.cu_seqlens != nullptr) return find_slot(call, slot, kChunkTokens, lane);
    const ChunkLocation location = locate_chunk_of_row(call, row, chunk);
    return {row, location, chunk == 0, location.first_token + location.tokens == call.problem.tokens};
  }
};

}  // namespace kda
