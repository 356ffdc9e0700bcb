// The second part of the gradients inside a chunk: what the states and the pairs of tokens bring to dq, dk and the
// gradient of the cumulative log-gate of a block of 32 tokens. A warp owns 16 channels of one block.
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
  static constexpr int K = Config::K, V = Config::V, kTiles = Config::kTiles, kBlockTiles = Config::kBlockTiles;

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

  // Of the lane's channels.
  __device__ __forceinline__ void load_decay(float (&decay)[2], int array) const {
    const float* const decays = reinterpret_cast<const float*>(this->shared + Config::kDecays) + array * K;
    decay[0] = decays[channel(0)], decay[1] = decays[channel(1)];
  }

  // From the totals of the tiles, a channel a thread.
  __device__ __forceinline__ void store_decays() const {
    const int c = this->thread;
    if (c >= K) return;
    static_assert(kTiles == 4 && kBlockTiles == 2);
    float* const decays = reinterpret_cast<float*>(this->shared + Config::kDecays) + c;
    const float first = totals(0)[c], second = totals(1)[c], third = totals(2)[c], last = totals(3)[c];
    const float between = second + third;
    decays[Config::kFromEntry * K] = ptx::ex2(first);
    decays[(Config::kFromEntry + 1) * K] = ptx::ex2(first + between);
    decays[Config::kToExit * K] = ptx::ex2(between + last);
    decays[(Config::kToExit + 1) * K] = ptx::ex2(last);
    decays[Config::kOfChunk * K] = ptx::ex2((first + between) + last);
    decays[Config::kLog2Between * K] = between;
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
    this->template multiply<typename Config::PairTile>(acc, operand, offset, 16 * tt, 16 * other);
  }
  __device__ __forceinline__ void multiply_later(ChannelTile& acc, const ChannelOperand& operand, int offset, int tt,
                                                 int other) const {
    uint32_t b[4];
    Config::PairTile::load_b_trans(b, address(offset), 16 * other, 16 * tt, lane);
    operand.multiply(acc.value[0], b[0], b[1]);
    operand.multiply(acc.value[1], b[2], b[3]);
  }

  // The block of the warp, and its first tile.
  __device__ __forceinline__ int block() const { return static_cast<unsigned>(this->warp) / Config::kGroups; }
  __device__ __forceinline__ bool is_second() const { return block() > 0; }
  __device__ __forceinline__ int first_tile() const { return block() * kBlockTiles; }

  // What a block collects, in units of 2^-exponent of the chunk (see store_pairs()). cumulative: the gradient of G.
  struct Sums {
    Block dq, dk, cumulative;
  };
  // What a lane keeps in shared memory, as registers are few: log2 of P of a tile of the block, and operands of its tokens as the later
  // ones of their pairs, P q (which: 0) and P k (1), of a block of tokens; and X k of the first block.
  __device__ __forceinline__ float4* exponents(int i) const {
    return reinterpret_cast<float4*>(this->shared + Config::kGates) + (this->warp * kBlockTiles + i) * 2 * 32 + lane;
  }
  __device__ __forceinline__ ChannelTile exponent(int i) const { return this->kept(exponents(i)); }
  __device__ __forceinline__ uint4& later_operand(int which, int block, int i) const {
    const int warp = block * Config::kGroups + group();
    return *reinterpret_cast<uint4*>(this->shared + Config::kOperands +
                                     ((warp * Config::kOwnOperands + which * kBlockTiles + i) * 32 + lane) * 16);
  }
  __device__ __forceinline__ uint4& cross_operand(int i) const {
    return *reinterpret_cast<uint4*>(this->shared + Config::kCrossOperands +
                                     ((group() * kBlockTiles + i) * 32 + lane) * 16);
  }
  static __device__ __forceinline__ uint4 to_fragment(const ChannelOperand& operand) {
    return {operand.pair[0], operand.pair[1], operand.pair[2], operand.pair[3]};
  }

  // Operands in registers: P q and P k until they are left in shared memory, and R k.
  struct LaterOperands {
    ChannelOperand q_P[kBlockTiles], k_P[kBlockTiles];
  };
  struct EarlierOperands {
    ChannelOperand k_R[kBlockTiles];
  };

  // The operand of the warp's channels and 16 of V, of S or dS', from rows of its transpose.
  __device__ __forceinline__ ChannelOperand state_operand(int offset, int kt) const {
    ChannelOperand operand;
    using StateTile = SwizzledTile<K>;
    StateTile::load_a_trans(operand.pair, address(offset), 16 * kt, 16 * group(), lane);
    return operand;
  }

  // Sums over V of a state's rows with those of kOperands of dO, Y and U, for the block's tokens. beside(): what does not need them.
  template <int kOperands, typename Beside>
  __device__ __forceinline__ void multiply_state(Block* const (&sums)[kOperands], int state,
                                                 const int (&values)[kOperands], Beside beside) const {
    static_assert(kBlockTiles == 2);
    uint32_t fragments[V / 16][4];
#pragma unroll
    for (int kt = 0; kt < V / 16; ++kt) {
      const ChannelOperand operand = state_operand(state, kt);
#pragma unroll
      for (int i = 0; i < 4; ++i) fragments[kt][i] = operand.pair[i];
    }
    float acc[kOperands][4][4];
    uint64_t rows[kOperands];
#pragma unroll
    for (int i = 0; i < kOperands; ++i) rows[i] = this->value_descriptor(values[i], first_tile());
    wgmma::fence();
#pragma unroll
    for (int kt = 0; kt < V / 16; ++kt) {
#pragma unroll
      for (int i = 0; i < kOperands; ++i) {
        wgmma::m64n32k16_bf16<false>(acc[i], fragments[kt], Values::value_operand(rows[i], kt), kt > 0);
      }
    }
    wgmma::commit_group();
    beside();
    wgmma::wait_group<0>();
#pragma unroll
    for (int i = 0; i < kOperands; ++i) {
      wgmma::pin(acc[i]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) (*sums[i])[n / 2].value[n % 2][e] = acc[i][n][e];
      }
    }
  }

  // What the rounded operands of U dS'^T leave out in the last chunk of a sequence.
  __device__ __forceinline__ void add_written_roundings(Block& written) const {
    this->add_roundings(written, first_tile(), Config::kU, [&](int kt) { return state_operand(Config::kDState, kt); });
  }

  // What crosses the whole chunk, e^{G_C} (S . dS') over a half of V for each block's warp, on the lane that has it. unit: 2^-exponent.
  __device__ __forceinline__ void add_crossing_state(float (&crossing)[2], float unit) const {
    float dots[2][4] = {};  // rows of S against those of dS', of the lower 8 channels and of the upper
#pragma unroll 2
    for (int i = 0; i < V / 32; ++i) {
      const int kt = block() * (V / 32) + i;
      const ChannelOperand entry = state_operand(Config::kState, kt), exit = state_operand(Config::kDState, kt);
      entry.multiply(dots[0], exit.pair[0], exit.pair[2]);
      entry.multiply(dots[1], exit.pair[1], exit.pair[3]);
    }
    float chunk[2];
    load_decay(chunk, Config::kOfChunk);
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {  // the diagonal
      const float dot = this->row & 1 ? dots[hi][2 * hi + 1] : dots[hi][2 * hi];
      if (member == this->row >> 1) crossing[hi] += chunk[hi] * (unit * dot);
    }
  }

  // What the block's tokens read of the state at the entry, and the pairs of a token with itself. queries, keys: dO S^T and Y S^T.
  __device__ __forceinline__ void add_read(Sums& sums, LaterOperands& operands, const Block& queries, const Block& keys,
                                           float unit) const {
    const int first = first_tile();
    float from_entry[2];
    load_decay(from_entry, Config::kFromEntry + block());
    from_entry[0] *= unit, from_entry[1] *= unit;
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      float asks[4], predicts[4], diagonal[4];
      {
        float betas[4];
        this->load_norms(asks, Config::kQueryNorm, first + i);
        this->load_norms(predicts, Config::kKeyNorm, first + i);
        load_tokens(betas, Config::kBeta, first + i);
        load_tokens(diagonal, Config::kDiagonal, first + i);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          asks[t] *= this->call().scale, predicts[t] *= -betas[t];
          diagonal[t] *= unit;
        }
      }
      const ChannelTile P = power(exponent(i));
      const ChannelTile q = load_values(Config::kQuery, first + i), k = load_values(Config::kKey, first + i);
      operands.q_P[i] = ChannelOperand::scaled(q, P), operands.k_P[i] = ChannelOperand::scaled(k, P);
      sums.dq[i].for_each([&](float& dq, int block, int hi, int p) {
        const int e = 2 * hi + p, t = token_index(block, p);
        const float decay = P.value[block][e] * from_entry[hi];
        const float query = decay * asks[t] * queries[i].value[block][e];
        const float key = decay * predicts[t] * keys[i].value[block][e];
        dq = query + diagonal[t] * k.value[block][e];
        sums.dk[i].value[block][e] = key + diagonal[t] * q.value[block][e];
        sums.cumulative[i].value[block][e] = q.value[block][e] * query + k.value[block][e] * key;
      });
    }
  }

  // What the block's tokens write to the state at the exit: in dk, in crossing, and what of it crosses the tokens of the block. written: U dS'^T.
  __device__ __forceinline__ void add_written(Sums& sums, float (&crossing)[2], EarlierOperands& operands,
                                              const Block& written, float unit) const {
    const int first = first_tile();
    float to_exit[2];
    load_decay(to_exit, Config::kToExit + block());
    to_exit[0] *= unit, to_exit[1] *= unit;
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      float norms[4];
      this->load_norms(norms, Config::kKeyNorm, first + i);
      const ChannelTile R = inverse_power(exponent(i));
      const ChannelTile k = load_values(Config::kKey, first + i);
      operands.k_R[i] = ChannelOperand::scaled(k, R);
      sums.dk[i].for_each([&](float& dk, int block, int hi, int p) {
        const float x = written[i].at(block, hi, p) * (to_exit[hi] * norms[token_index(block, p)]);
        const float written_key = R.at(block, hi, p) * x;
        dk += written_key;
        const float term =
            __fmul_rn(k.at(block, hi, p), written_key);  // cancels in what the token itself does not cross
        crossing[hi] += term;
        sums.cumulative[i].value[block][2 * hi + p] -= term;
      });
    }
  }

  // dk and the gradient of G of tile i from a sum over later tokens, where `factor` is that of the earlier ones and `operand` the rounded k times
  // it. Sums over pairs go apart from those of the states, next to which they might be lost, or not cancel.
  static __device__ __forceinline__ void add_earlier(Sums& sums, int i, const ChannelTile& sum,
                                                     const ChannelTile& factor, const ChannelOperand& operand) {
    const ChannelTile rounded = operand.template unpack<BFloat16>();
    sums.dk[i].for_each([&](float& dk, int block, int hi, int p) {
      const float x = sum.at(block, hi, p);
      dk += factor.at(block, hi, p) * x;
      sums.cumulative[i].value[block][2 * hi + p] -= rounded.at(block, hi, p) * x;
    });
  }

  // Pairs inside the block in which tokens are the earlier ones.
  __device__ __forceinline__ void add_pairs_as_earlier(Sums& sums, const EarlierOperands& operands) const {
    const int first = first_tile();
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      ChannelTile sum = zeros();
#pragma unroll
      for (int other = i; other < kBlockTiles; ++other) {
        multiply_later(sum, to_operand(later_operand(0, block(), other)), Config::kDqk, first + i, first + other);
        multiply_later(sum, to_operand(later_operand(1, block(), other)), Config::kDkk, first + i, first + other);
      }
      add_earlier(sums, i, sum, inverse_power(exponent(i)), operands.k_R[i]);
    }
  }

  __device__ __forceinline__ void leave_operands(const LaterOperands& operands) const {
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      later_operand(0, block(), i) = to_fragment(operands.q_P[i]);
      later_operand(1, block(), i) = to_fragment(operands.k_P[i]);
    }
    if (is_second()) return;
    float middle[2];
    load_decay(middle, Config::kLog2Between);
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      cross_operand(i) = to_fragment(scaled_values(Config::kKey, i, power_to(middle, exponent(i))));
    }
  }

  // Pairs in which tokens are the later ones, inside the block and, in the second, with the first.
  __device__ __forceinline__ void add_pairs_as_later(Sums& sums, const EarlierOperands& operands) const {
    const int first = first_tile();
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      ChannelTile query = zeros(), key = zeros();
      const auto add = [&](const ChannelOperand& earlier, int other) {
        multiply_earlier(query, earlier, Config::kDqk, first + i, other);
        multiply_earlier(key, earlier, Config::kDkk, first + i, other);
      };
      if (is_second()) {
#pragma unroll
        for (int other = 0; other < kBlockTiles; ++other) add(to_operand(cross_operand(other)), other);
      }
#pragma unroll
      for (int other = 0; other <= i; ++other) add(operands.k_R[other], first + other);
      const ChannelTile P = power(exponent(i));
      const ChannelTile q_P = to_operand(later_operand(0, block(), i)).template unpack<BFloat16>();
      const ChannelTile k_P = to_operand(later_operand(1, block(), i)).template unpack<BFloat16>();
      sums.dq[i].for_each([&](float& dq, int block, int hi, int p) {
        const int e = 2 * hi + p;
        dq += P.value[block][e] * query.value[block][e];
        sums.dk[i].value[block][e] += P.value[block][e] * key.value[block][e];
        sums.cumulative[i].value[block][e] +=
            q_P.value[block][e] * query.value[block][e] + k_P.value[block][e] * key.value[block][e];
      });
    }
  }

  // Pairs of tokens of the first block with the second's.
  __device__ __forceinline__ void add_pairs_across(Sums& sums) const {
    if (is_second()) return;
    float middle[2];
    load_decay(middle, Config::kLog2Between);
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      ChannelTile sum = zeros();
#pragma unroll
      for (int other = 0; other < kBlockTiles; ++other) {
        multiply_later(sum, to_operand(later_operand(0, 1, other)), Config::kDqk, i, kBlockTiles + other);
        multiply_later(sum, to_operand(later_operand(1, 1, other)), Config::kDkk, i, kBlockTiles + other);
      }
      add_earlier(sums, i, sum, power_to(middle, exponent(i)), to_operand(cross_operand(i)));
    }
  }

  // Parts over the warp's channels of the products of q with dq, or of k with dk (which: 0, 1), for the tokens of the block.
  __device__ __forceinline__ void store_dots(const Block& gradients, int which) const {
    float dots[8];
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      const ChannelTile x = load_values(which == 0 ? Config::kQuery : Config::kKey, first_tile() + i);
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

  // Sums the parts of the warps of a block, in their order; times |x|^-2, what the normalisation takes away of q or k.
  __device__ __forceinline__ void sum_dots() const {
    const int index = this->thread;
    if (index >= 2 * Config::C) return;
    const bool is_key = index >= Config::C;
    const int t = index % Config::C, block = t / Config::kBlockTokens;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Config::kGroups; ++w) {
      sum += this->dot_parts(block * Config::kGroups + w)[is_key * Config::kBlockTokens + t % Config::kBlockTokens];
    }
    const float norm = this->tokens(is_key ? Config::kKeyNorm : Config::kQueryNorm)[t];
    this->tokens(is_key ? Config::kKeyRadial : Config::kQueryRadial)[t] = sum * norm * norm;
  }

  // dq or dk of the block, without what lies along q or k: as parts of the value head, or over the warp's channels of the
  // rows of q or k in shared memory.
  __device__ __forceinline__ void finish(Block& gradients, int which) const {
    const float size = this->inverse_unit();
    const int offset = which == 0 ? Config::kQuery : Config::kKey;
    float* const parts = which == 0 ? params.dq_parts : params.dk_parts;
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      const int tt = first_tile() + i;
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
