// The first part of the gradients inside a chunk, in which a warp owns rows of V or of pairs:
//   solve        Y = A^{-T} dU, and the part of dbeta in Y; norms of q and k
//   store_pairs  the gradients of the pairs of tokens, from dO U^T and Y U^T;   dV = beta Y
#pragma once

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

  // dU and U of 16 rows of V, from the fragments of the recurrences. Those of U in turn.
  struct SolveOperands {
    uint4 dU[kTiles], U[2];
  };
  __device__ __forceinline__ void load_operands(SolveOperands& operands, int row_tile) const {
    if (row_tile >= V / 16) return;
    const int64_t first = (tile * (V / 16) + row_tile) * kTiles * 32 + lane;
#pragma unroll
    for (int tt = 0; tt < kTiles; ++tt) operands.dU[tt] = params.dU[first + tt * 32];
#pragma unroll
    for (int i = 0; i < 2; ++i) operands.U[i] = params.forward.U_rounded[first + i * 32];
  }

  // Y^T = dU^T A^{-1} of 16 rows of V; Y and U into shared memory, and over these rows Y_i . U_i, which is the gradient of beta_i times
  // beta_i.
  __device__ __forceinline__ void solve_rows(SolveOperands& operands, int row_tile) const {
    float* const parts = reinterpret_cast<float*>(shared + Config::kBetaParts) + row_tile * C;
    const uint4* const U = params.forward.U_rounded + (tile * (V / 16) + row_tile) * kTiles * 32 + lane;
#pragma unroll 1
    for (int pair = 0; pair < kTiles; pair += 2) {
      float dots[8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int tt = pair + i;
        ChannelTile y = ChannelTile::make([](int, int, int) { return 0.0f; });  // rows of V for channels
#pragma unroll
        for (int kt = i; kt < kTiles; ++kt) {
          if (kt < tt) continue;
          uint32_t b[4];
          Config::PairTile::load_b_trans(b, address(Config::kInverse), 16 * kt, 16 * tt, lane);
          const ChannelOperand operand = to_operand(operands.dU[kt]);
          operand.multiply(y.value[0], b[0], b[1]);
          operand.multiply(y.value[1], b[2], b[3]);
        }
        const ChannelOperand u = to_operand(operands.U[i]);
        if (tt + 2 < kTiles) operands.U[i] = U[(tt + 2) * 32];
        const ChannelTile values = u.template unpack<BFloat16>();
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j] = pack_bf16(y.at(j >> 1, j & 1, 0), y.at(j >> 1, j & 1, 1));
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const int block = t >> 1, p = t & 1;
          dots[4 * i + t] = y.at(block, 0, p) * values.at(block, 0, p) + y.at(block, 1, p) * values.at(block, 1, p);
        }
        Config::ValueTile::store_a_trans(pairs, address(Config::kY), 16 * tt, 16 * row_tile, lane);
        Config::ValueTile::store_a_trans(u.pair, address(Config::kU), 16 * tt, 16 * row_tile, lane);
      }
      const float dot = sum_rows(dots, lane);  // the one of index `row`
      parts[this->token(pair + (row >> 2), row >> 1 & 1, row & 1)] = dot;
    }
  }

  // operands: those of the warp's first rows.
  __device__ __forceinline__ void solve(SolveOperands& operands) const {
#pragma unroll 1
    for (int row_tile = warp; row_tile < V / 16; row_tile += Config::kWarps) {
      solve_rows(operands, row_tile);
      load_operands(operands, row_tile + Config::kWarps);
    }
  }

  __device__ __forceinline__ void beta_gradient() const {
    const int t = threadIdx.x;
    if (t >= location.tokens) return;
    const float* const parts = reinterpret_cast<const float*>(shared + Config::kBetaParts);
    float gradient = 0.0f;
#pragma unroll
    for (int i = 0; i < V / 16; ++i) gradient += parts[i * C + t];
    const float beta = tokens(Config::kBeta)[t];
    gradient /= beta;
    if (call().beta_sigmoid) gradient *= beta * (1.0f - beta / call().beta_scale);
    this->store_1(params.dbeta, value_row(t), call().beta_type, gradient);
  }

  // dV = beta Y, from Y in shared memory.
  __device__ __forceinline__ void store_value_gradient() const {
    constexpr int kUnits = V / 8;
#pragma unroll 2
    for (int i = threadIdx.x; i < C * kUnits; i += Config::kThreads) {
      const int t = i / kUnits, unit = i % kUnits;
      if (t >= location.tokens) break;
      const float beta = tokens(Config::kBeta)[t];
      float y[8];
      unpack_8<BFloat16>(
          y, *reinterpret_cast<const uint4*>(shared + Config::kY + Config::ValueTile::unit_offset(t, unit)));
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) packed[j] = Packed2<Element>::from_floats(beta * y[2 * j], beta * y[2 * j + 1]);
      Element* const destination = static_cast<Element*>(params.dv) + value_row(t) * V + 8 * unit;
      *reinterpret_cast<uint4*>(destination) = {packed[0], packed[1], packed[2], packed[3]};
    }
  }

  // The gradients of the pairs, with the factors by which q and k are normalised, so that all that follows takes q and
  // k as they are:
  //   Dqk[i,j] = scale (dO U^T)[i,j] / (|q_i| |k_j|)          Dkk[i,j] = -beta_i (Y U^T)[i,j] / (|k_i| |k_j|)
  // for i > j; the diagonal of Dqk, over which nothing decays, goes by itself, in fp32. A warp has rows of 16 of one of the two.
  static constexpr int kPairJobs = 2 * kTiles / Config::kWarps;  // of a warp
  struct Pairs {
    float acc[kTiles][2][4];
  };
  __device__ __forceinline__ bool has_queries() const { return warp & 1; }
  __device__ __forceinline__ int pair_rows(int job) const { return job == 0 ? kTiles - 1 - (warp >> 1) : warp >> 1; }

  // Returns the largest in magnitude that the lane has.
  __device__ __forceinline__ float multiply_pairs(Pairs& pairs, int r) const {
    const bool is_query = has_queries();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 8; ++e) pairs.acc[n][e >> 2][e & 3] = 0.0f;
    }
#pragma unroll 1
    for (int kt = 0; kt < V / 16; ++kt) {
      uint32_t a[4];
      Config::ValueTile::load_a(a, address(is_query ? Config::kOutputGradient : Config::kY), 16 * r, 16 * kt, lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n > r) continue;
        uint32_t b[4];
        Config::ValueTile::load_b(b, address(Config::kU), 16 * n, 16 * kt, lane);
        ptx::mma_m16n8k16_bf16(pairs.acc[n][0], a[0], a[1], a[2], a[3], b[0], b[1]);
        ptx::mma_m16n8k16_bf16(pairs.acc[n][1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
    float largest = 0.0f;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const int i = 16 * r + row + 8 * hi;
      const float factor = is_query ? call().scale * tokens(Config::kQueryNorm)[i]
                                    : -tokens(Config::kBeta)[i] * tokens(Config::kKeyNorm)[i];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n > r) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = 16 * n + 8 * half + 2 * member;
          const float2 norms = *reinterpret_cast<const float2*>(tokens(Config::kKeyNorm) + j);
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
    return largest;
  }

  // 2^e and 2^-e: sums are in units of 2^e, where no pair is larger than 2^e in magnitude, so that P and R at the end of their range
  // neither overflow nor lose bits, whatever the size of the gradients is. Biased e is kept behind the largest pairs of the warps.
  __device__ __forceinline__ uint32_t& unit_exponent() const {
    return reinterpret_cast<uint32_t*>(largest_pairs())[Config::kWarps];
  }
  static __device__ __forceinline__ float inverse_unit(uint32_t exponent) { return __uint_as_float(exponent << 23); }
  static __device__ __forceinline__ float unit(uint32_t exponent) { return __uint_as_float((254 - exponent) << 23); }
  __device__ __forceinline__ float inverse_unit() const { return inverse_unit(unit_exponent()); }
  __device__ __forceinline__ float unit() const { return unit(unit_exponent()); }

  __device__ __forceinline__ uint32_t choose_unit() const {
    float largest = 0.0f;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) largest = fmaxf(largest, largest_pairs()[w]);
    constexpr int kLeast = 127 - 60, kMost = 127 + 100;  // terms of the states may be larger than those of pairs
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) + 1;
    return exponent < kLeast ? kLeast : exponent > kMost ? kMost : exponent;
  }

  __device__ __forceinline__ void store_pair_rows(const Pairs& pairs, int r, float size) const {
    uint8_t* const destination = shared + (has_queries() ? Config::kDqk : Config::kDkk);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n > r) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e >> 1, hi = e & 1;
        const float even = pairs.acc[n][half][2 * hi], odd = pairs.acc[n][half][2 * hi + 1];
        *reinterpret_cast<uint32_t*>(
            destination + Config::PairTile::pair_offset(16 * r + row + 8 * hi, 16 * n + 8 * half + 2 * member)) =
            pack_bf16(size * even, size * odd);
      }
    }
  }

  // Ends with a barrier.
  __device__ __forceinline__ void store_pairs() const {
    Pairs pairs[kPairJobs];
    float largest = 0.0f;
#pragma unroll
    for (int job = 0; job < kPairJobs; ++job) largest = fmaxf(largest, multiply_pairs(pairs[job], pair_rows(job)));
    largest = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)));
    if (lane == 0) largest_pairs()[warp] = largest;
    store_value_gradient();
    __syncthreads();
    const uint32_t exponent = choose_unit();
    const float size = unit(exponent);
#pragma unroll
    for (int job = 0; job < kPairJobs; ++job) store_pair_rows(pairs[job], pair_rows(job), size);
    const int t = threadIdx.x;
    if (t == 0) unit_exponent() = exponent;
    if (t < C) {
      const float key = size * tokens(Config::kKeyNorm)[t];
      tokens(Config::kAskScale)[t] = size * (call().scale * tokens(Config::kQueryNorm)[t]);
      tokens(Config::kPredictScale)[t] = -tokens(Config::kBeta)[t] * key;
      tokens(Config::kWriteScale)[t] = key;
      tokens(Config::kDiagonal)[t] *= size;
    }
    __syncthreads();
  }
};

}  // namespace kda
