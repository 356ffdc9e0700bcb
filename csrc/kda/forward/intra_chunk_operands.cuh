// Operands of a step of the intra-chunk solve, as in step_operands.cuh, where one reference serves all pairs: gates stay in registers from their
// copies to the operands, and both steps go through the same code, as the instruction cache is small. Where a step goes by levels, its gates go
// to shared memory, and what follows is StepOperands'.
#pragma once

#include "step_producer.cuh"

namespace kda {

// Where the gated operands go, and by what they are multiplied: in memory to the later stages, and in shared memory to the products of the chunk. For
// pairs across the steps Q ⊙ e^G is needed of the later one, K ⊙ e^{G_C - G} of the earlier one.
template <typename Config>
struct IntraChunkDestination {
  using Operands = StepOperands<Config>;
  using Token = typename Operands::Token;
  using GatedTile = typename Config::GatedTile;
  static constexpr bool kScales = true;
  const Operands& operands;
  uint8_t* const queries;      // rows of the step of Q_gated
  uint8_t* const queries_low;  // of Q_gated_low, in the first chunk of a sequence for a backward; else null
  uint8_t* const keys;         // rows of the step of K_decayed
  const RowValues rows;
  const bool is_later;
  const float2 query_factor;  // scale, of the later step times the decay of the earlier one
  const float2 key_factor;    // of the earlier step the decay of the later one; 1
  float inverse_q[4], inverse_k[4];

  __device__ __forceinline__ IntraChunkDestination(const Operands& operands_, uint8_t* queries_, uint8_t* queries_low_,
                                                   uint8_t* keys_, const RowValues& rows_, bool is_later_, float scale,
                                                   float2 other_decay)
      : operands(operands_),
        queries(queries_),
        queries_low(queries_low_),
        keys(keys_),
        rows(rows_),
        is_later(is_later_),
        query_factor{is_later_ ? scale * other_decay.x : scale, is_later_ ? scale * other_decay.y : scale},
        key_factor{is_later_ ? 1.0f : other_decay.x, is_later_ ? 1.0f : other_decay.y} {}

  // For StepOperands, by levels.
  template <typename First>
  __device__ __forceinline__ void prepare(First first) {
    const int four = first();
    StepProducer<Config>::load(inverse_q, rows.output_scale + four);
    StepProducer<Config>::load(inverse_k, rows.key_norm + four);
  }
  __device__ __forceinline__ float2 scaled_query(Token t, float2 q) const {
    return {q.x * inverse_q[t.n], q.y * inverse_q[t.n]};
  }
  __device__ __forceinline__ float2 scaled_key(Token t, float2 k) const {
    return {k.x * inverse_k[t.n], k.y * inverse_k[t.n]};
  }
  __device__ __forceinline__ void query(Token t, float2 x) const {
    if (is_later) *operands.gated_query(t) = pack_bf16(x.x, x.y);
    const SplitBf16 split(x.x * query_factor.x, x.y * query_factor.y);
    *operands.template pair<GatedTile>(queries, t) = split.high;
    if (queries_low != nullptr) *operands.template pair<GatedTile>(queries_low, t) = split.low;
  }
  __device__ __forceinline__ void key(Token t, float2 x) const { *operands.gated_key(t) = pack_bf16(x.x, x.y); }
  __device__ __forceinline__ void decayed_key(Token t, float2 x) const {
    if (!is_later) *operands.row_pair(Config::kSecondGate, t) = pack_bf16(x.x, x.y);
    *operands.template pair<GatedTile>(keys, t) = pack_bf16(x.x * key_factor.x, x.y * key_factor.y);
  }
};

template <typename Config>
struct IntraChunkOperands : StepOperands<Config> {
  using Base = StepOperands<Config>;
  using Element = typename Config::Element;
  using KeyTile = typename Config::KeyTile;
  using GatedTile = typename Config::GatedTile;
  using Destination = IntraChunkDestination<Config>;
  using Base::channel, Base::first_token, Base::group, Base::raw, Base::tokens, Base::total_of;
  static constexpr int K = Config::K, C = Config::C, kTokens = Base::kTokens, kGroups = Base::kGroups,
                       kBatch = Base::kBatch;
  static_assert(kTokens % 8 == 0, "a thread's first token has its units in order");

  float2 gates[kTokens];  // log2 of alpha, in units of `unit`

  __device__ __forceinline__ explicit IntraChunkOperands(const Base& operands) : Base(operands) {}

  // The place of the thread's token i in a tile of rows of 128 bytes, from the address of its first token: i goes in by one exclusive or and a
  // constant.
  static __device__ __forceinline__ uint8_t* at(uint32_t first, int i) {
    return static_cast<uint8_t*>(__cvta_shared_to_generic((first ^ ((i & 7) << 4)) + i * 128));
  }

  // Elements of g to gates; 0 past the end. Totals and the answer as in StepOperands::activate(). A barrier then follows: gates in memory have been
  // read.
  __device__ __forceinline__ bool activate(const ChunkFwdParams& call, float decay_rate, float2 bias) {
    const auto load = [&](uint32_t first, auto convert) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) gates[i] = convert(at(first, i));
    };
    const uint32_t rows = ptx::shared_address(raw) + Config::kRawG;
    const auto load_16bit = [&](auto element) {
      load(rows + KeyTile::pair_offset(first_token(), channel), [](const uint8_t* pair) {
        return Packed2<decltype(element)>::to_float2(*reinterpret_cast<const uint32_t*>(pair));
      });
    };
    if (call.gate_type == DataType::kBFloat16) {
      load_16bit(BFloat16());
    } else if (call.gate_type == DataType::kFloat16) {
      load_16bit(Float16());
    } else {  // tiles of fp32 have two columns of 16 bits for each channel
      load(rows + KeyTile::pair_offset(first_token(), 2 * channel),
           [](const uint8_t* pair) { return *reinterpret_cast<const float2*>(pair); });
    }
    Base::with_activation(call, decay_rate, bias, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) gates[i] = activation(gates[i]);
    });
    if (tokens < C) {  // past the end nothing decays
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (first_token() + i >= tokens) gates[i] = {0.0f, 0.0f};
      }
    }
    float2 total = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) this->add(total, gates[i]);
    *this->totals(group) = total;
    return Base::is_far_apart(total);
  }

  // To where StepOperands has them.
  __device__ __forceinline__ void leave_gates() const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) this->store_gate(this->token(i), gates[i]);
  }

  // StepOperands::store_with_middle_reference(). kNormalizes: q and k are scaled first. Tokens that are eight apart have their units in the same order:
  // they come together, so that addresses are made once for both.
  template <bool kNormalizes>
  __device__ __forceinline__ void store_with_middle_reference(const Destination& destination) {
    const float2 head = total_of(0, kGroups / 2), tail = total_of(kGroups / 2, kGroups);
    const float2 to_start = {ptx::ex2(head.x), ptx::ex2(head.y)}, to_end = {ptx::ex2(tail.x), ptx::ex2(tail.y)};
    const float2 before = total_of(0, group);
    {
      float2 sum = {before.x - head.x, before.y - head.y};
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        this->add(sum, gates[i]);
        gates[i] = sum;
      }
    }
    const float2(&from_middle)[kTokens] = gates;  // from now on
    const float2 query_factor = destination.query_factor, key_factor = destination.key_factor;

    const uint32_t rows = ptx::shared_address(raw) + KeyTile::pair_offset(first_token(), channel);
    const uint32_t in_gated = GatedTile::pair_offset(first_token(), channel);
    const uint32_t gated = ptx::shared_address(this->stage) + Config::kGated + in_gated;
    // What pairs across the steps take of this one.
    const uint32_t across = destination.is_later ? gated + Config::kGatedQueries : rows + Config::kSecondGate;
    const auto word = [&](uint32_t first, int i, int region = 0) -> uint32_t& {
      return *reinterpret_cast<uint32_t*>(at(first, i) + region);
    };
    const auto to_memory = [&](uint8_t* tile, int i, uint32_t packed) {
      *reinterpret_cast<uint32_t*>(tile + (in_gated ^ ((i & 7) << 4)) + i * 128) = packed;
    };

    // What the rounding of Q_gated below leaves out. Apart from it, so that other chunks take one branch.
    if (destination.queries_low != nullptr) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const float2 P = {ptx::ex2(from_middle[i].x), ptx::ex2(from_middle[i].y)};
        float2 q = Packed2<Element>::to_float2(word(rows, i, Config::kRawQ));
        if constexpr (kNormalizes) {
          const float inverse = destination.rows.output_scale[first_token() + i];
          q = {q.x * inverse, q.y * inverse};
        }
        const SplitBf16 split(q.x * P.x * to_start.x * query_factor.x, q.y * P.y * to_start.y * query_factor.y);
        to_memory(destination.queries_low, i, split.low);
      }
    }

    constexpr int kTogether = kTokens / 8;
    const auto token_of = [](int place) { return place / kTogether + 8 * (place % kTogether); };
#pragma unroll
    for (int first = 0; first < kTokens; first += kBatch) {
      uint32_t q_packed[kBatch], k_packed[kBatch];
      float inverse_q[kBatch], inverse_k[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int i = token_of(first + n);
        q_packed[n] = word(rows, i, Config::kRawQ), k_packed[n] = word(rows, i, Config::kRawK);
        if constexpr (kNormalizes) {
          inverse_q[n] = destination.rows.output_scale[first_token() + i];
          inverse_k[n] = destination.rows.key_norm[first_token() + i];
        }
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int i = token_of(first + n);
        const float2 sum = from_middle[i];
        const float2 P = {ptx::ex2(sum.x), ptx::ex2(sum.y)}, R = {ptx::ex2(-sum.x), ptx::ex2(-sum.y)};
        float2 q = Packed2<Element>::to_float2(q_packed[n]), k = Packed2<Element>::to_float2(k_packed[n]);
        if constexpr (kNormalizes) {
          q = {q.x * inverse_q[n], q.y * inverse_q[n]};
          k = {k.x * inverse_k[n], k.y * inverse_k[n]};
        }
        const float2 qP = {q.x * P.x, q.y * P.y}, kP = {k.x * P.x, k.y * P.y}, kR = {k.x * R.x, k.y * R.y};
        word(rows, i, Config::kRawQ) = pack_bf16(qP.x, qP.y);
        word(rows, i, Config::kRawK) = pack_bf16(kP.x, kP.y);
        word(rows, i, Config::kRawG) = pack_bf16(kR.x, kR.y);
        const float2 query = {qP.x * to_start.x, qP.y * to_start.y}, key = {kP.x * to_start.x, kP.y * to_start.y};
        const float2 decayed_key = {kR.x * to_end.x, kR.y * to_end.y};
        word(gated, i) = pack_bf16(key.x, key.y);
        word(across, i) = destination.is_later ? pack_bf16(query.x, query.y) : pack_bf16(decayed_key.x, decayed_key.y);
        to_memory(destination.queries, i, pack_bf16(query.x * query_factor.x, query.y * query_factor.y));
        to_memory(destination.keys, i, pack_bf16(decayed_key.x * key_factor.x, decayed_key.y * key_factor.y));
      }
    }
  }
};

}  // namespace kda
