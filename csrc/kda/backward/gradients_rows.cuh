// What the kernels of the gradients inside a chunk have in common: rows of q, k and dO into shared memory, rows of
// gradients out of it, beta, norms, and the derivatives of the gate.
#pragma once

#include "gradients_context.cuh"

namespace kda {

template <typename Config>
struct GradientsRows : GradientsContext<Config> {
  using Context = GradientsContext<Config>;
  using Element = typename Config::Element;
  using Context::address, Context::call, Context::channel, Context::lane, Context::location, Context::member,
      Context::params, Context::row, Context::shared, Context::tile, Context::token, Context::tokens,
      Context::value_head, Context::value_row, Context::warp;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;

  __device__ __forceinline__ GateOfTile gate() const {
    const ChunkFwdParams& c = call();
    const float rate = c.A_log != nullptr ? expf(c.A_log[value_head]) : 1.0f;
    const float* const bias = c.dt_bias != nullptr ? c.dt_bias + int64_t{value_head} * K + channel(0) : nullptr;
    return {c.gate, rate, c.lower_bound, {bias ? bias[0] : 0.0f, bias ? bias[8] : 0.0f}};
  }

  // Rows of `Columns` elements into a tile; rows past the end are zero.
  template <typename Tile, int Columns, typename T>
  __device__ __forceinline__ void load_rows(int offset, const T* first, int64_t row_stride, bool vectorized) const {
    constexpr int kOfUnit = 16 / sizeof(T), kUnits = Columns / kOfUnit, kRowsAtOnce = Config::kThreads / kUnits;
    static_assert(kRowsAtOnce % 8 == 0 && C % kRowsAtOnce == 0, "the swizzle of a thread's rows is the same");
    const int row = this->thread / kUnits, unit = this->thread % kUnits;
    const T* const source = first + row * row_stride + kOfUnit * unit;
    uint8_t* const destination = shared + offset + Tile::unit_offset(row, unit);
#pragma unroll
    for (int i = 0; i < C / kRowsAtOnce; ++i) {
      const bool in_range = row + i * kRowsAtOnce < location.tokens;
      const T* const elements = in_range ? source + i * kRowsAtOnce * row_stride : first;
      uint8_t* const to = destination + i * kRowsAtOnce * Tile::kRowBytes;
      if (vectorized) {
        ptx::cp_async_16(ptx::shared_address(to), elements, in_range ? 16 : 0);
      } else {
        *reinterpret_cast<uint4*>(to) = in_range ? load_8x16bit(elements) : uint4{0, 0, 0, 0};
      }
    }
  }

  // dO to bf16, each thread what it has loaded.
  __device__ __forceinline__ void convert_output_gradient() const {
    constexpr int kUnits = V / 8;
    for (int i = this->thread; i < C * kUnits; i += Config::kThreads) {
      uint4* unit = reinterpret_cast<uint4*>(shared + Config::kOutputGradient +
                                             Config::ValueTile::unit_offset(i / kUnits, i % kUnits));
      float values[8];
      unpack_8<Element>(values, *unit);
      *unit = {pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
               pack_bf16(values[6], values[7])};
    }
  }

  // beta of a token as it came, one a thread, and 0 past the end.
  __device__ __forceinline__ float raw_beta() const {
    const int token = this->thread;
    if (token >= location.tokens) return 0.0f;
    const ChunkFwdParams& c = call();
    return load_1(c.beta,
                  location.batch * c.beta_stride.batch + (location.first_token + token) * c.beta_stride.token +
                      value_head * c.beta_stride.head,
                  c.beta_type);
  }

  // Returns whether a token of the chunk has beta below kSmallestBeta, or `mine` holds in any thread. A barrier.
  __device__ __forceinline__ bool store_beta(float beta, bool mine) const {
    if (this->thread < C) {
      const int token = this->thread;
      if (token < location.tokens) {
        if (call().beta_sigmoid) beta = call().beta_scale * sigmoid(beta);
        mine |= fabsf(beta) < kSmallestBeta;
      }
      tokens(Config::kBeta)[token] = beta;
      tokens(Config::kBetaBound)[token] = fabsf(beta) < kSmallestBeta ? kSmallestBeta : beta;
    }
    return __syncthreads_or(mine);
  }

  __device__ __forceinline__ void load_output_gradient() const {
    load_rows<typename Config::ValueTile, V>(Config::kOutputGradient,
                                             static_cast<const Element*>(params.dO) + value_row(0) * V,
                                             int64_t{call().problem.value_heads} * V, true);
  }

  __device__ __forceinline__ void load_queries_and_keys() const {
    const ChunkFwdParams& c = call();
    const int key_head = this->key_head();
    const auto rows_of = [&](const void* base, const TokenStrides& stride) {
      return static_cast<const Element*>(base) + location.batch * stride.batch + location.first_token * stride.token +
             key_head * stride.head;
    };
    const bool vectorized = params.forward.vectorized;
    load_rows<typename Config::KeyTile, K>(Config::kQuery, rows_of(c.q, c.q_stride), c.q_stride.token, vectorized);
    load_rows<typename Config::KeyTile, K>(Config::kKey, rows_of(c.k, c.k_stride), c.k_stride.token, vectorized);
  }

  __device__ __forceinline__ void load_inverse() const {
    const uint8_t* inverse = params.forward.inverse + tile * Config::kPairTileBytes;
    for (int i = this->thread; i < C * (C / 8);
         i += Config::kThreads) {  // blocks of 16 above the diagonal are not there
      const int row = i / (C / 8), unit = i % (C / 8);
      const uint32_t offset = Config::PairTile::unit_offset(row, unit);
      if (unit / 2 <= row / 16) ptx::cp_async_16(address(Config::kInverse + offset), inverse + offset, 16);
    }
  }

  __device__ __forceinline__ void load() const {
    load_output_gradient();
    load_queries_and_keys();
    load_inverse();
  }

  // Returns whether a token of the chunk has beta below kSmallestBeta. A barrier.
  __device__ __forceinline__ bool wait_for_loads() const {
    ptx::cp_async_wait_all();
    if constexpr (!std::is_same_v<Element, BFloat16>) convert_output_gradient();
    return store_beta(raw_beta(), false);
  }

  // 1 / |x| of the rows of q and k, unless they are taken as they are: eight rows of one of them a warp, products of a row with itself. Returns the largest
  // |x|^2 that the lane has seen, or NaN.
  __device__ __forceinline__ float store_norms() const {
    float largest = 0.0f;
    for (int job = warp; job < 2 * C / 8; job += Config::kWarps) {
      const bool is_key = job & 1;
      const int first = 8 * (job >> 1);
      const uint32_t rows = address(is_key ? Config::kKey : Config::kQuery);
      float products[2][4] = {};
#pragma unroll
      for (int kt = 0; kt < K / 16; kt += 2) {
        uint32_t x[4];  // of 32 channels
        ptx::ldmatrix_x4(x, rows + Config::KeyTile::unit_offset(first + (lane & 7), 2 * kt + (lane >> 3)));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (std::is_same_v<Element, BFloat16>) {
            ptx::mma_m16n8k16_bf16(products[i], x[2 * i], 0, x[2 * i + 1], 0, x[2 * i], x[2 * i + 1]);
          } else {
            ptx::mma_m16n8k16_f16(products[i], x[2 * i], 0, x[2 * i + 1], 0, x[2 * i], x[2 * i + 1]);
          }
        }
      }
      // The diagonal, on one of the lanes of a row; one past the end has none, whatever it holds.
      const int token = first + row;
      if (member != row >> 1) continue;
      const float on_diagonal = row & 1 ? products[0][1] + products[1][1] : products[0][0] + products[1][0];
      const float squares = token < location.tokens ? on_diagonal : 0.0f;
      largest = squares <= largest ? largest : squares;
      if constexpr (!Config::kUnitNorms) {
        tokens(is_key ? Config::kKeyNorm : Config::kQueryNorm)[token] =
            call().qk_l2norm ? rsqrtf(squares + kL2NormEpsilon) : 1.0f;
      }
    }
    return largest;
  }

  // Rows of a [C, Columns] tile of 16 bits, a thread's units of them, on the way to a contiguous tensor, in which the first token has row
  // `first_row` and the next are `row_stride` rows further each.
  template <int Columns>
  struct RowUnits {
    static constexpr int kUnits = Columns / 8, kRowsAtOnce = Config::kThreads / kUnits, kCount = C / kRowsAtOnce;
    uint4 unit[kCount];
  };
  template <typename Tile, int Columns>
  __device__ __forceinline__ void take_rows(RowUnits<Columns>& units, int offset) const {
    using Units = RowUnits<Columns>;
    const int row = this->thread / Units::kUnits, unit = this->thread % Units::kUnits;
    const uint8_t* const from = shared + offset + Tile::unit_offset(row, unit);
#pragma unroll
    for (int i = 0; i < Units::kCount; ++i) {
      units.unit[i] = *reinterpret_cast<const uint4*>(from + i * Units::kRowsAtOnce * Tile::kRowBytes);
    }
  }
  template <int Columns>
  __device__ __forceinline__ void store_rows(const RowUnits<Columns>& units, void* destination, int64_t first_row,
                                             int row_stride) const {
    using Units = RowUnits<Columns>;
    const int row = this->thread / Units::kUnits, unit = this->thread % Units::kUnits;
    Element* const to =
        static_cast<Element*>(destination) + (first_row + int64_t{row} * row_stride) * Columns + 8 * unit;
#pragma unroll
    for (int i = 0; i < Units::kCount; ++i) {
      if (row + i * Units::kRowsAtOnce < location.tokens) {
        *reinterpret_cast<uint4*>(to + int64_t{i * Units::kRowsAtOnce} * row_stride * Columns) = units.unit[i];
      }
    }
  }

  // The same in one go.
  template <typename Tile, int Columns>
  __device__ __forceinline__ void store_rows(void* destination, int offset, int64_t first_row, int row_stride) const {
    RowUnits<Columns> units;
    take_rows<Tile>(units, offset);
    store_rows(units, destination, first_row, row_stride);
  }

  // dq or dk of a tile of tokens, as parts of the value head.
  __device__ __forceinline__ void store_parts(const ChannelTile& gradient, float* parts, int tt) const {
    uint8_t* const first = this->template first_channel<float>(parts);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = i >> 1, parity = i & 1, t = token(tt, block, parity);
      float* const destination = reinterpret_cast<float*>(first + this->template bytes_to_token<float>(t));
      if (t < location.tokens) {
        destination[0] = gradient.at(block, 0, parity);
        destination[8] = gradient.at(block, 1, parity);
      }
    }
  }

  // Likewise, or over the warp's channels of the rows of q or k at `offset` of shared memory if there are no parts.
  __device__ __forceinline__ void leave_rows(const ChannelTile& gradient, float* parts, int offset, int tt) const {
    if (parts != nullptr) {
      store_parts(gradient, parts, tt);
      return;
    }
    __syncwarp();
    store_channels<Element>(gradient, offset, tt);
  }

  // The 16 channels of the warp of a tile of tokens, in 16 bits, as load_channels() reads them.
  template <typename T>
  __device__ __forceinline__ void store_channels(const ChannelTile& values, int offset, int tt) const {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = Packed2<T>::from_floats(values.at(i >> 1, i & 1, 0), values.at(i >> 1, i & 1, 1));
    }
    Config::KeyTile::store_a_trans(pairs, address(offset), 16 * tt, 16 * this->group(), lane);
  }

  static __device__ __forceinline__ void store_1(void* base, int64_t offset, DataType type, float value) {
    if (type == DataType::kFloat32) {
      static_cast<float*>(base)[offset] = value;
    } else if (type == DataType::kBFloat16) {
      static_cast<BFloat16*>(base)[offset] = __float2bfloat16_rn(value);
    } else {
      static_cast<Float16*>(base)[offset] = __float2half_rn(value);
    }
  }

  __device__ __forceinline__ void clear_rows_past_end(ChannelTile& values, int tt) const {
    if (location.tokens == C) return;
    values.for_each([&](float& x, int block, int, int parity) {
      if (token(tt, block, parity) >= location.tokens) x = 0.0f;
    });
  }

  // dg of a tile.
  __device__ __forceinline__ void store_gate_gradient(const ChannelTile& gradients, int tt) const {
    this->with_gate_type([&](auto element) {
      using Gate = decltype(element);
      uint8_t* const first = this->template first_channel<Gate>(params.dg);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int block = i >> 1, parity = i & 1, t = token(tt, block, parity);
        Gate* const destination = reinterpret_cast<Gate*>(first + this->template bytes_to_token<Gate>(t));
        if (t < location.tokens) {
          destination[0] = Gate(gradients.at(block, 0, parity));
          destination[8] = Gate(gradients.at(block, 1, parity));
        }
      }
    });
  }
};

// Slots without a chunk. Their parts of the parameters' gradients are zero.
template <typename Config>
__device__ __forceinline__ void clear_parts(const ChunkBwdKernelParams& params, int64_t tile) {
  if (params.dA_log_parts == nullptr) return;
  for (int c = threadIdx.x; c < Config::K; c += Config::kThreads) {
    params.dA_log_parts[tile * Config::K + c] = params.ddt_bias_parts[tile * Config::K + c] = 0.0f;
  }
}

// Each slot past the last used one clears the gradients of 64 rows past the last entry of cu_seqlens, which belong to no sequence: those from `first` on.
struct RowsPastEnd {
  int64_t first, count;  // none if count <= 0
  __device__ __forceinline__ RowsPastEnd(const ChunkFwdParams& call, int64_t slot) : first(0), count(0) {
    if (call.cu_seqlens == nullptr) return;
    const int64_t end = cu_seqlens_at(call, call.problem.sequences);
    const int64_t first_unused_slot = end / kChunkTokens + call.problem.sequences;
    if (slot < first_unused_slot) return;
    first = end + (slot - first_unused_slot) * kChunkTokens;
    count = min(call.problem.tokens - first, int64_t{kChunkTokens});
  }
};

template <typename Config>
__device__ __forceinline__ void clear_rows(const ChunkBwdKernelParams& params, const RowsPastEnd& rows,
                                           int value_head) {
  constexpr int K = Config::K, V = Config::V;
  const ChunkFwdParams& call = params.forward.call;
  const ChunkFwdProblem& problem = call.problem;
  const auto clear = [&](void* base, int heads, int head, int row_bytes) {
    const int words = row_bytes / 2;  // every type has a whole number of them
    for (int64_t i = threadIdx.x; i < rows.count * words; i += Config::kThreads) {
      static_cast<uint16_t*>(base)[((rows.first + i / words) * heads + head) * words + i % words] = 0;
    }
  };
  const auto bytes_of = [](DataType type) { return type == DataType::kFloat32 ? 4 : 2; };
  if (params.dq_parts != nullptr) {
    clear(params.dq_parts, problem.value_heads, value_head, K * 4);
    clear(params.dk_parts, problem.value_heads, value_head, K * 4);
  } else {
    clear(params.dq, problem.heads, value_head, K * 2);
    clear(params.dk, problem.heads, value_head, K * 2);
  }
  clear(params.dv, problem.value_heads, value_head, V * 2);
  clear(params.dg, problem.value_heads, value_head, K * bytes_of(call.gate_type));
  clear(params.dbeta, problem.value_heads, value_head, bytes_of(call.beta_type));
}

}  // namespace kda
