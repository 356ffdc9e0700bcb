// Stage 4 of the backward: the gradients inside each chunk. With S at its entry, dS' at its exit, U and dU from the
// recurrences, A = I + Akk, G the cumulative log-gate, and sums over pairs i >= j of tokens of the chunk:
//   Y = A^{-T} dU,   dV = beta Y,   dbeta_i = Y_i . U_i / beta_i
//   Dqk = scale tril(dO U^T),   Dkk = -beta strict_tril(Y U^T), the gradients of the pairs
//   dq_i = scale e^{G_i} (dO S^T)_i + sum_j Dqk_ij k_j e^{G_i - G_j}
//   dk_i = -beta_i e^{G_i} (Y S^T)_i + e^{G_C - G_i} (U dS'^T)_i + sum_j Dkk_ij k_j e^{G_i - G_j} as the later token, and
//          sum over later tokens t of (Dkk_ti k_t + Dqk_ti q_t) e^{G_t - G_i} as the earlier one
//   dg_t = the sum of what crosses token t: q dq + k dk of the later tokens less k dk of the earlier ones, the terms of
//        the states included
// and then the derivatives of the transforms.
//
// Grid: kCtasPerSm CTAs of K / 8 warps for each multiprocessor, which take a chunk slot of a value head after the other; rows past
// the last sequence are left to level_gradients.cuh. First a warp owns rows of V, and a warpgroup a matrix of pairs (value_gradients.cuh), then a warp 16
// channels of one of two blocks of 32 tokens, transposed (channel_tile.cuh): decay factors, operands and results have one layout (block_gradients.cuh).
// What a chunk needs is copied as soon as the one before has no more use for the room, by the copy engine, which the first lanes of several warps ask: each takes
// a while, in which the others wait for it at the next barrier. It also stores dq, dk, dv and dg of whole chunks from tiles in shared memory; where those of dq, dk and dg
// lie, q, k and dS' come next, so that these are asked for in their own chunk, from the L2 cache. Kernels for any kind of call copy rows by cp.async, in groups
// whose order the waits count on, and store them by threads.
//
// Numerics: in each block one reference in its middle serves all pairs, as in step_operands.cuh. A chunk whose gates
// decay too much on either side of it, whose q or k are too large for that (see kWideLog2Range), or which has a beta that
// nothing can be divided by, is left to level_gradients.cuh by a flag. Operands are single bf16; in the last chunk of a sequence what those of U, dU and
// dS' leave out is added (see GradientsContext::last_of_chain). The terms of dg that belong to pairs
// cancel between their two tokens outside of what they cross; both sides take the same rounded operands, so that they cancel to fp32.
//
// Shared memory (bytes, K = V = 128): g, then log2 of P, 32768; dU, then Y, 16384; U 16384; the inverse 8192; S and dS', then operands of pairs, 65536;
// dO 16384; q and k, then dq and dk, 32768; two matrices of pairs 16384; 18 KiB over tokens and channels.
// Registers: at most 128 for 16 warps. Nothing is kept from phase to phase but sums and operands: where a lane's elements lie, and where the chunk is, is found
// again, as a spilled register is a round trip to L2. Bound by latencies, at half of the issue slots: 39 000 instructions a chunk and head, 51 000 with raw inputs.
#pragma once

#include "../device/sum_rows.cuh"
#include "../device/timeline.cuh"
#include "block_gradients.cuh"
#include "gradients_params.h"

namespace kda {

template <typename Config>
struct IntraChunkGradients : BlockGradients<Config> {
  using Blocks = BlockGradients<Config>;
  using Values = ValueGradients<Config>;
  using Element = typename Config::Element;
  using Sums = typename Blocks::Sums;
  using Block = typename Blocks::Block;
  using Blocks::address, Blocks::block, Blocks::call, Blocks::channel, Blocks::first_tile, Blocks::is_second,
      Blocks::lane, Blocks::location, Blocks::member, Blocks::params, Blocks::shared, Blocks::tile, Blocks::token,
      Blocks::totals, Blocks::value_head;
  static constexpr int K = Config::K, V = Config::V, C = Config::C, kTiles = Config::kTiles,
                       kBlockTiles = Config::kBlockTiles;
  static constexpr bool kTensorCopies = Config::kTensorCopies;

  const GradientTensorMaps& maps;  // if kTensorCopies

  // ---- Copies from memory ----

  // Copies by the copy engine, which barriers count: of values, of states, of g, and of q and k.
  enum class Copies { kValues, kStates, kGates, kKeys };
  static constexpr int kCopies = 4;
  // The warps whose first lanes ask for them, and for stores. Each takes a while, in which the others wait for it at the next barrier.
  enum class Asking {
    kQueries,
    kKeys,
    kValues,
    kRows,
    kGates,
    kStates,
    kAhead,
    kValueGradients,
    kNothing,  // this warp looks for the next chunk
    kGateGradients
  };
  __device__ __forceinline__ bool asks_for(Asking what) const {
    return this->warp == static_cast<int>(what) % Config::kWarps && lane == 0;
  }
  // How many of them arrive at a barrier.
  static constexpr int arrivals(int copies) { return copies == static_cast<int>(Copies::kGates) ? 1 : 2; }
  // Those for which nothing is copied of no chunk: the others ask for what they copy in its own chunk.
  static constexpr int early_arrivals(int copies) {
    if (copies == static_cast<int>(Copies::kKeys)) return 0;
    return copies == static_cast<int>(Copies::kStates) && Config::kGateGradientFits ? 1 : arrivals(copies);
  }
  __device__ __forceinline__ uint32_t barrier(Copies copies) const {
    return address(Config::kBarriers + static_cast<int>(copies) * 8);
  }
  // Rows of the chunk, and of what follows it in the tensor.
  __device__ __forceinline__ void copy_rows(Copies copies, int offset, const CUtensorMap& map) const {
    ptx::cp_async_bulk_tensor_load(address(offset), &map, 0, static_cast<int>(location.first_token), 0, value_head,
                                   static_cast<int>(location.batch), barrier(copies));
  }
  __device__ __forceinline__ void store_tile(const CUtensorMap& map, int offset) const {
    ptx::cp_async_bulk_tensor_store(&map, 0, static_cast<int>(location.first_token), 0, value_head,
                                    static_cast<int>(location.batch), address(offset));
    ptx::cp_async_bulk_commit_group();
  }
  // Whether rows of 64 tokens are the chunk's: else those past its end belong to another sequence.
  __device__ __forceinline__ bool is_whole() const { return location.tokens == C; }

  __device__ __forceinline__ void copy_gates() const {
    if constexpr (kTensorCopies) {
      if (!asks_for(Asking::kGates)) return;
      const bool is_used = location.tokens > 0;
      const int bytes = C * K * (call().gate_type == DataType::kFloat32 ? 4 : 2);
      ptx::mbarrier_arrive_expect_tx(barrier(Copies::kGates), is_used ? bytes : 0);
      if (is_used) copy_rows(Copies::kGates, Config::kGates, maps.g);
      return;
    }
    if (location.tokens > 0) {
      this->with_gate_type([&](auto element) {
        const ChunkFwdParams& c = call();
        const auto* const first = static_cast<const decltype(element)*>(c.g) +
                                  (location.batch * c.g_stride.batch + location.first_token * c.g_stride.token +
                                   value_head * c.g_stride.head);
        this->template load_rows<typename Config::GateTile, K>(Config::kGates, first, c.g_stride.token,
                                                               params.forward.vectorized);
      });
    }
    ptx::cp_async_commit_group();
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_tile(Copies copies, int offset, const void* tiles) const {
    ptx::cp_async_bulk_load(address(offset), static_cast<const uint8_t*>(tiles) + tile * kBytes, kBytes,
                            barrier(copies));
  }

  // Until those beside which the kernel works have left the chunk, for the copy engine.
  __device__ __forceinline__ void wait_for_recurrences() const {
    if (params.forward.progress == nullptr) return;
    while (ptx::load_acquire(params.forward.progress + tile) < params.progress_wanted) __nanosleep(100);
    ptx::fence_proxy_async_global();
  }

  __device__ __forceinline__ void copy_values() const {
    const bool is_used = location.tokens > 0;
    if (asks_for(Asking::kValues)) {
      if (is_used) {
        mark(params.forward, Mark::kGradientsWait, tile);
        wait_for_recurrences();
        mark(params.forward, Mark::kGradientsThere, tile);
      }
      constexpr int kBytes = 2 * Config::kValueTileBytes + Config::kPairTileBytes;
      ptx::mbarrier_arrive_expect_tx(barrier(Copies::kValues), is_used ? kBytes : 0);
      if (!is_used) return;
      copy_tile<Config::kValueTileBytes>(Copies::kValues, Config::kY, params.dU);
      copy_tile<Config::kValueTileBytes>(Copies::kValues, Config::kU, params.forward.U_rounded);
      copy_tile<Config::kPairTileBytes>(Copies::kValues, Config::kInverse, params.forward.inverse);
    } else if (asks_for(Asking::kRows)) {
      const bool copies_rows = kTensorCopies && is_used;
      ptx::mbarrier_arrive_expect_tx(barrier(Copies::kValues), copies_rows ? Config::kValueTileBytes : 0);
      if (copies_rows) copy_rows(Copies::kValues, Config::kOutputGradient, maps.dO);
    }
  }

  __device__ __forceinline__ void copy_states() const {
    if constexpr (!kTensorCopies) {
      if (location.tokens > 0) this->load_output_gradient();
      ptx::cp_async_commit_group();
    }
    if (!asks_for(Asking::kStates)) return;
    const bool is_used = location.tokens > 0;
    copy_state(is_used, Config::kState, params.forward.state);
    if constexpr (!Config::kGateGradientFits) copy_state(is_used, Config::kDState, params.dstate);
  }
  __device__ __forceinline__ void copy_state(bool is_used, int offset, const void* states) const {
    ptx::mbarrier_arrive_expect_tx(barrier(Copies::kStates), is_used ? Config::kStateBytes : 0);
    if (!is_used) return;
    if (params.forward.progress != nullptr) ptx::fence_proxy_async_global();  // the values' thread has waited
    copy_tile<Config::kStateBytes>(Copies::kStates, offset, states);
  }

  __device__ __forceinline__ void wait_for(Copies copies) const {
    ptx::mbarrier_wait_parity(barrier(copies), this->turn);
  }

  __device__ __forceinline__ void copy_keys() const {
    if constexpr (kTensorCopies) return;
    if (location.tokens > 0) this->load_queries_and_keys();
    ptx::cp_async_commit_group();
  }

  // The copy engine, which stores dq, dk and dg of the chunk before from where q, k and dS' come, is asked for these in their own chunk, and to have them at
  // hand in the one before.
  __device__ __forceinline__ void prefetch() const {
    if (!kTensorCopies || !asks_for(Asking::kAhead) || location.tokens == 0) return;
    const int token = static_cast<int>(location.first_token), batch = static_cast<int>(location.batch);
    ptx::prefetch_tensor_to_l2(&maps.q, 0, token, 0, value_head, batch);
    ptx::prefetch_tensor_to_l2(&maps.k, 0, token, 0, value_head, batch);
    if constexpr (Config::kGateGradientFits) {
      ptx::prefetch_to_l2(params.dstate + tile * Config::kStateBytes, Config::kStateBytes);
    }
    if (const int64_t chain = this->last_of_chain; chain >= 0) {  // what its operands leave out
      const auto tile_of_chain = [&](const void* tiles, int bytes) {
        ptx::prefetch_to_l2(static_cast<const uint8_t*>(tiles) + chain * bytes, bytes);
      };
      tile_of_chain(params.forward.U_low, Config::kValueTileBytes);
      tile_of_chain(params.dU_low, Config::kValueTileBytes);
      tile_of_chain(params.dstate_low, Config::kStateBytes);
    }
  }
  __device__ __forceinline__ void copy_over_gradients() const {
    if constexpr (kTensorCopies) {
      if (asks_for(Asking::kQueries)) copy_over_gradient(Config::kQuery, maps.q);
      if (asks_for(Asking::kKeys)) copy_over_gradient(Config::kKey, maps.k);
    }
    if (Config::kGateGradientFits && asks_for(Asking::kGateGradients)) {
      ptx::cp_async_bulk_wait_read_all();
      copy_state(location.tokens > 0, Config::kDState, params.dstate);
    }
  }
  __device__ __forceinline__ void copy_over_gradient(int offset, const CUtensorMap& map) const {
    ptx::cp_async_bulk_wait_read_all();
    const bool is_used = location.tokens > 0;
    ptx::mbarrier_arrive_expect_tx(barrier(Copies::kKeys), is_used ? Config::kKeyTileBytes : 0);
    if (is_used) copy_rows(Copies::kKeys, offset, map);
  }

  // Of a chunk that is not whole.
  template <int kBytes>
  __device__ __forceinline__ void clear_copied_rows(int offset) const {
    constexpr int kUnits = kBytes / 16 / C;
    for (int i = this->thread; i < C * kUnits; i += Config::kThreads) {
      const int t = i / kUnits;
      const uint32_t at = offset + BlockedTile<C>::unit_offset(t, i % kUnits);
      if (t >= location.tokens) *reinterpret_cast<uint4*>(shared + at) = {0, 0, 0, 0};
    }
  }
  // q, k and dO of the chunk are there; rows past its end are zero.
  __device__ __forceinline__ void wait_for_rows() const {
    if constexpr (!kTensorCopies) {
      ptx::cp_async_wait_all();
      if constexpr (!std::is_same_v<Element, BFloat16>) this->convert_output_gradient();
      return;
    }
    wait_for(Copies::kKeys);
    if (is_whole()) return;
    clear_copied_rows<Config::kValueTileBytes>(Config::kOutputGradient);
    clear_copied_rows<Config::kKeyTileBytes>(Config::kQuery);
    clear_copied_rows<Config::kKeyTileBytes>(Config::kKey);
  }

  // dV, from the tile that solve() has left, behind a barrier; wait_for_stores() goes before the one behind which pairs take its place.
  __device__ __forceinline__ void store_value_gradient() const {
    if (!kTensorCopies || !is_whole()) {
      this->template store_rows<typename Config::ValueTile, V>(params.dv, Config::kValueGradient, this->value_row(0),
                                                               call().problem.value_heads);
    } else if (asks_for(Asking::kValueGradients)) {
      store_tile(maps.dv, Config::kValueGradient);
    }
  }
  __device__ __forceinline__ void wait_for_stores() const {
    if (kTensorCopies && asks_for(Asking::kValueGradients)) ptx::cp_async_bulk_wait_read_all();
  }

  // ---- Gates ----

  // Where the lane's elements of a tile are in a GateTile of fp32. Tokens and channels change bits of a unit's number in a row; the rest are constant
  // distances. (Those of 16 bits are moved as matrices.)
  struct WideGates {
    using Tile = typename Config::GateTile;
    static constexpr uint32_t kRow = Tile::kRowBytes;
    uint8_t* const gates;
    uint32_t first;
    __device__ __forceinline__ WideGates(uint8_t* all, int tt, int group, int row, int member) : gates(all) {
      const uint32_t group_bytes = group * 64, lane_bytes = static_cast<uint32_t>(row) * 4;
      first = Tile::unit_offset(2 * member, group_bytes % kRow / 16 + lane_bytes / 16) + lane_bytes % 16 +
              group_bytes / kRow * Tile::kBlockBytes + tt * 16 * kRow;
    }
    __device__ __forceinline__ float& at(int b, int hi, int p) const {
      return *reinterpret_cast<float*>(gates + (first ^ (2 * hi ^ p) * 16) + (8 * b + p) * kRow);
    }
  };

  // g of the lane's elements of a tile.
  __device__ __forceinline__ ChannelTile copied_gate(int tt) const {
    ChannelTile gates;
    this->with_gate_type([&](auto element) {
      using Gate = decltype(element);
      if constexpr (std::is_same_v<Gate, float>) {
        const WideGates lane_gates(shared + Config::kGates, tt, this->group(), this->row, member);
        gates = ChannelTile::make([&](int b, int hi, int p) { return lane_gates.at(b, hi, p); });
      } else {
        gates = this->load_channels(Config::kGates, tt).template unpack<Gate>();
      }
    });
    return gates;
  }

  // dg of a tile, for the copy engine.
  __device__ __forceinline__ void leave_gate_gradient(const ChannelTile& gradients, int tt) const {
    this->with_gate_type([&](auto element) {
      using Gate = decltype(element);
      if constexpr (std::is_same_v<Gate, float>) {
        const WideGates lane_gates(shared + Config::kGateGradient, tt, this->group(), this->row, member);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int b = i >> 2, hi = i >> 1 & 1, p = i & 1;
          lane_gates.at(b, hi, p) = gradients.at(b, hi, p);
        }
      } else {
        this->template store_channels<Gate>(gradients, Config::kGateGradient, tt);
      }
    });
  }

  // How far apart the tokens of a block are.
  struct Range {
    bool is_wide, is_too_wide;  // for one reference with any q and k, and for one at all
  };

  // log2 of P of the block's tokens; the totals of its tiles into shared memory.
  __device__ __forceinline__ Range activate(Block& exponent) const {
    const GateOfTile activation = kept_gate();
    Range range = {};
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      const int tt = first_tile() + i;
      ChannelTile& x = exponent[i];
      x = activation.log2_alpha(copied_gate(tt));
      if (location.tokens < C) {
        x.for_each([&](float& gate, int b, int, int p) {
          if (token(tt, b, p) >= location.tokens) gate = 0.0f;
        });
      }
      float total[2];
      prefix_sums(x, total, lane);
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        range.is_wide |= !(total[hi] >= -kMaxLog2Range);
        range.is_too_wide |= !(total[hi] >= -kWideLog2Range);
        if (member == 0) totals(tt)[channel(hi)] = total[hi];
      }
      if (i == 0) x.for_each([&](float& sum, int, int hi, int) { sum -= total[hi]; });
    }
    return range;
  }

  __device__ __forceinline__ void keep_exponents(const Block& exponent) const {
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) this->keep(this->exponents(i), exponent[i]);
  }

  __device__ __forceinline__ float& channel_sum(typename Config::ChannelArray array, int block, int hi) const {
    return reinterpret_cast<float*>(shared + Config::kChannels)[(array * Config::kBlocks + block) * K + channel(hi)];
  }

  // From gradients of G to sums up to the end of the block; leaves what the other block needs of them.
  __device__ __forceinline__ void leave_channel_sums(Block& cumulative, const float (&crossing)[2]) const {
    float after[2] = {};
#pragma unroll
    for (int i = kBlockTiles - 1; i >= 0; --i) suffix_sums(cumulative[i], after, lane);
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float sum = sum_tokens(crossing[hi]);
      if (member == 0) {
        channel_sum(Config::kCrossing, block(), hi) = sum;
        channel_sum(Config::kGradient, block(), hi) = after[hi];
      }
    }
  }

  // dg of the block, and its sums for the gate's parameters.
  __device__ __forceinline__ void store_gates(Block& cumulative) const {
    const GateOfTile activation = kept_gate();
    const float size = this->inverse_unit();
    float outside[2];  // what crosses the whole block
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      outside[hi] = channel_sum(Config::kCrossing, 0, hi) + channel_sum(Config::kCrossing, 1, hi);
    }
    float later[2] = {};
    if (!is_second()) later[0] = channel_sum(Config::kGradient, 1, 0), later[1] = channel_sum(Config::kGradient, 1, 1);
    float of_rate[2] = {}, of_bias[2] = {};
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      cumulative[i].for_each([&](float& x, int, int hi, int) { x = size * ((x + later[hi]) + outside[hi]); });
      this->clear_rows_past_end(cumulative[i], first_tile() + i);
    }
    if (activation.kind != GateKind::kLog) {  // a log-gate in range of one reference has a gradient, whatever it is
      Block gates;
      load_gates_again(gates);
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) activation.differentiate(cumulative[i], gates[i], of_rate, of_bias);
    }
    if (Config::kGateGradientFits && is_whole()) {
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) leave_gate_gradient(cumulative[i], first_tile() + i);
    } else {
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) this->store_gate_gradient(cumulative[i], first_tile() + i);
    }
    if (params.dA_log_parts == nullptr) return;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float rate = sum_tokens(of_rate[hi]), bias = sum_tokens(of_bias[hi]);
      if (member == 0) {
        channel_sum(Config::kOfRate, block(), hi) = rate;
        channel_sum(Config::kOfBias, block(), hi) = bias;
      }
    }
  }

  __device__ __forceinline__ void store_gate_parameters() const {
    if (params.dA_log_parts == nullptr || is_second() || member != 0 || location.tokens == 0) return;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      params.dA_log_parts[tile * K + channel(hi)] =
          channel_sum(Config::kOfRate, 0, hi) + channel_sum(Config::kOfRate, 1, hi);
      params.ddt_bias_parts[tile * K + channel(hi)] =
          channel_sum(Config::kOfBias, 0, hi) + channel_sum(Config::kOfBias, 1, hi);
    }
  }

  // What a chunk needs of parameters of a token or a channel, one element a thread: beta of token `thread` as it came, A_log, dt_bias of a channel; and
  // where they are kept until the chunk is the next.
  static constexpr int kRateThread = C, kFirstBiasThread = 2 * C;
  __device__ __forceinline__ float raw_parameter() const {
    const ChunkFwdParams& c = call();
    const int thread = this->thread, k = thread - kFirstBiasThread;
    if (thread < C || c.gate == GateKind::kLog || location.tokens == 0) return this->raw_beta();
    if (thread == kRateThread && c.A_log != nullptr) return c.A_log[value_head];
    return k >= 0 && k < K && c.dt_bias != nullptr ? c.dt_bias[int64_t{value_head} * K + k] : 0.0f;
  }
  __device__ __forceinline__ float& kept_bias(int k) const {
    return reinterpret_cast<float*>(shared + Config::kBias)[this->turn * K + k];
  }
  __device__ __forceinline__ float& kept_rate() const {
    return reinterpret_cast<float*>(shared + Config::kRate)[this->turn];
  }
  __device__ __forceinline__ void keep_parameter(float value) const {
    const int thread = this->thread, k = thread - kFirstBiasThread;
    if (thread < C) {
      this->tokens(Config::kNextBeta)[thread] = value;
    } else if (thread == kRateThread) {
      kept_rate() = call().A_log != nullptr ? expf(value) : 1.0f;
    } else if (k >= 0 && k < K) {
      kept_bias(k) = value;
    }
  }
  __device__ __forceinline__ GateOfTile kept_gate() const {
    if (call().gate == GateKind::kLog) return {GateKind::kLog, 1.0f, 0.0f, {0.0f, 0.0f}};
    return {call().gate, kept_rate(), call().lower_bound, {kept_bias(channel(0)), kept_bias(channel(1))}};
  }

  // g once more for its derivative, as the next chunk's comes to where it was: what a warp needs is copied by the warp. Not fp32, for which there is no room.
  __device__ __forceinline__ bool copies_gates_again() const {
    return call().gate != GateKind::kLog && call().gate_type != DataType::kFloat32 && params.forward.vectorized;
  }
  __device__ __forceinline__ uint8_t* gates_again() const {
    return shared + Config::kGatesAgain + this->warp * Config::kGatesOfWarpBytes;
  }
  __device__ __forceinline__ void copy_gates_again() const {
    if (copies_gates_again() && location.tokens > 0) {
      static_assert(Config::kBlockTokens == 32);
      const ChunkFwdParams& c = call();
      const int t = min(first_tile() * 16 + lane, location.tokens - 1);
      const uint16_t* const row = static_cast<const uint16_t*>(c.g) +
                                  (location.batch * c.g_stride.batch + (location.first_token + t) * c.g_stride.token +
                                   value_head * c.g_stride.head + 16 * this->group());
      const uint32_t to = ptx::shared_address(gates_again() + lane * 32);
      ptx::cp_async_16(to, row, 16);
      ptx::cp_async_16(to + 16, row + 8, 16);
    }
    ptx::cp_async_commit_group();
  }
  __device__ __forceinline__ void load_gates_again(Block& gates) const {
    if (!copies_gates_again()) {
      this->load_gates(gates, first_tile());
      return;
    }
    constexpr int kLaterGroups = kTensorCopies ? 0 : 2;  // of the next chunk: g, dO
    ptx::cp_async_wait_group<kLaterGroups>();
    __syncwarp();
    // The lane's row of the four matrices of a tile, as TileOperands::load_a_trans() has them.
    const uint32_t first =
        ptx::shared_address(gates_again()) + ((lane & 7) + (lane >> 4) * 8) * 32 + (lane >> 3 & 1) * 16;
    const auto load = [&](auto element) {
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) {
        ChannelOperand operand;
        ptx::ldmatrix_x4_trans(operand.pair, first + i * 16 * 32);
        gates[i] = operand.template unpack<decltype(element)>();
      }
    };
    if (call().gate_type == DataType::kBFloat16) {
      load(BFloat16());
    } else {
      load(Float16());
    }
  }

  __device__ __forceinline__ float copied_beta() const {
    return this->thread < C ? this->tokens(Config::kNextBeta)[this->thread] : 0.0f;
  }

  // ---- One chunk ----

  __device__ __forceinline__ void leave_to_levels(bool wanted) const {
    if (this->thread == 0 && location.tokens > 0) params.by_levels[tile] = wanted;
  }

  // here(), next(): this chunk, and the one to copy from memory meanwhile, looked up in shared memory again by each part, as there are few
  // registers. take_next(): asks which one is next; find_next(): where that is. Returns whether the chunk is
  // done: else it is left to the levels, nothing of the next one is on its way, nor has it been looked for.
  template <typename Here, typename Next, typename Take, typename Find>
  static __device__ __forceinline__ bool run(Here here, Next next, Take take_next, Find find_next) {
    bool is_wide;
    {
      if constexpr (kTensorCopies) here().wait_for(Copies::kGates);
      Block exponent;
      const Range range = here().activate(exponent);
      is_wide = range.is_wide;
      here().copy_over_gradients();
      if (here().store_beta(here().copied_beta(), range.is_too_wide)) {
        here().leave_to_levels(true);
        return false;
      }
      here().keep_exponents(exponent);
    }
    {
      typename Values::SolveOperands operands;
      here().wait_for(Copies::kValues);
      here().load_operands(operands);
      here().store_decays();
      __syncthreads();
      here().solve(operands);
    }
    here().wait_for_rows();
    // Their norms, if they are used, which the copy engine lets each warp see: else behind the barrier, while products are under way.
    constexpr bool kNormsFirst = kTensorCopies && !Config::kUnitNorms;
    float largest;
    if constexpr (kNormsFirst) {
      if (!here().is_whole()) __syncthreads();  // rows past the end have been cleared
      largest = here().store_norms();
    }
    ptx::fence_proxy_async_shared();  // Y, U and dO, before the products that read them, and dV
    is_wide = __syncthreads_or(is_wide);

    take_next();
    here().store_value_gradient();
    typename Values::Pairs pairs;
    here().multiply_pairs(pairs);
    const float most = is_wide ? kWideSquaredNorm : kMaxSquaredNorm;
    if constexpr (!kNormsFirst) largest = here().store_norms();
    bool is_large = !(largest <= most);
    if constexpr (!Config::kUnitNorms && !kNormsFirst) is_large = __syncthreads_or(is_large);
    find_next();
    here().scale_pairs(pairs);
    here().beta_gradient();
    here().wait_for_stores();
    is_large = __syncthreads_or(is_large);
    here().leave_to_levels(is_large);
    if (is_large) return false;
    const float unit = here().store_pairs(pairs);
    here().wait_for(Copies::kStates);
    Sums sums;
    float crossing[2] = {};
    Block written;
    typename Blocks::LaterOperands later_operands;
    here().template multiply_state<1>({&written}, Config::kDState, {Config::kU},
                                      [&] { here().add_crossing_state(crossing, unit); });
    if (here().last_of_chain >= 0) here().add_written_roundings(written);
    {
      Block queries, keys;
      here().template multiply_state<2>({&queries, &keys}, Config::kState, {Config::kOutputGradient, Config::kY},
                                        [] {});
      here().add_read(sums, later_operands, queries, keys, unit);
    }
    __syncthreads();
    next().copy_values();
    const float next_parameter = next().raw_parameter();
    here().leave_operands(later_operands);
    typename Blocks::EarlierOperands operands;
    here().add_written(sums, crossing, operands, written, unit);
    here().add_pairs_as_earlier(sums, operands);
    ptx::fence_proxy_async_shared();  // what is exchanged, before states are copied there
    __syncthreads();
    here().add_pairs_as_later(sums, operands);
    here().add_pairs_across(sums);
    if (here().call().qk_l2norm) {
      here().store_dots(sums.dq, 0);
      here().store_dots(sums.dk, 1);
    }
    here().leave_channel_sums(sums.cumulative, crossing);
    next().keep_parameter(next_parameter);
    __syncthreads();
    here().copy_gates_again();
    next().copy_gates();
    next().copy_states();
    next().prefetch();
    if (here().call().qk_l2norm) {
      here().sum_dots();
      __syncthreads();
    }
    here().finish(sums.dq, 0);
    here().finish(sums.dk, 1);
    here().store_gates(sums.cumulative);
    if constexpr (kTensorCopies) {
      ptx::fence_proxy_async_shared();  // dq, dk and dg, before they are stored
    } else {
      ptx::cp_async_wait_group<1>();  // g of the next chunk
    }
    __syncthreads();
    here().store_gate_parameters();
    if (kTensorCopies && here().is_whole()) {
      here().store_gradients();
      return true;
    }
    if (here().params.dq_parts != nullptr) {
      next().copy_keys();
      return true;
    }
    typename Blocks::template RowUnits<K> dq, dk;
    here().template take_rows<typename Config::KeyTile>(dq, Config::kQuery);
    here().template take_rows<typename Config::KeyTile>(dk, Config::kKey);
    __syncthreads();
    next().copy_keys();
    here().store_rows(dq, here().params.dq, here().key_row(0), here().call().problem.heads);
    here().store_rows(dk, here().params.dk, here().key_row(0), here().call().problem.heads);
    return true;
  }

  // dq and dk, which lie where q and k were, and dg.
  __device__ __forceinline__ void store_gradients() const {
    if (asks_for(Asking::kQueries)) store_tile(maps.dq, Config::kQuery);
    if (asks_for(Asking::kKeys)) store_tile(maps.dk, Config::kKey);
    if (Config::kGateGradientFits && asks_for(Asking::kGateGradients)) store_tile(maps.dg, Config::kGateGradient);
  }
};

// The chunk of a sequence that is taken as the turn-th one, when both recurrences go through it at the same pace: from its middle to its ends. The last chunk,
// which takes longer (its low parts), comes some turns early: most chunks are taken after the recurrences have ended, where it would
// else be among the last to be done.
__device__ __forceinline__ uint32_t chunk_left_at(const ChunkDivisors& divisors, uint32_t turn) {
  constexpr uint32_t kTurnsAhead = 8;
  const uint32_t chunks = divisors.chunks.value(), middle = chunks / 2;
  const uint32_t turn_of_last = (chunks - 1) / 2 * 2;
  const uint32_t early = turn_of_last - min(kTurnsAhead, turn_of_last / 2);
  if (turn == early) return chunks - 1;
  if (turn > early && turn <= turn_of_last) --turn;
  return turn % 2 == 1 ? middle - (turn + 1) / 2 : middle + turn / 2;
}

// The place of the index-th tile, which there is: in their order in memory, or beside the recurrences in that in which they leave them, all sequences, which
// have equal lengths, and heads at the same pace. By a whole warp.
__device__ __forceinline__ ChunkPlace place_of(const ChunkBwdKernelParams& params, const ChunkDivisors& divisors,
                                               uint32_t index, int lane) {
  const auto index_of_chain = [&] {
    const auto [turn, chain] = divisors.chains.divide(index);
    return ChunkIndex(divisors, chain, chunk_left_at(divisors, turn));
  };
  const ChunkIndex at = params.forward.progress != nullptr ? index_of_chain() : ChunkIndex(divisors, index);
  const SlotOfSequence found = at.found(params.forward.call, lane);
  return {found.location, at.tile(divisors), at.slot, static_cast<int>(at.value_head),
          last_of_chain(params, found, static_cast<int>(at.value_head))};
}

// Some of the CTAs that come early, spread over the device.
__device__ __forceinline__ bool is_rehearsing(const ChunkBwdKernelParams& params, int cta) {
  constexpr int kRehearsing = 8;
  const int early = static_cast<int>(params.early_ctas), stride = early > kRehearsing ? early / kRehearsing : 1;
  return cta < early && cta % stride == 0;
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    intra_chunk_gradients_kernel(const __grid_constant__ IntraChunkGradientsParams given) {
  ChunkBwdKernelParams params = given.stage;
  fix<Config::kKind>(params.forward.call);
  if constexpr (Config::kKind != CallKind::kAny) params.forward.vectorized = true, params.dq_parts = nullptr;
  if constexpr (Config::kKind == CallKind::kProcessed) params.dA_log_parts = nullptr;
  using Gradients = IntraChunkGradients<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  ChunkPlace* const places = reinterpret_cast<ChunkPlace*>(shared + Config::kPlaces);

  // The first chunk of a CTA is none: it goes on from there to its first tile as from one to the next. Beside the recurrences some CTAs go through it as
  // through others, again and again until there is a tile: so all find their instructions, 39 KB of them, in the L2 cache, where what the
  // recurrences read and write would not leave them.
  bool rehearses = is_rehearsing(params, blockIdx.x);
  const ChunkPlace nowhere = {{0, 0, 0}, 0, -1, 0, -1};
  const int64_t slots = params.forward.chunk_slots;

  const uint32_t tiles = static_cast<uint32_t>(slots * params.forward.call.problem.value_heads);  // fewer than 2^31
  const int warp =
      __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) >> 5, 0);  // so the compiler knows that lanes agree

  // One warp, which has little to do meanwhile, looks for the next place; past the last tile it has no tokens. Beside the recurrences, CTAs
  // that find room early take more tiles than others, in the order in which these are left. The number of one is asked for some time before it is wanted, but
  // not in the first quarter of a chunk: the later, the less do the last chunks keep CTAs that are late already.
  constexpr int kFindingWarp = Config::kWarps > 8 ? 8 : 0;
  const auto take_index = [&]() -> uint32_t {
    const bool takes = params.forward.progress != nullptr && warp == kFindingWarp && (threadIdx.x & 31) == 0;
    return takes ? atomicAdd(params.forward.progress + tiles, 1u) : 0;
  };
  const auto find = [&](unsigned turns, uint32_t taken) {
    if (warp != kFindingWarp) return;
    const int lane = ptx::opaque(threadIdx.x) & 31;
    const ChunkPlace& before = places[turns & 1 ^ 1];
    const auto in_order = [&]() -> uint32_t {
      if (before.slot < 0) return blockIdx.x;
      return TileOfTurn{(turns - 2) * gridDim.x, static_cast<uint32_t>(before.tile)}.next(gridDim.x).index;
    };
    const uint32_t index = params.forward.progress != nullptr ? __shfl_sync(0xffffffffu, taken, 0) : in_order();
    ChunkPlace place = {{0, 0, 0}, index, slots, 0, -1};
    if (index < tiles) place = place_of(params, given.divisors, index, lane);
    if (lane == 0) places[turns & 1] = place;
  };
  const auto at = [&](int turn) -> Gradients {
    const ChunkPlace& place = places[turn];
    const int thread = ptx::opaque(threadIdx.x), lane = thread & 31;  // what follows from it is not kept
    return {{{{{params, shared, thread, warp, lane, lane >> 2, lane & 3, place.location, place.value_head, place.tile,
                turn, place.last_of_chain}}}},
            given.maps};
  };

  if (threadIdx.x == 0) {
    mark(params.forward, Mark::kGradientsBegin, 0);
    const uint32_t barriers = ptx::shared_address(shared + Config::kBarriers);
#pragma unroll
    for (int i = 0; i < Gradients::kCopies; ++i) {
      ptx::mbarrier_init(barriers + 8 * i, Gradients::arrivals(i));
      for (int j = 0; j < Gradients::early_arrivals(i); ++j) ptx::mbarrier_arrive(barriers + 8 * i);
    }
    ptx::fence_mbarrier_init();
    places[0] = places[1] = nowhere;
  }
  if (rehearses) {  // norms in range
    for (int i = threadIdx.x; i < 2 * Config::kKeyTileBytes / 16; i += Config::kThreads) {
      reinterpret_cast<uint4*>(shared + Config::kQuery)[i] = {0, 0, 0, 0};
    }
  }
  __syncthreads();
  ptx::launch_dependents();
  // All of a chunk is copied; the first one's gates, which are an input, before the recurrences have ended.
  const auto copy = [&](int turn) {
    at(turn).copy_gates();
    if (params.forward.progress == nullptr) ptx::wait_for_kernel_before();
    at(turn).copy_values();
    __syncthreads();  // the recurrences have left the tile
    at(turn).copy_states();
    at(turn).copy_keys();
    at(turn).keep_parameter(at(turn).raw_parameter());
    ptx::cp_async_wait_group<2>();
    __syncthreads();
  };
  const auto there_is_a_tile = [&] {
    const uint32_t first = chunk_left_at(given.divisors, 0) * given.divisors.value_heads.value();
    return ptx::load_acquire(params.forward.progress + first) >= params.progress_wanted;
  };
#pragma unroll 1
  for (unsigned turns = 0; places[turns & 1].slot < slots; ++turns) {
    const int turn = turns & 1;
    const auto here = [&] { return at(turn); };
    const auto next = [&] { return at(turn ^ 1); };
    rehearses = rehearses && !__syncthreads_or(threadIdx.x == 0 && there_is_a_tile());
    uint32_t taken = 0;
    bool is_taken = rehearses, is_found = rehearses;
    const auto take_next = [&] {
      if (!is_taken) taken = take_index();
      is_taken = true;
    };
    const auto find_next = [&] {
      take_next();
      if (!is_found) find(turns + 1, taken);
      is_found = true;
    };
    const ChunkPlace& place = places[turn];
    if (place.location.tokens > 0 || rehearses) {
      if (threadIdx.x == 0) mark(params.forward, Mark::kGradientsChunk, place.tile);
      if (Gradients::run(here, next, take_next, find_next)) continue;
    } else {
      here().copy_over_gradients();
      if (place.slot >= 0) {
        clear_parts<Config>(params, place.tile);
        if (threadIdx.x == 0) params.by_levels[place.tile] = RowsPastEnd(params.forward.call, place.slot).count > 0;
      }
    }
    ptx::cp_async_wait_all();
    here().wait_for(Gradients::Copies::kValues);
    here().wait_for(Gradients::Copies::kStates);
    if constexpr (Config::kTensorCopies) {
      here().wait_for(Gradients::Copies::kGates);
      here().wait_for(Gradients::Copies::kKeys);
      ptx::fence_proxy_async_shared();
    }
    __syncthreads();  // all are done with this chunk, and with the one before
    find_next();
    __syncthreads();
    copy(turn ^ 1);
  }
  if (threadIdx.x == 0) mark(params.forward, Mark::kGradientsEnd, 0);
  if constexpr (Config::kTensorCopies) ptx::cp_async_bulk_wait_all();
  ptx::wait_for_kernel_before();  // who waits for this kernel relies on those before it, too
}

}  // namespace kda
