// The first part of the gradients inside a chunk, in which a warp owns rows of V or of pairs:
//   solve        Y = A^{-T} dU, dV = beta Y, and the part of dbeta in Y
//   multiply_pairs, scale_pairs, store_pairs
//                the gradients of the pairs of tokens, from dO U^T and Y U^T
#pragma once

#include "../device/wgmma.cuh"
#include "block_config.cuh"

namespace kda {

template <typename Config>
struct ValueGradients : GradientsRows<Config> {
  using Rows = GradientsRows<Config>;
  using Element = typename Config::Element;
  using Rows::address, Rows::call, Rows::lane, Rows::location, Rows::member, Rows::params, Rows::row, Rows::shared,
      Rows::tile, Rows::tokens, Rows::value_row, Rows::warp;
  static constexpr int K = Config::K, V = Config::V, C = Config::C, kTiles = Config::kTiles;

  __device__ __forceinline__ float* totals(int tt) const {
    return reinterpret_cast<float*>(shared + Config::kTotals) + tt * K;
  }
  __device__ __forceinline__ float* dot_parts(int warp) const {
    return reinterpret_cast<float*>(shared + Config::kDotParts + warp * Config::kDotBytes);
  }
  __device__ __forceinline__ float* largest_pairs() const {
    return reinterpret_cast<float*>(shared + Config::kLargest);
  }

  // Fragments that the recurrences left, [V / 16][C / 16] of them, as they are copied to where Y and U come.
  __device__ __forceinline__ ChannelOperand copied_fragment(int offset, int row_tile, int tt) const {
    const uint8_t* const at = shared + offset + ((row_tile * kTiles + tt) * 32 + lane) * 16;
    return to_operand(*reinterpret_cast<const uint4*>(at));
  }

  // A warp solves for 16 rows of V and kSolveTiles tiles of tokens, so that all have about as many products.
  static constexpr int kSolveParts = Config::kWarps / Config::kRowTiles, kSolveTiles = kTiles / kSolveParts;
  static_assert(kSolveParts * Config::kRowTiles == Config::kWarps && kSolveParts * kSolveTiles == kTiles);
  __device__ __forceinline__ int solved_rows() const { return warp % Config::kRowTiles; }
  __device__ __forceinline__ int solved_tile(int i) const {
    const int part = warp / Config::kRowTiles;
    return kSolveTiles == 2 && i == 1 ? kTiles - 1 - part : part + i;
  }

  struct SolveOperands {
    ChannelOperand dU[kTiles], U[kSolveTiles];
  };
  __device__ __forceinline__ void load_operands(SolveOperands& operands) const {
#pragma unroll
    for (int tt = 0; tt < kTiles; ++tt) operands.dU[tt] = copied_fragment(Config::kY, solved_rows(), tt);
#pragma unroll
    for (int i = 0; i < kSolveTiles; ++i) operands.U[i] = copied_fragment(Config::kU, solved_rows(), solved_tile(i));
  }

  // Y^T = dU^T A^{-1} of 16 rows of V; Y and U into shared memory, over what all have loaded, dV = beta Y, too, and over these rows Y_i . U_i,
  // which is the gradient of beta_i times beta_i.
  __device__ __forceinline__ void solve(const SolveOperands& operands) const {
    constexpr int kTilesOfSum = 2;
    const int row_tile = solved_rows();
    float* const parts = reinterpret_cast<float*>(shared + Config::kBetaParts) + row_tile * C;
    float dots[4 * kTilesOfSum];
#pragma unroll
    for (int i = 0; i < 4 * kTilesOfSum; ++i) dots[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kSolveTiles; ++i) {
      const int tt = solved_tile(i);
      ChannelTile y = ChannelTile::make([](int, int, int) { return 0.0f; });  // rows of V for channels
#pragma unroll
      for (int kt = 0; kt < kTiles; ++kt) {
        if (kt < tt) continue;
        uint32_t b[4];
        Config::PairTile::load_b_trans(b, address(Config::kInverse), 16 * kt, 16 * tt, lane);
        operands.dU[kt].multiply(y.value[0], b[0], b[1]);
        operands.dU[kt].multiply(y.value[1], b[2], b[3]);
      }
      const ChannelOperand& u = operands.U[i];
      ChannelTile values = u.template unpack<BFloat16>();
      if (this->last_of_chain >= 0) {
        this->add_value_roundings(values, row_tile, tt);
        this->add_solved_roundings(y, row_tile, tt);
      }
      float beta[4];
      this->load_tokens(beta, Config::kBeta, tt);
      uint32_t pairs[4], gradients[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int block = j >> 1;
        const float even = y.at(block, j & 1, 0), odd = y.at(block, j & 1, 1);
        pairs[j] = pack_bf16(even, odd);
        gradients[j] =
            Packed2<Element>::from_floats(beta[token_index(block, 0)] * even, beta[token_index(block, 1)] * odd);
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int block = t >> 1, p = t & 1;
        dots[4 * (i % kTilesOfSum) + t] =
            y.at(block, 0, p) * values.at(block, 0, p) + y.at(block, 1, p) * values.at(block, 1, p);
      }
      Config::ValueTile::store_a_trans(pairs, address(Config::kY), 16 * tt, 16 * row_tile, lane);
      Config::ValueTile::store_a_trans(gradients, address(Config::kValueGradient), 16 * tt, 16 * row_tile, lane);
      Config::ValueTile::store_a_trans(u.pair, address(Config::kU), 16 * tt, 16 * row_tile, lane);
      if (i % kTilesOfSum != kTilesOfSum - 1 && i != kSolveTiles - 1) continue;
      const float dot = sum_rows(dots, lane);  // the one of index `row`
      const int first = i / kTilesOfSum * kTilesOfSum, j = first + (row >> 2);
      if (j < kSolveTiles) parts[this->token(solved_tile(j), row >> 1 & 1, row & 1)] = dot;
    }
  }

  __device__ __forceinline__ void beta_gradient() const {
    constexpr int kFirstWarp = Config::kWarps > 8 ? 12 : 0;  // with few pairs to scale meanwhile
    const int t = this->thread - 32 * kFirstWarp;
    if (t < 0 || t >= location.tokens) return;
    const float* const parts = reinterpret_cast<const float*>(shared + Config::kBetaParts);
    float gradient = 0.0f;
#pragma unroll
    for (int i = 0; i < V / 16; ++i) gradient += parts[i * C + t];
    const float beta = tokens(Config::kBeta)[t];
    gradient /= beta;
    if (call().beta_sigmoid) gradient *= beta * (1.0f - beta / call().beta_scale);
    this->store_1(params.dbeta, value_row(t), call().beta_type, gradient);
  }

  // The gradients of the pairs, with the factors by which q and k are normalised, so that all that follows takes q and
  // k as they are:
  //   Dqk[i,j] = scale (dO U^T)[i,j] / (|q_i| |k_j|)          Dkk[i,j] = -beta_i (Y U^T)[i,j] / (|k_i| |k_j|)
  // for i > j; the diagonal of Dqk, over which nothing decays, goes by itself, in fp32. A warp has rows of 16 of one of the two.
  static constexpr int kPairParts = Config::kWarps / (2 * kTiles), kPairTiles = kTiles / kPairParts;
  struct Pairs {
    float acc[kPairTiles][2][4];
  };
  // A warpgroup has all rows of one of the two, and a part of the columns.
  __device__ __forceinline__ bool has_queries() const { return warp >> 2 & 1; }
  __device__ __forceinline__ int pair_row_tile() const { return warp & 3; }
  __device__ __forceinline__ int first_pair_tile() const { return (warp >> 3) * kPairTiles; }

  // The operands of 16 of V of a tile of dO, Y or U, for rows from that of tile tt on.
  __device__ __forceinline__ uint64_t value_descriptor(int offset, int tt) const {
    return wgmma::descriptor(address(offset) + tt * 16 * Config::ValueTile::kRowBytes, Config::ValueTile::kBlockBytes);
  }
  static __device__ __forceinline__ uint64_t value_operand(uint64_t descriptor, int kt) {
    return wgmma::advance(descriptor, (kt >> 2) * Config::ValueTile::kBlockBytes + (kt & 3) * 32);
  }

  __device__ __forceinline__ void multiply_pairs(Pairs& pairs) const {
    constexpr int kHalves = kPairTiles / 2;  // products of 32 columns
    float acc[kHalves][4][4];
    const uint64_t rows = value_descriptor(has_queries() ? Config::kOutputGradient : Config::kY, 0);
    const uint64_t columns = value_descriptor(Config::kU, first_pair_tile());
    wgmma::fence();
#pragma unroll
    for (int kt = 0; kt < V / 16; ++kt) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        wgmma::m64n32k16_bf16<false>(
            acc[half], value_operand(rows, kt),
            wgmma::advance(value_operand(columns, kt), half * 32 * Config::ValueTile::kRowBytes), kt > 0);
      }
    }
    wgmma::commit_group();
    wgmma::wait_group<0>();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      wgmma::pin(acc[half]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) pairs.acc[2 * half + n / 2][n % 2][e] = acc[half][n][e];
      }
    }
  }

  // Leaves the largest in magnitude of the warp in shared memory.
  __device__ __forceinline__ void scale_pairs(Pairs& pairs) const {
    const bool is_query = has_queries();
    const int r = pair_row_tile(), first = first_pair_tile();
    float largest = 0.0f;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const int i = 16 * r + row + 8 * hi;
      const auto norm_of = [&](typename Config::TokenArray array) {
        return Config::kUnitNorms ? 1.0f : tokens(array)[i];
      };
      const float factor =
          is_query ? call().scale * norm_of(Config::kQueryNorm) : -tokens(Config::kBeta)[i] * norm_of(Config::kKeyNorm);
#pragma unroll
      for (int n = 0; n < kPairTiles; ++n) {
        if (first + n > r) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = 16 * (first + n) + 8 * half + 2 * member;
          const float2 norms =
              Config::kUnitNorms ? float2{1.0f, 1.0f} : *reinterpret_cast<const float2*>(tokens(Config::kKeyNorm) + j);
          float& even = pairs.acc[n][half][2 * hi];
          float& odd = pairs.acc[n][half][2 * hi + 1];
          even *= factor * norms.x, odd *= factor * norms.y;
          if (is_query && (j == i || j + 1 == i)) tokens(Config::kDiagonal)[i] = j == i ? even : odd;
          even = j < i ? even : 0.0f;
          odd = j + 1 < i ? odd : 0.0f;
          largest = fmaxf(largest, fmaxf(fabsf(even), fabsf(odd)));
        }
      }
    }
    largest = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)));
    if (lane == 0) largest_pairs()[warp] = largest;
  }

  // 2^e and 2^-e: sums are in units of 2^e, where no pair is larger than 2^e in magnitude, so that P and R at the end of their range
  // neither overflow nor lose bits, whatever the size of the gradients is. Biased e is kept behind the largest pairs of the warps.
  __device__ __forceinline__ uint32_t& unit_exponent() const {
    return reinterpret_cast<uint32_t*>(largest_pairs())[Config::kWarps];
  }
  static __device__ __forceinline__ float inverse_unit(uint32_t exponent) { return __uint_as_float(exponent << 23); }
  static __device__ __forceinline__ float unit(uint32_t exponent) { return __uint_as_float((254 - exponent) << 23); }
  __device__ __forceinline__ float inverse_unit() const { return inverse_unit(unit_exponent()); }

  __device__ __forceinline__ uint32_t choose_unit() const {
    float largest = 0.0f;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) largest = fmaxf(largest, largest_pairs()[w]);
    constexpr int kLeast = 127 - 60, kMost = 127 + 100;  // terms of the states may be larger than those of pairs
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) + 1;
    return exponent < kLeast ? kLeast : exponent > kMost ? kMost : exponent;
  }

  // The pairs, in units of 2^e; the largest pairs of all warps are there. Returns 2^-e.
  __device__ __forceinline__ float store_pairs(const Pairs& pairs) const {
    const uint32_t exponent = choose_unit();
    const float size = unit(exponent);
    const int r = pair_row_tile(), first = first_pair_tile();
    uint8_t* const destination = shared + (has_queries() ? Config::kDqk : Config::kDkk);
#pragma unroll
    for (int n = 0; n < kPairTiles; ++n) {
      if (first + n > r) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e >> 1, hi = e & 1;
        const float even = pairs.acc[n][half][2 * hi], odd = pairs.acc[n][half][2 * hi + 1];
        *reinterpret_cast<uint32_t*>(
            destination +
            Config::PairTile::pair_offset(16 * r + row + 8 * hi, 16 * (first + n) + 8 * half + 2 * member)) =
            pack_bf16(size * even, size * odd);
      }
    }
    if (this->thread == 0) unit_exponent() = exponent;
    return size;
  }
};

}  // namespace kda
