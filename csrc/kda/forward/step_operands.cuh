// The producers' operands: from the rows of q, k and g of a step to
//   K ⊙ e^G, Q ⊙ e^G, K ⊙ e^{G_C - G}   into the stage, for the consumers: factors at most 1, and
//   the operands of the products between tokens of the step, in the place of the rows, or level by level in that of the gated operands.
//
// For the pairs, exp(G_i - G_j) is split at a reference token. If every channel decays by less than 2^-kMidRange on either side of the
// middle of the step, one reference serves all pairs: P_i = exp(G_i - G_mid), R_j = exp(G_mid - G_j), both within 2^±kMidRange.
// A gate bounded by -5 a token always does: 16 tokens are 115.4 in log2. Otherwise the pairs go by levels: i and j whose indices differ
// first in the bit h meet at the boundary between their blocks of h tokens; factors are at most 1, whatever the gates are.
//
// A thread has two channels of kTokensPerThread consecutive tokens.
#pragma once

#include "../device/gate.cuh"
#include "step_layout.cuh"

namespace kda {

// Values of each token of the step, in shared memory [C] each. Config::kNormalizes: operands are made of q / |q| and k / |k|, not of q and k as they
// came.
struct RowValues {
  float* query_key;     // q·k of the same token, from q and k as they came
  float* write;         // beta |k|^-2: beta for keys as they came and values over |k|; kNormalizes: beta
  float* query_power;   // power of two that scales q to about 1, for operands in fp16
  float* key_power;     // likewise k
  float* key_norm;      // |k|, or 1; kNormalizes: its inverse
  float* output_scale;  // scale / |q|, or scale; kNormalizes: without scale

  __device__ __forceinline__ explicit RowValues(void* memory)
      : query_key(static_cast<float*>(memory)),
        write(query_key + kStepTokens),
        query_power(write + kStepTokens),
        key_power(query_power + kStepTokens),
        key_norm(key_power + kStepTokens),
        output_scale(key_norm + kStepTokens) {}
};

// What decides about the pairs: log2 range on either side of the middle that bf16 and fp32 hold with operands up to
// 2^kMaxNormLog2.
inline constexpr float kMidRange = 117.0f;
inline constexpr float kMaxNormLog2 = 8.0f;
// A gate below this has long underflowed to 0 in fp32; sums of gates stay finite.
inline constexpr float kSmallestLog2Alpha = -200.0f;

template <typename Config>
struct StepOperands {
  using Element = typename Config::Element;
  static constexpr int K = Config::K, C = Config::C, kTokens = Config::kTokensPerThread, kGroups = Config::kTokenGroups;
  static constexpr int kBatch = 4;  // tokens whose loads are issued together: a store may alias any load after it

  uint8_t* const raw;      // rows of the step; pair operands take their place
  uint8_t* const stage;    // the stage to fill
  uint8_t* const scratch;  // the group's own memory
  const int channel;       // first of the thread's two channels
  const int group;         // its tokens are kTokens * group ..
  const int tokens;        // of the step
  const float unit;        // of the gates in memory: log2 alpha is unit * gate

  __device__ __forceinline__ int first_token() const { return kTokens * group; }
  __device__ __forceinline__ float2* totals(int token_group) const {
    return reinterpret_cast<float2*>(scratch + Config::kTotals) + token_group * (K / 2) + channel / 2;
  }
  using KeyTile = typename Config::KeyTile;
  using GatedTile = typename Config::GatedTile;

  // A token of the step as four + n, four a multiple of 4 and n below 4.
  struct Token {
    int four, n;
    __device__ __forceinline__ int index() const { return four + n; }
  };
  // The thread's token i.
  __device__ __forceinline__ Token token(int i) const { return {first_token() + (i & ~3), i & 3}; }
  static_assert(kTokens % 4 == 0);

  template <typename Tile>
  __device__ __forceinline__ uint32_t* pair(uint8_t* tile, Token t) const {
    // Row four + n has its units at unit ^ (four & 4) ^ n.
    const int permuted = channel ^ (t.four & 4) << 3;
    return reinterpret_cast<uint32_t*>(tile + Tile::pair_offset(t.n, permuted) + Tile::unit_offset(8, 0) / 8 * t.four);
  }
  __device__ __forceinline__ uint32_t* row_pair(int region, Token t) const { return pair<KeyTile>(raw + region, t); }
  // Of the tile of gated keys and that of queries.
  __device__ __forceinline__ uint32_t* gated_key(Token t) const { return pair<GatedTile>(stage + Config::kGated, t); }
  __device__ __forceinline__ uint32_t* gated_query(Token t) const {
    return pair<GatedTile>(stage + Config::kGated + Config::kGatedQueries, t);
  }
  __device__ __forceinline__ uint32_t* decayed_key(Token t) const {
    return pair<KeyTile>(stage + Config::kKeysDecayed, t);
  }

  // Where gated operands go. Another class can take its place, and may scale q and k first (kScales: scaled_query() and scaled_key() exist). prepare():
  // the four tokens from first() on come next.
  struct ToStage {
    static constexpr bool kScales = false;
    const StepOperands& at;
    template <typename First>
    __device__ __forceinline__ void prepare(First) const {}
    __device__ __forceinline__ void query(Token t, float2 x) const { *at.gated_query(t) = pack_bf16(x.x, x.y); }
    __device__ __forceinline__ void key(Token t, float2 x) const { *at.gated_key(t) = pack_bf16(x.x, x.y); }
    __device__ __forceinline__ void decayed_key(Token t, float2 x) const { *at.decayed_key(t) = pack_bf16(x.x, x.y); }
  };

  // The gates of a pair of channels: two tiles, the first of which later takes the earlier tokens' k of the pair products. Each slot is
  // read and written by one thread.
  __device__ __forceinline__ float2 gate(Token t) const {
    return {__uint_as_float(*row_pair(Config::kRawG, t)), __uint_as_float(*row_pair(Config::kSecondGate, t))};
  }
  __device__ __forceinline__ void store_gate(Token t, float2 value) const {
    *row_pair(Config::kRawG, t) = __float_as_uint(value.x);
    *row_pair(Config::kSecondGate, t) = __float_as_uint(value.y);
  }

  // Zeros for q and k past the end, where rows of another sequence may lie.
  __device__ __forceinline__ void clear_rows_past_end() const {
#pragma unroll 1
    for (int i = 0; i < kTokens; ++i) {
      if (first_token() + i >= tokens) {
        *row_pair(Config::kRawQ, token(i)) = 0;
        *row_pair(Config::kRawK, token(i)) = 0;
      }
    }
  }

  // From elements of g to the log-gate, in their place; 0 past the end. The thread's totals into shared memory. Returns whether its tokens are
  // too far apart for one reference. sync: a barrier of the group.
  template <typename Sync>
  __device__ __forceinline__ bool activate(const ChunkFwdParams& call, float decay_rate, float2 bias, Sync sync) const {
    if (call.gate_type == DataType::kBFloat16) {
      return activate_with(call, decay_rate, bias,
                           [&](Token t) { return Packed2<BFloat16>::to_float2(*row_pair(Config::kRawG, t)); });
    }
    if (call.gate_type == DataType::kFloat16) {
      return activate_with(call, decay_rate, bias,
                           [&](Token t) { return Packed2<Float16>::to_float2(*row_pair(Config::kRawG, t)); });
    }
    // Tiles of fp32 have two columns of 16 bits for each channel: to the gates' slots first.
    float2 g[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t unit_offset = KeyTile::unit_offset(first_token() + i, channel / 4);
      g[i] = *reinterpret_cast<const float2*>(raw + Config::kRawG + unit_offset + channel % 4 * 4);
    }
    sync();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) store_gate(token(i), g[i]);
    return activate_with(call, decay_rate, bias, [&](Token t) { return gate(t); });
  }

  // Calls f with what makes gates of elements of g.
  template <typename Function>
  static __device__ __forceinline__ void with_activation(const ChunkFwdParams& call, float decay_rate, float2 bias,
                                                         Function f) {
    if (call.gate == GateKind::kSigmoid) {
      // sigmoid(x) = 1 / (1 + 2^(-x log2 e)). Where the exponential exceeds fp32, the sigmoid is below its smallest normal number, and
      // comes out as 0.
      const float rate = -decay_rate * kLog2E;
      const float2 offset = {rate * bias.x, rate * bias.y};
      f([&](float2 g) {
        return float2{ptx::rcp(1.0f + ptx::ex2(fmaf(g.x, rate, offset.x))),
                      ptx::rcp(1.0f + ptx::ex2(fmaf(g.y, rate, offset.y)))};
      });
    } else if (call.gate == GateKind::kSoftplus) {
      const float rate = -decay_rate * kLog2E;
      f([&](float2 g) { return float2{clamp(rate * softplus(g.x + bias.x)), clamp(rate * softplus(g.y + bias.y))}; });
    } else {
      f([&](float2 g) { return float2{clamp(g.x * kLog2E), clamp(g.y * kLog2E)}; });
    }
  }

  // Whether a thread's tokens, of which this is the sum of log-gates, are too far apart for one reference.
  static __device__ __forceinline__ bool is_far_apart(float2 total) {
    constexpr float kRange = kMidRange / (kGroups / 2);  // of one group
    return !(total.x >= -kRange && total.y >= -kRange);
  }

  template <typename Load>
  __device__ __forceinline__ bool activate_with(const ChunkFwdParams& call, float decay_rate, float2 bias,
                                                Load load) const {
    float2 total = {0.0f, 0.0f};
    with_activation(call, decay_rate, bias, [&](auto activation) { activate_all(total, load, activation); });
    *totals(group) = total;
    return is_far_apart(total);
  }

  template <typename Load, typename Activation>
  __device__ __forceinline__ void activate_all(float2& total, Load load, Activation activation) const {
#pragma unroll 2
    for (int first = 0; first < kTokens; first += kBatch) {
      const int four = first_token() + first;
      float2 g[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) g[n] = load(Token{four, n});
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const float2 value = activation(g[n]);
        store_gate(Token{four, n}, value);
        add(total, value);
      }
    }
    if (tokens < C) {  // past the end nothing decays
      total = {0.0f, 0.0f};
#pragma unroll 1
      for (int i = 0; i < kTokens; ++i) {
        if (first_token() + i >= tokens) store_gate(token(i), {0.0f, 0.0f});
        add(total, gate(token(i)));
      }
    }
  }

  // Adds a log-gate.
  __device__ __forceinline__ void add(float2& sum, float2 value) const {
    sum.x = fmaf(value.x, unit, sum.x);
    sum.y = fmaf(value.y, unit, sum.y);
  }

  // NaN passes.
  static __device__ __forceinline__ float clamp(float x) { return x < kSmallestLog2Alpha ? kSmallestLog2Alpha : x; }

  __device__ __forceinline__ float2 total_of(int first_group, int end_group) const {
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g >= first_group && g < end_group) {
        const float2 total = *totals(g);
        sum.x += total.x, sum.y += total.y;
      }
    }
    return sum;
  }

  // e^{G_C}: from the sum of the log-gates, so that very slow gates keep their bits over thousands of steps.
  __device__ __forceinline__ void store_step_decay() const {
    if (group != 0) return;
    const float2 total = total_of(0, kGroups);
    *reinterpret_cast<float2*>(stage + Config::kStepDecay + channel * 4) = {ptx::ex2(total.x), ptx::ex2(total.y)};
  }

  // One reference for all pairs of the step. The pairs' operands are bf16: P q, P k in the place of q, k; R k in that of g.
  // A loop that is hardly unrolled: what is executed at every step has to stay in the instruction cache.
  template <typename Destination>
  __device__ __forceinline__ void store_with_middle_reference(Destination destination) const {
    const float2 head = total_of(0, kGroups / 2), tail = total_of(kGroups / 2, kGroups);
    const float2 to_start = {ptx::ex2(head.x), ptx::ex2(head.y)}, to_end = {ptx::ex2(tail.x), ptx::ex2(tail.y)};
    // G_i - G_mid: what lies between the middle and the token, negative before the middle. At most kMidRange in magnitude, so a difference is exact
    // to 2^-13.
    const float2 before = total_of(0, group);
    float2 sum = {before.x - head.x, before.y - head.y};
#pragma unroll 1
    for (int first = 0; first < kTokens; first += kBatch) {
      const auto token_of = [&](int n) { return Token{first_token() + first, n}; };
      uint32_t q_packed[kBatch], k_packed[kBatch];
      float2 gates[kBatch];
      destination.prepare([&] { return first_token() + first; });
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        gates[n] = gate(token_of(n));
        q_packed[n] = *row_pair(Config::kRawQ, token_of(n)), k_packed[n] = *row_pair(Config::kRawK, token_of(n));
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const Token t = token_of(n);
        add(sum, gates[n]);
        const float2 P = {ptx::ex2(sum.x), ptx::ex2(sum.y)}, R = {ptx::ex2(-sum.x), ptx::ex2(-sum.y)};
        float2 q = Packed2<Element>::to_float2(q_packed[n]), k = Packed2<Element>::to_float2(k_packed[n]);
        if constexpr (Destination::kScales) q = destination.scaled_query(t, q), k = destination.scaled_key(t, k);
        const float2 qP = {q.x * P.x, q.y * P.y}, kP = {k.x * P.x, k.y * P.y}, kR = {k.x * R.x, k.y * R.y};
        *row_pair(Config::kRawQ, t) = pack_bf16(qP.x, qP.y);
        *row_pair(Config::kRawK, t) = pack_bf16(kP.x, kP.y);
        *row_pair(Config::kRawG, t) = pack_bf16(kR.x, kR.y);
        destination.query(t, {qP.x * to_start.x, qP.y * to_start.y});
        destination.key(t, {kP.x * to_start.x, kP.y * to_start.y});
        destination.decayed_key(t, {kR.x * to_end.x, kR.y * to_end.y});
      }
    }
  }

  // The consumers' operands by sums from the start and from the end of the step, whatever the gates are.
  template <typename Destination>
  __device__ __forceinline__ void store_state_operands(Destination destination) const {
    float2 sum = total_of(0, group);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const Token t = token(i);
      if (t.n == 0) destination.prepare([&] { return t.four; });
      add(sum, gate(t));
      const float2 factor = {ptx::ex2(sum.x), ptx::ex2(sum.y)};
      float2 q = Packed2<Element>::to_float2(*row_pair(Config::kRawQ, t));
      float2 k = Packed2<Element>::to_float2(*row_pair(Config::kRawK, t));
      if constexpr (Destination::kScales) q = destination.scaled_query(t, q), k = destination.scaled_key(t, k);
      destination.query(t, {q.x * factor.x, q.y * factor.y});
      destination.key(t, {k.x * factor.x, k.y * factor.y});
    }
    sum = total_of(group + 1, kGroups);
#pragma unroll
    for (int i = kTokens - 1; i >= 0; --i) {
      const Token t = token(i);
      if (t.n == 3) destination.prepare([&] { return t.four; });
      const float2 factor = {ptx::ex2(sum.x), ptx::ex2(sum.y)};
      add(sum, gate(t));
      float2 k = Packed2<Element>::to_float2(*row_pair(Config::kRawK, t));
      if constexpr (Destination::kScales) k = destination.scaled_key(t, k);
      destination.decayed_key(t, {k.x * factor.x, k.y * factor.y});
    }
  }

  // Operands of the level of blocks of `block` tokens, in the place of the gated keys and queries: a token in an upper block is the later one of
  // its pairs, and has P = exp(G_i - G of the token before its block); one in a lower block is the earlier one, and has R = exp(G of the block's last
  // token - G_j). half: fp16, q and k scaled to about 1; otherwise bf16, with powers of 1.
  __device__ __forceinline__ void store_level(int block, const RowValues& rows, bool half) const {
    const auto scaled = [&](uint32_t packed, const float2& factor, float power) {
      const float2 x = Packed2<Element>::to_float2(packed);
      const float2 y = {x.x * power * factor.x, x.y * power * factor.y};
      return half ? Packed2<Float16>::from_floats(y.x, y.y) : pack_bf16(y.x, y.y);
    };
    float2 sum = total_of(first_token() / block * block / kTokens, group);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const Token t = token(i);
      if ((t.index() & (block - 1)) == 0) sum = {0.0f, 0.0f};
      add(sum, gate(t));
      if (t.index() & block) {
        const float2 factor = {ptx::ex2(sum.x), ptx::ex2(sum.y)};
        *gated_key(t) = scaled(*row_pair(Config::kRawK, t), factor, rows.key_power[t.index()]);
        *gated_query(t) = scaled(*row_pair(Config::kRawQ, t), factor, rows.query_power[t.index()]);
      }
    }
    sum = total_of(group + 1, ((first_token() + kTokens - 1) / block + 1) * block / kTokens);
#pragma unroll
    for (int i = kTokens - 1; i >= 0; --i) {
      const Token t = token(i);
      if (((t.index() + 1) & (block - 1)) == 0) sum = {0.0f, 0.0f};
      if (!(t.index() & block)) {
        const float2 factor = {ptx::ex2(sum.x), ptx::ex2(sum.y)};
        *gated_key(t) = scaled(*row_pair(Config::kRawK, t), factor, rows.key_power[t.index()]);
      }
      add(sum, gate(t));
    }
  }
};

}  // namespace kda
