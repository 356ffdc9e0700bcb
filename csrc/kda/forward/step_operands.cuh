// The producers' operands: from the rows of q, k and g of a step to
//   K ⊙ e^G, Q ⊙ e^G, K ⊙ e^{G_C - G}   into the stage, for the consumers: factors at most 1, and
//   the operands of the products between tokens of the step, in the place of the rows, or level by level in that of the gated operands.
//
// For the pairs, exp(G_i - G_j) is split at a reference token. If every channel decays by less than 2^-kMidRange on either side of the
// middle of the step, one reference serves all pairs: P_i = exp(G_i - G_mid), R_j = exp(G_mid - G_j), both within 2^±kMidRange.
// A gate bounded by -5 a token always does: 16 tokens are 115.4 in log2. Otherwise the pairs go by levels: i and j whose indices differ
// first in the bit h meet at the boundary between their blocks of h tokens; factors are at most 1, whatever the gates are.
//
// The reference of a channel is the sum up to the middle, rounded to an integer: then e^{G_ref} is a power of two, and the operands of the pairs
// become those of the consumers by a product that rounds nothing.
//
// A thread has four channels, eight bytes of a row, of kTokensPerThread consecutive tokens.
#pragma once

#include "../device/gate.cuh"
#include "step_layout.cuh"

namespace kda {

// Values of each token of the step, in shared memory [C] each.
struct RowValues {
  float* query_key;     // q·k of the same token, from q and k as they came
  float* write;         // beta |k|^-2: beta for keys as they came and values over |k|
  float* query_power;   // power of two that scales q to about 1, for operands in fp16
  float* key_power;     // likewise k
  float* key_norm;      // |k|, or 1
  float* output_scale;  // scale / |q|, or scale

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
inline constexpr float kMidRange = 117.0f;  // and half a unit, by which the reference is rounded
inline constexpr float kMaxNormLog2 = 8.0f;
// A gate below this has long underflowed to 0 in fp32; sums of gates stay finite.
inline constexpr float kSmallestLog2Alpha = -200.0f;

// Values of four channels.
struct ChannelQuad {
  float value[4];

  __device__ __forceinline__ ChannelQuad& operator+=(const ChannelQuad& other) {
#pragma unroll
    for (int c = 0; c < 4; ++c) value[c] += other.value[c];
    return *this;
  }

  template <typename Function>
  __device__ __forceinline__ ChannelQuad map(Function f) const {
    return {f(value[0]), f(value[1]), f(value[2]), f(value[3])};
  }

  __device__ __forceinline__ ChannelQuad operator*(const ChannelQuad& other) const {
    return {value[0] * other.value[0], value[1] * other.value[1], value[2] * other.value[2], value[3] * other.value[3]};
  }

  __device__ __forceinline__ ChannelQuad ex2() const {
    return map([](float x) { return ptx::ex2(x); });
  }

  __device__ __forceinline__ bool all_at_least(float bound) const {  // false for NaN
    return value[0] >= bound && value[1] >= bound && value[2] >= bound && value[3] >= bound;
  }

  template <typename Element>
  static __device__ __forceinline__ ChannelQuad unpack(const uint2& packed) {
    const float2 low = Packed2<Element>::to_float2(packed.x), high = Packed2<Element>::to_float2(packed.y);
    return {low.x, low.y, high.x, high.y};
  }

  template <typename Element>
  __device__ __forceinline__ uint2 pack() const {
    return {Packed2<Element>::from_floats(value[0], value[1]), Packed2<Element>::from_floats(value[2], value[3])};
  }
};

template <typename Config>
struct StepOperands {
  using Element = typename Config::Element;
  using KeyTile = typename Config::KeyTile;
  using GatedTile = typename Config::GatedTile;
  static constexpr int K = Config::K, C = Config::C, kTokens = Config::kTokensPerThread, kGroups = Config::kTokenGroups;
  // Tokens whose loads are issued together, as far as registers go: a store may alias any load after it.
  static constexpr int kBatch = 2;
  static_assert(kTokens == 4 || kTokens == 8);

  uint8_t* const raw;      // rows of the step; pair operands take their place
  uint8_t* const stage;    // the stage to fill
  uint8_t* const scratch;  // the group's own memory
  const int channel;       // first of the thread's four channels
  const int group;         // its tokens are kTokens * group ..
  const int tokens;        // of the step
  const float unit;        // of the gates in memory: log2 alpha is unit * gate
  const uint32_t key_slot, gated_slot;  // of its first token, in a KeyTile and in a GatedTile

  __device__ __forceinline__ StepOperands(uint8_t* raw, uint8_t* stage, uint8_t* scratch, int channel, int group,
                                          int tokens, float unit)
      : raw(raw),
        stage(stage),
        scratch(scratch),
        channel(channel),
        group(group),
        tokens(tokens),
        unit(unit),
        key_slot(KeyTile::pair_offset(kTokens * group, channel)),
        gated_slot(GatedTile::pair_offset(kTokens * group, channel)) {}

  __device__ __forceinline__ int first_token() const { return kTokens * group; }
  __device__ __forceinline__ ChannelQuad* totals(int token_group) const {
    return reinterpret_cast<ChannelQuad*>(scratch + Config::kTotals) + token_group * (K / 4) + channel / 4;
  }

  // The thread's four channels of its token i, in tiles of rows whose units are permuted by the row.
  static __device__ __forceinline__ uint2* slot_of(uint8_t* tile, uint32_t first_slot, int i) {
    return reinterpret_cast<uint2*>(tile + (first_slot ^ i << 4) + 128 * i);
  }
  __device__ __forceinline__ uint2& row(int region, int i) const { return *slot_of(raw + region, key_slot, i); }
  // Of the tile of gated keys (rows 0 .. C - 1) and queries.
  __device__ __forceinline__ uint2& gated_key(int i) const { return *slot_of(stage + Config::kGated, gated_slot, i); }
  __device__ __forceinline__ uint2& gated_query(int i) const {
    return *slot_of(stage + Config::kGated + GatedTile::unit_offset(C, 0), gated_slot, i);
  }
  __device__ __forceinline__ uint2& decayed_key(int i) const {
    return *slot_of(stage + Config::kKeysDecayed, key_slot, i);
  }

  // The gates of four channels: two tiles, the first of which later takes the earlier tokens' k of the pair products. Each slot is
  // read and written by one thread.
  __device__ __forceinline__ ChannelQuad gate(int i) const {
    const uint2 low = row(Config::kRawG, i), high = row(Config::kSecondGate, i);
    return {__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(high.x), __uint_as_float(high.y)};
  }
  __device__ __forceinline__ void store_gate(int i, const ChannelQuad& gate) const {
    row(Config::kRawG, i) = {__float_as_uint(gate.value[0]), __float_as_uint(gate.value[1])};
    row(Config::kSecondGate, i) = {__float_as_uint(gate.value[2]), __float_as_uint(gate.value[3])};
  }

  // Zeros for q and k past the end, where rows of another sequence may lie.
  __device__ __forceinline__ void clear_rows_past_end() const {
#pragma unroll 1
    for (int i = 0; i < kTokens; ++i) {
      if (first_token() + i >= tokens) row(Config::kRawQ, i) = row(Config::kRawK, i) = {0, 0};
    }
  }

  // From elements of g to the log-gate, in their place; 0 past the end. The thread's totals into shared memory. Returns whether its tokens are
  // too far apart for one reference. sync(): a barrier of the group.
  template <typename Sync>
  __device__ __forceinline__ bool activate(const ChunkFwdParams& call, float decay_rate, const ChannelQuad& bias,
                                           Sync sync) const {
    if (call.gate_type == DataType::kBFloat16) {
      return activate_with(call, decay_rate, bias,
                           [&](int i) { return ChannelQuad::unpack<BFloat16>(row(Config::kRawG, i)); });
    }
    if (call.gate_type == DataType::kFloat16) {
      return activate_with(call, decay_rate, bias,
                           [&](int i) { return ChannelQuad::unpack<Float16>(row(Config::kRawG, i)); });
    }
    // Tiles of fp32 have two columns of 16 bits for each channel: to the gates' slots first.
    ChannelQuad g[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t unit_offset = KeyTile::unit_offset(first_token() + i, channel / 4);
      const float4 four = *reinterpret_cast<const float4*>(raw + Config::kRawG + unit_offset);
      g[i] = {four.x, four.y, four.z, four.w};
    }
    sync();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) store_gate(i, g[i]);
    return activate_with(call, decay_rate, bias, [&](int i) { return gate(i); });
  }

  template <typename Load>
  __device__ __forceinline__ bool activate_with(const ChunkFwdParams& call, float decay_rate, const ChannelQuad& bias,
                                                Load load) const {
    ChannelQuad total = {};
    const float rate = -decay_rate * kLog2E;
    if (call.gate == GateKind::kSigmoid) {
      // sigmoid(x) = 1 / (1 + 2^(-x log2 e)). Where the exponential exceeds fp32, the sigmoid is below its smallest normal number, and
      // comes out as 0.
      const ChannelQuad offset = bias.map([&](float x) { return rate * x; });
      activate_all(total, load,
                   [&](float g, int c) { return ptx::rcp(1.0f + ptx::ex2(fmaf(g, rate, offset.value[c]))); });
    } else if (call.gate == GateKind::kSoftplus) {
      activate_all(total, load, [&](float g, int c) { return clamp(rate * softplus(g + bias.value[c])); });
    } else {
      activate_all(total, load, [&](float g, int) { return clamp(g * kLog2E); });
    }
    *totals(group) = total;
    constexpr float kRange = kMidRange / (kGroups / 2);  // of one group
    return !total.all_at_least(-kRange);
  }

  template <typename Load, typename Activation>
  __device__ __forceinline__ void activate_all(ChannelQuad& total, Load load, Activation activation) const {
#pragma unroll 1
    for (int first = 0; first < kTokens; first += kBatch) {
      ChannelQuad g[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) g[n] = load(first + n);
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) g[n].value[c] = activation(g[n].value[c], c);
        store_gate(first + n, g[n]);
        add(total, g[n]);
      }
    }
    if (tokens < C) {  // past the end nothing decays
      total = {};
#pragma unroll 1
      for (int i = 0; i < kTokens; ++i) {
        if (first_token() + i >= tokens) store_gate(i, {});
        add(total, gate(i));
      }
    }
  }

  // Adds a log-gate.
  __device__ __forceinline__ void add(ChannelQuad& sum, const ChannelQuad& gate) const {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum.value[c] = fmaf(gate.value[c], unit, sum.value[c]);
  }

  // NaN passes.
  static __device__ __forceinline__ float clamp(float x) { return x < kSmallestLog2Alpha ? kSmallestLog2Alpha : x; }

  __device__ __forceinline__ ChannelQuad total_of(int first_group, int end_group) const {
    ChannelQuad sum = {};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g >= first_group && g < end_group) sum += *totals(g);
    }
    return sum;
  }

  // e^{G_C}: from the sum of the log-gates, so that very slow gates keep their bits over thousands of steps.
  __device__ __forceinline__ void store_step_decay() const {
    if (group == 0) {
      *reinterpret_cast<ChannelQuad*>(stage + Config::kStepDecay + channel * 4) = total_of(0, kGroups).ex2();
    }
  }

  // One reference for all pairs of the step. The pairs' operands are bf16: P q, P k in the place of q, k; R k in that of g.
  // A loop that is hardly unrolled: what is executed at every step has to stay in the instruction cache.
  __device__ __forceinline__ void store_with_middle_reference() const {
    const ChannelQuad head = total_of(0, kGroups / 2), tail = total_of(kGroups / 2, kGroups);
    const ChannelQuad reference = head.map([](float x) { return rintf(x); });
    const uint2 to_start = reference.ex2().template pack<BFloat16>();
    // Of the first token, G - G_ref; at most kMidRange and a half in magnitude, so a difference is exact to 2^-13.
    ChannelQuad sum = total_of(0, group), to_end;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sum.value[c] -= reference.value[c];
      to_end.value[c] = ptx::ex2(tail.value[c] + (head.value[c] - reference.value[c]));  // at most 2^0.5
    }
#pragma unroll 1
    for (int first = 0; first < kTokens; first += kBatch) {
      uint2 q_packed[kBatch], k_packed[kBatch];
      ChannelQuad gates[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        gates[n] = gate(first + n);
        q_packed[n] = row(Config::kRawQ, first + n), k_packed[n] = row(Config::kRawK, first + n);
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int i = first + n;
        add(sum, gates[n]);
        const ChannelQuad P = sum.ex2(), R = sum.map([](float x) { return ptx::ex2(-x); });
        const ChannelQuad q = ChannelQuad::unpack<Element>(q_packed[n]), k = ChannelQuad::unpack<Element>(k_packed[n]);
        const uint2 qP = (q * P).template pack<BFloat16>(), kP = (k * P).template pack<BFloat16>();
        const ChannelQuad kR = k * R;
        row(Config::kRawQ, i) = qP;
        row(Config::kRawK, i) = kP;
        row(Config::kRawG, i) = kR.template pack<BFloat16>();
        gated_query(i) = {multiply_bf16(qP.x, to_start.x), multiply_bf16(qP.y, to_start.y)};
        gated_key(i) = {multiply_bf16(kP.x, to_start.x), multiply_bf16(kP.y, to_start.y)};
        decayed_key(i) = (kR * to_end).template pack<BFloat16>();
      }
    }
  }

  // The consumers' operands by sums from the start and from the end of the step, whatever the gates are.
  __device__ __forceinline__ void store_state_operands() const {
    ChannelQuad sum = total_of(0, group);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      add(sum, gate(i));
      const ChannelQuad factor = sum.ex2();
      gated_query(i) = (ChannelQuad::unpack<Element>(row(Config::kRawQ, i)) * factor).template pack<BFloat16>();
      gated_key(i) = (ChannelQuad::unpack<Element>(row(Config::kRawK, i)) * factor).template pack<BFloat16>();
    }
    sum = total_of(group + 1, kGroups);
#pragma unroll
    for (int i = kTokens - 1; i >= 0; --i) {
      const ChannelQuad factor = sum.ex2();
      add(sum, gate(i));
      decayed_key(i) = (ChannelQuad::unpack<Element>(row(Config::kRawK, i)) * factor).template pack<BFloat16>();
    }
  }

  // Operands of the level of blocks of `block` tokens, in the place of the gated keys and queries: a token in an upper block is the later one of
  // its pairs, and has P = exp(G_i - G of the token before its block); one in a lower block is the earlier one, and has R = exp(G of the block's last
  // token - G_j). half: fp16, q and k scaled to about 1; otherwise bf16, with powers of 1.
  __device__ __forceinline__ void store_level(int block, const RowValues& rows, bool half) const {
    const auto scaled = [&](const uint2& packed, const ChannelQuad& factor, float power) {
      const ChannelQuad y =
          ChannelQuad::unpack<Element>(packed).map([&](float x) { return x * power; }) * factor;
      return half ? y.template pack<Float16>() : y.template pack<BFloat16>();
    };
    ChannelQuad sum = total_of(first_token() / block * block / kTokens, group);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int token = first_token() + i;
      if ((token & (block - 1)) == 0) sum = {};
      add(sum, gate(i));
      if (token & block) {
        const ChannelQuad factor = sum.ex2();
        gated_key(i) = scaled(row(Config::kRawK, i), factor, rows.key_power[token]);
        gated_query(i) = scaled(row(Config::kRawQ, i), factor, rows.query_power[token]);
      }
    }
    sum = total_of(group + 1, ((first_token() + kTokens - 1) / block + 1) * block / kTokens);
#pragma unroll
    for (int i = kTokens - 1; i >= 0; --i) {
      const int token = first_token() + i;
      if (((token + 1) & (block - 1)) == 0) sum = {};
      if (!(token & block)) gated_key(i) = scaled(row(Config::kRawK, i), sum.ex2(), rows.key_power[token]);
      add(sum, gate(i));
    }
  }
};

}  // namespace kda
