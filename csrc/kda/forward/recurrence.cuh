// What the recurrences over chunks share, that of the state (state_recurrence.cuh) and that of its gradient
// (../backward/reverse_recurrence.cuh): a CTA of one or two warpgroups of 64 rows of V and one more that fills a ring of stages,
// products of these rows, and operand fragments on their way to memory.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/elements.cuh"
#include "../device/tile.cuh"
#include "../device/wgmma.cuh"
#include "state_fragments.cuh"

namespace kda {

// Rows of V that a warpgroup of a recurrence owns.
inline constexpr int kRecurrenceRows = 64;

// Threads and registers of a CTA with kGroups consuming warpgroups, the only one of its multiprocessor.
template <int kGroups_>
struct RecurrenceThreads {
  static constexpr int kGroups = kGroups_;
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 128;
  static constexpr int kRows = kRecurrenceRows * kGroups;
  static constexpr int kMoverRegisters = 56;
  static constexpr int kMostRegisters = (65536 / 128 - kMoverRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kMostRegisters < 240 ? kMostRegisters : 240;

  static __device__ __forceinline__ bool is_mover() { return threadIdx.x >= kConsumers; }
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

// The ring of stages of a recurrence, at the start of shared memory; behind it two barriers for each, and two for each of kBuffers
// buffers of operands that leave.
template <int kBuffers>
struct StageRing {
  uint32_t first_stage;
  int stages, stage_bytes;

  __device__ __forceinline__ uint32_t stage(int i) const { return first_stage + i * stage_bytes; }
  __device__ __forceinline__ uint32_t full(int i) const { return first_stage + stages * stage_bytes + 16 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(i) + 8; }
  __device__ __forceinline__ uint32_t staged(int buffer) const { return full(stages + buffer); }  // operands of a chunk
  __device__ __forceinline__ uint32_t taken(int buffer) const { return empty(stages + buffer); }
  static constexpr int barrier_bytes(int stages) { return (stages + kBuffers) * 16; }

  // By all threads of the CTA. arrivals: on `full`, besides the bytes of bulk copies.
  __device__ __forceinline__ void init(int arrivals, int consumers, int movers) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        ptx::mbarrier_init(full(i), arrivals);
        ptx::mbarrier_init(empty(i), consumers);
      }
      for (int i = 0; i < kBuffers; ++i) {
        ptx::mbarrier_init(staged(i), consumers);
        ptx::mbarrier_init(taken(i), movers);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  // By consumers, before they leave operands in the buffer: those that it had are on their way.
  __device__ __forceinline__ void wait_for_buffer(int64_t chunk) const {
    if (chunk >= kBuffers) ptx::mbarrier_wait_parity(taken(buffer_of(chunk)), turn_of(chunk) ^ 1);
  }
  static __device__ __forceinline__ int buffer_of(int64_t chunk) { return static_cast<int>(chunk) % kBuffers; }
  static __device__ __forceinline__ uint32_t turn_of(int64_t chunk) {
    static_assert(kBuffers == 1 || kBuffers == 2);
    return static_cast<uint32_t>(chunk) / kBuffers & 1;
  }

  // By the movers, for each of `chunks` chunks: fill(i, stage) once the stage is free, and store(buffer) when its operands are
  // staged.
  template <typename Fill, typename Store>
  __device__ __forceinline__ void move(int64_t chunks, int lane, Fill fill, Store store) const {
    for (int i = 0; i < stages && i < chunks; ++i) fill(i, i);
    RingPosition ring;
    for (int64_t i = 0; i < chunks; ++i) {
      const int buffer = buffer_of(i);
      ptx::mbarrier_wait_parity(staged(buffer), turn_of(i));
      store(buffer);
      if (lane == 0) ptx::mbarrier_arrive(taken(buffer));
      if (i + stages < chunks) {
        ptx::mbarrier_wait_parity(empty(ring.stage), ring.parity);
        fill(i + stages, ring.stage);
      }
      ring.advance(stages);
    }
    if (lane == 0) ptx::cp_async_bulk_wait_all();
  }
};

// Stages of the ring of Config: all that fit. (sm_90: 228 KiB, less 1 KiB that the system keeps for a CTA.)
template <typename Config>
constexpr int stages_of_ring() {
  const int stages = (227 * 1024 - Config::shared_bytes(0) - 256) / Config::kStageBytes;
  return stages < Config::kMaxStages ? stages : Config::kMaxStages;
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

// Operands of one row tile of 16 rows of V on their way to memory: rows of S^T [16, K], and fragments of U^T. Consumers leave them in
// shared memory, a mover turns the rows into fragments, and the copy engine takes all from there: ordinary stores would keep
// shared memory waiting for the chain of the consumers.
template <int K, int kTokenTiles>
struct StagedOperands {
  using StateTile = SwizzledTile<K>;
  static constexpr int kStateBytes = K / 16 * 512, kValueBytes = kTokenTiles * 512, kBytes = kStateBytes + kValueBytes;

  static __device__ __forceinline__ void put_state(uint32_t area, const uint32_t (&operand)[4], int kt, int lane) {
    StateTile::store_a(operand, area, 0, 16 * kt, lane);
  }
  static __device__ __forceinline__ void put_values(uint8_t* area, const uint4& operand, int kt, int lane) {
    reinterpret_cast<uint4*>(area + kStateBytes)[kt * 32 + lane] = operand;
  }
  // The rows to fragments in their place, by a warp with a barrier of its own; kTransposed: operands of S rather than of S^T.
  template <bool kTransposed>
  static __device__ __forceinline__ void to_fragments(uint8_t* area, int barrier, int lane) {
    uint32_t operands[K / 16][4];
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      if constexpr (kTransposed) {
        StateTile::load_a_trans(operands[kt], ptx::shared_address(area), 0, 16 * kt, lane);
      } else {
        StateTile::load_a(operands[kt], ptx::shared_address(area), 0, 16 * kt, lane);
      }
    }
    ptx::bar_sync(barrier, 32);
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      const uint32_t(&x)[4] = operands[kt];
      reinterpret_cast<uint4*>(area)[kt * 32 + lane] = {x[0], x[1], x[2], x[3]};
    }
  }
  // By one thread. values: not read if there are none.
  static __device__ __forceinline__ void store(uint4* states, uint4* values, const uint8_t* area) {
    ptx::cp_async_bulk_store(states, ptx::shared_address(area), kStateBytes);
    if constexpr (kValueBytes > 0) {
      ptx::cp_async_bulk_store(values, ptx::shared_address(area) + kStateBytes, kValueBytes);
    }
  }
};

// A mover warp's row tiles, one of each group of consumers, from chunk to chunk.
template <typename Staged, int kGroups, bool kTransposed>
struct OperandMover {
  uint8_t* area;           // of the first one in the first buffer; four row tiles to the next
  uint4 *states, *values;  // where they belong; not read if there are none
  int64_t state_stride, value_stride;
  int state_tile, value_tile;  // fragments of four row tiles
  int barrier, lane;

  __device__ __forceinline__ void operator()(int buffer) {
    uint8_t* const here = area + buffer * (4 * kGroups * Staged::kBytes);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Staged::template to_fragments<kTransposed>(here + 4 * i * Staged::kBytes, barrier, lane);
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(barrier, 32);
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        Staged::store(states + i * state_tile, values + i * value_tile, here + 4 * i * Staged::kBytes);
      }
      ptx::cp_async_bulk_commit_group();
      ptx::cp_async_bulk_wait_read_all();
    }
    states += state_stride, values += value_stride;
  }
};

}  // namespace kda
