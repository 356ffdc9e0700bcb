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

// What a step gives: outputs and the next state, or the next state alone.
enum class StepResult { kOutputs, kState };

// Config: a StepStage with Element, and with kHasRegisters, where ptxas finds room for more beside the products.
// kResult: see StepResult.
template <typename Config, StepResult kResult>
struct StepConsumer {
  using Element = typename Config::Element;
  static constexpr int K = Config::K, C = Config::C;
  static constexpr int kTokenTiles = C / 8;
  static constexpr bool kOutputs = kResult == StepResult::kOutputs;
  // With outputs, the products of the state with keys and with queries are one.
  static constexpr int kProductTiles = kOutputs ? 2 * kTokenTiles : kTokenTiles;

  const int value_column;  // of the group's first row in the tile of V
  const int warp, lane;

  __device__ __forceinline__ int member() const { return lane & 3; }

  // Tokens 8 n + 2 member, + 1 of an array [C].
  __device__ __forceinline__ float2 token_pair(const uint8_t* stage, int array, int n) const {
    return *reinterpret_cast<const float2*>(stage + array + (8 * n + 2 * member()) * 4);
  }

  // S^T times the gated keys (d[0 .. 3]) and queries (d[4 .. 7]).
  static __device__ __forceinline__ void multiply_state(float (&d)[kProductTiles][4],
                                                        const uint32_t (&state)[K / 16][4], uint64_t tile) {
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      const uint64_t b = wgmma::advance(tile, kt / 4 * Config::GatedTile::kBlockBytes + kt % 4 * 32);
      if constexpr (kOutputs) {
        wgmma::m64n64k16_bf16<false>(d, state[kt], b, kt > 0);
      } else {
        wgmma::m64n32k16_bf16<false>(d, state[kt], b, kt > 0);
      }
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

  // One step, whose stage is in shared memory. operands: those of the state (StateFragments::to_operands), before and after. meanwhile(): what
  // can be done while the first product runs. has_values: whether there is V; else it is zero. output: of StepResult::kOutputs.
  template <typename Meanwhile>
  __device__ __forceinline__ void advance(StateFragments<K>& state, uint32_t (&operands)[K / 16][4],
                                          PackedOutput& output, const uint8_t* stage, int tokens, bool has_values,
                                          Meanwhile meanwhile) const {
    const uint32_t stage_address = ptx::shared_address(stage);
    const uint64_t tiles = wgmma::descriptor(stage_address, 16);  // K-major
    const uint64_t gated = wgmma::advance(tiles, Config::kGated);
    const uint64_t keys_decayed = wgmma::descriptor(stage_address + Config::kKeysDecayed, Config::KeyTile::kBlockBytes);
    const uint64_t inverse_high = wgmma::advance(tiles, Config::kInverseTile);
    const uint64_t inverse_middle = wgmma::advance(inverse_high, 2 * C);
    const uint64_t aqk = wgmma::advance(tiles, Config::kAqkTile), inverse_low = wgmma::advance(aqk, 2 * C);

    const auto let_decay = [&] {
      const float* const decay = reinterpret_cast<const float*>(stage + Config::kStepDecay);
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        const float2 factor = *reinterpret_cast<const float2*>(decay + 8 * n + 2 * member());
        state.acc[n][0] *= factor.x, state.acc[n][1] *= factor.y;
        state.acc[n][2] *= factor.x, state.acc[n][3] *= factor.y;
      }
    };
    // While the first product runs, if ptxas can tell that apart from it: for want of registers, or where branches lie in between, it
    // serialises all products.
    if constexpr (!Config::kHasRegisters) let_decay();
    float products[kProductTiles][4];
    wgmma::fence();
    multiply_state(products, operands, gated);
    wgmma::commit_group();
    if constexpr (Config::kHasRegisters) let_decay();
    meanwhile();

    uint32_t v[kTokenTiles / 2][4] = {};
    if (has_values) {
#pragma unroll
      for (int kt = 0; kt < kTokenTiles / 2; ++kt) {
        Config::ValueTile::load_a_trans(v[kt], stage_address + Config::kValues, 16 * kt, value_column + 16 * warp,
                                        lane);
      }
    }

    wgmma::wait_group<0>();
    wgmma::pin(products);
    float r[kTokenTiles][4], o[kTokenTiles][4];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        r[n][e] = products[n][e];
        if constexpr (kOutputs) {
          // In registers of its own: parts of the accumulators of one product cannot be those of another without ptxas serialising both.
          const float x = products[kTokenTiles + n][e];
          o[n][e] = Config::kHasRegisters ? ptx::copied(x) : x;
        }
      }
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
    if (tokens < C) {  // V past the end may be anything
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
      }
    }
    if constexpr (kOutputs) pack_output(output, o, stage);
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

}  // namespace kda
