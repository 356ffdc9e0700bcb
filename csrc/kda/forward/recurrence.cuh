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
  static constexpr int kMoverRegisters = 72;
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

// The ring of stages of a recurrence, at the start of shared memory; behind it two barriers for each, and two of the fragments that
// leave.
struct StageRing {
  uint32_t first_stage;
  int stages, stage_bytes;

  __device__ __forceinline__ uint32_t stage(int i) const { return first_stage + i * stage_bytes; }
  __device__ __forceinline__ uint32_t full(int i) const { return first_stage + stages * stage_bytes + 16 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(i) + 8; }
  __device__ __forceinline__ uint32_t staged() const { return full(stages); }  // fragments of a chunk
  __device__ __forceinline__ uint32_t taken() const { return empty(stages); }
  static constexpr int barrier_bytes(int stages) { return (stages + 1) * 16; }

  // By all threads of the CTA. arrivals: on `full`, besides the bytes of bulk copies.
  __device__ __forceinline__ void init(int arrivals, int consumers, int movers) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        ptx::mbarrier_init(full(i), arrivals);
        ptx::mbarrier_init(empty(i), consumers);
      }
      ptx::mbarrier_init(staged(), consumers);
      ptx::mbarrier_init(taken(), movers);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  // By the movers, for each of `chunks` chunks: fill(i, stage) once the stage is free, and store(i) when its fragments are staged.
  template <typename Fill, typename Store>
  __device__ __forceinline__ void move(int64_t chunks, Fill fill, Store store) const {
    for (int i = 0; i < stages && i < chunks; ++i) fill(i, i);
    RingPosition ring;
    for (int64_t i = 0; i < chunks; ++i) {
      ptx::mbarrier_wait_parity(staged(), i & 1);
      store(i);
      ptx::mbarrier_arrive(taken());
      if (i + stages < chunks) {
        ptx::mbarrier_wait_parity(empty(ring.stage), ring.parity);
        fill(i + stages, ring.stage);
      }
      ring.advance(stages);
    }
  }
};

// Shared memory of a recurrence: the ring and its barriers, then an area of Config::Staged for each row tile.
template <typename Config>
constexpr int staging_offset(int stages) {
  return stages * Config::kStageBytes + (StageRing::barrier_bytes(stages) + 255) / 256 * 256;
}
template <typename Config>
constexpr int recurrence_shared_bytes(int stages) {
  return staging_offset<Config>(stages) + Config::kRows / 16 * Config::Staged::kBytes;
}

// Stages of the ring: all that fit. (sm_90: 228 KiB, less 1 KiB that the system keeps for a CTA.)
template <typename Config>
constexpr int stages_of_ring() {
  const int stages = (227 * 1024 - recurrence_shared_bytes<Config>(0) - 256) / Config::kStageBytes;
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

// Operands of one row tile of 16 rows of V on their way to memory: rows of S^T (16 x K), and fragments of U^T. Consumers leave them in
// shared memory, so that neither stores nor transposing are in their chain; movers take them from there.
template <int K, int kTokenTiles>
struct StagedOperands {
  using StateTile = SwizzledTile<K>;
  static constexpr int kStateBytes = 16 * K * 2, kBytes = kStateBytes + kTokenTiles * 512;

  static __device__ __forceinline__ void put_state(uint32_t area, const uint32_t (&operand)[4], int kt, int lane) {
    StateTile::store_a(operand, area, 0, 16 * kt, lane);
  }
  static __device__ __forceinline__ void put_values(uint8_t* area, const uint4& operand, int kt, int lane) {
    reinterpret_cast<uint4*>(area + kStateBytes)[kt * 32 + lane] = operand;
  }
  // To the fragments of the row tile; kTransposed: operands of S rather than of S^T.
  template <bool kTransposed>
  static __device__ __forceinline__ void store_state(uint4* destination, uint32_t area, int lane) {
    uint32_t operands[K / 16][4];
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      if constexpr (kTransposed) {
        StateTile::load_a_trans(operands[kt], area, 0, 16 * kt, lane);
      } else {
        StateTile::load_a(operands[kt], area, 0, 16 * kt, lane);
      }
    }
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      destination[kt * 32 + lane] = {operands[kt][0], operands[kt][1], operands[kt][2], operands[kt][3]};
    }
  }
  static __device__ __forceinline__ void store_values(uint4* destination, const uint8_t* area, int lane) {
#pragma unroll
    for (int kt = 0; kt < kTokenTiles; ++kt) {
      destination[kt * 32 + lane] = reinterpret_cast<const uint4*>(area + kStateBytes)[kt * 32 + lane];
    }
  }
};

}  // namespace kda
