// A consumer group of the fused forward: one warpgroup that carries 64 rows of the transposed state S^T through the steps,
//   R^T  = |K| V^T - S^T (K ⊙ e^G)^T
//   U^T  = R^T Tinv^T
//   O^T  = S^T (Q ⊙ e^G)^T + U^T Aqk^T
//   S'^T = S^T Diag(e^{G_C}) + U^T (K ⊙ e^{G_C - G})
// all as wgmma with A from registers: accumulators of one product are the operands of the next. R, U and Tinv are split into bf16
// parts, because a delta rule that hardly forgets (beta up to 2, repeated keys) sums values that cancel.
#pragma once

#include "../device/wgmma.cuh"
#include "fused_config.cuh"
#include "state_fragments.cuh"

namespace kda {

// [64 rows, 16 n tokens] accumulators as A operands, one for each 16 tokens: high + low.
template <int kTiles>
struct SplitOperands {
  uint32_t high[kTiles / 2][4], low[kTiles / 2][4];

  __device__ __forceinline__ explicit SplitOperands(const float (&x)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const SplitBf16 split(x[n][2 * half], x[n][2 * half + 1]);
        high[n / 2][2 * (n % 2) + half] = split.high;
        low[n / 2][2 * (n % 2) + half] = split.low;
      }
    }
  }
};

template <typename Config>
struct FusedConsumer {
  using Element = typename Config::Element;
  static constexpr int K = Config::K, C = Config::C;
  static constexpr int kTokenTiles = C / 8;

  const ChunkFwdParams& call;
  const ScanItem& item;
  uint8_t* const shared;
  const int consumer;  // which group
  const int thread, warp, lane;

  static constexpr int kBarrier = 1 + Config::kProducerGroups;  // + consumer
  __device__ __forceinline__ int member() const { return lane & 3; }
  __device__ __forceinline__ void sync() const { ptx::barrier_sync(kBarrier + consumer, Config::kGroupThreads); }

  // First row of V of the group, and of the warp.
  __device__ __forceinline__ int group_row() const { return item.first_row + 64 * consumer; }
  __device__ __forceinline__ int warp_row() const { return group_row() + 16 * warp; }
  __device__ __forceinline__ int64_t row_stride() const { return call.state_v_first ? K : 1; }
  __device__ __forceinline__ int64_t channel_stride() const { return call.state_v_first ? 1 : Config::V; }

  // Tokens 8 n + 2 member, + 1 of an array [C].
  __device__ __forceinline__ float2 token_pair(const uint8_t* stage, int array, int n) const {
    return *reinterpret_cast<const float2*>(stage + array + (8 * n + 2 * member()) * 4);
  }

  // S^T times the gated keys (d[0 .. 3]) and queries (d[4 .. 7]).
  static __device__ __forceinline__ void multiply_state(float (&d)[2 * kTokenTiles][4],
                                                        const uint32_t (&state)[K / 16][4], uint64_t tile) {
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      const uint64_t b = wgmma::advance(tile, kt / 4 * Config::GatedTile::kBlockBytes + kt % 4 * 32);
      wgmma::m64n64k16_bf16<false>(d, state[kt], b, kt > 0);
    }
  }

  // D += A B for columns first_column .. + C - 1 of a tile of matrices [C, C].
  static __device__ __forceinline__ void multiply_tokens(float (&d)[kTokenTiles][4], const uint32_t (&a)[C / 16][4],
                                                         uint64_t tile, bool accumulate) {
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      wgmma::m64n32k16_bf16<false>(d, a[kt], wgmma::advance(tile, kt * 32), accumulate || kt > 0);
    }
  }

  static __device__ __forceinline__ void add_to_state(StateFragments<K>& state, const uint32_t (&u)[C / 16][4],
                                                      uint64_t tile) {
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      const uint64_t b = wgmma::advance(tile, kt * 2048);
      if constexpr (K == 128) {
        wgmma::m64n128k16_bf16<true>(state.acc, u[kt], b, true);
      } else {
        wgmma::m64n64k16_bf16<true>(state.acc, u[kt], b, true);
      }
    }
  }

  // O^T of a step, [64 rows, C tokens] accumulators, in its final scale and type.
  struct PackedOutput {
    uint32_t pairs[kTokenTiles][2];
  };

  __device__ __forceinline__ void pack_output(PackedOutput& packed, const float (&o)[kTokenTiles][4],
                                              const uint8_t* stage) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const float2 scale = token_pair(stage, Config::kOutputScale, n);
      packed.pairs[n][0] = Packed2<Element>::from_floats(o[n][0] * scale.x, o[n][1] * scale.y);
      packed.pairs[n][1] = Packed2<Element>::from_floats(o[n][2] * scale.x, o[n][3] * scale.y);
    }
  }

  // Where the thread's part of o goes: 16 bytes of every kRowsAtOnce-th row of a step.
  struct OutputRows {
    static constexpr int kUnits = 64 / 8, kRowsAtOnce = Config::kGroupThreads / kUnits;
    Element* next;  // in the next step to store
    int64_t row_stride;
    int row, unit;

    __device__ __forceinline__ explicit OutputRows(const FusedConsumer& c)
        : row_stride(int64_t{c.call.problem.value_heads} * Config::V), row(c.thread / kUnits), unit(c.thread % kUnits) {
      const int64_t first = c.item.range.batch * c.call.problem.tokens + c.item.range.begin + row;
      next = static_cast<Element*>(c.call.o) + first * row_stride + c.item.value_head * Config::V + c.group_row() +
             8 * unit;
    }
  };

  // To rows of o, by way of shared memory. A buffer is used again two steps later, and the barrier of the step between says that it
  // has been read.
  __device__ __forceinline__ void store_output(const PackedOutput& packed, OutputRows& rows, int step) const {
    uint8_t* const tile =
        shared + Config::kOutputOffset + consumer * Config::kOutputBytes + step % 2 * Config::kOutputTileBytes;
    const int matrix = lane >> 3;
    const uint32_t address = ptx::shared_address(tile) +
                             Config::OutputTile::unit_offset(8 * (matrix >> 1) + (lane & 7), 2 * warp + (matrix & 1));
#pragma unroll
    for (int n = 0; n < kTokenTiles; n += 2) {
      ptx::stmatrix_x4_trans(address + Config::OutputTile::unit_offset(8 * n, 0), packed.pairs[n][0],
                             packed.pairs[n][1], packed.pairs[n + 1][0], packed.pairs[n + 1][1]);
    }
    sync();
    const int tokens = item.tokens(step);
    const uint8_t* from = tile + Config::OutputTile::unit_offset(rows.row, rows.unit);
#pragma unroll
    for (int i = 0; i < C; i += OutputRows::kRowsAtOnce) {
      if (rows.row + i < tokens) {
        *reinterpret_cast<uint4*>(rows.next) = *reinterpret_cast<const uint4*>(from);
      }
      rows.next += OutputRows::kRowsAtOnce * rows.row_stride;
      from += Config::OutputTile::unit_offset(OutputRows::kRowsAtOnce, 0);
    }
  }

  __device__ __forceinline__ void run() const {
    const uint32_t shared_base = ptx::shared_address(shared);
    const int value_heads = call.problem.value_heads;
    StateFragments<K> state;
    if (call.initial_state != nullptr) {
      const int64_t matrix = item.sequence * call.initial_state_stride_sequence +
                             item.value_head * call.initial_state_stride_head + warp_row() * row_stride();
      const int element_bytes = call.state_type == DataType::kFloat32 ? 4 : 2;
      state.load(static_cast<const uint8_t*>(call.initial_state) + matrix * element_bytes, call.state_type,
                 row_stride(), channel_stride(), lane);
    } else {
      state.for_each(lane, [](float& value, int, int) { value = 0.0f; });
    }
    const int64_t first_slot = first_chunk_slot(call, item.sequence, item.range);

    OutputRows output_rows(*this);
    PackedOutput output;  // of the step before, stored while the products of the next one run
    for (int step = 0; step < item.steps; ++step) {
      const int stage_index = step % Config::kStages, use = step / Config::kStages;
      uint8_t* const stage = shared + stage_index * Config::kStageBytes;
      const uint32_t stage_address = shared_base + stage_index * Config::kStageBytes;
      if (call.chunk_states != nullptr && step % (kChunkTokens / C) == 0) {
        const int64_t tile = (first_slot + step / (kChunkTokens / C)) * value_heads + item.value_head;
        state.store(call.chunk_states + tile * K * Config::V + warp_row() * row_stride(), row_stride(),
                    channel_stride(), lane);
      }
      const uint64_t tiles = wgmma::descriptor(stage_address, 16);  // K-major
      const uint64_t gated = wgmma::advance(tiles, Config::kGated);
      const uint64_t keys_decayed =
          wgmma::descriptor(stage_address + Config::kKeysDecayed, Config::KeyTile::kBlockBytes);
      const uint64_t inverse_high = wgmma::advance(tiles, Config::kInverseTile);
      const uint64_t inverse_middle = wgmma::advance(inverse_high, 2 * C);
      const uint64_t aqk = wgmma::advance(tiles, Config::kAqkTile), inverse_low = wgmma::advance(aqk, 2 * C);
      uint32_t operands[K / 16][4];
      state.to_operands(operands);

      ptx::mbarrier_wait_parity(Config::full(shared_base, stage_index), use & 1);
      // Meanwhile: the state decays, and V comes as fragments.
      const float* const decay = reinterpret_cast<const float*>(stage + Config::kStepDecay);
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        const float2 factor = *reinterpret_cast<const float2*>(decay + 8 * n + 2 * member());
        state.acc[n][0] *= factor.x, state.acc[n][1] *= factor.y;
        state.acc[n][2] *= factor.x, state.acc[n][3] *= factor.y;
      }
      float products[2 * kTokenTiles][4];
      wgmma::fence();
      multiply_state(products, operands, gated);
      wgmma::commit_group();
      if (step > 0) store_output(output, output_rows, step - 1);

      uint32_t v[kTokenTiles / 2][4];
#pragma unroll
      for (int kt = 0; kt < kTokenTiles / 2; ++kt) {
        Config::ValueTile::load_a_trans(v[kt], stage_address + Config::kValues, 16 * kt, 64 * consumer + 16 * warp,
                                        lane);
      }

      wgmma::wait_group<0>();
      wgmma::pin(products);
      float r[kTokenTiles][4], o[kTokenTiles][4];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) r[n][e] = products[n][e], o[n][e] = products[kTokenTiles + n][e];
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const float2 norm = token_pair(stage, Config::kKeyNorm, n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 value = Packed2<Element>::to_float2(v[n / 2][2 * (n % 2) + half]);
          r[n][2 * half] = value.x * norm.x - r[n][2 * half];
          r[n][2 * half + 1] = value.y * norm.y - r[n][2 * half + 1];
        }
      }
      if (const int tokens = item.tokens(step); tokens < C) {  // V past the end may be anything
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (8 * n + 2 * member() + (e & 1) >= tokens) r[n][e] = 0.0f;
          }
        }
      }
      float u[kTokenTiles][4];
      {
        const SplitOperands<kTokenTiles> split(r);
        wgmma::fence();
        multiply_tokens(u, split.high, inverse_high, false);
        multiply_tokens(u, split.low, inverse_high, true);
        multiply_tokens(u, split.high, inverse_middle, true);
        multiply_tokens(u, split.high, inverse_low, true);
        wgmma::commit_group();
        wgmma::wait_group<0>();
        wgmma::pin(u);
      }
      {
        const SplitOperands<kTokenTiles> split(u);
        wgmma::fence();
        add_to_state(state, split.high, keys_decayed);
        add_to_state(state, split.low, keys_decayed);
        multiply_tokens(o, split.high, aqk, true);
        multiply_tokens(o, split.low, aqk, true);
        wgmma::commit_group();
        wgmma::wait_group<0>();
        wgmma::pin(state.acc);
        wgmma::pin(o);
      }
      pack_output(output, o, stage);
      ptx::mbarrier_arrive(Config::empty(shared_base, stage_index));
    }
    if (item.steps > 0) store_output(output, output_rows, item.steps - 1);

    if (call.final_state != nullptr) {
      state.store(call.final_state + (item.sequence * value_heads + item.value_head) * K * Config::V +
                      warp_row() * row_stride(),
                  row_stride(), channel_stride(), lane);
    }
    clear_rows_past_end();
  }

  // Rows of o past the last entry of cu_seqlens belong to no sequence and are zero: the last sequence's CTAs clear them.
  __device__ __forceinline__ void clear_rows_past_end() const {
    if (call.cu_seqlens == nullptr || item.sequence != call.problem.sequences - 1) return;
    constexpr int kUnits = 64 / 8;
    Element* const o = static_cast<Element*>(call.o);
    for (int64_t i = item.range.end * kUnits + thread; i < call.problem.tokens * kUnits; i += Config::kGroupThreads) {
      Element* const row = o + (i / kUnits * call.problem.value_heads + item.value_head) * Config::V + group_row();
      reinterpret_cast<uint4*>(row)[i % kUnits] = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace kda
