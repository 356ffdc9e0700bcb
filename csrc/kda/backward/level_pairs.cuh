// The second part of the gradients by levels: what the pairs of tokens bring to dq, dk and the gradient of the
// cumulative log-gate, level by level of the tree of decays. A warp owns 16 channels, and takes 16 tokens at a time.
#pragma once

#include "level_values.cuh"

namespace kda {

template <typename Config>
struct LevelPairGradients : LevelValues<Config> {
  using Values = LevelValues<Config>;
  using Element = typename Config::Element;
  using Values::address, Values::channel, Values::kept_operand, Values::key_operand, Values::lane, Values::member,
      Values::query_operand, Values::totals;
  static constexpr int kTiles = Config::kTiles;

  // What the 16 tokens of a tile collect. `cumulative` is the gradient of G_i, `prediction` what beta_gradient() needs.
  struct Sums {
    ChannelTile dq, dk, cumulative;
    float prediction[4];
  };

  static __device__ __forceinline__ ChannelTile zeros() {
    return ChannelTile::make([](int, int, int) { return 0.0f; });
  }

  // q or k of the tile, as they came.
  __device__ __forceinline__ ChannelTile load_values(int offset, int tt) const {
    return this->load_channels(offset, tt).template unpack<Element>();
  }

  // F of blocks of 32 tokens: P in the second half of the chunk, R in the first.
  __device__ __forceinline__ ChannelTile block_32_factor(const ChannelDecayTree& tree, int tt) const {
    const bool is_later = tt >= kTiles / 2;
    const bool has_sibling = is_later == bool(tt & 1);  // between the tile and the middle of the chunk lies another
    const float sibling[2] = {totals(tt ^ 1)[channel(0)], totals(tt ^ 1)[channel(1)]};
    ChannelTile factor = tree.select(is_later);
    factor.for_each([&](float& x, int, int hi, int) { x = has_sibling ? x * sibling[hi] : x; });
    return factor;
  }

  // Adds a level: `queries` are sums over the earlier tokens of Dqk F k, for the later ones; `keys` the sums for dk.
  // The products with `cumulative` take the operands as they were rounded, see Numerics. lower: sign bits of the tokens
  // that are the earlier of their pairs. kQueryBlocks: bits of the blocks that have later tokens, and so queries.
  template <int kQueryBlocks>
  __device__ __forceinline__ void add_level(Sums& sums, const ChannelTile& factor, const ChannelOperand& q_operand,
                                            const ChannelOperand& k_operand, const ChannelTile& queries,
                                            const ChannelTile& keys, const uint32_t (&lower)[2]) const {
    const ChannelTile q = q_operand.template unpack<BFloat16>();
    const ChannelTile k = k_operand.with_signs(lower).template unpack<BFloat16>();
    sums.dq.for_each([&](float& dq, int block, int hi, int parity) {
      const int i = 2 * hi + parity;
      const float f = factor.at(block, hi, parity);
      float& cumulative = sums.cumulative.value[block][i];
      if (kQueryBlocks >> block & 1) {
        dq += f * queries.value[block][i];
        cumulative += q.at(block, hi, parity) * queries.value[block][i];
      }
      sums.dk.value[block][i] += f * keys.value[block][i];
      cumulative += k.at(block, hi, parity) * keys.value[block][i];
    });
    if (!this->tiny_beta) return;
    sums.dq.for_each([&](float&, int block, int hi, int parity) {
      const bool is_later = (lower[block] >> (parity ? 31 : 15) & 1) == 0;
      const float product = k.at(block, hi, parity) * keys.at(block, hi, parity);
      sums.prediction[token_index(block, parity)] += is_later ? product : 0.0f;
    });
  }

  // Pairs of neighbours, 2 m and 2 m + 1: both are this lane's, and need no product of matrices.
  __device__ __forceinline__ void add_neighbours(Sums& sums, const ChannelTile& alpha, const ChannelTile& q,
                                                 const ChannelTile& k, const uint32_t (&dqk)[4],
                                                 const uint32_t (&dkk)[4]) const {
    const int owner = 4 * (2 * member + 1) + member;  // has n = 2 m + 1, k = 2 m
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float query_pair = unpack_bf16(__shfl_sync(0xffffffffu, dqk[3 * block], owner)).x;
      const float key_pair = unpack_bf16(__shfl_sync(0xffffffffu, dkk[3 * block], owner)).x;
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const int even = 2 * hi, odd = even + 1;
        const float decay = alpha.value[block][odd], k_even = k.value[block][even];
        const float for_query = decay * query_pair, for_key = decay * key_pair;
        const float of_key = for_key * k.value[block][odd];
        const float for_even = for_query * q.value[block][odd] + of_key;
        sums.dq.value[block][odd] += for_query * k_even;
        sums.dk.value[block][odd] += for_key * k_even;
        sums.dk.value[block][even] += for_even;
        sums.cumulative.value[block][odd] += for_even * k_even;
        sums.cumulative.value[block][even] -= for_even * k_even;
        if (this->tiny_beta) sums.prediction[token_index(block, 1)] += of_key * k_even;
      }
    }
  }

  // Pairs of a block of 8 tokens that differ first in the bit of kBlock.
  template <int kBlock>
  __device__ __forceinline__ void add_pairs_in_blocks(Sums& sums, const ChannelDecayTree& tree, const ChannelTile& q,
                                                      const ChannelTile& k, const uint32_t (&dqk)[4],
                                                      const uint32_t (&dqk_t)[4], const uint32_t (&dkk)[4],
                                                      const uint32_t (&dkk_t)[4]) const {
    const LevelPairs<kBlock> pairs(lane);
    const ChannelTile factor = tree.template factor<kBlock>(lane);
    const ChannelOperand q_operand = ChannelOperand::scaled(q, factor), k_operand = ChannelOperand::scaled(k, factor);
    ChannelTile queries = zeros(), keys = zeros();
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int i = 3 * block;  // the 8 x 8 block on the diagonal
      k_operand.multiply_block(queries.value[block], block, pairs.later_n ? dqk[i] : 0);
      k_operand.multiply_block(keys.value[block], block, pairs.later_n ? dkk[i] : pairs.earlier_n ? dkk_t[i] : 0);
      q_operand.multiply_block(keys.value[block], block, pairs.earlier_n ? dqk_t[i] : 0);
    }
    uint32_t lower[2];
    ChannelDecayTree::lower_signs<kBlock>(lower, lane);
    add_level<0b11>(sums, factor, q_operand, k_operand, queries, keys, lower);
  }

  // Pairs inside the tile. Completes the tree.
  __device__ __forceinline__ void add_own_pairs(Sums& sums, ChannelDecayTree& tree, const ChannelTile& q,
                                                const ChannelTile& k, int tt) const {
    using PairTile = typename Config::PairTile;
    uint32_t dqk[4], dqk_t[4], dkk[4], dkk_t[4];
    PairTile::load_b(dqk, address(Config::kDqk), 16 * tt, 16 * tt, lane);
    PairTile::load_b_trans(dqk_t, address(Config::kDqk), 16 * tt, 16 * tt, lane);
    PairTile::load_b(dkk, address(Config::kDkk), 16 * tt, 16 * tt, lane);
    PairTile::load_b_trans(dkk_t, address(Config::kDkk), 16 * tt, 16 * tt, lane);
    add_neighbours(sums, tree.prefix, q, k, dqk, dkk);
    tree.template double_blocks<1>(lane);
    add_pairs_in_blocks<2>(sums, tree, q, k, dqk, dqk_t, dkk, dkk_t);
    tree.template double_blocks<2>(lane);
    add_pairs_in_blocks<4>(sums, tree, q, k, dqk, dqk_t, dkk, dkk_t);
    tree.template double_blocks<4>(lane);

    // The upper block of 8 tokens against the lower.
    const ChannelTile factor = tree.template factor<8>(lane);
    const ChannelOperand q_operand = ChannelOperand::scaled(q, factor), k_operand = ChannelOperand::scaled(k, factor);
    ChannelTile queries = zeros(), keys = zeros();
    k_operand.multiply_block(queries.value[1], 0, dqk[2]);
    k_operand.multiply_block(keys.value[1], 0, dkk[2]);
    k_operand.multiply_block(keys.value[0], 1, dkk_t[1]);
    q_operand.multiply_block(keys.value[0], 1, dqk_t[1]);
    uint32_t lower[2];
    ChannelDecayTree::lower_signs<8>(lower, lane);
    add_level<0b10>(sums, factor, q_operand, k_operand, queries, keys, lower);
    tree.template double_blocks<8>(lane);
  }

  // Pairs with the tile `other`: acc += what it brings at this level.
  __device__ __forceinline__ void multiply_other_tile(ChannelTile& queries, ChannelTile& keys, int level, int tt,
                                                      int other) const {
    using PairTile = typename Config::PairTile;
    const ChannelOperand k_other = kept_operand(key_operand(level, other));
    const auto multiply = [&](ChannelTile& acc, const ChannelOperand& a, const uint32_t(&b)[4]) {
      a.multiply(acc.value[0], b[0], b[1]);
      a.multiply(acc.value[1], b[2], b[3]);
    };
    uint32_t b[4];
    if (other < tt) {
      PairTile::load_b(b, address(Config::kDqk), 16 * tt, 16 * other, lane);
      multiply(queries, k_other, b);
      PairTile::load_b(b, address(Config::kDkk), 16 * tt, 16 * other, lane);
      multiply(keys, k_other, b);
    } else {
      PairTile::load_b_trans(b, address(Config::kDkk), 16 * other, 16 * tt, lane);
      multiply(keys, k_other, b);
      PairTile::load_b_trans(b, address(Config::kDqk), 16 * other, 16 * tt, lane);
      multiply(keys, kept_operand(query_operand(level, other)), b);
    }
  }

  // Pairs of different tiles: blocks of 16 tokens (level 0), then of 32 (level 1).
  __device__ __forceinline__ void add_pairs_of_tiles(Sums& sums, const ChannelDecayTree& tree, int tt) const {
#pragma unroll 1
    for (int level = 0; level < 2; ++level) {
      ChannelTile queries = zeros(), keys = zeros();
      const int tiles = 1 << level, first = ((tt >> level) ^ 1) << level;
#pragma unroll 1
      for (int other = first; other < first + tiles; ++other) {
        multiply_other_tile(queries, keys, level, tt, other);
      }
      const bool is_later = tt >> level & 1;
      const ChannelTile factor = level == 1 ? block_32_factor(tree, tt) : tree.select(is_later);
      const ChannelOperand k_operand = kept_operand(key_operand(level, tt));
      if (is_later) {
        add_level<0b11>(sums, factor, kept_operand(query_operand(level, tt)), k_operand, queries, keys, {0, 0});
      } else {
        add_level<0>(sums, factor, k_operand, k_operand, queries, keys, {0x80008000u, 0x80008000u});
      }
    }
  }
};

}  // namespace kda
