// Stage 3 of the forward: the output GEMM of each chunk,
//   O = Q_gated S + Aqk U        (scale is in Q_gated and in Aqk),
// with S the state at the entry of the chunk.
//
// Grid: one CTA for each (chunk slot, value head), and with cu_seqlens one more slot; 4 warps, each owns V / 4 columns
// of O and all 64 tokens. U^T lies in the workspace as operand fragments and goes from global memory to registers; Q_gated, Aqk and S^T come by one bulk
// copy each. Rows of o past the last entry of cu_seqlens are set to zero here.
//
// Shared memory (bytes, K = V = 128): Q_gated 16384, then O for a coalesced store; Aqk 8192; S^T 32768.
// Bound by memory traffic: 2 * (K + 2 V + C + K V / C) bytes read and 2 V written for each token and head.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/elements.cuh"
#include "../device/tile.cuh"
#include "kernel_params.h"

namespace kda {

template <int K_, int V_, typename Element_>
struct OutputGemmConfig {
  static constexpr int K = K_, V = V_, C = kChunkTokens;
  using Element = Element_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kCtasPerSm = 3;
  using KeyTile = BlockedTile<C>;
  using StateTile = SwizzledTile<K>;
  using PairTile = SwizzledTile<C>;
  using OutputTile = SwizzledTile<V>;
  static constexpr int kKeyTileBytes = C * K * 2, kStateBytes = V * K * 2, kPairTileBytes = C * C * 2,
                       kOutputTileBytes = C * V * 2;
  static constexpr int kQGated = 0;  // later O
  static constexpr int kAqk = kKeyTileBytes > kOutputTileBytes ? kKeyTileBytes : kOutputTileBytes;
  static constexpr int kState = kAqk + kPairTileBytes;
  static constexpr int kBarrier = kState + kStateBytes;
  static constexpr int kSharedBytes = kBarrier + 16;
};

// Zeroes rows of o that belong to no sequence: 64 rows past the last entry of cu_seqlens for each slot past the last
// used one.
template <typename Config>
__device__ __forceinline__ void clear_rows_past_end(const ChunkFwdParams& call, int64_t slot, int value_head) {
  if (call.cu_seqlens == nullptr) return;
  const int64_t end = cu_seqlens_at(call, call.problem.sequences);
  const int64_t first_unused_slot = end / kChunkTokens + call.problem.sequences;
  if (slot < first_unused_slot) return;
  const int64_t first = end + (slot - first_unused_slot) * kChunkTokens;
  const int64_t rows = min(call.problem.tokens - first, int64_t{kChunkTokens});
  typename Config::Element* o = static_cast<typename Config::Element*>(call.o);
  for (int64_t i = threadIdx.x; i < rows * (Config::V / 8); i += Config::kThreads) {
    const int64_t token = first + i / (Config::V / 8);
    *reinterpret_cast<uint4*>(o + (token * call.problem.value_heads + value_head) * Config::V +
                              i % (Config::V / 8) * 8) = uint4{0, 0, 0, 0};
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    output_gemm_kernel(const __grid_constant__ ChunkFwdKernelParams params) {
  using Element = typename Config::Element;
  constexpr int K = Config::K, V = Config::V, C = Config::C;
  constexpr int kRowTiles = V / 16 / Config::kWarps;  // 16-row tiles of S^T and U^T of a warp
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.call;
  const int value_heads = call.problem.value_heads;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int64_t tile = blockIdx.x, slot = tile / value_heads;
  const int value_head = static_cast<int>(tile % value_heads);

  const ChunkLocation location = locate_chunk(call, slot, lane);
  if (location.tokens == 0 || slot >= params.chunk_slots) {
    clear_rows_past_end<Config>(call, slot, value_head);
    return;
  }

  const uint32_t barrier = ptx::shared_address(shared + Config::kBarrier);
  const uint32_t q_gated = ptx::shared_address(shared + Config::kQGated),
                 aqk = ptx::shared_address(shared + Config::kAqk), state = ptx::shared_address(shared + Config::kState);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, Config::kKeyTileBytes + Config::kPairTileBytes + Config::kStateBytes);
    ptx::cp_async_bulk_load(q_gated, params.Q_gated + tile * Config::kKeyTileBytes, Config::kKeyTileBytes, barrier);
    ptx::cp_async_bulk_load(aqk, params.Aqk + tile * Config::kPairTileBytes, Config::kPairTileBytes, barrier);
    ptx::cp_async_bulk_load(state, params.state + tile * Config::kStateBytes, Config::kStateBytes, barrier);
  }
  __syncthreads();

  const int64_t first_row_tile = tile * (V / 16) + warp * kRowTiles;
  const uint4* const u = params.U + first_row_tile * (C / 8) * 32 + lane;
  float acc[C / 16][2 * kRowTiles][4] = {};

  // acc[mt] += A(16 tokens) * operand^T, for the 16 columns of O that one 16-row operand of S^T or U^T covers.
  const auto multiply = [&](int mt, int row_tile, const uint32_t(&a)[4], const uint4& operand) {
    ptx::mma_m16n8k16_bf16(acc[mt][2 * row_tile], a[0], a[1], a[2], a[3], operand.x, operand.z);
    ptx::mma_m16n8k16_bf16(acc[mt][2 * row_tile + 1], a[0], a[1], a[2], a[3], operand.y, operand.w);
  };

  ptx::mbarrier_wait_parity(barrier, 0);
#pragma unroll
  for (int kt = 0; kt < C / 16; ++kt) {
    uint4 u_operand[kRowTiles][2];  // high, low
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      u_operand[r][0] = u[(r * (C / 8) + 2 * kt) * 32];
      u_operand[r][1] = u[(r * (C / 8) + 2 * kt + 1) * 32];
    }
#pragma unroll
    for (int mt = kt; mt < C / 16; ++mt) {
      uint32_t a[4];
      Config::PairTile::load_a(a, aqk, 16 * mt, 16 * kt, lane);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply(mt, r, a, u_operand[r][0]);
        multiply(mt, r, a, u_operand[r][1]);
      }
    }
  }
#pragma unroll
  for (int kt = 0; kt < K / 16; ++kt) {
    uint4 state_operand[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      uint32_t operand[4];
      Config::StateTile::load_a(operand, state, 16 * (warp * kRowTiles + r), 16 * kt, lane);
      state_operand[r] = {operand[0], operand[1], operand[2], operand[3]};
    }
#pragma unroll
    for (int mt = 0; mt < C / 16; ++mt) {
      uint32_t a[4];
      Config::KeyTile::load_a(a, q_gated, 16 * mt, 16 * kt, lane);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) multiply(mt, r, a, state_operand[r]);
    }
  }

  __syncthreads();  // Q_gated is dead; O takes its place
#pragma unroll
  for (int mt = 0; mt < C / 16; ++mt) {
#pragma unroll
    for (int n = 0; n < 2 * kRowTiles; ++n) {
      const int token = 16 * mt + (lane >> 2), column = (warp * kRowTiles * 2 + n) * 8 + 2 * (lane & 3);
      uint32_t* upper = reinterpret_cast<uint32_t*>(shared + Config::OutputTile::pair_offset(token, column));
      uint32_t* lower = reinterpret_cast<uint32_t*>(shared + Config::OutputTile::pair_offset(token + 8, column));
      *upper = Packed2<Element>::from_floats(acc[mt][n][0], acc[mt][n][1]);
      *lower = Packed2<Element>::from_floats(acc[mt][n][2], acc[mt][n][3]);
    }
  }
  __syncthreads();

  constexpr int kUnits = V / 8;
  Element* const o = static_cast<Element*>(call.o) +
                     ((location.batch * call.problem.tokens + location.first_token) * value_heads + value_head) * V;
  for (int i = threadIdx.x; i < location.tokens * kUnits; i += Config::kThreads) {
    const int token = i / kUnits, unit = i % kUnits;
    *reinterpret_cast<uint4*>(o + int64_t{token} * value_heads * V + unit * 8) =
        *reinterpret_cast<const uint4*>(shared + Config::OutputTile::unit_offset(token, unit));
  }
}

}  // namespace kda
