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

// Operands of the products between tokens, whose gate factors are at most 1. With normalised q and k every operand is at most 1 in
// magnitude and fp16 holds it with 11 bits; without, its range is not known and it is bf16.
template <bool kNormalized>
struct PairOperand {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return kNormalized ? Packed2<Float16>::from_floats(low, high) : pack_bf16(low, high);
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                  uint32_t b0, uint32_t b1) {
    if constexpr (kNormalized) {
      ptx::mma_m16n8k16_f16(d, a0, a1, a2, a3, b0, b1);
    } else {
      ptx::mma_m16n8k16_bf16(d, a0, a1, a2, a3, b0, b1);
    }
  }

  // Eight fp32 values, scaled, as four packed pairs.
  static __device__ __forceinline__ void scale_and_pack(uint32_t (&packed)[4], const float (&values)[8],
                                                        const float (&factor)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed[i] = pack(values[2 * i] * factor[2 * i], values[2 * i + 1] * factor[2 * i + 1]);
    }
  }
};

// 1 / |x| as the product of a power of two and a rest in [1, 2): the power of two scales operands without rounding them, so that
// products of keys that are the same bit for bit come out the same, and the rest is applied to the fp32 results.
struct InverseNorm {
  float power = 1.0f, rest = 1.0f;
  InverseNorm() = default;
  __device__ __forceinline__ explicit InverseNorm(float sum_of_squares) {
    const uint32_t bits = __float_as_uint(rsqrtf(sum_of_squares + kL2NormEpsilon));
    power = __uint_as_float(bits & 0x7f800000u);
    rest = __uint_as_float((bits & 0x007fffffu) | 0x3f800000u);
  }
};

// Eight fp32 values at a multiple of 16 bytes.
__device__ __forceinline__ void load_8_aligned(float (&values)[8], const float* source) {
  const float4 low = reinterpret_cast<const float4*>(source)[0], high = reinterpret_cast<const float4*>(source)[1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

template <typename Config>
struct IntraChunkPairs : IntraChunkContext<Config> {
  using Context = IntraChunkContext<Config>;
  using Element = typename Config::Element;
  using Context::beta, Context::channel, Context::group, Context::key_rest, Context::lane, Context::lane_unit,
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

  using Operand = PairOperand<Config::kNormalized>;
  static constexpr int kLevels = 3;  // of the decay tree inside a block of 8 tokens

  // Products of the tile with itself, in blocks of 8 x 8. Rows 0-7 of each A operand are q rows and rows 8-15 the k
  // rows of the same tokens, so that elements 0, 1 of an accumulator belong to q k^T and elements 2, 3 to k k^T.
  struct DiagonalProducts {
    float exact[2][4] = {};           // block on the diagonal, unscaled operands: for the diagonal of Aqk
    float level[kLevels][2][4] = {};  // block on the diagonal, pairs of each level
    float lower[4] = {};              // rows 8-15 against rows 0-7
  };

  InverseNorm q_norm[2], k_norm[2];
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
        const float* bias = call.dt_bias + int64_t{value_head} * K + channel(slice);
        if constexpr (Config::kVectorized) {
          load_8_aligned(bias_next, bias);
        } else {
#pragma unroll
          for (int c = 0; c < 8; ++c) bias_next[c] = bias[c];
        }
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
      if constexpr (Config::kNormalized) {
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

      float log2_alpha[2][8];
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        float g[8];
        gate_units[hi].to_floats(g, call.gate_type);
        gate.log2_alpha(log2_alpha[hi], g, bias);
        if (!valid(hi)) {  // a token past the end has gate 0
#pragma unroll
          for (int c = 0; c < 8; ++c) log2_alpha[hi][c] = 0.0f;
        }
      }
      float alpha[2][8], log_sum[8], product[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        alpha[0][c] = ptx::ex2(log2_alpha[0][c]);
        alpha[1][c] = ptx::ex2(log2_alpha[1][c]);
        log_sum[c] = log2_alpha[0][c] + log2_alpha[1][c];
        product[c] = alpha[0][c] * alpha[1][c];
      }
      store_lane_floats(s, alpha);
      totals[channel(s) + group] = combine_rows<Multiply>(product, lane);
      log_totals[channel(s) + group] = combine_rows<Add>(log_sum, lane);
    }

#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      if constexpr (Config::kNormalized) {
        q_squares[hi] += __shfl_xor_sync(0xffffffffu, q_squares[hi], 1);
        q_squares[hi] += __shfl_xor_sync(0xffffffffu, q_squares[hi], 2);
        k_squares[hi] += __shfl_xor_sync(0xffffffffu, k_squares[hi], 1);
        k_squares[hi] += __shfl_xor_sync(0xffffffffu, k_squares[hi], 2);
        q_norm[hi] = InverseNorm(q_squares[hi]);
        k_norm[hi] = InverseNorm(k_squares[hi]);
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
        key_rest()[row(hi)] = k_norm[hi].rest;
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

  // Adds the products of 16 channels' worth of packed operands: qa, ka as the later token of a pair, kb as the earlier
  // one.
  template <int kLevel>
  __device__ __forceinline__ void multiply_diagonal_blocks(const uint32_t (&qa)[2][4], const uint32_t (&ka)[2][4],
                                                           const uint32_t (&kb)[2][4]) {
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        Operand::multiply(products.level[kLevel][b], qa[b][step], ka[b][step], qa[b][step + 1], ka[b][step + 1],
                          kb[b][step], kb[b][step + 1]);
      }
    }
  }

  __device__ __forceinline__ void multiply_lower_block(const uint32_t (&qa)[2][4], const uint32_t (&ka)[2][4],
                                                       const uint32_t (&kb)[2][4]) {
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      Operand::multiply(products.lower, qa[1][step], ka[1][step], qa[1][step + 1], ka[1][step + 1], kb[0][step],
                        kb[0][step + 1]);
    }
  }

  // The level of blocks of kBlock tokens. Each row is the later token of all its pairs at this level, or the earlier
  // one of all.
  template <int kLevel, int kBlock>
  __device__ __forceinline__ void add_level(const DecayTree& tree, const float (&q)[2][8], const float (&k)[2][8]) {
    uint32_t qs[2][4], ks[2][4];
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      float factor[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) factor[c] = tree.template factor<kBlock>(hi, c, lane);
      Operand::scale_and_pack(qs[hi], q[hi], factor);
      Operand::scale_and_pack(ks[hi], k[hi], factor);
    }
    if constexpr (kBlock == 8) {
      multiply_lower_block(qs, ks, ks);
    } else {
      multiply_diagonal_blocks<kLevel>(qs, ks, ks);
    }
  }

  // The diagonal of Aqk from q and k as they came: products of 16-bit numbers are exact in fp32.
  __device__ __forceinline__ void add_exact(const uint4 (&q_units)[2], const uint4 (&k_units)[2]) {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const uint32_t q[4] = {q_units[hi].x, q_units[hi].y, q_units[hi].z, q_units[hi].w};
      const uint32_t k[4] = {k_units[hi].x, k_units[hi].y, k_units[hi].z, k_units[hi].w};
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        if constexpr (std::is_same_v<Element, BFloat16>) {
          ptx::mma_m16n8k16_bf16(products.exact[hi], q[step], 0, q[step + 1], 0, k[step], k[step + 1]);
        } else {
          ptx::mma_m16n8k16_f16(products.exact[hi], q[step], 0, q[step + 1], 0, k[step], k[step + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_lane_floats(int slice, const float (&values)[2][8]) const {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float(&v)[8] = values[hi];
      *reinterpret_cast<float4*>(lane_unit(slice, 2 * hi)) = {v[0], v[1], v[2], v[3]};
      *reinterpret_cast<float4*>(lane_unit(slice, 2 * hi + 1)) = {v[4], v[5], v[6], v[7]};
    }
  }

  __device__ __forceinline__ void load_lane_floats(int slice, float (&values)[2][8]) const {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float4 low = *reinterpret_cast<const float4*>(lane_unit(slice, 2 * hi));
      const float4 high = *reinterpret_cast<const float4*>(lane_unit(slice, 2 * hi + 1));
      values[hi][0] = low.x, values[hi][1] = low.y, values[hi][2] = low.z, values[hi][3] = low.w;
      values[hi][4] = high.x, values[hi][5] = high.y, values[hi][6] = high.z, values[hi][7] = high.w;
    }
  }

  // Units of a [C, K] tile in bf16: values times the factor of the channel and that of the row.
  __device__ __forceinline__ void store_key_units(uint8_t* destination, int slice, const float (&values)[2][8],
                                                  const float (&channel_factor)[8],
                                                  const float (&row_factor)[2]) const {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        packed[i] = pack_bf16(values[hi][2 * i] * (channel_factor[2 * i] * row_factor[hi]),
                              values[hi][2 * i + 1] * (channel_factor[2 * i + 1] * row_factor[hi]));
      }
      *reinterpret_cast<uint4*>(destination + Config::KeyTile::unit_offset(row(hi), channel(slice) >> 3)) = {
          packed[0], packed[1], packed[2], packed[3]};
    }
  }

  // Phase 2: products inside the tile, and every operand that carries a gate factor.
  __device__ __forceinline__ void scale_operands(RowReader& q_rows, RowReader& k_rows) {
    const float q_rest[2] = {q_norm[0].rest * params.call.scale, q_norm[1].rest * params.call.scale};
    const float k_rest[2] = {k_norm[0].rest, k_norm[1].rest};
#pragma unroll 1
    for (int s = 0; s < Config::kSlices; ++s) {
      float q[2][8], k[2][8];
      {
        uint4 q_units[2], k_units[2];
        q_rows.take(q_units, s);
        k_rows.take(k_units, s);
        add_exact(q_units, k_units);
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) {
          unpack_8<Element>(q[hi], q_units[hi]);
          unpack_8<Element>(k[hi], k_units[hi]);
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            q[hi][c] *= q_norm[hi].power;
            k[hi][c] *= k_norm[hi].power;
          }
        }
      }

      float alpha[2][8];
      load_lane_floats(s, alpha);
      DecayTree tree(alpha);
      add_level<0, 1>(tree, q, k);
      tree.template double_blocks<1>(lane);
      add_level<1, 2>(tree, q, k);
      tree.template double_blocks<2>(lane);
      add_level<2, 4>(tree, q, k);
      tree.template double_blocks<4>(lane);
      add_level<0, 8>(tree, q, k);
      tree.join_halves();

      // From here on: q P, k P and k R, with P and R over the tile.
      float k_suffix[2][8];
      uint32_t qp[2][4], kp[2][4];
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          k_suffix[hi][c] = k[hi][c] * tree.suffix[hi][c];
          q[hi][c] *= tree.prefix[hi][c];
          k[hi][c] *= tree.prefix[hi][c];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          qp[hi][i] = Operand::pack(q[hi][2 * i], q[hi][2 * i + 1]);
          kp[hi][i] = Operand::pack(k[hi][2 * i], k[hi][2 * i + 1]);
        }
      }

      // A operands for the products with earlier tiles, over the gates in region A.
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        *lane_unit(s, step) = {qp[0][2 * step], qp[1][2 * step], qp[0][2 * step + 1], qp[1][2 * step + 1]};
        *lane_unit(s, 2 + step) = {kp[0][2 * step], kp[1][2 * step], kp[0][2 * step + 1], kp[1][2 * step + 1]};
      }

      // B operands for each later tile: k R times the totals of the tiles between.
      float after[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) after[c] = 1.0f;
#pragma unroll 1
      for (int target = warp + 1; target < Config::kWarps; ++target) {
        uint32_t kr[2][4];
        Operand::scale_and_pack(kr[0], k_suffix[0], after);
        Operand::scale_and_pack(kr[1], k_suffix[1], after);
        const int index = suffix_operand_index(warp, target);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          *suffix_operand(index, s, step) = {kr[0][2 * step], kr[0][2 * step + 1], kr[1][2 * step],
                                             kr[1][2 * step + 1]};
        }
        float total[8];
        load_8_aligned(total, tile_total(target, s));
#pragma unroll
        for (int c = 0; c < 8; ++c) after[c] *= total[c];
      }

      // `after` now reaches to the end of the chunk, `before` from its beginning to the tile.
      float before[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) before[c] = 1.0f;
#pragma unroll 1
      for (int source = 0; source < warp; ++source) {
        float total[8];
        load_8_aligned(total, tile_total(source, s));
#pragma unroll
        for (int c = 0; c < 8; ++c) before[c] *= total[c];
      }
      store_key_units(params.K_decayed + tile * Config::kKeyTileBytes, s, k_suffix, after, k_rest);
      store_key_units(params.Q_gated + tile * Config::kKeyTileBytes, s, q, before, q_rest);
      store_key_units(shared + Config::kRegionC, s, k, before, k_rest);
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
            Operand::multiply(qk[source][0], q.x, q.y, q.z, q.w, b.x, b.y);
            Operand::multiply(qk[source][1], q.x, q.y, q.z, q.w, b.z, b.w);
            Operand::multiply(kk[source][0], k.x, k.y, k.z, k.w, b.x, b.y);
            Operand::multiply(kk[source][1], k.x, k.y, k.z, k.w, b.z, b.w);
          }
        }
      }
    }
  }

  // Writes (row, column) and (row, column + 1) of Aqk and Akk. The factors complete the normalisation and carry scale and beta.
  __device__ __forceinline__ void store_pair(int row, int column, float qk0, float qk1, float kk0, float kk1,
                                             float q_factor, float k_factor) const {
    const float2 rest = *reinterpret_cast<const float2*>(key_rest() + column);
    *reinterpret_cast<uint32_t*>(shared + Config::kAqkOffset + Config::PairTile::pair_offset(row, column)) =
        pack_bf16(qk0 * q_factor * rest.x, qk1 * q_factor * rest.y);
    *reinterpret_cast<float2*>(&this->Akk().at(row, column)) = {kk0 * k_factor * rest.x, kk1 * k_factor * rest.y};
  }

  // The product of the pair (group, column) of a block on the diagonal, out of the level that their highest differing
  // bit names; `offset` 0 for q k^T, 2 for k k^T.
  __device__ __forceinline__ float select_level(int block, int element, int column) const {
    const int differing = group ^ column;
    return differing >= 4 ? products.level[kLevels - 1][block][element]
                          : (differing >= 2 ? products.level[1][block][element] : products.level[0][block][element]);
  }

  // Phase 4: Aqk and Akk into shared memory. What is not a pair of the tile is dropped by selection: it may be inf or
  // NaN.
  __device__ __forceinline__ void store_products() const {
    float q_factor[2], k_factor[2];
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      q_factor[hi] = q_norm[hi].rest * params.call.scale;
      k_factor[hi] = k_norm[hi].rest * beta()[row(hi)];
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
                       kk[source][n][2 * hi], kk[source][n][2 * hi + 1], q_factor[hi], k_factor[hi]);
          }
        }
      }
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float qk_values[2], kk_values[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = pair + e;
        const float diagonal = products.exact[b][e] * (q_norm[b].power * k_norm[b].power);
        qk_values[e] = group > column ? select_level(b, e, column) : (group == column ? diagonal : 0.0f);
        kk_values[e] = group > column ? select_level(b, 2 + e, column) : 0.0f;
      }
      store_pair(row(b), 16 * warp + 8 * b + pair, qk_values[0], qk_values[1], kk_values[0], kk_values[1], q_factor[b],
                 k_factor[b]);
    }
    store_pair(row(1), 16 * warp + pair, products.lower[0], products.lower[1], products.lower[2], products.lower[3],
               q_factor[1], k_factor[1]);
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
