// A warpgroup that carries 64 rows of the transposed state S^T through steps (step_producer.cuh):
//   R^T  = |K| V^T - S^T (K ⊙ e^G)^T
//   U^T  = R^T Tinv^T
//   O^T  = S^T (Q ⊙ e^G)^T + U^T Aqk^T
//   S'^T = S^T Diag(e^{G_C}) + U^T (K ⊙ e^{G_C - G})
// all as wgmma with A from registers: accumulators of one product are the operands of the next. R, U and Tinv are split into bf16
// parts, because a delta rule that hardly forgets (beta up to 2, repeated keys) sums values that cancel.
#pragma once

#include "../device/wgmma.cuh"
#include "state_fragments.cuh"
#include "step_layout.cuh"

namespace kda {

// [64 rows, 8 n tokens] accumulators as A operands, one for each 16 tokens: high + low. The low part is made apart, while products of the
// high one run.
template <int kTiles>
struct SplitOperands {
  uint32_t high[kTiles / 2][4], low[kTiles / 2][4];

  __device__ __forceinline__ explicit SplitOperands(const float (&x)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        high[n / 2][2 * (n % 2) + half] = pack_bf16(x[n][2 * half], x[n][2 * half + 1]);
      }
    }
  }

  __device__ __forceinline__ void make_low(const float (&x)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 h = unpack_bf16(high[n / 2][2 * (n % 2) + half]);
        low[n / 2][2 * (n % 2) + half] = pack_bf16(x[n][2 * half] - h.x, x[n][2 * half + 1] - h.y);
      }
    }
  }
};

// What a step gives: outputs and the next state, or the next state alone.
enum class StepResult { kOutputs, kState };

// A warpgroup's rows of S^T on their way through the steps. Between two steps the product of the state with the gated keys of the next one is in
// flight, and behind it what is still missing of O of the last one: what is not part of the chain from S to S' runs while the tensor cores do.
//
// Config: a StepStage with Element. kResult: see StepResult.
template <typename Config, StepResult kResult>
struct StepConsumer {
  using Element = typename Config::Element;
  static constexpr int K = Config::K, C = Config::C;
  static constexpr int kTokenTiles = C / 8;
  static constexpr bool kOutputs = kResult == StepResult::kOutputs;

  const int value_column;  // of the group's first row in the tile of V
  const int warp, lane;

  StateFragments<K> state;
  uint32_t operands[K / 16][4];           // of the state, for the next products
  float predicted[kTokenTiles][4];        // S^T (K ⊙ e^G)^T of the next step
  float o[kOutputs ? kTokenTiles : 1][4];  // O^T without its scale
  float last_o[kOutputs ? kTokenTiles : 1][4];  // of the step before: ptxas serialises all products if o is read while one runs

  __device__ __forceinline__ StepConsumer(int value_column, int warp, int lane)
      : value_column(value_column), warp(warp), lane(lane) {}

  __device__ __forceinline__ int member() const { return lane & 3; }

  // Tokens 8 n + 2 member, + 1 of an array [C].
  __device__ __forceinline__ float2 token_pair(const uint8_t* stage, int array, int n) const {
    return *reinterpret_cast<const float2*>(stage + array + (8 * n + 2 * member()) * 4);
  }

  static __device__ __forceinline__ uint64_t token_major(const uint8_t* stage, int tile) {
    return wgmma::descriptor(ptx::shared_address(stage) + tile, 16);
  }

  // d = S^T times 32 rows of the gated tile, of keys or of queries.
  __device__ __forceinline__ void multiply_state(float (&d)[kTokenTiles][4], uint64_t tile) const {
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      const uint64_t b = wgmma::advance(tile, kt / 4 * Config::GatedTile::kBlockBytes + kt % 4 * 32);
      wgmma::m64n32k16_bf16<false>(d, operands[kt], b, kt > 0);
    }
  }

  // d += A B for 32 columns of a tile of matrices [C, C].
  static __device__ __forceinline__ void multiply_tokens(float (&d)[kTokenTiles][4], const uint32_t (&a)[C / 16][4],
                                                         uint64_t tile, bool accumulate) {
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      wgmma::m64n32k16_bf16<false>(d, a[kt], wgmma::advance(tile, kt * 32), accumulate || kt > 0);
    }
  }

  __device__ __forceinline__ void add_to_state(const uint32_t (&u)[C / 16][4], uint64_t tile) {
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

  // O of the step before, whose stage is given; zeros before any step.
  __device__ __forceinline__ void pack_output(PackedOutput& packed, const uint8_t* stage) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const float2 scale = token_pair(stage, Config::kOutputScale, n);
      packed.pairs[n][0] = Packed2<Element>::from_floats(last_o[n][0] * scale.x, last_o[n][1] * scale.y);
      packed.pairs[n][1] = Packed2<Element>::from_floats(last_o[n][2] * scale.x, last_o[n][3] * scale.y);
    }
  }

  // Takes on a state, before the first step.
  __device__ __forceinline__ void enter() {
    state.to_operands(operands);
#pragma unroll
    for (auto& fragment : last_o) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0.0f;
  }

  // The first product of a step, whose stage is in shared memory.
  __device__ __forceinline__ void begin(const uint8_t* stage) {
    wgmma::fence();
    multiply_state(predicted, token_major(stage, Config::kGated));
    wgmma::commit_group();
  }

  // |K| V^T; zero past the end, where V may be anything.
  __device__ __forceinline__ void load_values(float (&values)[kTokenTiles][4], const uint8_t* stage,
                                              int tokens) const {
#pragma unroll
    for (int kt = 0; kt < kTokenTiles / 2; ++kt) {
      uint32_t v[4];
      Config::ValueTile::load_a_trans(v, ptx::shared_address(stage) + Config::kValues, 16 * kt, value_column + 16 * warp,
                                      lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * kt + i / 2;
        const float2 norm = token_pair(stage, Config::kKeyNorm, n), value = Packed2<Element>::to_float2(v[i]);
        values[n][2 * (i % 2)] = value.x * norm.x, values[n][2 * (i % 2) + 1] = value.y * norm.y;
      }
    }
    if (tokens < C) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (8 * n + 2 * member() + (e & 1) >= tokens) values[n][e] = 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void let_decay(const uint8_t* stage) {
    const float* const decay = reinterpret_cast<const float*>(stage + Config::kStepDecay);
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
      const float2 factor = *reinterpret_cast<const float2*>(decay + 8 * n + 2 * member());
      state.acc[n][0] *= factor.x, state.acc[n][1] *= factor.y;
      state.acc[n][2] *= factor.x, state.acc[n][3] *= factor.y;
    }
  }

  // The rest of a step after its begin() and, if there was one before, finish_output(). has_values: whether there is V; else it is zero.
  // meanwhile(): what can be done while products run. Then the stage is no longer needed but for O.
  template <typename Meanwhile>
  __device__ __forceinline__ void advance(const uint8_t* stage, int tokens, bool has_values, Meanwhile meanwhile) {
    const uint64_t keys_decayed =
        wgmma::descriptor(ptx::shared_address(stage) + Config::kKeysDecayed, Config::KeyTile::kBlockBytes);
    const uint64_t inverse_high = token_major(stage, Config::kInverseTile);
    const uint64_t inverse_middle = wgmma::advance(inverse_high, 2 * C);
    const uint64_t aqk = token_major(stage, Config::kAqkTile), inverse_low = wgmma::advance(aqk, 2 * C);

    if constexpr (kOutputs) {
      wgmma::fence();
      multiply_state(o, token_major(stage, Config::kGated + Config::GatedTile::unit_offset(C, 0)));
      wgmma::commit_group();
    }
    float r[kTokenTiles][4] = {};
    if (has_values) load_values(r, stage, tokens);
    wgmma::wait_group<kOutputs ? 1 : 0>();
    wgmma::pin(predicted);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) r[n][e] -= predicted[n][e];
    }
    float u[kTokenTiles][4];
    {
      SplitOperands<kTokenTiles> split(r);
      wgmma::fence();
      multiply_tokens(u, split.high, inverse_high, false);
      multiply_tokens(u, split.high, inverse_middle, true);
      multiply_tokens(u, split.high, inverse_low, true);
      split.make_low(r);
      wgmma::fence();
      multiply_tokens(u, split.low, inverse_high, true);
      wgmma::commit_group();
      let_decay(stage);
      wgmma::pin(state.acc);
      meanwhile();
      wgmma::wait_group<0>();
      wgmma::pin(u);
    }
    {
      SplitOperands<kTokenTiles> split(u);
      wgmma::fence();
      add_to_state(split.high, keys_decayed);
      split.make_low(u);
      wgmma::fence();
      add_to_state(split.low, keys_decayed);
      wgmma::commit_group();
      if constexpr (kOutputs) {
        multiply_tokens(o, split.high, aqk, true);
        multiply_tokens(o, split.low, aqk, true);
        wgmma::commit_group();
      }
      wgmma::wait_group<kOutputs ? 1 : 0>();
      wgmma::pin(state.acc);
      state.to_operands(operands);
      if constexpr (kOutputs) {
        wgmma::wait_group<0>();
        wgmma::pin(o);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) last_o[n][e] = ptx::copied(o[n][e]);
        }
      }
    }
  }
};

// Rows of o for 64 columns of V, by a warpgroup and by way of a tile in shared memory, of which each warp has 16 columns for itself.
template <typename Config>
struct OutputWriter {
  using Element = typename Config::Element;
  using Tile = typename Config::ValueTile;  // C rows of 64 columns
  using PackedOutput = typename StepConsumer<Config, StepResult::kOutputs>::PackedOutput;
  static constexpr int kThreads = 128, kUnits = 64 / 8, kRowsAtOnce = 16;
  static constexpr int kTileBytes = Config::C * 128;
  Element* next;  // of the next step: the thread's 16 bytes of every kRowsAtOnce-th row
  int64_t row_stride;
  int thread;

  __device__ __forceinline__ int row() const { return (thread & 31) >> 1; }
  __device__ __forceinline__ int unit() const { return 2 * (thread >> 5) + (thread & 1); }

  __device__ __forceinline__ OutputWriter(const ChunkFwdParams& call, int64_t batch, int64_t first_token,
                                          int value_head, int first_column, int thread)
      : row_stride(int64_t{call.problem.value_heads} * Config::V), thread(thread) {
    const int64_t first = batch * call.problem.tokens + first_token + row();
    next = static_cast<Element*>(call.o) + first * row_stride + value_head * Config::V + first_column + 8 * unit();
  }

  __device__ __forceinline__ void store(const PackedOutput& packed, uint8_t* tile, int tokens) {
    const int warp = thread >> 5, lane = thread & 31, matrix = lane >> 3;
    // Rows 8 and 16 further on have the same permutation of units.
    const uint32_t to =
        ptx::shared_address(tile) + Tile::unit_offset(8 * (matrix >> 1) + (lane & 7), 2 * warp + (matrix & 1));
#pragma unroll
    for (int n = 0; n < Config::C / 8; n += 2) {
      ptx::stmatrix_x4_trans(to + 8 * n * 128, packed.pairs[n][0], packed.pairs[n][1], packed.pairs[n + 1][0],
                             packed.pairs[n + 1][1]);
    }
    __syncwarp();
    const uint8_t* const from = tile + Tile::unit_offset(row(), unit());
#pragma unroll
    for (int i = 0; i < Config::C; i += kRowsAtOnce) {
      if (row() + i < tokens) {
        *reinterpret_cast<uint4*>(next) = *reinterpret_cast<const uint4*>(from + i * 128);
      }
      next += kRowsAtOnce * row_stride;
    }
  }

  // Rows of o past the last entry of cu_seqlens, which ends at end_token, belong to no sequence and are zero.
  __device__ __forceinline__ void clear_rows_past(const ChunkFwdParams& call, int64_t end_token, int value_head,
                                                  int first_column) const {
    Element* const o = static_cast<Element*>(call.o);
    for (int64_t i = end_token * kUnits + thread; i < call.problem.tokens * kUnits; i += kThreads) {
      Element* const row = o + (i / kUnits * call.problem.value_heads + value_head) * Config::V + first_column;
      reinterpret_cast<uint4*>(row)[i % kUnits] = uint4{0, 0, 0, 0};
    }
  }
};

// Where the rows of a warp of a state tensor [.., K, V] or [.., V, K] lie.
struct StateStrides {
  int64_t row, channel;
  __device__ __forceinline__ StateStrides(const ChunkFwdParams& call)
      : row(call.state_v_first ? call.problem.key_dim : 1), channel(call.state_v_first ? 1 : call.problem.value_dim) {}
};

// Rows first_row .. of the initial state of a sequence; zeros if there is none.
template <int K>
__device__ __forceinline__ void load_initial_state(StateFragments<K>& state, const ChunkFwdParams& call,
                                                   int64_t sequence, int value_head, int first_row, int lane) {
  if (call.initial_state == nullptr) {
    state.for_each(lane, [](float& value, int, int) { value = 0.0f; });
    return;
  }
  const StateStrides stride(call);
  const int64_t first = sequence * call.initial_state_stride_sequence + value_head * call.initial_state_stride_head +
                        first_row * stride.row;
  const int element_bytes = call.state_type == DataType::kFloat32 ? 4 : 2;
  state.load(static_cast<const uint8_t*>(call.initial_state) + first * element_bytes, call.state_type, stride.row,
             stride.channel, lane);
}

// Into matrix `index` of a tensor of states in fp32.
template <int K>
__device__ __forceinline__ void store_state(float* states, int64_t index, StateFragments<K>& state,
                                            const ChunkFwdParams& call, int first_row, int lane) {
  const StateStrides stride(call);
  state.store(states + index * K * call.problem.value_dim + first_row * stride.row, stride.row, stride.channel, lane);
}

}  // namespace kda
