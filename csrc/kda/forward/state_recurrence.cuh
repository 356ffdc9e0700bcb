// Stage 2 of the forward: the hidden-state recurrence over the chunks of a sequence,
//   U = U0 - W S,      S' = Diag(e^{G_C}) S + (K ⊙ e^{G_C - G})^T U,
// writing, for stage 3, the state at the entry of each chunk and U as bf16 MMA operands, U in the place of U0.
//
// Grid: one CTA for each (sequence, value head, tile of rows); tile / 16 warps. Rows are the V columns of S.
// The state is kept transposed, S^T [V, K], in fp32 accumulator fragments for the whole sequence. Each warp owns 16
// rows of V and all of K, so that it needs nothing from the other warps:
//   U^T  = U0^T - S^T W^T                      A = S^T, its accumulators rounded to bf16;  B = W [C, K]
//   S'^T = S^T Diag(e^{G_C}) + U^T K_decayed   A = U^T, as a sum of two bf16 operands;     B = K_decayed [C, K]
// U is split because its rounding is what the state's error mostly consists of, and because a delta rule that hardly
// forgets (beta up to 2, repeated keys) sums values of U that cancel.
// Thread 0 keeps a ring of stages filled by bulk copies: everything a chunk needs is contiguous in the workspace. A
// warp of its own for that would cost registers: nine warps leave 168 for each thread, eight leave 255, and the state
// with its operands needs 200.
//
// Shared memory of one stage (bytes, K = 128): W 16384, K_decayed 16384, chunk_decay 512, U0 256 for each value row.
// Bound, at few CTAs, by the chain of 3 * 64 products a chunk and warp; at many CTAs by the traffic of the workspace.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/elements.cuh"
#include "../device/tile.cuh"
#include "kernel_params.h"
#include "state_fragments.cuh"

namespace kda {

template <int K_>
struct StateRecurrenceConfig {
  static constexpr int K = K_, C = kChunkTokens;
  using KeyTile = SwizzledTile<K>;
  static constexpr int kRowsPerWarp = 16;
  static constexpr int kMaxWarps = 8;
  static constexpr int kMaxThreads = 32 * kMaxWarps;
  static constexpr int kMaxStages = 4;

  static constexpr int kKeyTileBytes = C * K * 2;
  static constexpr int kDecayBytes = K * 4;
  static constexpr int kU0BytesPerWarp = kRowsPerWarp * C * 4;

  // Offsets inside one stage.
  static constexpr int kW = 0;
  static constexpr int kKeyDecayed = kW + kKeyTileBytes;
  static constexpr int kU0 = kKeyDecayed + kKeyTileBytes;
  static constexpr __host__ __device__ int stage_bytes(int warps) {
    return kU0 + warps * kU0BytesPerWarp + kDecayBytes;
  }

  static constexpr int kBarrierBytes = 2 * kMaxStages * 8;
  static constexpr __host__ __device__ int shared_bytes(int warps, int stages) {
    return stages * stage_bytes(warps) + kBarrierBytes;
  }
};

// Which stage of the ring, and the parity of its barriers in this turn.
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

template <typename Config>
__global__ void __launch_bounds__(Config::kMaxThreads, 1)
    state_recurrence_kernel(const __grid_constant__ ChunkFwdKernelParams params, int warps, int stages) {
  constexpr int K = Config::K, C = Config::C;
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.call;
  const int V = call.problem.value_dim, value_heads = call.problem.value_heads;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int stage_bytes = Config::stage_bytes(warps);

  const int value_row_tiles = V / Config::kRowsPerWarp, ctas_of_head = value_row_tiles / warps;
  const int first_row_tile = static_cast<int>(blockIdx.x % ctas_of_head) * warps;  // in units of 16 rows
  const int value_head = static_cast<int>(blockIdx.x / ctas_of_head % value_heads);
  const int64_t sequence = blockIdx.x / ctas_of_head / value_heads;
  const SequenceRange range = sequence_range(call, sequence);
  const int64_t first_slot = first_chunk_slot(call, sequence, range);
  const int64_t chunks = (range.end - range.begin + kChunkTokens - 1) / kChunkTokens;

  const uint32_t shared_base = ptx::shared_address(shared);
  const uint32_t barriers = shared_base + stages * stage_bytes;
  const auto full = [&](int stage) { return barriers + 16 * stage; };
  const auto empty = [&](int stage) { return barriers + 16 * stage + 8; };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), 32 * warps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  // Everything chunk `chunk` needs, into a stage that is free. One thread.
  const auto fill = [&](int64_t chunk, int ring_stage) {
    const int64_t tile = (first_slot + chunk) * value_heads + value_head;
    const uint32_t stage = shared_base + ring_stage * stage_bytes, barrier = full(ring_stage);
    const uint32_t u0_bytes = warps * Config::kU0BytesPerWarp;
    ptx::mbarrier_arrive_expect_tx(barrier, stage_bytes);
    ptx::cp_async_bulk_load(stage + Config::kW, params.W + tile * Config::kKeyTileBytes, Config::kKeyTileBytes,
                            barrier);
    ptx::cp_async_bulk_load(stage + Config::kU0, params.U + (tile * (V / 16) + first_row_tile) * (C / 8) * 32, u0_bytes,
                            barrier);
    ptx::cp_async_bulk_load(stage + Config::kKeyDecayed, params.K_decayed + tile * Config::kKeyTileBytes,
                            Config::kKeyTileBytes, barrier);
    ptx::cp_async_bulk_load(stage + Config::kU0 + u0_bytes, params.chunk_decay + tile * K, Config::kDecayBytes,
                            barrier);
  };
  const bool is_producer = threadIdx.x == 0;
  if (is_producer) {
    for (int chunk = 0; chunk < stages && chunk < chunks; ++chunk) fill(chunk, chunk);
  }

  // Rows 16 * row_tile .. + 15 of S^T.
  const int row_tile = first_row_tile + warp;
  const int64_t row_stride = call.state_v_first ? K : 1, channel_stride = call.state_v_first ? 1 : V;
  const int64_t first_row = row_tile * Config::kRowsPerWarp * row_stride;
  StateFragments<K> state;
  if (call.initial_state != nullptr) {
    const int64_t offset =
        sequence * call.initial_state_stride_sequence + value_head * call.initial_state_stride_head + first_row;
    const int element_bytes = call.state_type == DataType::kFloat32 ? 4 : 2;
    state.load(static_cast<const uint8_t*>(call.initial_state) + offset * element_bytes, call.state_type, row_stride,
               channel_stride, lane);
  } else {
    state.for_each(lane, [](float& value, int, int) { value = 0.0f; });
  }

  // Where this warp writes for the current chunk; consecutive chunks are value_heads tiles apart.
  const int64_t first_tile = first_slot * value_heads + value_head;
  const int64_t first_operand_tile = first_tile * (V / 16) + row_tile, operand_tiles_per_chunk = value_heads * (V / 16);
  uint4* state_operands = params.state + first_operand_tile * (K / 16) * 32 + lane;
  uint4* u_operands = params.U + first_operand_tile * (C / 8) * 32 + lane;
  uint4* u_rounded = params.U_rounded + first_operand_tile * (C / 16) * 32 + lane;

  RingPosition ring, previous;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (is_producer && chunk > 0 && chunk - 1 + stages < chunks) {  // refill the stage of the chunk before
      ptx::mbarrier_wait_parity(empty(previous.stage), previous.parity);
      fill(chunk - 1 + stages, previous.stage);
    }
    if (call.chunk_states != nullptr) {
      const int64_t tile = first_tile + chunk * value_heads;
      state.store(call.chunk_states + tile * K * V + first_row, row_stride, channel_stride, lane);
    }

    uint32_t s[K / 16][4];
    state.to_operands(s);
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      if (params.inverse == nullptr) state_operands[kt * 32] = {s[kt][0], s[kt][1], s[kt][2], s[kt][3]};
    }

    ptx::mbarrier_wait_parity(full(ring.stage), ring.parity);
    const uint32_t stage = shared_base + ring.stage * stage_bytes;
    const uint8_t* const stage_data = shared + ring.stage * stage_bytes;

    float u[C / 8][4] = {};  // (W S)^T
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
#pragma unroll
      for (int n = 0; n < C / 16; ++n) {
        uint32_t b[4];
        Config::KeyTile::load_b(b, stage + Config::kW, 16 * n, 16 * kt, lane);
        ptx::mma_m16n8k16_bf16(u[2 * n], s[kt][0], s[kt][1], s[kt][2], s[kt][3], b[0], b[1]);
        ptx::mma_m16n8k16_bf16(u[2 * n + 1], s[kt][0], s[kt][1], s[kt][2], s[kt][3], b[2], b[3]);
      }
    }

    if (params.inverse != nullptr) {  // S rather than its transpose, for the backward
#pragma unroll
      for (int kt = 0; kt < K / 16; ++kt) {
        state_operands[kt * 32] = transposed_fragment({s[kt][0], s[kt][1], s[kt][2], s[kt][3]});
      }
    }

    // U^T as A operands: their high parts, and what those leave out.
    uint32_t ut_high[C / 16][4], ut_low[C / 16][4];
    const float4* const u0 = reinterpret_cast<const float4*>(stage_data + Config::kU0) + warp * (C / 8) * 32 + lane;
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 corrected = u0[(2 * kt + half) * 32];
        const float(&ws)[4] = u[2 * kt + half];
        const SplitBf16 upper(corrected.x - ws[0], corrected.y - ws[1]),
            lower(corrected.z - ws[2], corrected.w - ws[3]);
        ut_high[kt][2 * half] = upper.high, ut_high[kt][2 * half + 1] = lower.high;
        ut_low[kt][2 * half] = upper.low, ut_low[kt][2 * half + 1] = lower.low;
      }
      const uint4 high = {ut_high[kt][0], ut_high[kt][1], ut_high[kt][2], ut_high[kt][3]};
      if (params.wants_output) {
        u_operands[2 * kt * 32] = high;
        u_operands[(2 * kt + 1) * 32] = {ut_low[kt][0], ut_low[kt][1], ut_low[kt][2], ut_low[kt][3]};
      }
      if (params.inverse != nullptr) u_rounded[kt * 32] = high;
    }

    const float* const decay =
        reinterpret_cast<const float*>(stage_data + Config::kU0 + warps * Config::kU0BytesPerWarp);
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
      const float2 factor = *reinterpret_cast<const float2*>(decay + 8 * n + 2 * (lane & 3));
      state.acc[n][0] *= factor.x;
      state.acc[n][1] *= factor.y;
      state.acc[n][2] *= factor.x;
      state.acc[n][3] *= factor.y;
    }
    // Products that add to the same accumulators wait for each other: the high parts of four operands, then the low
    // ones.
    constexpr int kGroup = 4;
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
#pragma unroll
      for (int first = 0; first < K / 16; first += kGroup) {
        uint32_t b[kGroup][4];
#pragma unroll
        for (int n = 0; n < kGroup; ++n) {
          Config::KeyTile::load_b_trans(b[n], stage + Config::kKeyDecayed, 16 * kt, 16 * (first + n), lane);
        }
        const auto multiply = [&](const uint32_t(&a)[4]) {
#pragma unroll
          for (int n = 0; n < kGroup; ++n) {
            float(&even)[4] = state.acc[2 * (first + n)], (&odd)[4] = state.acc[2 * (first + n) + 1];
            ptx::mma_m16n8k16_bf16(even, a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
            ptx::mma_m16n8k16_bf16(odd, a[0], a[1], a[2], a[3], b[n][2], b[n][3]);
          }
        };
        multiply(ut_high[kt]);
        multiply(ut_low[kt]);
      }
    }
    // Every thread says that it has read the stage: one lane could say so for its warp after a __syncwarp(), but
    // racecheck does not see that order, and a clean report is worth more than 31 arrivals.
    ptx::mbarrier_arrive(empty(ring.stage));
    state_operands += operand_tiles_per_chunk * (K / 16) * 32;
    u_operands += operand_tiles_per_chunk * (C / 8) * 32;
    u_rounded += operand_tiles_per_chunk * (C / 16) * 32;
    previous = ring;
    ring.advance(stages);
  }

  if (call.final_state != nullptr) {
    state.store(call.final_state + (sequence * value_heads + value_head) * K * V + first_row, row_stride,
                channel_stride, lane);
  }
}

}  // namespace kda
