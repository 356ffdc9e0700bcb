// What the recurrences over chunks share, that of the state (state_recurrence.cuh) and that of its gradient
// (../backward/reverse_recurrence.cuh): a CTA of one or two warpgroups of 64 rows of V and one more that fills a ring of stages,
// products of these rows, and operand fragments on their way to memory.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/elements.cuh"
#include "../device/tile.cuh"
#include "../device/wgmma.cuh"
#include "kernel_params.h"
#include "solve_progress.cuh"
#include "state_fragments.cuh"

namespace kda {

// Rows of V that a warpgroup of a recurrence owns.
inline constexpr int kRecurrenceRows = 64;

// What a CTA works on: which chunks of which value head, and which of its rows.
struct RecurrenceBlock {
  SegmentLocation segment;  // the whole sequence if it is not cut
  int64_t segment_tile;     // index of (segment slot, value head)
  int64_t first_tile;       // index of (chunk slot, value head) of the first chunk
  int value_head;
  int first_row_tile;  // in units of 16 rows, of V or of a map
  bool is_map;

  // The grid has value_blocks blocks of `rows` rows of V for each segment and value head, and map_blocks of a map. Called by whole warps.
  __device__ __forceinline__ RecurrenceBlock(const ChunkFwdParams& call, int64_t segment_chunks, int rows,
                                             int value_blocks, int map_blocks, int lane) {
    const int cta = blockIdx.x, blocks = value_blocks + map_blocks, value_heads = call.problem.value_heads;
    const int64_t slot = cta / blocks / value_heads;
    value_head = cta / blocks % value_heads;
    segment = locate_segment(call, slot, segment_chunks, lane);
    segment_tile = slot * value_heads + value_head;
    first_tile = segment.first_chunk_slot * value_heads + value_head;
    is_map = cta % blocks >= value_blocks;
    first_row_tile = (cta % blocks - (is_map ? value_blocks : 0)) * (rows / 16);
  }

  // The index of the sequence and value head.
  __device__ __forceinline__ int64_t chain(int value_heads) const {
    return segment.sequence * value_heads + value_head;
  }

  // The tile of 16 rows that a warp owns.
  __device__ __forceinline__ int row_tile(int thread) const { return first_row_tile + thread / 32; }

  // Where this warp's rows of a tile [V, K] of fragments lie, of the segment or of one some segments behind.
  template <int K>
  __device__ __forceinline__ float4* fragments(float4* tiles, const ChunkFwdParams& call, int thread,
                                               int segments_behind = 0) const {
    const int64_t tile = segment_tile + segments_behind * call.problem.value_heads;
    return fragments_at<K>(tiles, tile, call.problem.value_dim, row_tile(thread));
  }
};

// Threads and registers of a CTA with kGroups consuming warpgroups, the only one of its multiprocessor.
template <int kGroups_>
struct RecurrenceThreads {
  static constexpr int kGroups = kGroups_;
  static constexpr int kConsumers = 128 * kGroups, kMovers = 32 * kMoverWarps, kThreads = kConsumers + kMovers;
  static constexpr int kRows = kRecurrenceRows * kGroups;
  // The CTA starts with kRegisters a thread; what the movers give up of them is all that the consumers can get.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kMoverRegisters = 72;
  static constexpr int kMostRegisters = (kRegisters * (kGroups + 1) - kMoverRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kMostRegisters < 240 ? kMostRegisters : 240;

  static __device__ __forceinline__ bool is_mover() { return threadIdx.x >= kConsumers; }

  // The movers' warps: two fill the stages, whose first lane asks for bulk copies; one thread stores, and one tells of it.
  static constexpr int kFillers = 64;
  enum Mover { kFills, kStores = kFillers / 32, kTells };
  static_assert(kTells < kMoverWarps);
  static __device__ __forceinline__ bool is_mover(Mover which) {
    return (threadIdx.x - kConsumers) / 32 == static_cast<unsigned>(which);
  }
};

// Which stage of a ring, and the parity of its barriers in this turn.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The ring of stages of a recurrence, at the start of shared memory; behind it two barriers for each, two of the fragments that
// leave, and what the CTA works on, so that it is not kept in registers to the end.
struct StageRing {
  uint32_t first_stage;
  int stages, stage_bytes;

  __device__ __forceinline__ uint32_t stage(int i) const { return first_stage + i * stage_bytes; }
  __device__ __forceinline__ uint32_t full(int i) const { return first_stage + stages * stage_bytes + 16 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(i) + 8; }
  __device__ __forceinline__ uint32_t staged() const { return full(stages); }  // fragments of a chunk
  __device__ __forceinline__ uint32_t taken() const { return empty(stages); }
  static constexpr int barrier_bytes(int stages) { return (stages + 2) * 16; }
  static constexpr int bytes_behind(int stages) {
    return (barrier_bytes(stages) + static_cast<int>(sizeof(RecurrenceBlock)) + 255) / 256 * 256;
  }
  __device__ __forceinline__ uint32_t* stored(uint8_t* shared) const {  // how many chunks are in memory
    return reinterpret_cast<uint32_t*>(shared + stages * stage_bytes + (stages + 1) * 16);
  }
  __device__ __forceinline__ RecurrenceBlock& block(uint8_t* shared) const {
    return *reinterpret_cast<RecurrenceBlock*>(shared + stages * stage_bytes + barrier_bytes(stages));
  }

  // By all threads of the CTA. arrivals: on `full`, besides the bytes of bulk copies.
  __device__ __forceinline__ void init(uint8_t* shared, const RecurrenceBlock& works_on, int arrivals,
                                       int consumers) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        ptx::mbarrier_init(full(i), arrivals);
        ptx::mbarrier_init(empty(i), consumers);
      }
      ptx::mbarrier_init(staged(), consumers);
      ptx::mbarrier_init(taken(), 1);
      ptx::fence_mbarrier_init();
      *stored(shared) = 0;
      block(shared) = works_on;
    }
    __syncthreads();
  }

  // What the movers do, each warp its own: those of kFills, for each of `chunks` chunks, fill(i, stage) once the stage is free, and fill_last(position) when
  // all are on their way, of the stage behind the last chunk's, which is free when its barrier `empty` says so.
  template <typename Fill, typename FillLast>
  __device__ __forceinline__ void fill_stages(int chunks, Fill fill, FillLast fill_last) const {
    for (int i = 0; i < stages && i < chunks; ++i) fill(i, i);
    if (chunks < stages) fill_last(RingPosition{chunks, 1});
    RingPosition ring;
    for (int i = 0; i + stages <= chunks; ++i) {
      if (i + stages < chunks) {
        ptx::mbarrier_wait_parity(empty(ring.stage), ring.parity);
        fill(i + stages, ring.stage);
      } else {
        fill_last(ring);
      }
      ring.advance(stages);
    }
  }
  // By one thread: what leaves goes to the copy engine, store(), when it is staged. stored: how many chunks of it are in memory.
  template <typename Store>
  __device__ __forceinline__ void store_staged(int chunks, uint32_t* stored, Store store) const {
    const auto publish = [&](int count) {
      __threadfence_block();
      atomicExch(stored, static_cast<uint32_t>(count));
    };
    for (int i = 0; i < chunks; ++i) {
      ptx::mbarrier_wait_parity(staged(), i & 1);
      ptx::fence_proxy_async_shared();  // by this thread alone: by each that has staged it took a fifth of their time
      store();
      ptx::cp_async_bulk_wait_read_all();
      ptx::mbarrier_arrive(taken());
      ptx::cp_async_bulk_wait_all_but<1>();
      publish(i);
    }
    ptx::cp_async_bulk_wait_all();
    publish(chunks);
  }
  // By a thread of another warp, as it waits for a fence each time: of chunks that are in memory, progress(i) counts one up.
  template <typename Progress>
  static __device__ __forceinline__ void tell_stored(int chunks, uint32_t* stored, Progress progress) {
    for (int told = 0; told < chunks;) {
      const int count = static_cast<int>(atomicAdd(stored, 0));
      if (count == told) {
        __nanosleep(50);
        continue;
      }
      __threadfence();
      for (; told < count; ++told) atomicAdd(progress(told), 1);
    }
  }
};

// Shared memory of a recurrence: the ring and its barriers, then Config::Staged, unless it is a summary.
template <typename Config>
constexpr int staging_offset(int stages) {
  return stages * Config::kStageBytes + StageRing::bytes_behind(stages);
}
template <typename Config>
constexpr int recurrence_shared_bytes(int stages) {
  return staging_offset<Config>(stages) + (Config::kSummary ? 0 : Config::Staged::kBytes);
}

// Stages of the ring: all that fit. (sm_90: 228 KiB, less 1 KiB that the system keeps for a CTA.)
template <typename Config>
constexpr int stages_of_ring() {
  const int stages = (227 * 1024 - recurrence_shared_bytes<Config>(0) - 256) / Config::kStageBytes;
  return stages < Config::kMaxStages ? stages : Config::kMaxStages;
}

// Half of an A operand, 8 of its 16 columns, from the accumulators of these: their high parts, and what those leave out.
__device__ __forceinline__ void split_half(uint32_t (&high)[4], uint32_t (&low)[4], int half, float x, float y, float z,
                                           float w) {
  const SplitBf16 upper(x, y), lower(z, w);
  high[2 * half] = upper.high, high[2 * half + 1] = lower.high;
  low[2 * half] = upper.low, low[2 * half + 1] = lower.low;
}

// D (64 x N) += A (64 x 16) B (16 x N) with N = K or C.
template <bool kTransposed>
__device__ __forceinline__ void multiply_rows(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  wgmma::m64n64k16_bf16<kTransposed>(d, a, b, true);
}
template <bool kTransposed>
__device__ __forceinline__ void multiply_rows(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  wgmma::m64n128k16_bf16<kTransposed>(d, a, b, true);
}

// Bytes from the start of a [C, K] tile to the operand of channels 16 kt .. 16 kt + 15, if they are what is summed over; and to
// that of tokens 16 kt .. if those are.
template <typename KeyTile>
__device__ __forceinline__ constexpr int channels_at(int kt) {
  return kt / 4 * KeyTile::kBlockBytes + kt % 4 * 32;
}
__device__ __forceinline__ constexpr int tokens_at(int kt) { return 16 * 128 * kt; }

// Scales the columns of rows of S^T by e^{G_C}, which lies in shared memory.
template <int K>
__device__ __forceinline__ void scale_channels(StateFragments<K>& state, const uint8_t* decay, int lane) {
  const float* const factors = reinterpret_cast<const float*>(decay) + 2 * (lane & 3);
#pragma unroll
  for (int n = 0; n < K / 8; ++n) {
    const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * n);
    state.acc[n][0] *= factor.x, state.acc[n][1] *= factor.y;
    state.acc[n][2] *= factor.x, state.acc[n][3] *= factor.y;
  }
}

// Operands of a CTA's rows of V on their way to memory, as they lie there: of each 16 rows an image of S^T [16][K] in bf16, and then fragments of U^T.
// Consumers leave them in shared memory, and the copy engine takes them from there, so that no stores are in their chain.
template <int K, int kTokenTiles, int kRows>
struct StagedOperands {
  using StateTile = SwizzledTile<K>;
  static constexpr int kStateBytes = 16 * K * 2, kValueBytes = kTokenTiles * 512;  // of 16 rows
  static constexpr int kRowTiles = kRows / 16, kValues = kRowTiles * kStateBytes,
                       kBytes = kRowTiles * (kStateBytes + kValueBytes);

  static __device__ __forceinline__ void put_state(uint8_t* staging, int row_tile, const uint32_t (&operand)[4], int kt,
                                                   int lane) {
    StateTile::store_a(operand, ptx::shared_address(staging) + row_tile * kStateBytes, 0, 16 * kt, lane);
  }
  static __device__ __forceinline__ void put_values(uint8_t* staging, int row_tile, const uint4& operand, int kt,
                                                    int lane) {
    reinterpret_cast<uint4*>(staging + kValues + row_tile * kValueBytes)[kt * 32 + lane] = operand;
  }
  // By one thread: to the images and fragments of these rows, and on to those of the next chunk, row_tiles further, or of the one before.
  template <bool kReversed>
  static __device__ __forceinline__ void store(uint8_t*& states, uint8_t*& values, uint8_t* staging,
                                               int64_t row_tiles) {
    ptx::cp_async_bulk_store(states, ptx::shared_address(staging), kRowTiles * kStateBytes);
    if constexpr (kTokenTiles > 0) {
      ptx::cp_async_bulk_store(values, ptx::shared_address(staging + kValues), kRowTiles * kValueBytes);
    }
    ptx::cp_async_bulk_commit_group();
    const auto advance = [](uint8_t*& at, int64_t bytes) { at = kReversed ? at - bytes : at + bytes; };
    advance(states, row_tiles * kStateBytes);
    advance(values, row_tiles * kValueBytes);
  }
};

}  // namespace kda
