// The first half of the gradients by levels, in which a warp owns rows of V or of pairs:
//   solve           Y = A^{-T} dU, dV = beta Y, and the part of dbeta in Y; norms of q and k
//   multiply_pairs  the gradients of the pairs of tokens, from dO U^T and Y U^T
#pragma once

#include "level_context.cuh"

namespace kda {

template <typename Config>
struct LevelValues : LevelContext<Config> {
  using Context = LevelContext<Config>;
  using Element = typename Config::Element;
  using Context::address, Context::call, Context::lane, Context::location, Context::member, Context::params,
      Context::row, Context::shared, Context::tile, Context::tokens, Context::value_head, Context::value_row,
      Context::warp;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;

  bool tiny_beta;  // a token of the chunk has beta below kSmallestBeta

  // v of a token and row of V, where beta is too small to divide by it.
  __device__ __forceinline__ float value_element(int token, int row) const {
    const ChunkFwdParams& c = call();
    if (token >= location.tokens) return 0.0f;
    return load_1(c.v,
                  location.batch * c.v_stride.batch + (location.first_token + token) * c.v_stride.token +
                      value_head * c.v_stride.head + row,
                  c.problem.activation_type);
  }

  // What Y of 16 rows of V and 16 tokens takes, from the fragments of the recurrences: dU of all tokens from these on,
  // and U.
  struct SolveOperands {
    uint4 dU[C / 16], U;
  };
  static constexpr int kSolveJobs = V / 16 * Config::kTiles;
  static __device__ __forceinline__ int row_tile_of(int job) { return job % (V / 16); }
  // Tile 0 has the most products, tile 3 the fewest: a warp that takes two takes 0 and 3, or 1 and 2.
  static __device__ __forceinline__ int token_tile_of(int job) {
    const int index = job / (V / 16);
    return index < 2 ? index : 5 - index;
  }

  __device__ __forceinline__ void load_operands(SolveOperands& operands, int job) const {
    if (job >= kSolveJobs) return;
    const int tt = token_tile_of(job);
    const int64_t first = ((tile * (V / 16) + row_tile_of(job)) * (C / 16)) * 32 + lane;
    const uint4* const du = params.dU + first;
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      if (kt >= tt) operands.dU[kt] = du[kt * 32];
    }
    operands.U = params.forward.U_rounded[first + tt * 32];
  }

  // Y^T = dU^T A^{-1}.
  __device__ __forceinline__ ChannelTile multiply_inverse(const SolveOperands& operands, int tt) const {
    ChannelTile y = ChannelTile::make([](int, int, int) { return 0.0f; });  // rows of V for channels
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      if (kt >= tt) {
        uint32_t b[4];
        Config::PairTile::load_b_trans(b, address(Config::kInverse), 16 * kt, 16 * tt, lane);
        const ChannelOperand operand = to_operand(operands.dU[kt]);
        operand.multiply(y.value[0], b[0], b[1]);
        operand.multiply(y.value[1], b[2], b[3]);
      }
    }
    return y;
  }

  // The gradient of beta_i is Y_i . (V - K e^G S - Akk / beta U)_i, and that is Y_i . U_i / beta_i; where beta is too
  // small, here Y_i . V_i, and the rest in beta_gradient(). Y, dV and U go to shared memory.
  __device__ __forceinline__ void store_solution(const ChannelTile& y, const ChannelOperand& u, int row_tile,
                                                 int tt) const {
    ChannelTile values = u.template unpack<BFloat16>();
    if (this->last_of_chain >= 0) this->add_value_roundings(values, row_tile, tt);
    float beta[4], bound[4];
    this->load_tokens(beta, Config::kBeta, tt);
    this->load_tokens(bound, Config::kBetaBound, tt);
    float* const parts = reinterpret_cast<float*>(shared + Config::kBetaParts) + row_tile * C;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = i >> 1, parity = i & 1, token = this->token(tt, block, parity);
      float dot = 0.0f;
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) dot += y.at(block, hi, parity) * values.at(block, hi, parity);
      dot = __fdividef(dot, bound[i]);
      if (tiny_beta && fabsf(beta[i]) < kSmallestBeta) {
        dot = y.at(block, 0, parity) * value_element(token, 16 * row_tile + row) +
              y.at(block, 1, parity) * value_element(token, 16 * row_tile + row + 8);
      }
      dot = sum_channels(dot);
      if (row == 0) parts[token] = dot;
    }

    uint32_t y_pairs[4], dv_pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = i >> 1, hi = i & 1;
      const float even = y.at(block, hi, 0), odd = y.at(block, hi, 1);
      y_pairs[i] = pack_bf16(even, odd);
      dv_pairs[i] =
          Packed2<Element>::from_floats(even * beta[token_index(block, 0)], odd * beta[token_index(block, 1)]);
    }
    Config::ValueTile::store_a_trans(y_pairs, address(Config::kY), 16 * tt, 16 * row_tile, lane);
    Config::ValueTile::store_a_trans(dv_pairs, address(Config::kValueGradient), 16 * tt, 16 * row_tile, lane);
    Config::ValueTile::store_a_trans(u.pair, address(Config::kU), 16 * tt, 16 * row_tile, lane);
  }

  // operands: those of the warp's first tile.
  __device__ __forceinline__ void solve(SolveOperands& operands) const {
#pragma unroll 1
    for (int job = warp; job < kSolveJobs; job += Config::kWarps) {
      const int tt = token_tile_of(job);
      ChannelTile y = multiply_inverse(operands, tt);
      if (this->last_of_chain >= 0) this->add_solved_roundings(y, row_tile_of(job), tt);
      const ChannelOperand u = to_operand(operands.U);
      load_operands(operands, job + Config::kWarps);
      store_solution(y, u, row_tile_of(job), tt);
    }
    this->store_norms();
  }

  // The gradients of the pairs, with the factors by which q and k are normalised, so that all that follows takes q and
  // k as they are:
  //   Dqk[i,j] = scale (dO U^T)[i,j] / (|q_i| |k_j|)          Dkk[i,j] = -beta_i (Y U^T)[i,j] / (|k_i| |k_j|)
  // Two matrices, each cut into rows of 16, and the longer ones into halves of two blocks of 16 columns.
  static constexpr int kPairJobs = 12;

  __device__ __forceinline__ void multiply_pairs() const {
    for (int job = warp; job < kPairJobs; job += Config::kWarps) {
      const bool is_query = job & 1;
      const int index = job >> 1;  // rows 3, 3, 2, 2, 1, 0
      const int r = index < 4 ? 3 - (index >> 1) : 5 - index, first = index < 4 ? 2 * (index & 1) : 0;
      float acc[4][4] = {};
#pragma unroll 4
      for (int kt = 0; kt < V / 16; ++kt) {
        uint32_t a[4];
        Config::ValueTile::load_a(a, address(is_query ? Config::kOutputGradient : Config::kY), 16 * r, 16 * kt, lane);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          uint32_t b[4];  // of no use, but there, right of the diagonal
          Config::ValueTile::load_b(b, address(Config::kU), 16 * (first + c), 16 * kt, lane);
          ptx::mma_m16n8k16_bf16(acc[2 * c], a[0], a[1], a[2], a[3], b[0], b[1]);
          ptx::mma_m16n8k16_bf16(acc[2 * c + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
      uint8_t* const destination = shared + (is_query ? Config::kDqk : Config::kDkk);
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const int i = 16 * r + row + 8 * hi;
        const float factor = is_query ? call().scale * tokens(Config::kQueryNorm)[i]
                                      : -tokens(Config::kBetaBound)[i] * tokens(Config::kKeyNorm)[i];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int j = 16 * first + 8 * n + 2 * member;
          const float2 norms = *reinterpret_cast<const float2*>(tokens(Config::kKeyNorm) + j);
          const float even = factor * norms.x * acc[n][2 * hi], odd = factor * norms.y * acc[n][2 * hi + 1];
          *reinterpret_cast<uint32_t*>(destination + Config::PairTile::pair_offset(i, j)) = pack_bf16(even, odd);
          if (is_query && (i == j || i == j + 1)) tokens(Config::kDiagonal)[i] = i == j ? even : odd;
        }
      }
    }
  }
};

}  // namespace kda
