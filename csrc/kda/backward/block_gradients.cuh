// The second part of the gradients inside a chunk: what the states and the pairs of tokens bring to dq, dk and the
// gradient of the cumulative log-gate of a block of 32 tokens. A warp owns 16 channels.
//
// Two references serve all pairs. With G_mid the sum of the log-gates up to the middle of a block,
//   P_i = exp(G_i - G_mid),   R_j = exp(G_mid - G_j)   inside a block, both within 2^±kMaxLog2Range, and
//   X_j = exp(G_mid of the second block - G_j) <= 1     for tokens of the first block with those of the second:
// exp(G_i - G_j) = P_i R_j or P_i X_j. The states have e^{G_mid} and e^{G_C - G_mid}, which scale sums in fp32.
#pragma once

#include "value_gradients.cuh"

namespace kda {

template <typename Config>
struct BlockGradients : ValueGradients<Config> {
  using Values = ValueGradients<Config>;
  using Element = typename Config::Element;
  using Values::address, Values::channel, Values::group, Values::lane, Values::load_tokens, Values::member,
      Values::params, Values::tile, Values::totals;
  static constexpr int K = Config::K, V = Config::V, kTiles = Config::kTiles, kBlockTiles = 2;
  using Values::kFragmentStride, Values::multiply_state, Values::state_fragments;

  using Block = ChannelTile[kBlockTiles];

  static __device__ __forceinline__ ChannelTile zeros() {
    return ChannelTile::make([](int, int, int) { return 0.0f; });
  }

  // 2^exponent, 2^-exponent, 2^(middle - exponent): P, R and X, from the log2 of P.
  static __device__ __forceinline__ ChannelTile power(const ChannelTile& exponent) {
    return ChannelTile::make([&](int b, int hi, int p) { return ptx::ex2(exponent.at(b, hi, p)); });
  }
  static __device__ __forceinline__ ChannelTile inverse_power(const ChannelTile& exponent) {
    return ChannelTile::make([&](int b, int hi, int p) { return ptx::ex2(-exponent.at(b, hi, p)); });
  }
  static __device__ __forceinline__ ChannelTile power_to(const float (&middle)[2], const ChannelTile& exponent) {
    return ChannelTile::make([&](int b, int hi, int p) { return ptx::ex2(middle[hi] - exponent.at(b, hi, p)); });
  }

  // log2 of the decay over the tiles from `first` to before `last`.
  __device__ __forceinline__ void decay_over(float (&decay)[2], int first, int last) const {
    decay[0] = decay[1] = 0.0f;
#pragma unroll
    for (int tt = 0; tt < kTiles; ++tt) {
      if (tt >= first && tt < last) decay[0] += totals(tt)[channel(0)], decay[1] += totals(tt)[channel(1)];
    }
  }

  // q or k of the tile, as they came.
  __device__ __forceinline__ ChannelTile load_values(int offset, int tt) const {
    return this->load_channels(offset, tt).template unpack<Element>();
  }

  // q or k of a tile times a factor, as an operand.
  __device__ __forceinline__ ChannelOperand scaled_values(int offset, int tt, const ChannelTile& factor) const {
    return ChannelOperand::scaled(load_values(offset, tt), factor);
  }

  // acc of the tokens of tile tt += operand of those of tile `other`, times the pairs' matrix at `offset`: its rows are the
  // later tokens.
  __device__ __forceinline__ void multiply_earlier(ChannelTile& acc, const ChannelOperand& operand, int offset, int tt,
                                                   int other) const {
    uint32_t b[4];
    Config::PairTile::load_b(b, address(offset), 16 * tt, 16 * other, lane);
    operand.multiply(acc.value[0], b[0], b[1]);
    operand.multiply(acc.value[1], b[2], b[3]);
  }
  __device__ __forceinline__ void multiply_later(ChannelTile& acc, const ChannelOperand& operand, int offset, int tt,
                                                 int other) const {
    uint32_t b[4];
    Config::PairTile::load_b_trans(b, address(offset), 16 * other, 16 * tt, lane);
    operand.multiply(acc.value[0], b[0], b[1]);
    operand.multiply(acc.value[1], b[2], b[3]);
  }

  static constexpr int kRound = 4;  // of them that are loaded at once

  // What a block collects, in units of 2^-exponent of the chunk (see store_pairs()). cumulative: the gradient of G.
  struct Sums {
    Block dq, dk, cumulative;
  };
  // Operands of the tokens as the later ones, P q and P k.
  struct LaterOperands {
    ChannelOperand q[kBlockTiles], k[kBlockTiles];
  };

  // Both blocks go through the same code, as it has to stay in the instruction cache. first: the block's first tile.

  // The terms of dk in which the block's tokens are the earlier ones of their pairs, or write to the state at the exit. k_R: leaves
  // R k. crossing: adds what they write, and in the second block what crosses the whole chunk, e^{G_C} (S . dS') over V, for the lane's part of
  // tokens and of V. second_block: operands of that, for the first.
  __device__ __forceinline__ void add_as_earlier(Sums& sums, float (&crossing)[2], ChannelOperand (&k_R)[kBlockTiles],
                                                 const Block& exponent, const LaterOperands& second_block,
                                                 int first) const {
    const bool is_second = first > 0;
    Block written = {zeros(), zeros()};  // U dS'^T
    {
      const uint4* const exit_fragments = state_fragments(params.dstate);
      const uint4* const entry_fragments = state_fragments(params.forward.state);
      float dots[2][4] = {};  // rows of S against those of dS': of the lower 8 channels, and of the upper
#pragma unroll 1
      for (int round = 0; round < V / 16; round += kRound) {
        uint4 exits[kRound], entries[kRound] = {};
#pragma unroll
        for (int i = 0; i < kRound; ++i) exits[i] = exit_fragments[(round + i) * kFragmentStride];
        if (is_second) {
#pragma unroll
          for (int i = 0; i < kRound; ++i) entries[i] = entry_fragments[(round + i) * kFragmentStride];
        }
#pragma unroll
        for (int r = 0; r < kRound; ++r) {
          const ChannelOperand exit = to_operand(exits[r]);
#pragma unroll
          for (int i = 0; i < kBlockTiles; ++i) multiply_state(written[i], exit, Config::kU, first + i, round + r);
        }
        if (is_second) {
#pragma unroll
          for (int r = 0; r < kRound; ++r) {
            const ChannelOperand entry = to_operand(entries[r]);
            entry.multiply(dots[0], exits[r].x, exits[r].z);
            entry.multiply(dots[1], exits[r].y, exits[r].w);
          }
        }
      }
      if (is_second) {
        float chunk[2];
        decay_over(chunk, 0, kTiles);
#pragma unroll
        for (int hi = 0; hi < 2; ++hi) {  // the diagonal
          const float dot = this->row & 1 ? dots[hi][2 * hi + 1] : dots[hi][2 * hi];
          if (member == this->row >> 1) crossing[hi] += ptx::ex2(chunk[hi]) * (this->unit() * dot);
        }
      }
    }
    float to_exit[2];
    decay_over(to_exit, first + 1, kTiles);
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) to_exit[hi] = ptx::ex2(to_exit[hi]);
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      float scale[4];
      load_tokens(scale, Config::kWriteScale, first + i);
      const ChannelTile R = inverse_power(exponent[i]);
      k_R[i] = scaled_values(Config::kKey, first + i, R);
      const ChannelTile rounded = k_R[i].template unpack<BFloat16>();
      sums.dk[i].for_each([&](float& dk, int block, int hi, int p) {
        const float x = written[i].at(block, hi, p) * (to_exit[hi] * scale[token_index(block, p)]);
        dk = R.at(block, hi, p) * x;
        const float term = __fmul_rn(rounded.at(block, hi, p), x);  // cancels in what the token itself does not cross
        crossing[hi] += term;
        sums.cumulative[i].value[block][2 * hi + p] = -term;
      });
      written[i] = zeros();  // from here on the sums over pairs
    }
#pragma unroll
    for (int other = 0; other < kBlockTiles; ++other) {
      const ChannelTile P = power(exponent[other]);
      const ChannelOperand q_P = scaled_values(Config::kQuery, first + other, P);
      const ChannelOperand k_P = scaled_values(Config::kKey, first + other, P);
#pragma unroll
      for (int i = 0; i <= other; ++i) {
        multiply_later(written[i], q_P, Config::kDqk, first + i, first + other);
        multiply_later(written[i], k_P, Config::kDkk, first + i, first + other);
      }
    }
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      const ChannelTile R = inverse_power(exponent[i]), rounded = k_R[i].template unpack<BFloat16>();
      sums.dk[i].for_each([&](float& dk, int block, int hi, int p) {
        const float x = written[i].at(block, hi, p);
        dk += R.at(block, hi, p) * x;
        sums.cumulative[i].value[block][2 * hi + p] -= rounded.at(block, hi, p) * x;
      });
    }
    if (is_second) return;
    // Pairs with the second block.
    float middle[2];
    decay_over(middle, 1, 1 + kBlockTiles);
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      ChannelTile across = zeros();
#pragma unroll
      for (int other = 0; other < kBlockTiles; ++other) {
        multiply_later(across, second_block.q[other], Config::kDqk, i, kBlockTiles + other);
        multiply_later(across, second_block.k[other], Config::kDkk, i, kBlockTiles + other);
      }
      const ChannelTile X = power_to(middle, exponent[i]);
      const ChannelTile rounded = scaled_values(Config::kKey, i, X).template unpack<BFloat16>();
      sums.dk[i].for_each([&](float& dk, int block, int hi, int p) {
        const float x = across.at(block, hi, p);
        dk += X.at(block, hi, p) * x;
        sums.cumulative[i].value[block][2 * hi + p] -= rounded.at(block, hi, p) * x;
      });
    }
  }

  // The terms of dq and dk in which they are the later ones, or read the state at the entry. other_exponent: log2 of P of the first block, for the
  // second. Leaves the operands in `operands`.
  __device__ __forceinline__ void add_as_later(Sums& sums, LaterOperands& operands,
                                               const ChannelOperand (&k_R)[kBlockTiles], const Block& exponent,
                                               const Block& other_exponent, int first) const {
    Block queries = {zeros(), zeros()}, keys = {zeros(), zeros()};
    const uint4* const entry_fragments = state_fragments(params.forward.state);
#pragma unroll 1
    for (int round = 0; round < V / 16; round += kRound) {
      uint4 entries[kRound];
#pragma unroll
      for (int r = 0; r < kRound; ++r) entries[r] = entry_fragments[(round + r) * kFragmentStride];
#pragma unroll
      for (int r = 0; r < kRound; ++r) {
        const ChannelOperand entry = to_operand(entries[r]);
#pragma unroll
        for (int i = 0; i < kBlockTiles; ++i) {
          multiply_state(queries[i], entry, Config::kOutputGradient, first + i, round + r);
          multiply_state(keys[i], entry, Config::kY, first + i, round + r);
        }
      }
    }
    float from_entry[2];
    decay_over(from_entry, 0, first + 1);
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) from_entry[hi] = ptx::ex2(from_entry[hi]);
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      float asks[4], predicts[4], diagonal[4];
      load_tokens(asks, Config::kAskScale, first + i);
      load_tokens(predicts, Config::kPredictScale, first + i);
      load_tokens(diagonal, Config::kDiagonal, first + i);
      const ChannelTile P = power(exponent[i]);
      const ChannelTile q = load_values(Config::kQuery, first + i), k = load_values(Config::kKey, first + i);
      operands.q[i] = ChannelOperand::scaled(q, P), operands.k[i] = ChannelOperand::scaled(k, P);
      sums.dq[i].for_each([&](float& dq, int block, int hi, int p) {
        const int e = 2 * hi + p, t = token_index(block, p);
        const float decay = P.value[block][e] * from_entry[hi];
        const float query = decay * asks[t] * queries[i].value[block][e];
        const float key = decay * predicts[t] * keys[i].value[block][e];
        dq = query + diagonal[t] * k.value[block][e];
        sums.dk[i].value[block][e] += key + diagonal[t] * q.value[block][e];
        sums.cumulative[i].value[block][e] += q.value[block][e] * query + k.value[block][e] * key;
      });
    }

    // The pairs' sums apart from those of the states, next to which they might be lost, or not cancel.
    float middle[2];
    decay_over(middle, 1, 1 + kBlockTiles);
    ChannelOperand k_X[kBlockTiles];
    if (first > 0) {
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) {
        k_X[i] = scaled_values(Config::kKey, i, power_to(middle, other_exponent[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      ChannelTile query = zeros(), key = zeros();
      const auto add = [&](const ChannelOperand& earlier, int other) {
        multiply_earlier(query, earlier, Config::kDqk, first + i, other);
        multiply_earlier(key, earlier, Config::kDkk, first + i, other);
      };
      if (first > 0) {
#pragma unroll
        for (int other = 0; other < kBlockTiles; ++other) add(k_X[other], other);
      }
#pragma unroll
      for (int other = 0; other <= i; ++other) add(k_R[other], first + other);
      const ChannelTile P = power(exponent[i]);
      const ChannelTile q_P = operands.q[i].template unpack<BFloat16>();
      const ChannelTile k_P = operands.k[i].template unpack<BFloat16>();
      sums.dq[i].for_each([&](float& dq, int block, int hi, int p) {
        const int e = 2 * hi + p;
        dq += P.value[block][e] * query.value[block][e];
        sums.dk[i].value[block][e] += P.value[block][e] * key.value[block][e];
        sums.cumulative[i].value[block][e] +=
            q_P.value[block][e] * query.value[block][e] + k_P.value[block][e] * key.value[block][e];
      });
    }
  }

  // Parts over the warp's channels of the products of q with dq, or of k with dk (which: 0, 1), for the tokens of the block.
  __device__ __forceinline__ void store_dots(const Block& gradients, int which, int first) const {
    float dots[8];
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      const ChannelTile x = load_values(which == 0 ? Config::kQuery : Config::kKey, first + i);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int block = t >> 1, p = t & 1;
        dots[4 * i + t] =
            x.at(block, 0, p) * gradients[i].at(block, 0, p) + x.at(block, 1, p) * gradients[i].at(block, 1, p);
      }
    }
    const float dot = sum_rows(dots, lane);  // the one of index `row`
    const int row = this->row;
    this->dot_parts(this->warp)[which * Config::kBlockTokens + this->token(row >> 2, row >> 1 & 1, row & 1)] = dot;
  }

  // Sums the parts of the warps, in their order; times |x|^-2, what the normalisation takes away of q or k.
  __device__ __forceinline__ void sum_dots(int first) const {
    const int index = threadIdx.x;
    if (index >= 2 * Config::kBlockTokens) return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) sum += this->dot_parts(w)[index];
    const bool is_key = index >= Config::kBlockTokens;
    const int t = 16 * first + index % Config::kBlockTokens;
    const float norm = this->tokens(is_key ? Config::kKeyNorm : Config::kQueryNorm)[t];
    this->tokens(is_key ? Config::kKeyRadial : Config::kQueryRadial)[t] = sum * norm * norm;
  }

  // dq or dk of the block, without what lies along q or k: as parts of the value head, or over the warp's channels of the
  // rows of q or k in shared memory.
  __device__ __forceinline__ void finish(Block& gradients, int which, int first) const {
    const float size = this->inverse_unit();
    const int offset = which == 0 ? Config::kQuery : Config::kKey;
    float* const parts = which == 0 ? params.dq_parts : params.dk_parts;
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      const int tt = first + i;
      ChannelTile& gradient = gradients[i];
      if (this->call().qk_l2norm) {
        const ChannelTile x = load_values(offset, tt);
        float along[4];
        load_tokens(along, which == 0 ? Config::kQueryRadial : Config::kKeyRadial, tt);
        gradient.for_each([&](float& value, int block, int hi, int p) {
          value -= x.at(block, hi, p) * along[token_index(block, p)];
        });
      }
      gradient.for_each([&](float& value, int, int, int) { value *= size; });
      this->leave_rows(gradient, parts, offset, tt);
    }
  }
};

}  // namespace kda
