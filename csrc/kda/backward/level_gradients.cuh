// The gradients inside those chunks for which intra_chunk_gradients.cuh found no reference that serves all pairs of a block: whatever
// the gates, beta, q and k are. With S at its entry, dS' at its exit, U and dU from the
// recurrences, A = I + Akk, and F the decay factors of the levels of pairs (docs/design.md):
//   Y = A^{-T} dU,   dV = beta Y,   dbeta_i = Y_i . U_i / beta_i
//   Dqk = scale tril(dO U^T),   Dkk = -beta strict_tril(Y U^T), the gradients of the pairs
//   dq = scale e^G (dO S^T) + sum over levels F (Dqk (F k)),   and for the diagonal of Aqk Dqk_ii k_i
//   dk = -beta e^G (Y S^T) + e^{G_C - G} (U dS'^T) + sum over levels F (Dkk (F k)) as the later token, and
//        F (Dkk^T (F k) + Dqk^T (F q)) as the earlier one,   and for the diagonal of Aqk Dqk_ii q_i
//   dg_t = the sum of what crosses token t: q dq + k dk of the later tokens less k dk of the earlier ones, the terms of
//        the states included
// and then the derivatives of the transforms.
//
// Grid: one CTA a multiprocessor, which goes through its share of the chunks that are left; K / 8 warps. First a warp owns
// rows of V or of pairs (level_values.cuh), then 16 channels and half of the tokens, transposed (channel_tile.cuh),
// 16 tokens at a time: decay factors, operands and results have one layout, and a tile needs few registers.
// level_pairs.cuh has the levels of pairs.
//
// Numerics: gate factors are products of alpha <= 1. Operands are single bf16 (the emulation in docs/lab-notebook.md), with the same
// exceptions as there in the last chunk of a sequence.
// The terms of dg that belong to pairs cancel between their two tokens outside of what they cross; each side takes the
// same rounded operands, so that they cancel to fp32. Entries of other levels are dropped by selection. alpha = 0
// has no gradient.
//
// Shared memory (bytes, K = V = 128): dO, Y, U 16384 each; q, k 16384 each, then dq, dk; two matrices of pairs 8192
// each; operands of pairs of different tiles 49152, first the inverse and dV; per lane alpha and parts of dk, then dq
// and dk in fp32, 65536; 10 KiB over tokens.
// Registers: 128 allowed (16 warps, one CTA a multiprocessor). Bound by latency.
#pragma once

#include "../device/sum_rows.cuh"
#include "level_pairs.cuh"

namespace kda {

template <typename Config>
struct LevelGradients : LevelPairGradients<Config> {
  using Values = LevelValues<Config>;
  using Pairs = LevelPairGradients<Config>;
  using Sums = typename Pairs::Sums;
  using Pairs::load_values, Pairs::zeros;
  using Element = typename Config::Element;
  using Values::address, Values::call, Values::channel, Values::first_tile, Values::group, Values::keep, Values::kept,
      Values::kept_operand, Values::key_operand, Values::lane, Values::lane_units, Values::load_tokens,
      Values::location, Values::member, Values::params, Values::part, Values::query_operand, Values::row,
      Values::shared, Values::tile, Values::token, Values::tokens, Values::totals, Values::value_head,
      Values::value_row;
  static constexpr int K = Config::K, V = Config::V, C = Config::C, kTiles = Config::kTiles;
  using Values::multiply_state, Values::state_at;

  // alpha of a tile, and its product over the tokens.
  __device__ __forceinline__ void activate(const ChannelTile& g, const GateOfTile& activation, int tt) const {
    ChannelTile alpha = activation.alpha(g);
    alpha.for_each([&](float& x, int block, int, int parity) {
      if (token(tt, block, parity) >= location.tokens) x = 1.0f;
    });
    keep(lane_units(tt, 0), alpha);
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float total =
          multiply_tokens((alpha.at(0, hi, 0) * alpha.at(0, hi, 1)) * (alpha.at(1, hi, 0) * alpha.at(1, hi, 1)));
      if (member == 0) totals(tt)[channel(hi)] = total;
    }
  }

  // All that comes from device memory first is asked for at once: g and operands by registers, the rest by asynchronous
  // copies.
  __device__ __forceinline__ void load_and_activate(typename Values::SolveOperands& operands) {
    static_assert(Config::kPartTiles == 2);
    const ChannelTile g[2] = {this->load_gate(first_tile()), this->load_gate(first_tile() + 1)};
    const GateOfTile activation = this->gate();
    this->load();
    this->load_operands(operands, this->warp);
#pragma unroll
    for (int i = 0; i < 2; ++i) activate(g[i], activation, first_tile() + i);
  }

  // Product of the decays over the tiles from `first` to before `last`, times `factor`.
  __device__ __forceinline__ void decay_over(float (&decay)[2], float factor, int first, int last) const {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) decay[hi] = factor;
#pragma unroll
    for (int tt = 0; tt < kTiles; ++tt) {
      if (tt >= first && tt < last) {
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) decay[hi] *= totals(tt)[channel(hi)];
      }
    }
  }

  // What phase 1 takes of dS', and of S its half of V. Asked for a phase earlier.
  struct StateFragmentsOfChannels {
    ChannelOperand exit[V / 16], entry[V / 32];
  };
  __device__ __forceinline__ void load_states(StateFragmentsOfChannels& fragments) const {
    const auto dstate = state_at(params.dstate), state = state_at(params.forward.state);
    uint4 exit[V / 16], entry[V / 32];  // all on their way before one is waited for
#pragma unroll
    for (int kt = 0; kt < V / 16; ++kt) exit[kt] = dstate.load(kt);
#pragma unroll
    for (int kt = 0; kt < V / 32; ++kt) entry[kt] = state.load(part() * (V / 32) + kt);
#pragma unroll
    for (int kt = 0; kt < V / 16; ++kt) fragments.exit[kt] = to_operand(transposed_fragment(exit[kt]));
#pragma unroll
    for (int kt = 0; kt < V / 32; ++kt) fragments.entry[kt] = to_operand(transposed_fragment(entry[kt]));
  }

  // Phase 1: e^{G_C - G} (U dS'^T), kept for phase 2, and operands for pairs of different tiles. Every token of the
  // chunk has in its gradient of g what crosses the whole chunk, e^{G_C} (S . dS') over V, and all that the tokens
  // write, whose own part phase 2 takes off. Each half adds its tokens and its half of V.
  __device__ __forceinline__ void scale_operands(const StateFragmentsOfChannels& fragments) const {
    float dot[2] = {};
    {
      static_assert(Config::kPartTiles == 2);
      ChannelTile of_tiles[2] = {zeros(), zeros()};
      ChannelTile &written_0 = of_tiles[0], &written_1 = of_tiles[1];
#pragma unroll
      for (int kt = 0; kt < V / 16; ++kt) {
        multiply_state(written_0, fragments.exit[kt], Config::kU, first_tile(), kt);
        multiply_state(written_1, fragments.exit[kt], Config::kU, first_tile() + 1, kt);
        if (kt / (V / 32) == part()) {
          const ChannelTile entry = fragments.entry[kt % (V / 32)].template unpack<BFloat16>();
          ChannelTile values = fragments.exit[kt].template unpack<BFloat16>();
          values.for_each([&](float& x, int block, int hi, int parity) { dot[hi] += x * entry.at(block, hi, parity); });
        }
      }
      if (this->last_of_chain >= 0) {
        this->add_roundings(of_tiles, first_tile(), Config::kU,
                            [&](int kt) { return state_at(params.dstate).operand(kt); });
      }
      keep(lane_units(first_tile(), 1), written_0);
      keep(lane_units(first_tile() + 1, 1), written_1);
    }

    float written[2] = {};
#pragma unroll 1
    for (int i = 0; i < Config::kPartTiles; ++i) {
      const int tt = first_tile() + i;
      ChannelDecayTree tree(kept(lane_units(tt, 0)));
      tree.complete(lane);
      const ChannelTile k = load_values(Config::kKey, tt);
      const bool is_odd = tt & 1, is_later = tt >= kTiles / 2;
      const ChannelTile of_16 = tree.select(is_odd), of_32 = this->block_32_factor(tree, tt);
      keep(key_operand(0, tt), ChannelOperand::scaled(k, of_16));
      keep(key_operand(1, tt), ChannelOperand::scaled(k, of_32));
      if (is_odd || is_later) {
        const ChannelTile q = load_values(Config::kQuery, tt);
        if (is_odd) keep(query_operand(0, tt), ChannelOperand::scaled(q, of_16));
        if (is_later) keep(query_operand(1, tt), ChannelOperand::scaled(q, of_32));
      }

      float after[2], norms[4];
      decay_over(after, 1.0f, tt + 1, kTiles);
      load_tokens(norms, Config::kKeyNorm, tt);
      ChannelTile dk = kept(lane_units(tt, 1));
      dk.for_each([&](float& x, int block, int hi, int parity) {
        x *= tree.suffix.at(block, hi, parity) * after[hi] * norms[token_index(block, parity)];
        written[hi] += k.at(block, hi, parity) * x;
      });
      keep(lane_units(tt, 1), dk);
    }

#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float decay = params.forward.chunk_decay[tile * K + channel(hi)];
      const float sum = sum_tokens(decay * dot[hi] + written[hi]);
      if (member == 0) this->crossing(part())[channel(hi)] = sum;
    }
  }

  // Terms of the states, and the diagonal of Aqk.
  __device__ __forceinline__ void add_states(Sums& sums, const ChannelDecayTree& tree, const ChannelTile& q,
                                             const ChannelTile& k, int tt) const {
    ChannelTile of_outputs = zeros(), of_values = zeros();
    const auto states = state_at(params.forward.state);
#pragma unroll
    for (int kt = 0; kt < V / 16; ++kt) {
      const ChannelOperand state = states.operand(kt);
      multiply_state(of_outputs, state, Config::kOutputGradient, tt, kt);
      multiply_state(of_values, state, Config::kY, tt, kt);
    }
    const ChannelTile of_state = kept(lane_units(tt, 1));
    float before[2], beta[4], diagonal[4], q_norms[4], k_norms[4], predicted[4] = {};
    decay_over(before, 1.0f, 0, tt);
    load_tokens(beta, Config::kBeta, tt);
    load_tokens(diagonal, Config::kDiagonal, tt);
    load_tokens(q_norms, Config::kQueryNorm, tt);
    load_tokens(k_norms, Config::kKeyNorm, tt);
    sums.dq.for_each([&](float& dq, int block, int hi, int parity) {
      const int i = 2 * hi + parity, t = token_index(block, parity);
      const float query = q.value[block][i], key = k.value[block][i];
      const float decay = tree.prefix.value[block][i] * before[hi];
      const float asks = call().scale * q_norms[t] * decay * of_outputs.value[block][i];
      const float predicts = k_norms[t] * decay * of_values.value[block][i];
      const float moves = -beta[t] * predicts, writes = of_state.value[block][i];
      dq += asks + diagonal[t] * key;
      sums.dk.value[block][i] += moves + writes + diagonal[t] * query;
      sums.cumulative.value[block][i] += query * asks + key * (moves - writes);
      predicted[t] += key * predicts;
    });
    if (!this->tiny_beta) return;
    // beta_gradient() needs k . (what the state and the pairs predict) without beta.
    float bound[4];
    load_tokens(bound, Config::kBetaBound, tt);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.prediction[i] = predicted[i] - sums.prediction[i] / bound[i];
  }

  __device__ __forceinline__ void store_dots(const Sums& sums, const ChannelTile& q, const ChannelTile& k,
                                             int tt) const {
    float* const parts = reinterpret_cast<float*>(shared + Config::kTokenParts) + group() * Config::kDotParts * C;
    float dots[8];  // of queries, then of keys
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = i >> 1, parity = i & 1;
      dots[i] =
          q.at(block, 0, parity) * sums.dq.at(block, 0, parity) + q.at(block, 1, parity) * sums.dq.at(block, 1, parity);
      dots[4 + i] =
          k.at(block, 0, parity) * sums.dk.at(block, 0, parity) + k.at(block, 1, parity) * sums.dk.at(block, 1, parity);
    }
    const float dot = sum_rows(dots, lane);  // the one of index `row`
    parts[(row >> 2) * C + token(tt, row >> 1 & 1, row & 1)] = dot;
    if (!this->tiny_beta) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float prediction = sum_channels(sums.prediction[i]);
      if (row == 0) parts[2 * C + token(tt, i >> 1, i & 1)] = prediction;
    }
  }

  // Phase 2: the half's tiles, the later one first. What they leave of the gradient of G: of the later one in the place
  // of U, of the earlier one in `last`; both without what comes after the half, except for what crosses the whole
  // chunk, which is counted in the second half.
  __device__ __forceinline__ void collect(ChannelTile& last) const {
    float after[2] = {};
    if (part() == 1) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) after[hi] = this->crossing(0)[channel(hi)] + this->crossing(1)[channel(hi)];
    }
#pragma unroll 1
    for (int i = Config::kPartTiles - 1; i >= 0; --i) {
      const int tt = first_tile() + i;
      const ChannelTile q = load_values(Config::kQuery, tt);
      const ChannelTile k = load_values(Config::kKey, tt);
      Sums sums{zeros(), zeros(), zeros(), {}};
      ChannelDecayTree tree(kept(lane_units(tt, 0)));
      this->add_own_pairs(sums, tree, q, k, tt);
      this->add_pairs_of_tiles(sums, tree, tt);
      add_states(sums, tree, q, k, tt);
      store_dots(sums, q, k, tt);
      keep(lane_units(tt, 0), sums.dq);
      keep(lane_units(tt, 1), sums.dk);
      suffix_sums(sums.cumulative, after, lane);
      if (i > 0) keep(this->cumulative_units(), sums.cumulative);
      last = sums.cumulative;
    }
    if (part() == 1 && member == 0) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) this->carry()[channel(hi)] = after[hi];
    }
  }

  // Phase 3, after a barrier: dg of the half's tiles, and the sums for the gate's parameters.
  __device__ __forceinline__ void store_gate_gradients(const ChannelTile& last, const ChannelTile (&g)[2]) const {
    const GateOfTile activation = this->gate();
    float later[2] = {}, dA_log[2] = {}, ddt_bias[2] = {};
    if (part() == 0) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) later[hi] = this->carry()[channel(hi)];
    }
#pragma unroll
    for (int i = 0; i < Config::kPartTiles; ++i) {
      ChannelTile cumulative = i > 0 ? kept(this->cumulative_units()) : last;
      cumulative.for_each([&](float& x, int, int hi, int) { x += later[hi]; });
      this->clear_rows_past_end(cumulative, first_tile() + i);
      activation.differentiate(cumulative, g[i], dA_log, ddt_bias);
      store_gate_gradient(cumulative, first_tile() + i);
    }
    if (params.dA_log_parts == nullptr) return;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float of_rate = sum_tokens(dA_log[hi]), of_bias = sum_tokens(ddt_bias[hi]);
      if (member == 0)
        parameter_sums(part(), 0)[channel(hi)] = of_rate, parameter_sums(part(), 1)[channel(hi)] = of_bias;
    }
  }

  // Of A_log (which = 0) and dt_bias, for each half: where the decays over the tiles were.
  __device__ __forceinline__ float* parameter_sums(int half, int which) const { return totals(2 * half + which); }

  __device__ __forceinline__ void store_parameter_sums() const {
    if (params.dA_log_parts == nullptr || threadIdx.x >= K) return;
    const int c = threadIdx.x;
    params.dA_log_parts[tile * K + c] = parameter_sums(0, 0)[c] + parameter_sums(1, 0)[c];
    params.ddt_bias_parts[tile * K + c] = parameter_sums(0, 1)[c] + parameter_sums(1, 1)[c];
  }

  // Sums the parts of the groups, in their order.
  __device__ __forceinline__ void sum_dots() const {
    const float* const parts = reinterpret_cast<const float*>(shared + Config::kTokenParts);
    const int count = (this->tiny_beta ? Config::kDotParts : Config::kDotParts - 1) * C;
    for (int i = threadIdx.x; i < count; i += Config::kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int g = 0; g < Config::kGroups; ++g) sum += parts[g * Config::kDotParts * C + i];
      tokens(Config::kQueryDot)[i] = sum;  // the arrays are adjacent
    }
  }

  // dbeta_i = Y_i . U_i / beta_i; where beta is too small Y_i . V_i - k_i . (e^G S Y_i + sum_j (Y_i . U_j) k_j e^{G_i -
  // G_j}).
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

  // dq or dk without what lies along q or k, which the normalisation takes away: as parts of the value head, or to the
  // group's channels of the tile at `offset`, from which q or k has been read.
  __device__ __forceinline__ void finish(int offset, typename Config::TokenArray norm, typename Config::TokenArray dot,
                                         int which, float* parts) const {
#pragma unroll 1
    for (int tt = first_tile(); tt < first_tile() + Config::kPartTiles; ++tt) {
      ChannelTile gradient = kept(lane_units(tt, which));
      if (call().qk_l2norm) {
        const ChannelTile x = load_values(offset, tt);
        float norms[4], radial[4];
        load_tokens(norms, norm, tt);
        load_tokens(radial, dot, tt);
#pragma unroll
        for (int i = 0; i < 4; ++i) radial[i] *= norms[i] * norms[i];
        gradient.for_each([&](float& value, int block, int hi, int parity) {
          value -= x.at(block, hi, parity) * radial[token_index(block, parity)];
        });
      }
      this->leave_rows(gradient, parts, offset, tt);
    }
  }

  __device__ __forceinline__ void run() {
    typename Values::SolveOperands operands;
    load_and_activate(operands);
    this->tiny_beta = this->wait_for_loads();
    this->solve(operands);
    __syncthreads();
    this->template store_rows<typename Config::ValueTile, V>(params.dv, Config::kValueGradient, value_row(0),
                                                             call().problem.value_heads);
    StateFragmentsOfChannels fragments;
    load_states(fragments);
    this->multiply_pairs();
    __syncthreads();  // the operands of pairs take the place of dV
    scale_operands(fragments);
    __syncthreads();  // the gradient of G takes the place of U
    ChannelTile last;
    collect(last);
    const ChannelTile g[2] = {this->load_gate(first_tile()), this->load_gate(first_tile() + 1)};
    __syncthreads();
    sum_dots();
    store_gate_gradients(last, g);
    __syncthreads();
    store_parameter_sums();
    beta_gradient();
    finish(Config::kQuery, Config::kQueryNorm, Config::kQueryDot, 0, params.dq_parts);
    finish(Config::kKey, Config::kKeyNorm, Config::kKeyDot, 1, params.dk_parts);
    if (params.dq_parts != nullptr) return;
    __syncthreads();
    this->template store_rows<typename Config::KeyTile, K>(params.dq, Config::kQuery, this->key_row(0),
                                                           call().problem.heads);
    this->template store_rows<typename Config::KeyTile, K>(params.dk, Config::kKey, this->key_row(0),
                                                           call().problem.heads);
  }
};

// A CTA looks at every gridDim.x-th tile. Where it stands is kept in shared memory: there is no register left for it.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    level_gradients_kernel(const __grid_constant__ ChunkBwdKernelParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ unsigned next;
  ptx::launch_dependents();
  ptx::wait_for_kernel_before();
  if (threadIdx.x == 0) next = blockIdx.x;
  __syncthreads();
  while (true) {
    const int thread = ptx::opaque(threadIdx.x);  // what follows from it is not kept over the loop
    const int warp = thread >> 5, lane = thread & 31;
    const int value_heads = params.forward.call.problem.value_heads;
    const int64_t flagged_tiles = params.forward.chunk_slots * value_heads;
    const bool has_more =
        RowsPastEnd(params.forward.call, params.forward.chunk_slots).count > 0;  // rows past those of all slots
    const int64_t tiles = flagged_tiles + (has_more ? value_heads : 0);
    int64_t tile = next;
    for (unsigned wanted = 0; tile < tiles; tile += 32 * gridDim.x) {
      const int64_t candidate = tile + int64_t{lane} * gridDim.x;
      wanted = __ballot_sync(0xffffffffu,
                             candidate < tiles && (candidate >= flagged_tiles || params.by_levels[candidate] != 0));
      if (wanted != 0) {
        tile += int64_t{__ffs(wanted) - 1} * gridDim.x;
        break;
      }
    }
    if (tile >= tiles) return;
    const int64_t slot = tile / value_heads;
    SlotOfSequence found = {0, {0, 0, 0}, false, false};
    if (tile < flagged_tiles) found = find_slot(params.forward.call, slot, kChunkTokens, lane);
    const ChunkLocation& location = found.location;
    const int value_head = static_cast<int>(tile % value_heads);
    __syncthreads();  // all have read where to begin; shared memory is free
    if (threadIdx.x == 0) next = static_cast<unsigned>(tile) + gridDim.x;
    if (location.tokens == 0) {
      clear_rows<Config>(params, RowsPastEnd(params.forward.call, slot), static_cast<int>(tile - slot * value_heads));
      __syncthreads();
      continue;
    }
    GradientsContext<Config> context{params,     shared,    thread,   warp,
                                     lane,       lane >> 2, lane & 3, location,
                                     value_head, tile,      0,        last_of_chain(params, found, value_head)};
    LevelGradients<Config>{{{{{{context}}}, false}}}.run();
    __syncthreads();
  }
}

}  // namespace kda
