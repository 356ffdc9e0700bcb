// Stage 1 of the forward: the intra-chunk solve. For every chunk of 64 tokens and value head, with G the cumulative log-gate:
//   Aqk[i,j] = scale * sum_d q_i k_j exp(G_i - G_j)   (i >= j)       Akk[i,j] = beta_i * sum_d k_i k_j exp(G_i - G_j)   (i > j)
//   Tinv = (I + Akk)^-1 Diag(beta)                                   U0 = Tinv V,   W = Tinv (K ⊙ e^G)
// and the operands of the later stages, Q_gated = scale * Q ⊙ e^G, K_decayed = K ⊙ e^{G_C - G}, chunk_decay = e^{G_C}.
//
// Grid: one CTA for each (chunk slot, value head); 4 warps. Until the solve, warp w owns the 16-token tile w; afterwards it owns
// K / 4 columns of W and V / 4 rows of U0^T.
//
// Where a token sits in registers: lane l holds rows l / 4 and l / 4 + 8 of its tile and, for each slice of 32 channels, the 8
// consecutive channels 32 s + 8 (l % 4) .. + 7, as a 16-byte load gives them. Read as MMA operands these are channels in a
// permuted order; A and B operands are permuted alike and the products contract over channels, so the order does not matter.
//
// Numerics: gate factors are products of alpha <= 1 (decay_tree.cuh). The diagonal of Aqk comes from the unscaled q and k, which
// are exact operands; normalisation is applied to fp32 results. The diagonal of Tinv (beta) is kept out of the bf16 operand and
// applied in fp32. The inverse is taken at fp32 accuracy (triangular_inverse.cuh).
//
// Shared memory (bytes, K = V = 128; regions are reused from phase to phase, barriers between):
//   region A  32768   alpha (fp32)  ->  operands q P, k P of the tile  ->  Akk (17408, fp32) and Aqk (8192, bf16)
//   region B  24576   log-decay totals of the tiles  ->  operands k R for the tiles below  ->  V (16384) and Tinv (8192, bf16)
//   region C  16384   K ⊙ e^G  ->  W, in place
//   rest       2560   decay totals of the tiles, beta, 1 / |k|
// Registers: at most 168, so that three CTAs fit a multiprocessor. Bound by issue slots and special functions, not by memory.
#pragma once

#include <type_traits>

#include "../device/chunk_location.cuh"
#include "../device/decay_tree.cuh"
#include "../device/elements.cuh"
#include "../device/gate.cuh"
#include "../device/tile.cuh"
#include "../device/triangular_inverse.cuh"
#include "kernel_params.h"

namespace kda {

constexpr int max_of(int a, int b) { return a > b ? a : b; }

// kVectorized: every 8-element group of q, k, v and g starts at a multiple of 16 bytes.
template <int K_, int V_, typename Element_, bool kVectorized_>
struct IntraChunkSolveConfig {
  static constexpr int K = K_, V = V_, C = kChunkTokens;
  using Element = Element_;
  static constexpr bool kVectorized = kVectorized_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kCtasPerSm = 3;
  static constexpr int kSlices = K / 32;

  using KeyTile = SwizzledTile<K>;    // [C][K]
  using ValueTile = SwizzledTile<V>;  // [C][V]
  using PairTile = SwizzledTile<C>;   // [C][C]
  static constexpr int kKeyTileBytes = C * K * 2, kValueTileBytes = C * V * 2, kPairTileBytes = C * C * 2;

  // One operand of a 16-token tile, for all channels.
  static constexpr int kTileOperandBytes = 16 * K * 2;
  // Tile 0 is seen by tiles 1, 2, 3; tile 1 by 2, 3; tile 2 by 3.
  static constexpr int kSuffixOperands = 6;

  static constexpr int kRegionA = 0;
  static constexpr int kRegionABytes = max_of(C * K * 4, SolveMatrix::kBytes + kPairTileBytes);
  static constexpr int kAqkOffset = kRegionA + SolveMatrix::kBytes;
  static constexpr int kRegionB = kRegionA + kRegionABytes;
  static constexpr int kRegionBBytes = max_of(kSuffixOperands * kTileOperandBytes, kValueTileBytes + kPairTileBytes);
  static constexpr int kTinvOffset = kRegionB + kValueTileBytes;
  static constexpr int kRegionC = kRegionB + kRegionBBytes;
  static constexpr int kTotals = kRegionC + kKeyTileBytes;  // [4][K] fp32
  static constexpr int kBeta = kTotals + 4 * K * 4;         // [C] fp32
  static constexpr int kKeyNorm = kBeta + C * 4;            // [C] fp32
  static constexpr int kSharedBytes = kKeyNorm + C * 4;

  static_assert(K % 64 == 0 && V % 64 == 0, "each warp owns whole 16 x 8 tiles of W and 16-row tiles of U0^T");
  static_assert(4 * K * 4 <= kRegionBBytes, "log-decay totals fit region B");
};

// Which operand copy in region B holds k R of tile `source` for the tile `target` > source.
__device__ __forceinline__ int suffix_operand_index(int source, int target) {
  return source == 0 ? target - 1 : (source == 1 ? target + 1 : 5);
}

// Eight fp32 values, scaled, as four packed bf16 pairs.
__device__ __forceinline__ void scale_and_pack(uint32_t (&packed)[4], const float (&values)[8], const float (&factor)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    packed[i] = pack_bf16(values[2 * i] * factor[2 * i], values[2 * i + 1] * factor[2 * i + 1]);
  }
}

__device__ __forceinline__ void load_8_shared(float (&values)[8], const float* source) {
  const float4 low = reinterpret_cast<const float4*>(source)[0], high = reinterpret_cast<const float4*>(source)[1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

template <typename Config>
struct IntraChunkSolve {
  using Element = typename Config::Element;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;

  const ChunkFwdKernelParams& params;
  uint8_t* const shared;
  const int warp, lane, group, member;  // group = lane / 4: row of the tile; member = lane % 4: channel group
  const ChunkLocation location;
  const int value_head;
  const int64_t tile;  // slot * HV + value_head

  // Products of one 8-row block of the tile with itself at one level: columns 0, 1 hold q k^T, columns 2, 3 hold k k^T.
  // A rows 0-7 are q rows, A rows 8-15 the k rows of the same tokens.
  struct DiagonalProducts {
    float exact[2][4] = {};    // unscaled operands, for the diagonal of Aqk
    float level[3][2][4] = {};  // blocks of 1, 2, 4 tokens; [block of 8 rows]
    float level8[4] = {};       // rows 8-15 against rows 0-7
  };

  __device__ __forceinline__ int row(int hi) const { return 16 * warp + group + 8 * hi; }
  __device__ __forceinline__ bool valid(int hi) const { return row(hi) < location.tokens; }
  __device__ __forceinline__ int channel(int slice) const { return 32 * slice + 8 * member; }

  // Element offset of the lane's first channel in its row `hi` of q, k or g. Rows past the end have the offset of the last one.
  __device__ __forceinline__ int64_t row_offset(const TokenStrides& stride, int head, int hi) const {
    const int token = min(row(hi), location.tokens - 1);
    return location.batch * stride.batch + (location.first_token + token) * stride.token + head * stride.head + channel(0);
  }

  // Eight channels of the lane's two rows of q or k, for the slices in turn: the loads of a slice are issued while the slice
  // before it is worked on. Rows past the end are zero.
  struct RowReader {
    const Element* rows[2];
    bool valid[2];
    uint4 next[2];

    __device__ __forceinline__ RowReader(const IntraChunkSolve& solve, const void* base, const TokenStrides& stride, int head) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        rows[hi] = static_cast<const Element*>(base) + solve.row_offset(stride, head, hi);
        valid[hi] = solve.valid(hi);
      }
      issue(0);
    }

    __device__ __forceinline__ void issue(int slice) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        next[hi] = valid[hi] ? load_8x16bit<Config::kVectorized>(rows[hi] + 32 * slice) : uint4{0, 0, 0, 0};
      }
    }

    // The units of slice `slice`; issues the loads of the slice after it.
    __device__ __forceinline__ void take(uint4 (&units)[2], int slice) {
      units[0] = next[0], units[1] = next[1];
      if (slice + 1 < Config::kSlices) issue(slice + 1);
    }
  };

  // Private to the lane: 16-byte unit `unit` of 4 of slice `slice` in region A.
  __device__ __forceinline__ uint4* lane_unit(int slice, int unit) const {
    return reinterpret_cast<uint4*>(shared + Config::kRegionA) + ((warp * Config::kSlices + slice) * 4 + unit) * 32 + lane;
  }

  __device__ __forceinline__ uint4* suffix_operand(int index, int slice, int k_step) const {
    return reinterpret_cast<uint4*>(shared + Config::kRegionB + index * Config::kTileOperandBytes) +
           (2 * slice + k_step) * 32 + lane;
  }

  __device__ __forceinline__ float* tile_total(int tile_index, int slice) const {
    return reinterpret_cast<float*>(shared + Config::kTotals) + tile_index * K + channel(slice);
  }

  // Phase 1: alpha of the tile into region A, totals over its tokens, beta, and 1 / |q|, 1 / |k| of the lane's rows.
  __device__ __forceinline__ void activate(int key_head, float (&q_norm)[2], float (&k_norm)[2]) {
    const ChunkFwdParams& call = params.call;
    const float decay_rate = call.A_log != nullptr ? expf(call.A_log[value_head]) : 1.0f;
    const GateActivation gate{call.gate, decay_rate, call.lower_bound};
    float* totals = reinterpret_cast<float*>(shared + Config::kTotals) + warp * K;
    float* log_totals = reinterpret_cast<float*>(shared + Config::kRegionB) + warp * K;
    const int64_t gate_rows[2] = {row_offset(call.g_stride, value_head, 0), row_offset(call.g_stride, value_head, 1)};
    Raw8 gate_next[2];
    const auto issue_gate = [&](int slice) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        gate_next[hi].template load<Config::kVectorized>(call.g, gate_rows[hi] + 32 * slice, call.gate_type);
      }
    };
    issue_gate(0);
    RowReader q_rows(*this, call.q, call.q_stride, key_head), k_rows(*this, call.k, call.k_stride, key_head);
    float q_squares[2] = {}, k_squares[2] = {};

#pragma unroll 1
    for (int s = 0; s < Config::kSlices; ++s) {
      float bias[8] = {};
      if (call.dt_bias != nullptr) {
#pragma unroll
        for (int c = 0; c < 8; ++c) bias[c] = __ldg(call.dt_bias + int64_t{value_head} * K + channel(s) + c);
      }
      const Raw8 gate_units[2] = {gate_next[0], gate_next[1]};
      if (s + 1 < Config::kSlices) issue_gate(s + 1);
      if (call.qk_l2norm) {
        uint4 q_units[2], k_units[2];
        q_rows.take(q_units, s);
        k_rows.take(k_units, s);
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) {
          float q[8], k[8];
          unpack_8<Element>(q, q_units[hi]);
          unpack_8<Element>(k, k_units[hi]);
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            q_squares[hi] += q[c] * q[c];
            k_squares[hi] += k[c] * k[c];
          }
        }
      }

      float log_sum[8], product[8];
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        float g[8], log2_alpha[8], alpha[8];
        gate_units[hi].to_floats(g, call.gate_type);
        gate.log2_alpha(log2_alpha, g, bias);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (!valid(hi)) log2_alpha[c] = 0.0f;  // a token past the end has gate 0
          alpha[c] = ptx::ex2(log2_alpha[c]);
          log_sum[c] = hi == 0 ? log2_alpha[c] : log_sum[c] + log2_alpha[c];
          product[c] = hi == 0 ? alpha[c] : product[c] * alpha[c];
        }
        *reinterpret_cast<float4*>(lane_unit(s, 2 * hi)) = {alpha[0], alpha[1], alpha[2], alpha[3]};
        *reinterpret_cast<float4*>(lane_unit(s, 2 * hi + 1)) = {alpha[4], alpha[5], alpha[6], alpha[7]};
      }
      totals[channel(s) + group] = combine_rows<Multiply>(product, lane);
      log_totals[channel(s) + group] = combine_rows<Add>(log_sum, lane);
    }

    constexpr float kEpsilon = 1e-6f;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      q_norm[hi] = k_norm[hi] = 1.0f;
      if (call.qk_l2norm) {
        q_squares[hi] += __shfl_xor_sync(0xffffffffu, q_squares[hi], 1);
        q_squares[hi] += __shfl_xor_sync(0xffffffffu, q_squares[hi], 2);
        k_squares[hi] += __shfl_xor_sync(0xffffffffu, k_squares[hi], 1);
        k_squares[hi] += __shfl_xor_sync(0xffffffffu, k_squares[hi], 2);
        q_norm[hi] = rsqrtf(q_squares[hi] + kEpsilon);
        k_norm[hi] = rsqrtf(k_squares[hi] + kEpsilon);
      }
      if (member == 0) {
        float beta = 0.0f;  // a token past the end writes nothing
        if (valid(hi)) {
          beta = load_1(call.beta,
                        location.batch * call.beta_stride.batch +
                            (location.first_token + row(hi)) * call.beta_stride.token + value_head * call.beta_stride.head,
                        call.beta_type);
          if (call.beta_sigmoid) beta = call.beta_scale * sigmoid(beta);
        }
        reinterpret_cast<float*>(shared + Config::kBeta)[row(hi)] = beta;
        reinterpret_cast<float*>(shared + Config::kKeyNorm)[row(hi)] = k_norm[hi];
      }
    }
  }

  // e^{G_C}: from the sum of the log-gates, so that very slow gates keep their bits over thousands of chunks.
  __device__ __forceinline__ void store_chunk_decay() {
    const float* log_totals = reinterpret_cast<const float*>(shared + Config::kRegionB);
    const int c = threadIdx.x;
    if (c < K) {
      const float sum = (log_totals[c] + log_totals[K + c]) + (log_totals[2 * K + c] + log_totals[3 * K + c]);
      params.chunk_decay[tile * K + c] = ptx::ex2(sum);
    }
  }

  template <int kLevel, int kBlock>
  __device__ __forceinline__ void add_level(DiagonalProducts& products, const DecayTree& tree, const float (&q)[2][8],
                                            const float (&k)[2][8]) const {
    uint32_t qs[2][4], ks[2][4];
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      float factor[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) factor[c] = tree.template factor<kBlock>(hi, c, lane);
      scale_and_pack(qs[hi], q[hi], factor);
      scale_and_pack(ks[hi], k[hi], factor);
    }
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      if constexpr (kBlock == 8) {
        ptx::mma_m16n8k16_bf16(products.level8, qs[1][step], ks[1][step], qs[1][step + 1], ks[1][step + 1], ks[0][step],
                               ks[0][step + 1]);
      } else {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          ptx::mma_m16n8k16_bf16(products.level[kLevel][b], qs[b][step], ks[b][step], qs[b][step + 1], ks[b][step + 1],
                                 ks[b][step], ks[b][step + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_key_unit(uint8_t* destination, int hi, int slice, const uint32_t (&packed)[4]) const {
    *reinterpret_cast<uint4*>(destination + Config::KeyTile::unit_offset(row(hi), channel(slice) >> 3)) = {
        packed[0], packed[1], packed[2], packed[3]};
  }

  // Phase 2: products inside the tile, level by level, and every operand that carries a gate factor.
  __device__ __forceinline__ void scale_operands(int key_head, const float (&q_norm)[2], const float (&k_norm)[2],
                                                 DiagonalProducts& products) {
    const ChunkFwdParams& call = params.call;
    RowReader q_rows(*this, call.q, call.q_stride, key_head), k_rows(*this, call.k, call.k_stride, key_head);
#pragma unroll 1
    for (int s = 0; s < Config::kSlices; ++s) {
      float alpha[2][8], q[2][8], k[2][8];
      uint4 q_units[2], k_units[2];
      q_rows.take(q_units, s);
      k_rows.take(k_units, s);
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        unpack_8<Element>(q[hi], q_units[hi]);
        unpack_8<Element>(k[hi], k_units[hi]);
        const uint32_t qw[4] = {q_units[hi].x, q_units[hi].y, q_units[hi].z, q_units[hi].w};
        const uint32_t kw[4] = {k_units[hi].x, k_units[hi].y, k_units[hi].z, k_units[hi].w};
#pragma unroll
        for (int step = 0; step < 4; step += 2) {
          if constexpr (std::is_same_v<Element, BFloat16>) {
            ptx::mma_m16n8k16_bf16(products.exact[hi], qw[step], 0, qw[step + 1], 0, kw[step], kw[step + 1]);
          } else {
            ptx::mma_m16n8k16_f16(products.exact[hi], qw[step], 0, qw[step + 1], 0, kw[step], kw[step + 1]);
          }
        }
        const float4 low = *reinterpret_cast<const float4*>(lane_unit(s, 2 * hi));
        const float4 high = *reinterpret_cast<const float4*>(lane_unit(s, 2 * hi + 1));
        alpha[hi][0] = low.x, alpha[hi][1] = low.y, alpha[hi][2] = low.z, alpha[hi][3] = low.w;
        alpha[hi][4] = high.x, alpha[hi][5] = high.y, alpha[hi][6] = high.z, alpha[hi][7] = high.w;
      }

      DecayTree tree(alpha);
      add_level<0, 1>(products, tree, q, k);
      tree.template double_blocks<1>(lane);
      add_level<1, 2>(products, tree, q, k);
      tree.template double_blocks<2>(lane);
      add_level<2, 4>(products, tree, q, k);
      tree.template double_blocks<4>(lane);
      add_level<2, 8>(products, tree, q, k);
      tree.join_halves();

      // Operands of the tiles above this one's columns: q P and k P as A operands, over alpha in region A.
      uint32_t qs[2][4], ks[2][4];
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        scale_and_pack(qs[hi], q[hi], tree.prefix[hi]);
        scale_and_pack(ks[hi], k[hi], tree.prefix[hi]);
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        *lane_unit(s, step) = {qs[0][2 * step], qs[1][2 * step], qs[0][2 * step + 1], qs[1][2 * step + 1]};
        *lane_unit(s, 2 + step) = {ks[0][2 * step], ks[1][2 * step], ks[0][2 * step + 1], ks[1][2 * step + 1]};
      }

      // k R times the totals of the tiles between, as B operands for each later tile.
      float between[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) between[c] = 1.0f;
#pragma unroll 1
      for (int target = warp + 1; target < Config::kWarps; ++target) {
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) {
          float factor[8];
#pragma unroll
          for (int c = 0; c < 8; ++c) factor[c] = tree.suffix[hi][c] * between[c];
          scale_and_pack(ks[hi], k[hi], factor);
        }
        const int index = suffix_operand_index(warp, target);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          *suffix_operand(index, s, step) = {ks[0][2 * step], ks[0][2 * step + 1], ks[1][2 * step], ks[1][2 * step + 1]};
        }
        float total[8];
        load_8_shared(total, tile_total(target, s));
#pragma unroll
        for (int c = 0; c < 8; ++c) between[c] *= total[c];
      }
      // `between` is now the decay from the end of this tile to the end of the chunk.
      float before[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) before[c] = 1.0f;
#pragma unroll 1
      for (int source = 0; source < warp; ++source) {
        float total[8];
        load_8_shared(total, tile_total(source, s));
#pragma unroll
        for (int c = 0; c < 8; ++c) before[c] *= total[c];
      }

#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        uint32_t packed[4];
        float factor[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) factor[c] = tree.suffix[hi][c] * between[c] * k_norm[hi];
        scale_and_pack(packed, k[hi], factor);
        store_key_unit(params.K_decayed + tile * Config::kKeyTileBytes, hi, s, packed);
#pragma unroll
        for (int c = 0; c < 8; ++c) factor[c] = tree.prefix[hi][c] * before[c] * k_norm[hi];
        scale_and_pack(packed, k[hi], factor);
        store_key_unit(shared + Config::kRegionC, hi, s, packed);
#pragma unroll
        for (int c = 0; c < 8; ++c) factor[c] = tree.prefix[hi][c] * before[c] * (q_norm[hi] * call.scale);
        scale_and_pack(packed, q[hi], factor);
        store_key_unit(params.Q_gated + tile * Config::kKeyTileBytes, hi, s, packed);
      }
    }
  }

  // Phase 3: products of this tile's rows with the tiles before it.
  __device__ __forceinline__ void multiply_earlier_tiles(float (&qk)[3][2][4], float (&kk)[3][2][4]) const {
#pragma unroll
    for (int source = 0; source < 3; ++source) {
      if (source < warp) {
#pragma unroll 2
        for (int s = 0; s < Config::kSlices; ++s) {
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const uint4 q = *lane_unit(s, step), k = *lane_unit(s, 2 + step);
            const uint4 b = *suffix_operand(suffix_operand_index(source, warp), s, step);
            ptx::mma_m16n8k16_bf16(qk[source][0], q.x, q.y, q.z, q.w, b.x, b.y);
            ptx::mma_m16n8k16_bf16(qk[source][1], q.x, q.y, q.z, q.w, b.z, b.w);
            ptx::mma_m16n8k16_bf16(kk[source][0], k.x, k.y, k.z, k.w, b.x, b.y);
            ptx::mma_m16n8k16_bf16(kk[source][1], k.x, k.y, k.z, k.w, b.z, b.w);
          }
        }
      }
    }
  }

  // Writes (row, column) and (row, column + 1) of Aqk and Akk, applying the norms, scale and beta.
  __device__ __forceinline__ void store_pair(int row, int column, float qk0, float qk1, float kk0, float kk1, float q_scale,
                                             float k_scale) const {
    const float2 norm = *reinterpret_cast<const float2*>(shared + Config::kKeyNorm + column * 4);
    *reinterpret_cast<uint32_t*>(shared + Config::kAqkOffset + Config::PairTile::pair_offset(row, column)) =
        pack_bf16(qk0 * q_scale * norm.x, qk1 * q_scale * norm.y);
    const SolveMatrix Akk{reinterpret_cast<float*>(shared + Config::kRegionA)};
    *reinterpret_cast<float2*>(&Akk.at(row, column)) = {kk0 * k_scale * norm.x, kk1 * k_scale * norm.y};
  }

  // Phase 4: Aqk and Akk into shared memory.
  __device__ __forceinline__ void store_products(const DiagonalProducts& products, const float (&qk)[3][2][4],
                                                 const float (&kk)[3][2][4], const float (&q_norm)[2],
                                                 const float (&k_norm)[2]) const {
    float q_scale[2], k_scale[2];
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      q_scale[hi] = q_norm[hi] * params.call.scale;
      k_scale[hi] = k_norm[hi] * reinterpret_cast<const float*>(shared + Config::kBeta)[row(hi)];
    }
    const int pair = 2 * member;  // first of the lane's two columns of an 8-column block
#pragma unroll
    for (int source = 0; source < 3; ++source) {
      if (source < warp) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int hi = 0; hi < 2; ++hi) {
            store_pair(row(hi), 16 * source + 8 * n + pair, qk[source][n][2 * hi], qk[source][n][2 * hi + 1],
                       kk[source][n][2 * hi], kk[source][n][2 * hi + 1], q_scale[hi], k_scale[hi]);
          }
        }
      }
    }
    // The tile itself. Inside a block of 8 rows the highest bit in which row and column differ names the level; entries of
    // other levels are dropped by selection.
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float qk_values[2], kk_values[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = pair + e, differing = group ^ column;
        const int level = differing >= 4 ? 2 : (differing >= 2 ? 1 : 0);
        const float qk_level = level == 2 ? products.level[2][b][e] : (level == 1 ? products.level[1][b][e] : products.level[0][b][e]);
        const float kk_level =
            level == 2 ? products.level[2][b][2 + e] : (level == 1 ? products.level[1][b][2 + e] : products.level[0][b][2 + e]);
        qk_values[e] = group > column ? qk_level : (group == column ? products.exact[b][e] : 0.0f);
        kk_values[e] = group > column ? kk_level : 0.0f;
      }
      store_pair(row(b), 16 * warp + 8 * b + pair, qk_values[0], qk_values[1], kk_values[0], kk_values[1], q_scale[b],
                 k_scale[b]);
    }
    store_pair(row(1), 16 * warp + pair, products.level8[0], products.level8[1], products.level8[2], products.level8[3],
               q_scale[1], k_scale[1]);
    // Above the diagonal Aqk is zero; Akk is not read there.
    for (int column = 16 * warp + 8; column < C; column += 8) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        if (column == 16 * warp + 8 && hi == 1) continue;
        *reinterpret_cast<uint32_t*>(shared + Config::kAqkOffset + Config::PairTile::pair_offset(row(hi), column + pair)) = 0;
      }
    }
  }

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

  // Tinv without its diagonal, as a bf16 tile: row tile `warp`, columns of the tiles up to it.
  __device__ __forceinline__ void store_inverse_operand() const {
    const SolveMatrix T{reinterpret_cast<float*>(shared + Config::kRegionA)};
    const float* beta = reinterpret_cast<const float*>(shared + Config::kBeta);
    for (int column = 2 * member; column < 16 * (warp + 1); column += 8) {
      const float2 beta_pair = *reinterpret_cast<const float2*>(beta + column);
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const float2 t = *reinterpret_cast<const float2*>(&T.at(row(hi), column));
        *reinterpret_cast<uint32_t*>(shared + Config::kTinvOffset + Config::PairTile::pair_offset(row(hi), column)) =
            pack_bf16(row(hi) > column ? t.x * beta_pair.x : 0.0f, row(hi) > column + 1 ? t.y * beta_pair.y : 0.0f);
      }
    }
  }

  // W = Tinv (K ⊙ e^G) for the warp's K / 4 channels, over K ⊙ e^G in region C.
  __device__ __forceinline__ void multiply_keys() const {
    using KeyTile = typename Config::KeyTile;
    constexpr int kColumns = K / Config::kWarps, kPairs = kColumns / 16;
    const uint32_t keys = ptx::shared_address(shared + Config::kRegionC);
    const uint32_t inverse = ptx::shared_address(shared + Config::kTinvOffset);
    float acc[4][2 * kPairs][4] = {};
#pragma unroll
    for (int kt = 0; kt < 4; ++kt) {
      uint32_t b[kPairs][4];
#pragma unroll
      for (int n = 0; n < kPairs; ++n) KeyTile::load_b_trans(b[n], keys, 16 * kt, warp * kColumns + 16 * n, lane);
#pragma unroll
      for (int mt = kt; mt < 4; ++mt) {
        uint32_t a[4];
        Config::PairTile::load_a(a, inverse, 16 * mt, 16 * kt, lane);
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
          ptx::mma_m16n8k16_bf16(acc[mt][2 * n], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
          ptx::mma_m16n8k16_bf16(acc[mt][2 * n + 1], a[0], a[1], a[2], a[3], b[n][2], b[n][3]);
        }
      }
    }
    __syncwarp();
    const float* beta = reinterpret_cast<const float*>(shared + Config::kBeta);
#pragma unroll
    for (int mt = 0; mt < 4; ++mt) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const int token = 16 * mt + 8 * hi + group;
        const float diagonal = beta[token];
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
    const float* beta = reinterpret_cast<const float*>(shared + Config::kBeta);
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
          const float2 diagonal = *reinterpret_cast<const float2*>(beta + 16 * kt + 8 * half + 2 * member);
          const float2 upper = Packed2<Element>::to_float2(a[2 * half]), lower = Packed2<Element>::to_float2(a[2 * half + 1]);
          acc[2 * kt + half][0] += diagonal.x * upper.x;
          acc[2 * kt + half][1] += diagonal.y * upper.y;
          acc[2 * kt + half][2] += diagonal.x * lower.x;
          acc[2 * kt + half][3] += diagonal.y * lower.y;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = Packed2<Element>::to_bf16(a[i]);
#pragma unroll
        for (int nt = kt; nt < 4; ++nt) {
          uint32_t b[4];
          Config::PairTile::load_b(b, inverse, 16 * nt, 16 * kt, lane);
          ptx::mma_m16n8k16_bf16(acc[2 * nt], a[0], a[1], a[2], a[3], b[0], b[1]);
          ptx::mma_m16n8k16_bf16(acc[2 * nt + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
      float4* destination = params.U0 + ((tile * (V / 16) + warp * kTiles + m) * (C / 8)) * 32 + lane;
#pragma unroll
      for (int n = 0; n < 8; ++n) destination[n * 32] = {acc[n][0], acc[n][1], acc[n][2], acc[n][3]};
    }
  }

  __device__ __forceinline__ void store_tile(uint8_t* destination, int shared_offset, int bytes) const {
    ptx::cp_async_bulk_store(destination, ptx::shared_address(shared + shared_offset), bytes);
    ptx::cp_async_bulk_commit_group();
  }

  __device__ __forceinline__ void run() {
    const int key_head = value_head / (params.call.problem.value_heads / params.call.problem.heads);
    float q_norm[2], k_norm[2];
    activate(key_head, q_norm, k_norm);
    __syncthreads();
    store_chunk_decay();
    __syncthreads();

    DiagonalProducts products;
    scale_operands(key_head, q_norm, k_norm, products);
    __syncthreads();

    float qk[3][2][4] = {}, kk[3][2][4] = {};
    multiply_earlier_tiles(qk, kk);
    __syncthreads();

    load_values();
    store_products(products, qk, kk, q_norm, k_norm);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) store_tile(params.Aqk + tile * Config::kPairTileBytes, Config::kAqkOffset, Config::kPairTileBytes);

    invert_unit_lower_64x64(SolveMatrix{reinterpret_cast<float*>(shared + Config::kRegionA)}, warp, lane);
    store_inverse_operand();
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
  IntraChunkSolve<Config>{params, shared,   warp, lane, lane >> 2, lane & 3, location, static_cast<int>(tile % value_heads),
                          tile}
      .run();
}

}  // namespace kda
