// Stage 4 of the backward: the gradients inside each chunk. With S at its entry, dS' at its exit, U and dU from the recurrences,
// A = I + Akk, and F the decay factors of the levels of pairs (docs/design.md):
//   Y = A^{-T} dU,   dV = beta Y,   dbeta_i = Y_i . U_i / beta_i
//   dAqk = tril(dO U^T),   D = -strict_tril(beta Y U^T), the gradient of Akk / beta
//   dq = scale (e^G (dO S^T) + sum over levels F ((dAqk) (F k))),   and for its diagonal dAqk_ii k_i
//   dk = -beta e^G (Y S^T) + e^{G_C - G} (U dS'^T) + sum over levels F (D (F k)) as the later token and F (D^T (F k) + dAqk^T (F q)) as the
//        earlier one,   and for the diagonal of Aqk dAqk_ii q_i
//   dg_t = the sum of what crosses token t: q dq + k dk of the later tokens less k dk of the earlier ones, the terms of the state included
// and then the derivatives of the transforms.
//
// Grid: one CTA for each (chunk slot, value head), and with cu_seqlens one more slot; K / 16 warps. First a warp owns rows of V or of
// pairs (gradients_values.cuh), then 16 channels and all tokens, transposed (channel_tile.cuh), 16 tokens at a time: decay factors,
// operands and results have one layout, and a tile needs few registers.
//
// Numerics: gate factors are products of alpha <= 1. Operands are single bf16 (the emulation in docs/lab-notebook.md). The terms of dg that
// belong to pairs cancel between their two tokens outside of what they cross; each side takes the same rounded operands, so that they
// cancel to fp32. Entries of other levels are dropped by masks of bits. alpha = 0 has no gradient.
//
// Shared memory (bytes, K = V = 128): dO, Y, U 16384 each; q, k 16384 each, then dq, dk; two matrices of pairs 8192 each; operands of pairs
// of different tiles 49152, first the inverse and dV; per lane alpha and parts of dk, then dq and dk in fp32, 65536; 10 KiB over tokens.
// Registers: 255 allowed (one CTA a multiprocessor). Bound by latency, at 8 warps a multiprocessor.
#pragma once

#include "gradients_values.cuh"

namespace kda {

template <typename Config>
struct IntraChunkGradients : GradientsOfValues<Config> {
  using Values = GradientsOfValues<Config>;
  using Element = typename Config::Element;
  using Values::address, Values::call, Values::channel, Values::group, Values::keep, Values::kept, Values::kept_operand,
      Values::key_operand, Values::lane, Values::load_channels, Values::location, Values::member, Values::params,
      Values::query_operand, Values::shared, Values::tile, Values::token, Values::tokens, Values::totals,
      Values::value_head, Values::value_row, Values::warp;
  static constexpr int K = Config::K, V = Config::V, C = Config::C, kTiles = Config::kTiles;

  // What the 16 tokens of a tile collect. `cumulative` is the gradient of G_i, `prediction` that of what is said at beta_gradient().
  struct Sums {
    ChannelTile dq, dk, cumulative;
    float prediction[4] = {};
  };

  __device__ __forceinline__ float decay_rate() const {
    return call().A_log != nullptr ? expf(call().A_log[value_head]) : 1.0f;
  }
  __device__ __forceinline__ float gate_bias(int row) const {
    return call().dt_bias != nullptr ? call().dt_bias[int64_t{value_head} * K + channel(row)] : 0.0f;
  }

  // q or k of the tile, normalised.
  __device__ __forceinline__ ChannelTile normalized(int offset, typename Config::TokenArray norm, int tt) const {
    ChannelTile values = load_channels(offset, tt).template unpack<Element>();
    values.for_each([&](float& x, int block, int, int parity) { x *= tokens(norm)[token(tt, block, parity)]; });
    return values;
  }

  // alpha of all tiles, and its product over each tile.
  __device__ __forceinline__ void activate() const {
    const float rate = decay_rate(), bias[2] = {gate_bias(0), gate_bias(1)};
#pragma unroll 1
    for (int tt = 0; tt < kTiles; ++tt) {
      const ChannelTile alpha = ChannelTile::make([&](int block, int row, int parity) {
        const int t = token(tt, block, parity);
        const GateElement gate(call().gate, rate, call().lower_bound, this->gate_input(t, channel(row)) + bias[row]);
        return t < location.tokens ? ptx::ex2(gate.log_alpha * kLog2E) : 1.0f;
      });
      keep(tt, 0, alpha);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float total = multiply_tokens((alpha.at(0, row, 0) * alpha.at(0, row, 1)) *
                                            (alpha.at(1, row, 0) * alpha.at(1, row, 1)));
        if (member == 0) totals(tt)[channel(row)] = total;
      }
    }
    __syncwarp();
  }

  // The fragments [16 channels, V] of S or dS', as A operands.
  __device__ __forceinline__ void load_state(ChannelOperand (&operands)[V / 16], const uint4* fragments) const {
    const uint4* source = fragments + (tile * (V / 16) * (K / 16) + warp) * 32 + lane;
#pragma unroll
    for (int kt = 0; kt < V / 16; ++kt) operands[kt] = transposed(source[kt * (K / 16) * 32]);
  }

  // acc (16 channels, 16 tokens) = operands (16 channels, V) * rows^T of a [C, V] tile.
  __device__ __forceinline__ ChannelTile multiply_state(const ChannelOperand (&operands)[V / 16], int offset,
                                                        int tt) const {
    ChannelTile acc = ChannelTile::make([](int, int, int) { return 0.0f; });
#pragma unroll
    for (int kt = 0; kt < V / 16; ++kt) {
      uint32_t b[4];
      Config::ValueTile::load_b(b, address(offset), 16 * tt, 16 * kt, lane);
      operands[kt].multiply(acc.value[0], b[0], b[1]);
      operands[kt].multiply(acc.value[1], b[2], b[3]);
    }
    return acc;
  }

  // Phase 1: e^{G_C - G} (U dS'^T), kept for phase 2, and operands for pairs of different tiles. Returns, for the two channels, what
  // every token of the chunk has in its gradient of g: the terms of dS' that cross the whole chunk.
  __device__ __forceinline__ void scale_operands(const ChannelOperand (&state)[V / 16], float (&crossing)[2]) const {
    ChannelOperand dstate[V / 16];
    load_state(dstate, params.dstate);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float dot = 0.0f;
#pragma unroll
      for (int kt = 0; kt < V / 16; ++kt) {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const float2 s = unpack_bf16(state[kt].pair[2 * block + row]),
                       d = unpack_bf16(dstate[kt].pair[2 * block + row]);
          dot += s.x * d.x + s.y * d.y;
        }
      }
      crossing[row] = params.forward.chunk_decay[tile * K + channel(row)] * sum_tokens(dot);
    }

    float after[2] = {1.0f, 1.0f}, written[2] = {};
#pragma unroll 1
    for (int tt = kTiles - 1; tt >= 0; --tt) {
      ChannelDecayTree tree(kept(tt, 0));
      tree.complete(lane);
      const ChannelTile k = normalized(Config::kKey, Config::kKeyNorm, tt);

      // Blocks of 16 tokens, then of 32.
      const bool is_odd = tt & 1;
      const ChannelTile of_16 = tree.select(is_odd);
      keep(key_operand(0, tt), ChannelOperand::scaled(k, of_16));
      float sibling[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) sibling[row] = totals(tt ^ 1)[channel(row)];
      const ChannelTile of_32 = block_32_factor(tree, sibling, tt);
      keep(key_operand(1, tt), ChannelOperand::scaled(k, of_32));
      if (is_odd || tt >= 2) {
        const ChannelTile q = normalized(Config::kQuery, Config::kQueryNorm, tt);
        if (is_odd) keep(query_operand(0, tt), ChannelOperand::scaled(q, of_16));
        if (tt >= 2) keep(query_operand(1, tt), ChannelOperand::scaled(q, of_32));
      }

      ChannelTile dk = multiply_state(dstate, Config::kU, tt);
      dk.for_each([&](float& x, int block, int row, int parity) {
        x *= tree.suffix.at(block, row, parity) * after[row];
        written[row] += k.at(block, row, parity) * x;
      });
      keep(tt, 1, dk);
#pragma unroll
      for (int row = 0; row < 2; ++row) after[row] *= totals(tt)[channel(row)];
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) crossing[row] += sum_tokens(written[row]);
    __syncwarp();
  }

  // F of blocks of 32 tokens: P in the second half of the chunk, R in the first. sibling: decay over the tile's other half of 32.
  static __device__ __forceinline__ ChannelTile block_32_factor(const ChannelDecayTree& tree, const float (&sibling)[2],
                                                                int tt) {
    const bool is_upper = tt >= 2;
    const bool has_sibling = is_upper == bool(tt & 1);  // between the tile and the middle of the chunk lies another
    ChannelTile factor = tree.select(is_upper);
    factor.for_each([&](float& x, int, int row, int) { x = has_sibling ? x * sibling[row] : x; });
    return factor;
  }

  // Adds a level: `queries` are sums over the earlier tokens of dAqk F k, for the later ones; `keys` the sums for dk. The products with
  // `cumulative` take the operands as they were rounded, see Numerics.
  template <typename IsUpper>
  __device__ __forceinline__ void add_level(Sums& sums, const ChannelTile& factor, const ChannelOperand& q_operand,
                                            const ChannelOperand& k_operand, const ChannelTile& queries,
                                            const ChannelTile& keys, IsUpper is_upper) const {
    const ChannelTile q = q_operand.template unpack<BFloat16>(), k = k_operand.template unpack<BFloat16>();
    sums.dq.for_each([&](float& dq, int block, int row, int parity) {
      const float f = factor.at(block, row, parity);
      const float for_query = queries.at(block, row, parity), for_key = keys.at(block, row, parity);
      const float product = k.at(block, row, parity) * for_key;
      const bool upper = is_upper(block, parity);
      dq += f * for_query;
      sums.dk.value[block][2 * row + parity] += f * for_key;
      sums.cumulative.value[block][2 * row + parity] +=
          q.at(block, row, parity) * for_query + (upper ? product : -product);
      sums.prediction[token_index(block, parity)] += upper ? product : 0.0f;
    });
  }

  // Pairs of a block of 8 tokens that differ first in the bit of kBlock.
  template <int kBlock>
  __device__ __forceinline__ void add_pairs_in_blocks(Sums& sums, const ChannelDecayTree& tree, const ChannelTile& q,
                                                      const ChannelTile& k, const uint32_t (&dqk)[4],
                                                      const uint32_t (&dqk_t)[4], const uint32_t (&dkk)[4],
                                                      const uint32_t (&dkk_t)[4]) const {
    const LevelMasks masks(kBlock, lane);
    const ChannelTile factor = tree.template factor<kBlock>(lane);
    const ChannelOperand q_operand = ChannelOperand::scaled(q, factor), k_operand = ChannelOperand::scaled(k, factor);
    ChannelTile queries = ChannelTile::make([](int, int, int) { return 0.0f; }), keys = queries;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int i = 3 * block;  // the 8 x 8 block on the diagonal
      k_operand.multiply_block(queries.value[block], block, dqk[i] & masks.later_n);
      k_operand.multiply_block(keys.value[block], block, (dkk[i] & masks.later_n) | (dkk_t[i] & masks.earlier_n));
      q_operand.multiply_block(keys.value[block], block, dqk_t[i] & masks.earlier_n);
    }
    add_level(sums, factor, q_operand, k_operand, queries, keys, [&](int block, int parity) {
      return ChannelDecayTree::is_upper<kBlock>(block, parity, lane);
    });
  }

  // Pairs inside the tile. Completes the tree.
  __device__ __forceinline__ void add_own_pairs(Sums& sums, ChannelDecayTree& tree, const ChannelTile& q,
                                                const ChannelTile& k, int tt) const {
    using PairTile = typename Config::PairTile;
    uint32_t dqk[4], dqk_t[4], dkk[4], dkk_t[4];
    PairTile::load_b(dqk, address(Config::kDqk), 16 * tt, 16 * tt, lane);
    PairTile::load_b_trans(dqk_t, address(Config::kDqk), 16 * tt, 16 * tt, lane);
    PairTile::load_b(dkk, address(Config::kDkk), 16 * tt, 16 * tt, lane);
    PairTile::load_b_trans(dkk_t, address(Config::kDkk), 16 * tt, 16 * tt, lane);
    add_pairs_in_blocks<1>(sums, tree, q, k, dqk, dqk_t, dkk, dkk_t);
    tree.template double_blocks<1>(lane);
    add_pairs_in_blocks<2>(sums, tree, q, k, dqk, dqk_t, dkk, dkk_t);
    tree.template double_blocks<2>(lane);
    add_pairs_in_blocks<4>(sums, tree, q, k, dqk, dqk_t, dkk, dkk_t);
    tree.template double_blocks<4>(lane);

    // The upper block of 8 tokens against the lower.
    const ChannelTile factor = tree.template factor<8>(lane);
    const ChannelOperand q_operand = ChannelOperand::scaled(q, factor), k_operand = ChannelOperand::scaled(k, factor);
    ChannelTile queries = ChannelTile::make([](int, int, int) { return 0.0f; }), keys = queries;
    k_operand.multiply_block(queries.value[1], 0, dqk[2]);
    k_operand.multiply_block(keys.value[1], 0, dkk[2]);
    k_operand.multiply_block(keys.value[0], 1, dkk_t[1]);
    q_operand.multiply_block(keys.value[0], 1, dqk_t[1]);
    add_level(sums, factor, q_operand, k_operand, queries, keys, [](int block, int) { return block == 1; });
    tree.template double_blocks<8>(lane);
  }

  // Pairs with the tile `other`: acc += what it brings at this level.
  __device__ __forceinline__ void multiply_other_tile(ChannelTile& queries, ChannelTile& keys, int level, int tt,
                                                      int other) const {
    using PairTile = typename Config::PairTile;
    const ChannelOperand k_other = kept_operand(key_operand(level, other));
    const auto multiply = [&](ChannelTile& acc, const ChannelOperand& a, const uint32_t(&b)[4]) {
      a.multiply(acc.value[0], b[0], b[1]);
      a.multiply(acc.value[1], b[2], b[3]);
    };
    uint32_t b[4];
    if (other < tt) {
      PairTile::load_b(b, address(Config::kDqk), 16 * tt, 16 * other, lane);
      multiply(queries, k_other, b);
      PairTile::load_b(b, address(Config::kDkk), 16 * tt, 16 * other, lane);
      multiply(keys, k_other, b);
    } else {
      PairTile::load_b_trans(b, address(Config::kDkk), 16 * other, 16 * tt, lane);
      multiply(keys, k_other, b);
      PairTile::load_b_trans(b, address(Config::kDqk), 16 * other, 16 * tt, lane);
      multiply(keys, kept_operand(query_operand(level, other)), b);
    }
  }

  // Pairs of different tiles: blocks of 16 tokens (level 0), then of 32 (level 1).
  __device__ __forceinline__ void add_pairs_of_tiles(Sums& sums, const ChannelDecayTree& tree, int tt) const {
#pragma unroll
    for (int level = 0; level < 2; ++level) {
      ChannelTile queries = ChannelTile::make([](int, int, int) { return 0.0f; }), keys = queries;
      const int tiles = 1 << level, first = ((tt >> level) ^ 1) << level;
      for (int other = first; other < first + tiles; ++other) {
        multiply_other_tile(queries, keys, level, tt, other);
      }
      const bool is_upper = Values::is_upper_tile(level, tt);
      float sibling[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) sibling[row] = totals(tt ^ 1)[channel(row)];
      const ChannelTile factor = level == 1 ? block_32_factor(tree, sibling, tt) : tree.select(is_upper);
      // Where the tile is the earlier one no query has a product here, and its operand is any finite one.
      const ChannelOperand k_operand = kept_operand(key_operand(level, tt));
      const ChannelOperand q_operand = is_upper ? kept_operand(query_operand(level, tt)) : k_operand;
      add_level(sums, factor, q_operand, k_operand, queries, keys, [&](int, int) { return is_upper; });
    }
  }

  // Terms of the states, and the diagonal of Aqk.
  __device__ __forceinline__ void add_states(Sums& sums, const ChannelDecayTree& tree, const ChannelTile& q,
                                             const ChannelTile& k, const ChannelOperand (&state)[V / 16],
                                             int tt) const {
    float before[2] = {call().scale, call().scale}, predicted[4] = {};
    for (int earlier = 0; earlier < tt; ++earlier) {
#pragma unroll
      for (int row = 0; row < 2; ++row) before[row] *= totals(earlier)[channel(row)];
    }
    const ChannelTile of_outputs = multiply_state(state, Config::kOutputGradient, tt);
    sums.dq.for_each([&](float& dq, int block, int row, int parity) {
      const float gradient = of_outputs.at(block, row, parity) * (tree.prefix.at(block, row, parity) * before[row]);
      dq += gradient;
      sums.cumulative.value[block][2 * row + parity] += q.at(block, row, parity) * gradient;
    });

    float decay[2] = {1.0f, 1.0f};
    for (int earlier = 0; earlier < tt; ++earlier) {
#pragma unroll
      for (int row = 0; row < 2; ++row) decay[row] *= totals(earlier)[channel(row)];
    }
    const ChannelTile of_values = multiply_state(state, Config::kY, tt), of_state = kept(tt, 1);
    sums.dk.for_each([&](float& dk, int block, int row, int parity) {
      const int t = token(tt, block, parity);
      const float predicts = of_values.at(block, row, parity) * (tree.prefix.at(block, row, parity) * decay[row]);
      const float key = k.at(block, row, parity);
      const float reads = -tokens(Config::kBeta)[t] * predicts, writes = of_state.at(block, row, parity);
      predicted[token_index(block, parity)] += key * predicts;
      sums.cumulative.value[block][2 * row + parity] += key * (reads - writes);
      const float diagonal = tokens(Config::kDiagonal)[t];
      dk += reads + writes + diagonal * q.at(block, row, parity);
      sums.dq.value[block][2 * row + parity] += diagonal * key;
    });
    // beta_gradient() needs k . (what the state and the pairs predict) without beta.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = token(tt, i >> 1, i & 1);
      sums.prediction[i] = predicted[i] - sums.prediction[i] / tokens(Config::kBetaBound)[t];
    }
  }

  __device__ __forceinline__ void store_dots(const Sums& sums, const ChannelTile& q, const ChannelTile& k,
                                             int tt) const {
    float* const parts = reinterpret_cast<float*>(shared + Config::kTokenParts) + warp * Config::kDotParts * C;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        float of_query = 0.0f, of_key = 0.0f;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          of_query += q.at(block, row, parity) * sums.dq.at(block, row, parity);
          of_key += k.at(block, row, parity) * sums.dk.at(block, row, parity);
        }
        of_query = sum_channels(of_query);
        of_key = sum_channels(of_key);
        const float prediction = sum_channels(sums.prediction[token_index(block, parity)]);
        if (group == 0) {
          const int t = token(tt, block, parity);
          parts[t] = of_query;
          parts[C + t] = of_key;
          parts[2 * C + t] = prediction;
        }
      }
    }
  }

  __device__ __forceinline__ void store_1(void* base, int64_t offset, DataType type, float value) const {
    if (type == DataType::kFloat32) {
      static_cast<float*>(base)[offset] = value;
    } else if (type == DataType::kBFloat16) {
      static_cast<BFloat16*>(base)[offset] = __float2bfloat16_rn(value);
    } else {
      static_cast<Float16*>(base)[offset] = __float2half_rn(value);
    }
  }

  // From the gradient of the log-gates to that of g; adds to the sums for the gate's parameters.
  __device__ __forceinline__ void store_gate_gradient(const ChannelTile& gradient, float rate, const float (&bias)[2],
                                                      float (&dA_log)[2], float (&ddt_bias)[2], int tt) const {
    ChannelTile values = gradient;
    values.for_each([&](float& x, int block, int row, int parity) {
      const int t = token(tt, block, parity);
      if (t >= location.tokens) return;
      const GateElement gate(call().gate, rate, call().lower_bound, this->gate_input(t, channel(row)) + bias[row]);
      const bool is_reset = ptx::ex2(gate.log_alpha * kLog2E) == 0.0f;
      const float dx = is_reset ? 0.0f : x * gate.by_x;
      dA_log[row] += is_reset ? 0.0f : x * gate.by_A_log;
      ddt_bias[row] += dx;
      store_1(params.dg, value_row(t) * K + channel(row), call().gate_type, dx);
    });
  }

  // Phase 2: the tiles from the last to the first.
  __device__ __forceinline__ void collect() const {
    ChannelOperand state[V / 16];
    load_state(state, params.forward.state);
    float after[2];
    scale_operands(state, after);

    const float rate = decay_rate(), bias[2] = {gate_bias(0), gate_bias(1)};
    float dA_log[2] = {}, ddt_bias[2] = {};
#pragma unroll 1
    for (int tt = kTiles - 1; tt >= 0; --tt) {
      const ChannelTile q = normalized(Config::kQuery, Config::kQueryNorm, tt);
      const ChannelTile k = normalized(Config::kKey, Config::kKeyNorm, tt);
      Sums sums;
      sums.dq = sums.dk = sums.cumulative = ChannelTile::make([](int, int, int) { return 0.0f; });
      ChannelDecayTree tree(kept(tt, 0));
      add_own_pairs(sums, tree, q, k, tt);
      add_pairs_of_tiles(sums, tree, tt);
      add_states(sums, tree, q, k, state, tt);
      store_dots(sums, q, k, tt);
      keep(tt, 0, sums.dq);
      keep(tt, 1, sums.dk);
      suffix_sums(sums.cumulative, after, lane);
      store_gate_gradient(sums.cumulative, rate, bias, dA_log, ddt_bias, tt);
    }
    if (params.dA_log_parts == nullptr) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float of_rate = sum_tokens(dA_log[row]), of_bias = sum_tokens(ddt_bias[row]);
      if (member == 0) {
        params.dA_log_parts[tile * K + channel(row)] = of_rate;
        params.ddt_bias_parts[tile * K + channel(row)] = of_bias;
      }
    }
  }

  // Sums the parts of the warps, in their order.
  __device__ __forceinline__ void sum_dots() const {
    const float* const parts = reinterpret_cast<const float*>(shared + Config::kTokenParts);
    for (int i = threadIdx.x; i < Config::kDotParts * C; i += Config::kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) sum += parts[w * Config::kDotParts * C + i];
      tokens(Config::kQueryDot)[i] = sum;  // the three arrays are adjacent
    }
  }

  // dbeta_i = Y_i . U_i / beta_i; where beta is too small Y_i . V_i - k_i . (e^G S Y_i + sum_j (Y_i . U_j) k_j e^{G_i - G_j}).
  __device__ __forceinline__ void beta_gradient() const {
    const int t = threadIdx.x;
    if (t >= location.tokens) return;
    const float* const parts = reinterpret_cast<const float*>(shared + Config::kBetaParts);
    float gradient = 0.0f;
#pragma unroll
    for (int i = 0; i < V / 16; ++i) gradient += parts[i * C + t];
    const float beta = tokens(Config::kBeta)[t];
    if (fabsf(beta) < kSmallestBeta) gradient -= tokens(Config::kPrediction)[t];
    if (call().beta_sigmoid) gradient *= beta * (1.0f - beta / call().beta_scale);
    store_1(params.dbeta, value_row(t), call().beta_type, gradient);
  }

  // dq or dk through the normalisation: as parts of the value head, or to the warp's channels of the tile at `offset`, from which q
  // or k has been read.
  __device__ __forceinline__ void finish(int offset, typename Config::TokenArray norm, typename Config::TokenArray dot,
                                         int which, float* parts) const {
#pragma unroll 1
    for (int tt = 0; tt < kTiles; ++tt) {
      const ChannelTile x = normalized(offset, norm, tt);
      ChannelTile gradient = kept(tt, which);
      gradient.for_each([&](float& value, int block, int row, int parity) {
        const int t = token(tt, block, parity);
        if (call().qk_l2norm) value = tokens(norm)[t] * (value - x.at(block, row, parity) * tokens(dot)[t]);
        if (parts != nullptr && t < location.tokens) parts[value_row(t) * K + channel(row)] = value;
      });
      if (parts != nullptr) continue;
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = Packed2<Element>::from_floats(gradient.at(i >> 1, i & 1, 0), gradient.at(i >> 1, i & 1, 1));
      }
      __syncwarp();
      Config::KeyTile::store_a_trans(pairs, address(offset), 16 * tt, 16 * warp, lane);
    }
  }

  __device__ __forceinline__ void run() {
    this->load();
    this->solve();
    __syncthreads();
    this->template store_rows<V>(params.dv, Config::kValueGradient, [&](int t) { return value_row(t); });
    this->multiply_pairs();
    __syncthreads();
    activate();
    collect();
    __syncthreads();
    sum_dots();
    __syncthreads();
    beta_gradient();
    finish(Config::kQuery, Config::kQueryNorm, Config::kQueryDot, 0, params.dq_parts);
    finish(Config::kKey, Config::kKeyNorm, Config::kKeyDot, 1, params.dk_parts);
    if (params.dq_parts != nullptr) return;
    __syncthreads();
    this->template store_rows<K>(params.dq, Config::kQuery, [&](int t) { return this->key_row(t); });
    this->template store_rows<K>(params.dk, Config::kKey, [&](int t) { return this->key_row(t); });
  }
};

// A slot without a chunk: its parts of the parameters' gradients are zero; and the gradients of rows that belong to no sequence, 64
// rows past the last entry of cu_seqlens for each slot past the last used one.
template <typename Config>
__device__ __forceinline__ void clear_unused_slot(const ChunkBwdKernelParams& params, int64_t slot, int value_head) {
  constexpr int K = Config::K, V = Config::V;
  const ChunkFwdParams& call = params.forward.call;
  const ChunkFwdProblem& problem = call.problem;
  if (slot < params.forward.chunk_slots && params.dA_log_parts != nullptr) {
    for (int c = threadIdx.x; c < K; c += Config::kThreads) {
      const int64_t part = (slot * problem.value_heads + value_head) * K + c;
      params.dA_log_parts[part] = params.ddt_bias_parts[part] = 0.0f;
    }
  }
  if (call.cu_seqlens == nullptr) return;
  const int64_t end = cu_seqlens_at(call, problem.sequences);
  const int64_t first_unused_slot = end / kChunkTokens + problem.sequences;
  if (slot < first_unused_slot) return;
  const int64_t first = end + (slot - first_unused_slot) * kChunkTokens;
  const int64_t rows = min(problem.tokens - first, int64_t{kChunkTokens});
  const auto clear = [&](void* base, int heads, int head, int row_bytes) {
    const int words = row_bytes / 2;  // every type has a whole number of them
    for (int64_t i = threadIdx.x; i < rows * words; i += Config::kThreads) {
      static_cast<uint16_t*>(base)[((first + i / words) * heads + head) * words + i % words] = 0;
    }
  };
  const auto bytes_of = [](DataType type) { return type == DataType::kFloat32 ? 4 : 2; };
  if (params.dq_parts != nullptr) {
    clear(params.dq_parts, problem.value_heads, value_head, K * 4);
    clear(params.dk_parts, problem.value_heads, value_head, K * 4);
  } else {
    clear(params.dq, problem.heads, value_head, K * 2);
    clear(params.dk, problem.heads, value_head, K * 2);
  }
  clear(params.dv, problem.value_heads, value_head, V * 2);
  clear(params.dg, problem.value_heads, value_head, K * bytes_of(call.gate_type));
  clear(params.dbeta, problem.value_heads, value_head, bytes_of(call.beta_type));
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    intra_chunk_gradients_kernel(const __grid_constant__ ChunkBwdKernelParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int value_heads = params.forward.call.problem.value_heads;
  const int64_t tile = blockIdx.x, slot = tile / value_heads;
  const int value_head = static_cast<int>(tile % value_heads);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const ChunkLocation location = locate_chunk(params.forward.call, slot, lane);
  if (location.tokens == 0 || slot >= params.forward.chunk_slots) {
    clear_unused_slot<Config>(params, slot, value_head);
    return;
  }
  IntraChunkGradientsContext<Config> context{params,    shared,   warp,       lane, lane >> 2,
                                             lane & 3,  location, value_head, tile};
  IntraChunkGradients<Config>{{{context}, false}}.run();
}

}  // namespace kda
