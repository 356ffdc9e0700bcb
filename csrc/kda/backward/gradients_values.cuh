// The first half of the intra-chunk gradients, in which a warp owns rows of V or of pairs:
//   load            q, k, dO and the inverse into shared memory; beta
//   solve           Y = A^{-T} dU, dV = beta Y, and the part of dbeta in Y; norms of q and k
//   multiply_pairs  dAqk = dO U^T and the gradient of Akk / beta = -beta Y U^T
#pragma once

#include "gradients_context.cuh"

namespace kda {

template <typename Config>
struct GradientsOfValues : IntraChunkGradientsContext<Config> {
  using Context = IntraChunkGradientsContext<Config>;
  using Element = typename Config::Element;
  using Context::address, Context::call, Context::group, Context::lane, Context::location, Context::member,
      Context::params, Context::shared, Context::tile, Context::tokens, Context::value_head, Context::value_row,
      Context::warp;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;

  bool tiny_beta;  // a token of the chunk has beta below kSmallestBeta

  // Rows of `Columns` elements into a swizzled tile; rows past the end are zero.
  template <int Columns>
  __device__ __forceinline__ void load_rows(int offset, const Element* first, int64_t row_stride,
                                            bool vectorized) const {
    constexpr int kUnits = Columns / 8;
    for (int i = threadIdx.x; i < C * kUnits; i += Config::kThreads) {
      const int row = i / kUnits, unit = i % kUnits;
      const bool in_range = row < location.tokens;
      const Element* source = first + (in_range ? row : 0) * row_stride + 8 * unit;
      uint8_t* destination = shared + offset + SwizzledTile<Columns>::unit_offset(row, unit);
      if (vectorized) {
        ptx::cp_async_16(ptx::shared_address(destination), source, in_range ? 16 : 0);
      } else {
        *reinterpret_cast<uint4*>(destination) = in_range ? load_8x16bit<false>(source) : uint4{0, 0, 0, 0};
      }
    }
  }

  // dO to bf16, each thread what it has loaded.
  __device__ __forceinline__ void convert_output_gradient() const {
    constexpr int kUnits = V / 8;
    for (int i = threadIdx.x; i < C * kUnits; i += Config::kThreads) {
      uint4* unit = reinterpret_cast<uint4*>(shared + Config::kOutputGradient +
                                             Config::ValueTile::unit_offset(i / kUnits, i % kUnits));
      float values[8];
      unpack_8<Element>(values, *unit);
      *unit = {pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
               pack_bf16(values[6], values[7])};
    }
  }

  __device__ __forceinline__ void load_beta() {
    bool tiny = false;
    if (threadIdx.x < C) {
      const int token = threadIdx.x;
      const ChunkFwdParams& c = call();
      float beta = 0.0f;
      if (token < location.tokens) {
        beta = load_1(c.beta,
                      location.batch * c.beta_stride.batch + (location.first_token + token) * c.beta_stride.token +
                          value_head * c.beta_stride.head,
                      c.beta_type);
        if (c.beta_sigmoid) beta = c.beta_scale * sigmoid(beta);
        tiny = fabsf(beta) < kSmallestBeta;
      }
      tokens(Config::kBeta)[token] = beta;
      tokens(Config::kBetaBound)[token] = fabsf(beta) < kSmallestBeta ? kSmallestBeta : beta;
    }
    tiny_beta = __syncthreads_or(tiny);
  }

  __device__ __forceinline__ void load() {
    const ChunkFwdParams& c = call();
    const int key_head = this->key_head();
    const auto rows_of = [&](const void* base, const TokenStrides& stride) {
      return static_cast<const Element*>(base) + location.batch * stride.batch + location.first_token * stride.token +
             key_head * stride.head;
    };
    const bool vectorized = params.forward.vectorized;
    load_rows<V>(Config::kOutputGradient, static_cast<const Element*>(params.dO) + value_row(0) * V,
                 int64_t{c.problem.value_heads} * V, true);
    load_rows<K>(Config::kQuery, rows_of(c.q, c.q_stride), c.q_stride.token, vectorized);
    load_rows<K>(Config::kKey, rows_of(c.k, c.k_stride), c.k_stride.token, vectorized);
    const uint8_t* inverse = params.forward.inverse + tile * Config::kPairTileBytes;
    for (int i = threadIdx.x; i < C * (C / 8); i += Config::kThreads) {  // blocks of 16 above the diagonal are not there
      const int row = i / (C / 8), unit = i % (C / 8);
      const uint32_t offset = Config::PairTile::unit_offset(row, unit);
      if (unit / 2 <= row / 16) ptx::cp_async_16(address(Config::kInverse + offset), inverse + offset, 16);
    }
    ptx::cp_async_wait_all();
    if constexpr (!std::is_same_v<Element, BFloat16>) convert_output_gradient();
    load_beta();  // ends with a barrier
  }

  // 1 / |x| of the rows of q or k, a row at a time by a warp.
  __device__ __forceinline__ void store_norms(int offset, float* norms) const {
    constexpr int kElements = K / 32;  // of a lane
    constexpr float kEpsilon = 1e-6f;
    for (int row = warp; row < C; row += Config::kWarps) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
        const float2 x = Packed2<Element>::to_float2(*reinterpret_cast<const uint32_t*>(
            shared + offset + Config::KeyTile::pair_offset(row, lane * kElements + i)));
        squares += x.x * x.x + x.y * x.y;
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, distance);
      }
      if (lane == 0) norms[row] = call().qk_l2norm ? rsqrtf(squares + kEpsilon) : 1.0f;
    }
  }

  // v of a token and row of V, where beta is too small to divide by it.
  __device__ __forceinline__ float value_element(int token, int row) const {
    const ChunkFwdParams& c = call();
    if (token >= location.tokens) return 0.0f;
    return load_1(c.v,
                  location.batch * c.v_stride.batch + (location.first_token + token) * c.v_stride.token +
                      value_head * c.v_stride.head + row,
                  c.problem.activation_type);
  }

  // Y^T = dU^T A^{-1} for 16 rows of V and all tokens, from the fragments of the recurrences. The gradient of beta_i is Y_i . (V - K e^G
  // S - Akk / beta U)_i, and that is Y_i . U_i / beta_i; where beta is too small, here Y_i . V_i, and the rest in beta_gradient().
  __device__ __forceinline__ void solve_rows(int row_tile) const {
    const int64_t first = ((tile * (V / 16) + row_tile) * (C / 8)) * 32 + lane;
    const uint4* const du = params.dU + first;
    const uint4* const u = params.forward.U + first;
    float y[C / 8][4] = {};
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      const uint4 high = du[2 * kt * 32], low = du[(2 * kt + 1) * 32];
#pragma unroll
      for (int n = 0; n <= kt; ++n) {
        uint32_t b[4];
        Config::PairTile::load_b_trans(b, address(Config::kInverse), 16 * kt, 16 * n, lane);
        ptx::mma_m16n8k16_bf16(y[2 * n], high.x, high.y, high.z, high.w, b[0], b[1]);
        ptx::mma_m16n8k16_bf16(y[2 * n + 1], high.x, high.y, high.z, high.w, b[2], b[3]);
        ptx::mma_m16n8k16_bf16(y[2 * n], low.x, low.y, low.z, low.w, b[0], b[1]);
        ptx::mma_m16n8k16_bf16(y[2 * n + 1], low.x, low.y, low.z, low.w, b[2], b[3]);
      }
    }

    float* const parts = reinterpret_cast<float*>(shared + Config::kBetaParts) + row_tile * C;
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      const ChannelTile values = ChannelTile::make(
          [&](int block, int row, int parity) { return y[2 * kt + block][2 * row + parity]; });  // rows of V
      const uint4 high = u[2 * kt * 32], low = u[(2 * kt + 1) * 32];
      const ChannelOperand u_high{{high.x, high.y, high.z, high.w}}, u_low{{low.x, low.y, low.z, low.w}};
      const ChannelTile upper = u_high.template unpack<BFloat16>(), lower = u_low.template unpack<BFloat16>();

      float beta[4];
#pragma unroll
      for (int block = 0; block < 2; ++block) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          const int token = this->token(kt, block, parity);
          beta[token_index(block, parity)] = tokens(Config::kBeta)[token];
          float dot = 0.0f;
          if (tiny_beta && fabsf(tokens(Config::kBeta)[token]) < kSmallestBeta) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
              dot += values.at(block, row, parity) * value_element(token, 16 * row_tile + group + 8 * row);
            }
          } else {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
              dot += values.at(block, row, parity) * (upper.at(block, row, parity) + lower.at(block, row, parity));
            }
            dot /= tokens(Config::kBetaBound)[token];
          }
          dot = sum_channels(dot);
          if (group == 0) parts[token] = dot;
        }
      }

      uint32_t y_pairs[4], dv_pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int block = i >> 1, row = i & 1;
        const float even = values.at(block, row, 0), odd = values.at(block, row, 1);
        y_pairs[i] = pack_bf16(even, odd);
        dv_pairs[i] = Packed2<Element>::from_floats(even * beta[token_index(block, 0)], odd * beta[token_index(block, 1)]);
      }
      Config::ValueTile::store_a_trans(y_pairs, address(Config::kY), 16 * kt, 16 * row_tile, lane);
      Config::ValueTile::store_a_trans(dv_pairs, address(Config::kValueGradient), 16 * kt, 16 * row_tile, lane);
      Config::ValueTile::store_a_trans(u_high.pair, address(Config::kU), 16 * kt, 16 * row_tile, lane);
    }
  }

  __device__ __forceinline__ void solve() const {
    store_norms(Config::kQuery, tokens(Config::kQueryNorm));
    store_norms(Config::kKey, tokens(Config::kKeyNorm));
    for (int row_tile = warp; row_tile < V / 16; row_tile += Config::kWarps) solve_rows(row_tile);
  }

  // Rows of a [C, Columns] tile to a contiguous tensor. row_of(token): index of the token's row in it.
  template <int Columns, typename RowOf>
  __device__ __forceinline__ void store_rows(void* destination, int offset, RowOf row_of) const {
    constexpr int kUnits = Columns / 8;
    for (int i = threadIdx.x; i < location.tokens * kUnits; i += Config::kThreads) {
      const int row = i / kUnits, unit = i % kUnits;
      *reinterpret_cast<uint4*>(static_cast<Element*>(destination) + row_of(row) * Columns + 8 * unit) =
          *reinterpret_cast<const uint4*>(shared + offset + SwizzledTile<Columns>::unit_offset(row, unit));
    }
  }

  // Rows 16 r .. of left U^T, the columns of the tiles up to r.
  __device__ __forceinline__ void multiply_pair_rows(int left, int r, float (&acc)[C / 8][4]) const {
#pragma unroll 2
    for (int kt = 0; kt < V / 16; ++kt) {
      uint32_t a[4];
      Config::ValueTile::load_a(a, address(left), 16 * r, 16 * kt, lane);
#pragma unroll
      for (int c = 0; c < C / 16; ++c) {
        if (c <= r) {
          uint32_t b[4];
          Config::ValueTile::load_b(b, address(Config::kU), 16 * c, 16 * kt, lane);
          ptx::mma_m16n8k16_bf16(acc[2 * c], a[0], a[1], a[2], a[3], b[0], b[1]);
          ptx::mma_m16n8k16_bf16(acc[2 * c + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_pairs() const {
    constexpr int kJobs = 2 * Config::kTiles;
    for (int job = warp; job < kJobs; job += Config::kWarps) {
      const int r = job >> 1;
      const bool is_query = job & 1;
      float acc[C / 8][4] = {};
      multiply_pair_rows(is_query ? Config::kOutputGradient : Config::kY, r, acc);
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const int row = 16 * r + group + 8 * hi;
        const float factor = is_query ? call().scale : -tokens(Config::kBetaBound)[row];
#pragma unroll
        for (int n = 0; n < C / 8; ++n) {
          const int column = 8 * n + 2 * member;
          if (n < 2 * (r + 1)) {
            const float even = factor * acc[n][2 * hi], odd = factor * acc[n][2 * hi + 1];
            *reinterpret_cast<uint32_t*>(shared + (is_query ? Config::kDqk : Config::kDkk) +
                                         Config::PairTile::pair_offset(row, column)) = pack_bf16(even, odd);
            if (is_query && (row == column || row == column + 1)) {
              tokens(Config::kDiagonal)[row] = row == column ? even : odd;
            }
          }
        }
      }
    }
  }
};

}  // namespace kda
