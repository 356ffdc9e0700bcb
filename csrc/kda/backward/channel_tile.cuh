// Values of 16 channels and 16 tokens of one warp, transposed: channels are the rows of MMA operands and accumulators,
// tokens their columns. A lane holds, for each of its two channels (lane / 4 and lane / 4 + 8), four tokens: 2 m, 2 m +
// 1, 2 m + 8 and 2 m + 9 with m = lane % 4. Operand A and two adjacent accumulators have this same layout, so that what
// scales an operand also scales a result, and nothing moves between lanes.
//
// Decay factors over blocks of 1, 2, 4, 8 and 16 tokens are products of alpha = exp(g) <= 1. For a pair of tokens i > j whose indices
// differ first (from the top) in bit h, with r the first token of the upper half-block:
//   exp(G_i - G_j) = prod(alpha_r .. alpha_i) * prod(alpha_{j+1} .. alpha_{r-1}) = P_h[i] * R_h[j].
// Nothing overflows, no difference of cumulative sums is taken, and a hard reset (g = -inf, alpha = 0) needs no special case. Blocks
// double by one exchange between lanes:
//   P_2h = P_h * (upper half ? total_h of the lower half : 1),   R_2h = R_h * (lower half ? total_h of the upper half : 1).
// Token bit 0 is the index in a pair, bits 1 and 2 are lane bits 0 and 1, and bit 3 is the block.
#pragma once

#include "../device/elements.cuh"
#include "../device/ptx.cuh"

namespace kda {

// value[block][2 * row + parity]: token 8 * block + 2 m + parity, channel lane / 4 + 8 * row.
struct ChannelTile {
  float value[2][4];

  template <typename Function>
  static __device__ __forceinline__ ChannelTile make(Function f) {
    ChannelTile tile;
    tile.for_each([&](float& x, int block, int row, int parity) { x = f(block, row, parity); });
    return tile;
  }

  // Calls f(value, block, row, parity) for each element.
  template <typename Function>
  __device__ __forceinline__ void for_each(Function f) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) f(value[block][2 * row + parity], block, row, parity);
      }
    }
  }

  __device__ __forceinline__ float at(int block, int row, int parity) const { return value[block][2 * row + parity]; }
};

// The index of a lane's token among its four: what depends on the token alone is kept by it.
__device__ __forceinline__ constexpr int token_index(int block, int parity) { return 2 * block + parity; }

// 16-bit pairs of tokens, in the order of an A operand.
struct ChannelOperand {
  uint32_t pair[4];  // [2 * block + row]

  // values * factor, rounded to bf16.
  static __device__ __forceinline__ ChannelOperand scaled(const ChannelTile& values, const ChannelTile& factor) {
    ChannelOperand operand;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        operand.pair[2 * block + row] = pack_bf16(values.at(block, row, 0) * factor.at(block, row, 0),
                                                  values.at(block, row, 1) * factor.at(block, row, 1));
      }
    }
    return operand;
  }

  // The same with the signs of the tokens that `flipped` names, for each block.
  __device__ __forceinline__ ChannelOperand with_signs(const uint32_t (&flipped)[2]) const {
    return {{pair[0] ^ flipped[0], pair[1] ^ flipped[0], pair[2] ^ flipped[1], pair[3] ^ flipped[1]}};
  }

  template <typename Element>
  __device__ __forceinline__ ChannelTile unpack() const {
    ChannelTile tile;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 values = Packed2<Element>::to_float2(pair[i]);
      tile.value[i >> 1][2 * (i & 1)] = values.x;
      tile.value[i >> 1][2 * (i & 1) + 1] = values.y;
    }
    return tile;
  }

  // acc (16 channels x 8 tokens) += this (16 x 16) * b.
  __device__ __forceinline__ void multiply(float (&acc)[4], uint32_t b0, uint32_t b1) const {
    ptx::mma_m16n8k16_bf16(acc, pair[0], pair[1], pair[2], pair[3], b0, b1);
  }

  // The same for the 8 tokens of one block.
  __device__ __forceinline__ void multiply_block(float (&acc)[4], int block, uint32_t b) const {
    ptx::mma_m16n8k8_bf16(acc, pair[2 * block], pair[2 * block + 1], b);
  }
};

// P_h and R_h of the tokens of a tile for growing blocks; see DecayTree.
struct ChannelDecayTree {
  ChannelTile prefix, suffix;

  __device__ __forceinline__ explicit ChannelDecayTree(const ChannelTile& alpha) : prefix(alpha) {
    suffix = ChannelTile::make([](int, int, int) { return 1.0f; });
  }

  // From blocks of kBlock tokens to blocks of 2 * kBlock.
  template <int kBlock>
  __device__ __forceinline__ void double_blocks(int lane) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if constexpr (kBlock == 1) {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const float lower = prefix.at(block, row, 0), upper = prefix.at(block, row, 1);
          prefix.value[block][2 * row + 1] *= lower;
          suffix.value[block][2 * row] *= upper;
        }
      } else if constexpr (kBlock == 8) {
        const float lower = total(0, row), upper = total(1, row);
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          prefix.value[1][2 * row + parity] *= lower;
          suffix.value[0][2 * row + parity] *= upper;
        }
      } else {
        constexpr int kLaneBit = kBlock / 2;
        const bool upper = lane & kLaneBit;
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const float sibling = __shfl_xor_sync(0xffffffffu, total(block, row), kLaneBit);
#pragma unroll
          for (int parity = 0; parity < 2; ++parity) {
            const int i = 2 * row + parity;
            if (upper) {
              prefix.value[block][i] *= sibling;
            } else {
              suffix.value[block][i] *= sibling;
            }
          }
        }
      }
    }
  }

  // P for all tokens, or R for all.
  __device__ __forceinline__ ChannelTile select(bool is_upper) const {
    return ChannelTile::make([&](int block, int row, int parity) {
      return is_upper ? prefix.at(block, row, parity) : suffix.at(block, row, parity);
    });
  }

  // Product over the present block of a row's tokens.
  __device__ __forceinline__ float total(int block, int row) const {
    return prefix.at(block, row, 1) * suffix.at(block, row, 1);
  }

  // Sign bits, in an operand, of the tokens in the lower half of their pair of blocks of kBlock tokens.
  template <int kBlock>
  static __device__ __forceinline__ void lower_signs(uint32_t (&signs)[2], int lane) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      signs[block] =
          (is_upper<kBlock>(block, 0, lane) ? 0 : 0x8000u) | (is_upper<kBlock>(block, 1, lane) ? 0 : 0x80000000u);
    }
  }

  // Whether a token is in the upper half of its pair of blocks of kBlock tokens: it is the i of its pairs, not the j.
  template <int kBlock>
  static __device__ __forceinline__ bool is_upper(int block, int parity, int lane) {
    if constexpr (kBlock == 1) return parity == 1;
    if constexpr (kBlock == 8) return block == 1;
    return lane & (kBlock / 2);
  }

  // The factor of each token at the level of blocks of kBlock tokens: P in the upper half, R in the lower.
  template <int kBlock>
  __device__ __forceinline__ ChannelTile factor(int lane) const {
    return ChannelTile::make([&](int block, int row, int parity) {
      return is_upper<kBlock>(block, parity, lane) ? prefix.at(block, row, parity) : suffix.at(block, row, parity);
    });
  }

  // All levels, to blocks of 16 tokens.
  __device__ __forceinline__ void complete(int lane) {
    double_blocks<1>(lane);
    double_blocks<2>(lane);
    double_blocks<4>(lane);
    double_blocks<8>(lane);
  }
};

// Whether the two elements of a lane in a B operand of 8 x 8 pairs (k = 2 m, 2 m + 1; n = lane / 4) belong to the level
// of blocks of kBlock tokens, 2 or 4: their indices differ first, from the top, in that bit. Others are dropped by
// selection, whatever they are.
template <int kBlock>
struct LevelPairs {
  bool later_n;    // n > k: the operand's n index is the later token
  bool earlier_n;  // n < k

  __device__ __forceinline__ explicit LevelPairs(int lane) {
    const int n = lane >> 3, k = lane & 3;  // in pairs of tokens
    const bool differ = kBlock == 2 ? (n ^ k) == 1 : (n ^ k) >= 2;
    later_n = differ && n > k;
    earlier_n = differ && n < k;
  }
};

// Sum over the lanes of equal lane % 4: all channels of the warp.
__device__ __forceinline__ float sum_channels(float value) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sum over the lanes of equal lane / 4: all tokens of a tile, if each lane brings the sum of its own.
__device__ __forceinline__ float sum_tokens(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

__device__ __forceinline__ float multiply_tokens(float value) {
  value *= __shfl_xor_sync(0xffffffffu, value, 1);
  return value * __shfl_xor_sync(0xffffffffu, value, 2);
}

// Which of the other lanes of equal lane / 4 have a smaller lane % 4, as factors of 0 and 1.
struct FourLanes {
  float odd, even, upper, lower;
  __device__ __forceinline__ explicit FourLanes(int lane)
      : odd(lane & 1 ? 1.0f : 0.0f), even(1.0f - odd), upper(lane & 2 ? 1.0f : 0.0f), lower(1.0f - upper) {}
};

// The sums of what they bring, finite, of those with a smaller lane % 4 and of those with a larger one, onto another; and of all of
// the four: all lanes get the same bits for it.
struct FourLaneSums {
  float neighbour, other_pair, total;
  __device__ __forceinline__ explicit FourLaneSums(float mine) {
    neighbour = __shfl_xor_sync(0xffffffffu, mine, 1);
    const float pair = mine + neighbour;
    other_pair = __shfl_xor_sync(0xffffffffu, pair, 2);
    total = pair + other_pair;
  }
  __device__ __forceinline__ float before(const FourLanes& lanes, float onto) const {
    return fmaf(lanes.upper, other_pair, fmaf(lanes.odd, neighbour, onto));
  }
  __device__ __forceinline__ float after(const FourLanes& lanes, float onto) const {
    return fmaf(lanes.lower, other_pair, fmaf(lanes.even, neighbour, onto));
  }
};

// Sums from the tile's first token to each of its tokens; for each channel. total: the sum over all.
__device__ __forceinline__ void prefix_sums(ChannelTile& tile, float (&total)[2], int lane) {
  const FourLanes lanes(lane);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    total[row] = 0.0f;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      float& even = tile.value[block][2 * row];
      float& odd = tile.value[block][2 * row + 1];
      const FourLaneSums sums(even + odd);
      even += sums.before(lanes, total[row]);
      odd += even;
      total[row] += sums.total;
    }
  }
}

// Sums from each token of the tile to its end, onto `after`, the sum of what comes later; for each channel. Leaves the
// sum over all in `after`.
__device__ __forceinline__ void suffix_sums(ChannelTile& tile, float (&after)[2], int lane) {
  const FourLanes lanes(lane);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int block = 1; block >= 0; --block) {
      float& even = tile.value[block][2 * row];
      float& odd = tile.value[block][2 * row + 1];
      const FourLaneSums sums(even + odd);
      odd += sums.after(lanes, after[row]);
      even += odd;
      after[row] += sums.total;
    }
  }
}

}  // namespace kda
