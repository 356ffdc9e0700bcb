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
// Grid: one CTA for each (chunk slot, value head), and with cu_seqlens one more slot; K / 16 warps. First a warp owns
// rows of V or of pairs (value_gradients.cuh), then 16 channels of a block of 32 tokens, the later block first, transposed
// (channel_tile.cuh): decay factors, operands and results have one layout (block_gradients.cuh).
//
// Numerics: in each block one reference in its middle serves all pairs, as in step_operands.cuh. A chunk whose gates
// decay by more than 2^kMaxLog2Range on either side of it, whose q or k are too large for that range, or which has a beta that
// nothing can be divided by, is left to level_gradients.cuh by a flag. Operands are single bf16. The terms of dg that belong to pairs
// cancel between their two tokens outside of what they cross; both sides take the same rounded operands, so that they cancel to fp32.
//
// Shared memory (bytes, K = V = 128): dO, Y, U 16384 each; q, k 16384 each, then dq, dk; two matrices of pairs 8192
// each, first the inverse; 9 KiB over tokens and channels: two CTAs share a multiprocessor.
// Registers: 128 (K = 128). The two blocks go through the same code, as the instruction cache is small. Bound by latency: loads of
// fragments, with 16 warps a multiprocessor, and 54 000 instructions a chunk and head.
#pragma once

#include "../device/sum_rows.cuh"
#include "block_gradients.cuh"

namespace kda {

template <typename Config>
struct IntraChunkGradients : BlockGradients<Config> {
  using Blocks = BlockGradients<Config>;
  using Values = ValueGradients<Config>;
  using Element = typename Config::Element;
  using Sums = typename Blocks::Sums;
  using Block = typename Blocks::Block;
  using Blocks::call, Blocks::channel, Blocks::keep, Blocks::kept, Blocks::lane, Blocks::location, Blocks::member,
      Blocks::params, Blocks::shared, Blocks::tile, Blocks::token, Blocks::totals, Blocks::value_row;
  static constexpr int K = Config::K, V = Config::V, C = Config::C, kTiles = Config::kTiles,
                       kBlockTiles = Blocks::kBlockTiles;

  // From elements of g to log2 of P, in their place; the totals of the tiles into shared memory. Returns whether the tokens of a
  // block are too far apart for one reference.
  __device__ __forceinline__ bool activate(Block& block, int first_tile, const GateOfTile& activation) const {
    bool far_apart = false;
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      ChannelTile& x = block[i];
      x = activation.log2_alpha(x);
      if (location.tokens < C) {
        x.for_each([&](float& gate, int b, int, int p) {
          if (token(first_tile + i, b, p) >= location.tokens) gate = 0.0f;
        });
      }
      float total[2];
      prefix_sums(x, total, lane);
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        far_apart |= !(total[hi] >= -kMaxLog2Range);
        if (member == 0) totals(first_tile + i)[channel(hi)] = total[hi];
      }
      if (i == 0) x.for_each([&](float& sum, int, int hi, int) { sum -= total[hi]; });
    }
    return far_apart;
  }

  __device__ __forceinline__ float4* kept_sums(int i) const {
    return reinterpret_cast<float4*>(shared + Config::kept_offset(i)) + this->warp * 2 * 32 + lane;
  }

  // From gradients of G inside the block to sums up to the end of the chunk, without what crosses it.
  __device__ __forceinline__ void add_later(Block& cumulative, float (&after)[2]) const {
#pragma unroll
    for (int i = kBlockTiles - 1; i >= 0; --i) suffix_sums(cumulative[i], after, lane);
  }

  // What both blocks do once their products are there.
  __device__ __forceinline__ void finish_block(Sums& sums, int first) const {
    if (call().qk_l2norm) {
      this->store_dots(sums.dq, 0, first);
      this->store_dots(sums.dk, 1, first);
    }
    __syncthreads();  // all have read dO, Y and U of the block, too
    if (call().qk_l2norm) {
      this->sum_dots(first);
      __syncthreads();
    }
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      this->finish(sums.dq, which, first);
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) sums.dq[i] = sums.dk[i];
    }
  }

  // dg of a block, and the sums for the gate's parameters.
  __device__ __forceinline__ void store_gates(Block& cumulative, int first_tile, const float (&crossing)[2],
                                              const GateOfTile& activation, float (&dA_log)[2],
                                              float (&ddt_bias)[2]) const {
    const float size = this->inverse_unit();
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      const int tt = first_tile + i;
      cumulative[i].for_each([&](float& x, int, int hi, int) { x = size * (x + crossing[hi]); });
      this->clear_rows_past_end(cumulative[i], tt);
      if (activation.kind != GateKind::kLog) {  // a log-gate in range of one reference has a gradient, whatever it is
        activation.differentiate(cumulative[i], this->load_gate(tt), dA_log, ddt_bias);
      }
      this->store_gate_gradient(cumulative[i], tt);
    }
  }

  __device__ __forceinline__ void leave_to_levels(bool wanted) const {
    if (threadIdx.x == 0) params.by_levels[tile] = wanted;
  }

  static __device__ __forceinline__ void copy(Block& to, const Block& from) {
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) to[i] = from[i];
  }

  __device__ __forceinline__ void run() const {
    ChannelTile gates[kTiles];
    this->load_gates(gates, 0);
    const GateOfTile activation = this->gate();
    this->load();
    typename Values::SolveOperands operands;
    this->load_operands(operands, this->warp);
    Block exponent = {gates[0], gates[1]},
          other_exponent;  // log2 of P, of the block that is next and of the one after it
    bool far_apart = false;
#pragma unroll 1
    for (int first = 0; first < kTiles; first += kBlockTiles) {
      far_apart |= activate(exponent, first, activation);
      if (first > 0) break;
      copy(other_exponent, exponent);
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) exponent[i] = gates[kBlockTiles + i];
    }
    if (this->wait_for_loads(far_apart)) return leave_to_levels(true);
    if (threadIdx.x == 0) {  // now that what comes first is there
      constexpr int kStateUnits = V * K / 8;
      ptx::prefetch_to_l2(params.dstate + tile * kStateUnits, kStateUnits * 16);
      ptx::prefetch_to_l2(params.forward.state + tile * kStateUnits, kStateUnits * 16);
    }
    const float largest_square = this->store_norms();
    this->solve(operands);
    if (__syncthreads_or(!(largest_square <= kMaxSquaredNorm))) return leave_to_levels(true);
    leave_to_levels(false);
    this->store_pairs();
    this->beta_gradient();

    float crossing[2] = {}, after[2] = {};
    typename Blocks::LaterOperands later;
    Sums sums;
#pragma unroll 1
    for (int first = kBlockTiles; first >= 0; first -= kBlockTiles) {
      ChannelOperand k_R[kBlockTiles];
      this->add_as_earlier(sums, crossing, k_R, exponent, later, first);
      this->add_as_later(sums, later, k_R, exponent, other_exponent, first);
      copy(exponent, other_exponent);
      finish_block(sums, first);
      add_later(sums.cumulative, after);
      if (first == 0) break;
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) keep(kept_sums(i), sums.cumulative[i]);
    }

#pragma unroll
    for (int hi = 0; hi < 2; ++hi) crossing[hi] = sum_tokens(crossing[hi]);
    float dA_log[2] = {}, ddt_bias[2] = {};
#pragma unroll 1
    for (int first = 0; first < kTiles; first += kBlockTiles) {
      store_gates(sums.cumulative, first, crossing, activation, dA_log, ddt_bias);
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) sums.cumulative[i] = kept(kept_sums(i));
    }
    if (params.dA_log_parts != nullptr) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const float of_rate = sum_tokens(dA_log[hi]), of_bias = sum_tokens(ddt_bias[hi]);
        if (member == 0) {
          params.dA_log_parts[tile * K + channel(hi)] = of_rate;
          params.ddt_bias_parts[tile * K + channel(hi)] = of_bias;
        }
      }
    }
    if (params.dq_parts != nullptr) return;
    __syncthreads();
    this->template store_rows<K>(params.dq, Config::kQuery, this->key_row(0), call().problem.heads);
    this->template store_rows<K>(params.dk, Config::kKey, this->key_row(0), call().problem.heads);
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    intra_chunk_gradients_kernel(const __grid_constant__ ChunkBwdKernelParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int value_heads = params.forward.call.problem.value_heads;
  const int64_t tile = blockIdx.x, slot = blockIdx.x / static_cast<unsigned>(value_heads);
  const int value_head = static_cast<int>(blockIdx.x % static_cast<unsigned>(value_heads));
  const int warp = ptx::opaque(threadIdx.x >> 5), lane = ptx::opaque(threadIdx.x & 31);
  const ChunkLocation location = locate_chunk(params.forward.call, slot, lane);
  if (location.tokens == 0 || slot >= params.forward.chunk_slots) {
    if (slot < params.forward.chunk_slots && threadIdx.x == 0) params.by_levels[tile] = 0;
    clear_unused_slot<Config>(params, slot, value_head);
    return;
  }
  GradientsContext<Config> context{params, shared, warp, lane, lane >> 2, lane & 3, location, value_head, tile};
  IntraChunkGradients<Config>{{{{context}}}}.run();
}

}  // namespace kda
