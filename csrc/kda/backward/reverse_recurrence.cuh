// Stage 3 of the backward: the recurrence of the state's gradient, from the last chunk of a sequence to its first,
//   dU = Aqk^T dO + K_decayed dS',      dS = Diag(e^{G_C}) dS' + Q_gated^T dO - W^T dU,
// writing, for stage 4, dS' of each chunk (the gradient of the state at its exit) as bf16 MMA operands of dS', not of
// its transpose, and dU as sums of two; at the end the gradient of the initial state.
//
// Grid as in stage 2 of the forward: one CTA for each (sequence, value head, value tile). The gradient is kept
// transposed, dS^T [V, K], in fp32 accumulator fragments; a warp owns 16 rows of V and all of K, or, where V is cut and
// multiprocessors have warps to spare, one of two owns half of K, and the two add their sums for dU in shared memory:
//   dU^T = dO^T Aqk + dS'^T K_decayed^T                         A = dO^T; dS'^T as a sum of two bf16 operands
//   dS^T = dS'^T Diag(e^{G_C}) + dO^T Q_gated - dU^T W          A = dO^T; dU^T as a sum of two
// Both sums are needed for the gradient of beta of the last tokens, where one gradient of the final state meets few
// tokens and no average hides the rounding of an operand.
// A ring of stages: bulk copies of what lies in the workspace, and units of 16 bytes of dO, which each thread copies.
// (Bulk copies of its rows took half of the time: the copies of a warp are issued one by one.)
//
// Shared memory of one stage (bytes, K = 128): W, K_decayed, Q_gated 16384 each, Aqk 8192, chunk_decay 512, and for dO
// 64 rows of two bytes for each value row and 16 more, which keep ldmatrix free of bank conflicts.
// Registers: 64 of the gradient, 32 of dU, then 32 of its operands. Bound by the chain of 340 products a chunk and
// warp, or of 170.
#pragma once

#include <type_traits>

#include "../forward/state_recurrence.cuh"
#include "kernel_params.h"

namespace kda {

template <int K_, typename Element_, int kKeyParts_>
struct ReverseRecurrenceConfig {
  static constexpr int K = K_, C = kChunkTokens;
  static constexpr int kKeyParts = kKeyParts_, kPartDim = K / kKeyParts;  // channels of a warp
  using Element = Element_;
  using KeyTile = SwizzledTile<K>;
  using PairTile = SwizzledTile<C>;
  static constexpr int kRowsPerWarp = 16;
  // Four row tiles give each quarter of a multiprocessor a warp; to halve their work gains nothing then, and the
  // exchange costs a stage of the ring.
  static constexpr int kMaxWarps = kKeyParts == 1 ? 8 : 4, kMaxRowTiles = kMaxWarps / kKeyParts;
  static constexpr int kMaxThreads = 32 * kMaxWarps;
  static constexpr int kMinStages = 2, kMaxStages = 3;

  static constexpr int kKeyTileBytes = C * K * 2, kPairTileBytes = C * C * 2, kDecayBytes = K * 4;
  static constexpr int kRowPadding = 16;  // bytes behind each row of dO

  // Offsets inside one stage.
  static constexpr int kW = 0;
  static constexpr int kKeyDecayed = kW + kKeyTileBytes;
  static constexpr int kQGated = kKeyDecayed + kKeyTileBytes;
  static constexpr int kAqk = kQGated + kKeyTileBytes;
  static constexpr int kDecay = kAqk + kPairTileBytes;
  static constexpr int kOutputGradient = kDecay + kDecayBytes;
  static constexpr __host__ __device__ int row_bytes(int row_tiles) { return row_tiles * kRowsPerWarp * 2; }
  static constexpr __host__ __device__ int stage_bytes(int row_tiles) {
    return kOutputGradient + C * (row_bytes(row_tiles) + kRowPadding);
  }

  // Behind the stages: barriers, and what the warps of a row tile exchange, each its sums for dU [16, C] in fp32, in
  // turns.
  static constexpr int kBarrierBytes = 64;
  static_assert(2 * kMaxStages * 8 <= kBarrierBytes);
  static constexpr int kExchangeBytes = kKeyParts == 1 ? 0 : kRowsPerWarp * C * 4;
  static constexpr __host__ __device__ int extra_bytes(int row_tiles) {
    return kBarrierBytes + 2 * kKeyParts * row_tiles * kExchangeBytes;
  }
  static constexpr __host__ __device__ int shared_bytes(int row_tiles, int stages) {
    return stages * stage_bytes(row_tiles) + extra_bytes(row_tiles);
  }
};

// acc[2 n], acc[2 n + 1] += a b[n] for all n. Products that add to the same accumulators are as far apart as they can
// be: they wait for each other.
template <int kPairs>
__device__ __forceinline__ void multiply_all(float (&acc)[2 * kPairs][4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[kPairs][4]) {
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    ptx::mma_m16n8k16_bf16(acc[2 * n], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
    ptx::mma_m16n8k16_bf16(acc[2 * n + 1], a[0], a[1], a[2], a[3], b[n][2], b[n][3]);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kMaxThreads, 1)
    reverse_recurrence_kernel(const __grid_constant__ ChunkBwdKernelParams params, int row_tiles, int stages) {
  constexpr int K = Config::K, C = Config::C, kParts = Config::kKeyParts, kPartTiles = Config::kPartDim / 16;
  using Element = typename Config::Element;
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.forward.call;
  const int V = call.problem.value_dim, value_heads = call.problem.value_heads;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int stage_bytes = Config::stage_bytes(row_tiles);
  const int row_bytes = Config::row_bytes(row_tiles), row_pitch = row_bytes + Config::kRowPadding;

  const int value_tiles = V / (row_tiles * Config::kRowsPerWarp);
  const int first_row_tile = static_cast<int>(blockIdx.x % value_tiles) * row_tiles;  // in units of 16 rows of V
  const int value_head = static_cast<int>(blockIdx.x / value_tiles % value_heads);
  const int64_t sequence = blockIdx.x / value_tiles / value_heads;
  const SequenceRange range = sequence_range(call, sequence);
  const int64_t first_slot = first_chunk_slot(call, sequence, range);
  const int64_t chunks = (range.end - range.begin + C - 1) / C;

  const uint32_t shared_base = ptx::shared_address(shared);
  const uint32_t barriers = shared_base + stages * stage_bytes;
  const auto full = [&](int stage) { return barriers + 16 * stage; };
  const auto empty = [&](int stage) { return barriers + 16 * stage + 8; };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::mbarrier_init(full(stage), 1 + blockDim.x);
      ptx::mbarrier_init(empty(stage), blockDim.x);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  // Everything chunk `chunk` needs, into a stage that is free. By all threads: thread 0 asks for the bulk copies, and
  // each copies 16-byte units of dO; rows past the end are zero.
  const auto fill = [&](int64_t chunk, int ring_stage) {
    const int64_t tile = (first_slot + chunk) * value_heads + value_head;
    const int64_t first_token = range.begin + chunk * C;
    const uint32_t stage = shared_base + ring_stage * stage_bytes, barrier = full(ring_stage);
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(barrier, Config::kOutputGradient);
      ptx::cp_async_bulk_load(stage + Config::kAqk, params.forward.Aqk + tile * Config::kPairTileBytes,
                              Config::kPairTileBytes, barrier);
      ptx::cp_async_bulk_load(stage + Config::kKeyDecayed, params.forward.K_decayed + tile * Config::kKeyTileBytes,
                              Config::kKeyTileBytes, barrier);
      ptx::cp_async_bulk_load(stage + Config::kDecay, params.forward.chunk_decay + tile * K, Config::kDecayBytes,
                              barrier);
      ptx::cp_async_bulk_load(stage + Config::kQGated, params.forward.Q_gated + tile * Config::kKeyTileBytes,
                              Config::kKeyTileBytes, barrier);
      ptx::cp_async_bulk_load(stage + Config::kW, params.forward.W + tile * Config::kKeyTileBytes,
                              Config::kKeyTileBytes, barrier);
    }
    const int units = row_bytes / 16;  // of a row
    const int unit = threadIdx.x % units, rows_at_once = blockDim.x / units,
              rows = static_cast<int>(min(range.end - first_token, int64_t{C}));
    const Element* const first = static_cast<const Element*>(params.dO) +
                                 ((range.batch * call.problem.tokens + first_token) * value_heads + value_head) * V +
                                 first_row_tile * Config::kRowsPerWarp + 8 * unit;
    for (int row = threadIdx.x / units; row < C; row += rows_at_once) {
      const bool in_range = row < rows;
      ptx::cp_async_16(stage + Config::kOutputGradient + row * row_pitch + 16 * unit,
                       first + int64_t{in_range ? row : 0} * value_heads * V, in_range ? 16 : 0);
    }
    ptx::cp_async_mbarrier_arrive_noinc(barrier);
  };
  for (int i = 0; i < stages && i < chunks; ++i) fill(chunks - 1 - i, i);

  // Rows 16 * row_tile .. + 15 of V, channels first_channel .. of K.
  const int own_tile = kParts == 1 ? warp : warp % row_tiles, part = kParts == 1 ? 0 : warp / row_tiles;
  const int row_tile = first_row_tile + own_tile, first_channel = part * Config::kPartDim;
  const int64_t row_stride = call.state_v_first ? K : 1, channel_stride = call.state_v_first ? 1 : V;
  const auto state_offset = [&](int tile) {  // tile: index of the sequence, value head and value tile
    return static_cast<int64_t>(tile / value_tiles) * K * V + row_tile * Config::kRowsPerWarp * row_stride +
           first_channel * channel_stride;
  };
  StateFragments<Config::kPartDim> dstate;
  if (params.dfinal_state != nullptr) {
    dstate.load(params.dfinal_state + state_offset(blockIdx.x), DataType::kFloat32, row_stride, channel_stride, lane);
  } else {
    dstate.for_each(lane, [](float& value, int, int) { value = 0.0f; });
  }

  // Where a lane's rows of an operand A = dO^T lie inside a stage, for the first 16 tokens.
  const int matrix = lane >> 3;
  const uint32_t output_gradient =
      Config::kOutputGradient + ((lane & 7) + (matrix >> 1) * 8) * row_pitch + (2 * own_tile + (matrix & 1)) * 16;

  RingPosition ring, previous;
  for (int64_t step = 0; step < chunks; ++step) {
    const int64_t operand_tile = ((first_slot + chunks - 1 - step) * value_heads + value_head) * (V / 16) + row_tile;
    uint4* const dstate_operands = params.dstate + operand_tile * (K / 16) * 32 + lane;
    uint4* const dU_operands = params.dU + operand_tile * (C / 16) * 32 + lane;

    ptx::mbarrier_wait_parity(full(ring.stage), ring.parity);
    const uint32_t stage = shared_base + ring.stage * stage_bytes;

    // dO^T of 16 tokens, twice in each step rather than kept in registers.
    const auto load_output_gradient = [&](uint32_t(&dO)[4], int kt) {
      ptx::ldmatrix_x4_trans(dO, stage + output_gradient + 16 * kt * row_pitch);
      if constexpr (!std::is_same_v<Element, BFloat16>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 values = Packed2<Element>::to_float2(dO[i]);
          dO[i] = pack_bf16(values.x, values.y);
        }
      }
    };

    float du[C / 8][4] = {};
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      if (kParts == 2 && (kt == C / 16 - 1) != (part == 0))
        continue;  // the last tokens have two fifths of the products
      uint32_t dO[4];
      load_output_gradient(dO, kt);
#pragma unroll
      for (int n = 0; n <= kt; ++n) {
        uint32_t b[4];
        Config::PairTile::load_b_trans(b, stage + Config::kAqk, 16 * kt, 16 * n, lane);
        ptx::mma_m16n8k16_bf16(du[2 * n], dO[0], dO[1], dO[2], dO[3], b[0], b[1]);
        ptx::mma_m16n8k16_bf16(du[2 * n + 1], dO[0], dO[1], dO[2], dO[3], b[2], b[3]);
      }
    }
#pragma unroll
    for (int kt = 0; kt < kPartTiles; ++kt) {
      const float(&lower)[4] = dstate.acc[2 * kt], (&upper)[4] = dstate.acc[2 * kt + 1];
      const SplitBf16 s0(lower[0], lower[1]), s1(lower[2], lower[3]), s2(upper[0], upper[1]), s3(upper[2], upper[3]);
      dstate_operands[(part * kPartTiles + kt) * 32] = transposed_fragment({s0.high, s1.high, s2.high, s3.high});
      uint32_t b[C / 16][4];
#pragma unroll
      for (int n = 0; n < C / 16; ++n) {
        Config::KeyTile::load_b(b[n], stage + Config::kKeyDecayed, 16 * n, first_channel + 16 * kt, lane);
      }
      multiply_all(du, {s0.high, s1.high, s2.high, s3.high}, b);
      multiply_all(du, {s0.low, s1.low, s2.low, s3.low}, b);
    }

    if constexpr (kParts == 2) {  // each warp has summed over its own channels
      float4* const sums =
          reinterpret_cast<float4*>(shared + stages * stage_bytes + Config::kBarrierBytes +
                                    ((step & 1) * row_tiles + own_tile) * kParts * Config::kExchangeBytes) +
          lane;
      constexpr int kOfPart = Config::kExchangeBytes / 16;
#pragma unroll
      for (int n = 0; n < C / 8; ++n) sums[part * kOfPart + n * 32] = {du[n][0], du[n][1], du[n][2], du[n][3]};
      ptx::bar_sync(1 + own_tile, 32 * kParts);
#pragma unroll
      for (int n = 0; n < C / 8; ++n) {
        const float4 other = sums[(part ^ 1) * kOfPart + n * 32];
        du[n][0] += other.x, du[n][1] += other.y, du[n][2] += other.z, du[n][3] += other.w;
      }
    }
    if (step > 0 && step - 1 + stages < chunks) {  // refill the stage of the step before
      ptx::mbarrier_wait_parity(empty(previous.stage), previous.parity);
      fill(chunks - 1 - (step - 1 + stages), previous.stage);
    }

    // -dU^T as A operands.
    uint32_t high[C / 16][4], low[C / 16][4];
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&values)[4] = du[2 * kt + half];
        const SplitBf16 upper(values[0], values[1]), lower(values[2], values[3]);
        high[kt][2 * half] = upper.high, high[kt][2 * half + 1] = lower.high;
        low[kt][2 * half] = upper.low, low[kt][2 * half + 1] = lower.low;
      }
      if (part == 0) dU_operands[kt * 32] = {high[kt][0], high[kt][1], high[kt][2], high[kt][3]};
      constexpr uint32_t kSigns = 0x80008000u;
#pragma unroll
      for (int i = 0; i < 4; ++i) high[kt][i] ^= kSigns, low[kt][i] ^= kSigns;
    }

    const float* const decay = reinterpret_cast<const float*>(shared + ring.stage * stage_bytes + Config::kDecay) +
                               first_channel + 2 * (lane & 3);
#pragma unroll
    for (int n = 0; n < Config::kPartDim / 8; ++n) {
      const float2 factor = *reinterpret_cast<const float2*>(decay + 8 * n);
      dstate.acc[n][0] *= factor.x;
      dstate.acc[n][1] *= factor.y;
      dstate.acc[n][2] *= factor.x;
      dstate.acc[n][3] *= factor.y;
    }
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      uint32_t dO[4];
      load_output_gradient(dO, kt);
      constexpr int kGroup = kPartTiles < 4 ? kPartTiles : 4;
      const int lane_here = ptx::opaque(lane);  // the addresses of all operands together do not fit the registers
#pragma unroll
      for (int first = 0; first < kPartTiles; first += kGroup) {
        uint32_t q[kGroup][4], w[kGroup][4];
#pragma unroll
        for (int n = 0; n < kGroup; ++n) {
          Config::KeyTile::load_b_trans(q[n], stage + Config::kQGated, 16 * kt, first_channel + 16 * (first + n),
                                        lane_here);
          Config::KeyTile::load_b_trans(w[n], stage + Config::kW, 16 * kt, first_channel + 16 * (first + n), lane_here);
        }
        float(&acc)[2 * kGroup][4] = reinterpret_cast<float(&)[2 * kGroup][4]>(dstate.acc[2 * first]);
        multiply_all(acc, dO, q);
        multiply_all(acc, high[kt], w);
        multiply_all(acc, low[kt], w);
      }
    }
    ptx::mbarrier_arrive(empty(ring.stage));  // by every thread, as in the forward
    previous = ring;
    ring.advance(stages);
  }

  if (params.dinitial_state == nullptr) return;
  const int64_t offset = state_offset(ptx::opaque(blockIdx.x));  // not kept over the loop
  if (call.state_type == DataType::kFloat32) {
    dstate.store(static_cast<float*>(params.dinitial_state) + offset, row_stride, channel_stride, lane);
  } else {
    BFloat16* const destination = static_cast<BFloat16*>(params.dinitial_state) + offset;
    dstate.for_each(lane, [&](float& value, int row, int channel) {
      destination[row * row_stride + channel * channel_stride] = __float2bfloat16_rn(value);
    });
  }
}

}  // namespace kda
