// Stage 1 of the forward: the intra-chunk solve. For every chunk of 64 tokens and value head, G the cumulative log-gate:
//   Aqk[i,j] = scale * sum_d q_i k_j exp(G_i - G_j)    (i >= j)
//   Akk[i,j] = beta_i * sum_d k_i k_j exp(G_i - G_j)   (i > j)
//   Tinv = (I + Akk)^-1 Diag(beta),   U0 = Tinv V,   W = Tinv (K ⊙ e^G)
// and the operands of the later stages,
//   Q_gated = scale * Q ⊙ e^G,   K_decayed = K ⊙ e^{G_C - G},   chunk_decay = e^{G_C}.
//
// Grid: one CTA for each (chunk slot, value head); 4 warps. Until the solve, warp w owns the 16-token tile w; afterwards
// it owns K / 4 columns of W and V / 4 rows of U0^T.
//
// Where a token sits in registers: lane l holds rows l / 4 and l / 4 + 8 of its tile and, for each slice of 32 channels,
// the 8 consecutive channels 32 s + 8 (l % 4) .. + 7, as a 16-byte load gives them. Read as MMA operands these are
// channels in a permuted order; A and B operands are permuted alike and the products contract over channels, so the
// order does not matter.
//
// Numerics: gate factors are products of alpha <= 1 (decay_tree.cuh). The diagonal of Aqk comes from q and k as they are in
// memory, whose products are exact. The diagonal of Tinv, beta, is kept out of the bf16 operands and applied in fp32; the
// rest of Tinv enters as the sum of two of them. The inverse is taken at fp32 accuracy (triangular_inverse.cuh).
//
// Shared memory (bytes, K = V = 128; regions are reused from phase to phase, barriers between):
//   region A  32768   alpha (fp32)  ->  operands q P, k P  ->  Akk, then the low part of Tinv (17408), and Aqk (8192)
//   region B  24576   log totals of the tiles  ->  operands k R for later tiles  ->  V (16384), high part of Tinv (8192)
//   region C  16384   K ⊙ e^G  ->  W, in place
//   rest       2560   decay over each tile, beta, rests of the keys' norms
// Registers: at most 168, so that three CTAs fit a multiprocessor. Bound by latency: loads, exchanges between lanes and
// barriers, at 12 warps a multiprocessor.
#pragma once

#include "intra_chunk_pairs.cuh"

namespace kda {

template <typename Config>
struct IntraChunkSolve : IntraChunkPairs<Config> {
  using Pairs = IntraChunkPairs<Config>;
  using Element = typename Config::Element;
  using RowReader = typename Pairs::RowReader;
  using Pairs::beta, Pairs::group, Pairs::lane, Pairs::location, Pairs::member, Pairs::params, Pairs::row,
      Pairs::shared;
  using Pairs::tile, Pairs::value_head, Pairs::warp;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;
  using LowTile = PitchedTile<SolveMatrix::kStride * 4>;  // low part of Tinv, in the rows of the fp32 matrix

  // V of the chunk into region B; rows past the end are zero.
  __device__ __forceinline__ void load_values() const {
    const ChunkFwdParams& call = params.call;
    constexpr int kUnits = V / 8;
    for (int i = threadIdx.x; i < C * kUnits; i += Config::kThreads) {
      const int token = i / kUnits, unit = i % kUnits;
      uint8_t* destination = shared + Config::kRegionB + Config::ValueTile::unit_offset(token, unit);
      const bool in_range = token < location.tokens;
      const Element* source = static_cast<const Element*>(call.v) + location.batch * call.v_stride.batch +
                              (location.first_token + (in_range ? token : 0)) * call.v_stride.token +
                              value_head * call.v_stride.head + 8 * unit;
      if constexpr (Config::kVectorized) {
        ptx::cp_async_16(ptx::shared_address(destination), source, in_range ? 16 : 0);
      } else {
        *reinterpret_cast<uint4*>(destination) = in_range ? load_8x16bit<false>(source) : uint4{0, 0, 0, 0};
      }
    }
  }

  // The inverse itself, for the backward, straight to the workspace: row tile `warp`, columns of the tiles up to it.
  // One bf16 is enough there (docs/lab-notebook.md).
  __device__ __forceinline__ void store_inverse() const {
    const SolveMatrix T = this->Akk();
    uint8_t* const destination = params.inverse + tile * Config::kPairTileBytes;
    for (int n = 0; n < 2 * (warp + 1); ++n) {
      const int column = 8 * n + 2 * member;
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const float2 t = *reinterpret_cast<const float2*>(&T.at(row(hi), column));
        *reinterpret_cast<uint32_t*>(destination + Config::PairTile::pair_offset(row(hi), column)) =
            pack_bf16(row(hi) >= column ? t.x : 0.0f, row(hi) > column ? t.y : 0.0f);
      }
    }
  }

  // Tinv without its diagonal, as the sum of two bf16 operands: row tile `warp`, columns of the tiles up to it. The high part goes
  // to region B; the low part takes the place of the inverse, row by row. Entries of Tinv are up to beta in magnitude and
  // cancel in its products where the gates hardly decay and keys repeat: one bf16 is not enough there.
  __device__ __forceinline__ void store_inverse_operands() const {
    const SolveMatrix T = this->Akk();  // inverted in place
    SplitBf16 entries[C / 8][2];
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
      const int column = 8 * n + 2 * member;
      if (n < 2 * (warp + 1)) {
        const float2 beta_pair = *reinterpret_cast<const float2*>(beta() + column);
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) {
          const float2 t = *reinterpret_cast<const float2*>(&T.at(row(hi), column));
          entries[n][hi] =
              SplitBf16(row(hi) > column ? t.x * beta_pair.x : 0.0f, row(hi) > column + 1 ? t.y * beta_pair.y : 0.0f);
        }
      }
    }
    __syncwarp();  // the warp has read all of its rows
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
      const int column = 8 * n + 2 * member;
      if (n < 2 * (warp + 1)) {
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) {
          *reinterpret_cast<uint32_t*>(shared + Config::kTinvOffset + Config::PairTile::pair_offset(row(hi), column)) =
              entries[n][hi].high;
          *reinterpret_cast<uint32_t*>(shared + Config::kRegionA + LowTile::pair_offset(row(hi), column)) =
              entries[n][hi].low;
        }
      }
    }
  }

  // W = Tinv (K ⊙ e^G) for the warp's K / 4 channels, over K ⊙ e^G in region C.
  __device__ __forceinline__ void multiply_keys() const {
    using KeyTile = typename Config::KeyTile;
    constexpr int kColumns = K / Config::kWarps, kPairs = kColumns / 16;
    const uint32_t keys = ptx::shared_address(shared + Config::kRegionC);
    const uint32_t inverse = ptx::shared_address(shared + Config::kTinvOffset);
    const uint32_t inverse_low = ptx::shared_address(shared + Config::kRegionA);
    float acc[4][2 * kPairs][4] = {};
#pragma unroll
    for (int kt = 0; kt < 4; ++kt) {
      uint32_t b[kPairs][4];
#pragma unroll
      for (int n = 0; n < kPairs; ++n) KeyTile::load_b_trans(b[n], keys, 16 * kt, warp * kColumns + 16 * n, lane);
#pragma unroll
      for (int mt = kt; mt < 4; ++mt) {
        uint32_t high[4], low[4];
        Config::PairTile::load_a(high, inverse, 16 * mt, 16 * kt, lane);
        LowTile::load_a(low, inverse_low, 16 * mt, 16 * kt, lane);
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
          const auto multiply = [&](const uint32_t(&a)[4]) {
            ptx::mma_m16n8k16_bf16(acc[mt][2 * n], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
            ptx::mma_m16n8k16_bf16(acc[mt][2 * n + 1], a[0], a[1], a[2], a[3], b[n][2], b[n][3]);
          };
          multiply(high);
          multiply(low);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int mt = 0; mt < 4; ++mt) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const int token = 16 * mt + 8 * hi + group;
        const float diagonal = beta()[token];
#pragma unroll
        for (int n = 0; n < 2 * kPairs; ++n) {
          uint32_t* entry = reinterpret_cast<uint32_t*>(
              shared + Config::kRegionC + KeyTile::pair_offset(token, warp * kColumns + 8 * n + 2 * member));
          const float2 key = unpack_bf16(*entry);
          *entry = pack_bf16(acc[mt][n][2 * hi] + diagonal * key.x, acc[mt][n][2 * hi + 1] + diagonal * key.y);
        }
      }
    }
  }

  // U0^T = V^T Tinv^T for the warp's V / 4 rows, straight to the workspace in accumulator order.
  __device__ __forceinline__ void multiply_values() const {
    constexpr int kRows = V / Config::kWarps, kTiles = kRows / 16;
    const uint32_t values = ptx::shared_address(shared + Config::kRegionB);
    const uint32_t inverse = ptx::shared_address(shared + Config::kTinvOffset);
    const uint32_t inverse_low = ptx::shared_address(shared + Config::kRegionA);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float acc[8][4] = {};
#pragma unroll
      for (int kt = 0; kt < 4; ++kt) {
        uint32_t a[4];
        Config::ValueTile::load_a_trans(a, values, 16 * kt, warp * kRows + 16 * m, lane);
        // The diagonal of Tinv: the operand itself has the layout of the accumulators of these 16 tokens.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 diagonal = *reinterpret_cast<const float2*>(beta() + 16 * kt + 8 * half + 2 * member);
          const float2 upper = Packed2<Element>::to_float2(a[2 * half]),
                       lower = Packed2<Element>::to_float2(a[2 * half + 1]);
          acc[2 * kt + half][0] += diagonal.x * upper.x;
          acc[2 * kt + half][1] += diagonal.y * upper.y;
          acc[2 * kt + half][2] += diagonal.x * lower.x;
          acc[2 * kt + half][3] += diagonal.y * lower.y;
        }
        uint32_t value[4], value_low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const SplitBf16 split = Packed2<Element>::split(a[i]);
          value[i] = split.high, value_low[i] = split.low;
        }
#pragma unroll
        for (int nt = kt; nt < 4; ++nt) {
          uint32_t high[4], low[4];
          Config::PairTile::load_b(high, inverse, 16 * nt, 16 * kt, lane);
          LowTile::load_b(low, inverse_low, 16 * nt, 16 * kt, lane);
          const auto multiply = [&](const uint32_t(&v)[4], const uint32_t(&b)[4]) {
            ptx::mma_m16n8k16_bf16(acc[2 * nt], v[0], v[1], v[2], v[3], b[0], b[1]);
            ptx::mma_m16n8k16_bf16(acc[2 * nt + 1], v[0], v[1], v[2], v[3], b[2], b[3]);
          };
          multiply(value, high);
          multiply(value, low);
          if constexpr (!std::is_same_v<Element, BFloat16>) multiply(value_low, high);
        }
      }
      float4* destination =
          reinterpret_cast<float4*>(params.U) + ((tile * (V / 16) + warp * kTiles + m) * (C / 8)) * 32 + lane;
#pragma unroll
      for (int n = 0; n < 8; ++n) destination[n * 32] = {acc[n][0], acc[n][1], acc[n][2], acc[n][3]};
    }
  }

  __device__ __forceinline__ void store_tile(uint8_t* destination, int shared_offset, int bytes) const {
    ptx::cp_async_bulk_store(destination, ptx::shared_address(shared + shared_offset), bytes);
    ptx::cp_async_bulk_commit_group();
  }

  __device__ __forceinline__ void run() {
    const ChunkFwdParams& call = params.call;
    const int key_head = value_head / (call.problem.value_heads / call.problem.heads);
    this->activate(key_head);
    RowReader q_rows(*this, call.q, call.q_stride, key_head), k_rows(*this, call.k, call.k_stride, key_head);
    __syncthreads();
    this->store_chunk_decay();
    __syncthreads();
    this->scale_operands(q_rows, k_rows);
    __syncthreads();
    this->multiply_earlier_tiles();
    __syncthreads();

    load_values();
    this->store_products();
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0)
      store_tile(params.Aqk + tile * Config::kPairTileBytes, Config::kAqkOffset, Config::kPairTileBytes);

    invert_unit_lower_64x64(this->Akk(), warp, lane);
    if (params.inverse != nullptr) store_inverse();
    store_inverse_operands();
    ptx::cp_async_wait_all();
    __syncthreads();

    multiply_keys();
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) store_tile(params.W + tile * Config::kKeyTileBytes, Config::kRegionC, Config::kKeyTileBytes);
    multiply_values();
    if (threadIdx.x == 0) ptx::cp_async_bulk_wait_all();
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    intra_chunk_solve_kernel(const __grid_constant__ ChunkFwdKernelParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int value_heads = params.call.problem.value_heads;
  const int64_t tile = blockIdx.x;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const ChunkLocation location = locate_chunk(params.call, tile / value_heads, lane);
  if (location.tokens == 0) return;
  IntraChunkContext<Config> context{
      params, shared, warp, lane, lane >> 2, lane & 3, location, static_cast<int>(tile % value_heads), tile};
  IntraChunkSolve<Config>{{context}}.run();
}

}  // namespace kda
