// The first half of the intra-chunk solve: from q, k, g and beta to Aqk and Akk in shared memory, and the operands of
// the later stages that carry a gate factor. Phases, a CTA barrier between each:
//   activate                alpha, totals of the tiles, norms, beta
//   scale_operands          products inside the warp's tile, level by level; operands for products with other tiles
//   multiply_earlier_tiles  products with the tiles before it
//   store_products          Aqk and Akk, selected and scaled
#pragma once

#include <type_traits>

#include "../device/decay_tree.cuh"
#include "../device/gate.cuh"
#include "intra_chunk_context.cuh"

namespace kda {

// Eight fp32 values, scaled, as four packed bf16 pairs.
__device__ __forceinline__ void scale_and_pack(uint32_t (&packed)[4], const float (&values)[8],
                                               const float (&factor)[8]) {
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
struct IntraChunkPairs : IntraChunkContext<Config> {
  using Context = IntraChunkContext<Config>;
  using Element = typename Config::Element;
  using Context::beta, Context::channel, Context::group, Context::key_norm, Context::lane, Context::lane_unit,
      Context::location;
  using Context::member, Context::params, Context::row, Context::row_offset, Context::shared, Context::suffix_operand;
  using Context::tile, Context::tile_total, Context::valid, Context::value_head, Context::warp;
  static constexpr int K = Config::K, C = Config::C;

  // Eight channels of the lane's two rows of q or k, for the slices in turn: the loads of a slice are issued while the
  // slice before it is worked on. Rows past the end are zero.
  struct RowReader {
    const Element* rows[2];
    bool valid[2];
    uint4 next[2];

    __device__ __forceinline__ RowReader(const IntraChunkPairs& pairs, const void* base, const TokenStrides& stride,
                                         int head) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        rows[hi] = static_cast<const Element*>(base) + pairs.row_offset(stride, head, hi);
        valid[hi] = pairs.valid(hi);
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

  // Products of one 8-row block of the tile with itself at one level: columns 0, 1 hold q k^T, columns 2, 3 hold k k^T.
  // A rows 0-7 are q rows, A rows 8-15 the k rows of the same tokens.
  struct DiagonalProducts {
    float exact[2][4] = {};     // unscaled operands, for the diagonal of Aqk
    float level[3][2][4] = {};  // blocks of 1, 2, 4 tokens; [block of 8 rows]
    float level8[4] = {};       // rows 8-15 against rows 0-7
  };

  float q_norm[2], k_norm[2];
  DiagonalProducts products;
  float qk[3][2][4] = {}, kk[3][2][4] = {};  // products with the tiles before the warp's own

  // Phase 1: alpha of the tile into region A, totals over its tokens, beta, and 1 / |q|, 1 / |k| of the lane's rows.
  __device__ __forceinline__ void activate(int key_head) {
    const ChunkFwdParams& call = params.call;
    const float decay_rate = call.A_log != nullptr ? expf(call.A_log[value_head]) : 1.0f;
    const GateActivation gate{call.gate, decay_rate, call.lower_bound};
    float* totals = reinterpret_cast<float*>(shared + Config::kTotals) + warp * K;
    float* log_totals = reinterpret_cast<float*>(shared + Config::kRegionB) + warp * K;
    const int64_t gate_rows[2] = {row_offset(call.g_stride, value_head, 0), row_offset(call.g_stride, value_head, 1)};
    Raw8 gate_next[2];
    float bias_next[8] = {};
    const auto issue_gate = [&](int slice) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        gate_next[hi].template load<Config::kVectorized>(call.g, gate_rows[hi] + 32 * slice, call.gate_type);
      }
      if (call.dt_bias != nullptr) {
#pragma unroll
        for (int c = 0; c < 8; ++c) bias_next[c] = __ldg(call.dt_bias + int64_t{value_head} * K + channel(slice) + c);
      }
    };
    issue_gate(0);
    RowReader q_rows(*this, call.q, call.q_stride, key_head), k_rows(*this, call.k, call.k_stride, key_head);
    float q_squares[2] = {}, k_squares[2] = {};

#pragma unroll 1
    for (int s = 0; s < Config::kSlices; ++s) {
      float bias[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) bias[c] = bias_next[c];
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
        float write_strength = 0.0f;  // a token past the end writes nothing
        if (valid(hi)) {
          write_strength =
              load_1(call.beta,
                     location.batch * call.beta_stride.batch +
                         (location.first_token + row(hi)) * call.beta_stride.token + value_head * call.beta_stride.head,
                     call.beta_type);
          if (call.beta_sigmoid) write_strength = call.beta_scale * sigmoid(write_strength);
        }
        beta()[row(hi)] = write_strength;
        key_norm()[row(hi)] = k_norm[hi];
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
  __device__ __forceinline__ void add_level(const DecayTree& tree, const float (&q)[2][8], const float (&k)[2][8]) {
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

  __device__ __forceinline__ void store_key_unit(uint8_t* destination, int hi, int slice,
                                                 const uint32_t (&packed)[4]) const {
    *reinterpret_cast<uint4*>(destination + Config::KeyTile::unit_offset(row(hi), channel(slice) >> 3)) = {
        packed[0], packed[1], packed[2], packed[3]};
  }

  // Phase 2: products inside the tile, level by level, and every operand that carries a gate factor.
  __device__ __forceinline__ void scale_operands(RowReader& q_rows, RowReader& k_rows) {
    const ChunkFwdParams& call = params.call;
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
      add_level<0, 1>(tree, q, k);
      tree.template double_blocks<1>(lane);
      add_level<1, 2>(tree, q, k);
      tree.template double_blocks<2>(lane);
      add_level<2, 4>(tree, q, k);
      tree.template double_blocks<4>(lane);
      add_level<2, 8>(tree, q, k);
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
          *suffix_operand(index, s, step) = {ks[0][2 * step], ks[0][2 * step + 1], ks[1][2 * step],
                                             ks[1][2 * step + 1]};
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
  __device__ __forceinline__ void multiply_earlier_tiles() {
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
  __device__ __forceinline__ void store_pair(int row, int column, float qk0, float qk1, float kk0, float kk1,
                                             float q_scale, float k_scale) const {
    const float2 norm = *reinterpret_cast<const float2*>(key_norm() + column);
    *reinterpret_cast<uint32_t*>(shared + Config::kAqkOffset + Config::PairTile::pair_offset(row, column)) =
        pack_bf16(qk0 * q_scale * norm.x, qk1 * q_scale * norm.y);
    *reinterpret_cast<float2*>(&this->Akk().at(row, column)) = {kk0 * k_scale * norm.x, kk1 * k_scale * norm.y};
  }

  // Phase 4: Aqk and Akk into shared memory.
  __device__ __forceinline__ void store_products() const {
    float q_scale[2], k_scale[2];
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      q_scale[hi] = q_norm[hi] * params.call.scale;
      k_scale[hi] = k_norm[hi] * beta()[row(hi)];
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
    // The tile itself. Inside a block of 8 rows the highest bit in which row and column differ names the level; entries
    // of other levels are dropped by selection.
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float qk_values[2], kk_values[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = pair + e, differing = group ^ column;
        const int level = differing >= 4 ? 2 : (differing >= 2 ? 1 : 0);
        const float qk_level =
            level == 2 ? products.level[2][b][e] : (level == 1 ? products.level[1][b][e] : products.level[0][b][e]);
        const float kk_level = level == 2 ? products.level[2][b][2 + e]
                                          : (level == 1 ? products.level[1][b][2 + e] : products.level[0][b][2 + e]);
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
        *reinterpret_cast<uint32_t*>(shared + Config::kAqkOffset +
                                     Config::PairTile::pair_offset(row(hi), column + pair)) = 0;
      }
    }
  }
};

}  // namespace kda
