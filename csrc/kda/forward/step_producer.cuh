// Four or eight warps that make everything of a step that does not depend on the state:
//   Akk[i,j] = beta_i sum_d k_i k_j exp(G_i - G_j)  (i > j),    Aqk[i,j] = sum_d q_i k_j exp(G_i - G_j)  (i >= j),
//   Tinv = (I + Akk)^-1 Diag(beta),
// and the gated operands (step_operands.cuh). The norms of q and k are applied late: with k = |k| k^ and U' = U / |k| every formula
// holds for keys as they come, with beta / |k|^2 for beta and |k| V for V:
//   U' = (I + Diag(beta / |k|^2) K K^T)^-1 Diag(beta / |k|^2) (|k| V - K S),     S' = S + K^T U'.
//
// Config says where the parts lie in shared memory; see StepFactorsConfig and FusedConfig.
#pragma once

#include "../device/triangular_inverse.cuh"
#include "step_operands.cuh"

namespace kda {

// What a thread keeps from step to step of one head.
struct GateConstants {
  float decay_rate;  // exp(A_log), or 1
  float2 bias;       // of the thread's two channels
  float unit;        // the bounded gate is kept as the sigmoid, in units of its bound

  __device__ __forceinline__ GateConstants(const ChunkFwdParams& call, float decay_rate_, float2 bias_)
      : decay_rate(decay_rate_),
        bias(bias_),
        unit(call.gate == GateKind::kSigmoid ? call.lower_bound * kLog2E : 1.0f) {}
  __device__ __forceinline__ GateConstants(const ChunkFwdParams& call, int value_head, int channel)
      : GateConstants(call, call.A_log != nullptr ? expf(call.A_log[value_head]) : 1.0f, {0.0f, 0.0f}) {
    if (call.dt_bias != nullptr) {
      const float* source = call.dt_bias + int64_t{value_head} * call.problem.key_dim + channel;
      bias = {source[0], source[1]};
    }
  }
};

// Whether a lane holds the diagonal element of row lane / 4 of a product of a warp's tokens with themselves, and that row.
__device__ __forceinline__ bool owns_diagonal(int lane) { return (lane & 3) == lane >> 3; }

// beta of the token whose diagonal element a lane owns, as it is in memory: the conversion would wait for the load.
struct BetaReader {
  const uint8_t* source;  // in the next step
  int64_t tokens_left;    // of the sequence, from the lane's token of that step on

  static __device__ __forceinline__ int bytes(const ChunkFwdParams& call) {
    return call.beta_type == DataType::kFloat32 ? 4 : 2;
  }

  __device__ __forceinline__ BetaReader(const ChunkFwdParams& call, int64_t batch, int64_t first_token,
                                        int64_t end_token, int value_head, int thread) {
    const int64_t token = first_token + 8 * (thread >> 5 & 3) + ((thread & 31) >> 2);
    const TokenStrides& stride = call.beta_stride;
    source = static_cast<const uint8_t*>(call.beta) +
             (batch * stride.batch + token * stride.token + value_head * stride.head) * bytes(call);
    tokens_left = thread < 128 && owns_diagonal(thread & 31) ? end_token - token : 0;
  }

  // Then goes on by `tokens`.
  __device__ __forceinline__ uint32_t next(const ChunkFwdParams& call, int tokens) {
    uint32_t bits = 0;
    if (tokens_left > 0) {
      bits = bytes(call) == 4 ? *reinterpret_cast<const uint32_t*>(source) : *reinterpret_cast<const uint16_t*>(source);
    }
    source += tokens * call.beta_stride.token * bytes(call);
    tokens_left -= tokens;
    return bits;
  }
};

template <typename Config>
struct StepProducer {
  using Element = typename Config::Element;
  static constexpr int K = Config::K, C = Config::C, kThreads = Config::kGroupThreads;
  static constexpr int kSolveWarp = 3;
  // Of eight warps, those 4 .. 7 share the rows of 0 .. 3.
  static constexpr bool kSharesRows = kThreads == 256;
  // Loads that are issued together, as far as registers go: the products after them may not move ahead.
  static constexpr int kLoadsAhead = kSharesRows ? 2 : 4;
  static_assert(kThreads == 128 || kSharesRows);

  const ChunkFwdParams& call;
  uint8_t* const raw;      // rows of the step
  uint8_t* const stage;    // what a consumer needs of it, to be filled
  uint8_t* const scratch;  // the group's own memory
  const int tokens;        // of the step
  const int least_tokens;  // of a step whose threads the barrier holds
  const int barrier;       // of the group, or of groups that go through the same steps of work
  const int thread, lane;

  // The warp's rows are 8 row_warp() .. + 7.
  __device__ __forceinline__ int row_warp() const { return thread >> 5 & 3; }
  __device__ __forceinline__ bool is_second() const { return kSharesRows && thread >= 128; }
  __device__ __forceinline__ int row_group() const { return lane >> 2; }
  __device__ __forceinline__ int member() const { return lane & 3; }
  __device__ __forceinline__ void sync() const { ptx::barrier_sync(barrier, Config::kBarrierThreads); }
  __device__ __forceinline__ SolveMatrix32 solve_matrix() const {
    return {reinterpret_cast<float*>(scratch + Config::kSolve)};
  }
  // First of the two channels of a thread.
  static __device__ __forceinline__ int channel_of(int thread) { return 2 * (thread % (K / 2)); }

  // Products of the warp's 8 tokens with themselves, from q and k as they came, exact in fp32: q q^T and q k^T in elements 0, 1 of the
  // accumulators, k k^T in elements 2, 3 of the second. fp16 keys are rounded to bf16 for k k^T, as in all operands of the recurrence: the norm must
  // be that of the key that is used.
  __device__ __forceinline__ void multiply_rows(float (&with_q)[4], float (&with_k)[4]) const {
    const int matrix = lane >> 3;
    const uint32_t tile = ptx::shared_address(raw) + (matrix & 1 ? Config::kRawK : Config::kRawQ);
    // Over even and over odd kt: products with the same accumulators wait for each other.
    float q_sums[2][4] = {}, k_sums[2][4] = {};
#pragma unroll
    for (int first = 0; first < K / 16; first += kLoadsAhead) {
      uint32_t rows[kLoadsAhead][4];  // 0-7: q, 8-15: k
#pragma unroll
      for (int n = 0; n < kLoadsAhead; ++n) {
        ptx::ldmatrix_x4(
            rows[n], tile + Config::KeyTile::unit_offset(8 * row_warp() + (lane & 7), 2 * (first + n) + (matrix >> 1)));
      }
#pragma unroll
      for (int n = 0; n < kLoadsAhead; ++n) {
        const uint32_t(&a)[4] = rows[n];
        float(&q_sum)[4] = q_sums[n & 1], (&k_sum)[4] = k_sums[n & 1];
        if constexpr (std::is_same_v<Element, BFloat16>) {
          ptx::mma_m16n8k16_bf16(k_sum, a[0], a[1], a[2], a[3], a[1], a[3]);
          ptx::mma_m16n8k16_bf16(q_sum, a[0], a[1], a[2], a[3], a[0], a[2]);
        } else {
          const auto rounded = [](uint32_t packed) {
            const float2 x = Packed2<Float16>::to_float2(packed);
            return pack_bf16(x.x, x.y);
          };
          const uint32_t k0 = rounded(a[1]), k1 = rounded(a[3]);
          ptx::mma_m16n8k16_f16(k_sum, a[0], 0, a[2], 0, a[1], a[3]);
          ptx::mma_m16n8k16_bf16(k_sum, 0, k0, 0, k1, k0, k1);
          ptx::mma_m16n8k16_f16(q_sum, a[0], 0, a[2], 0, a[0], a[2]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      with_q[e] = q_sums[0][e] + q_sums[1][e];
      with_k[e] = k_sums[0][e] + k_sums[1][e];
    }
  }

  // q·k, |q|^2 and |k|^2 are on the diagonals of those products; what follows from them. Returns whether q and k are too large for one reference.
  __device__ __forceinline__ bool store_row_values(const RowValues& rows, float beta) const {
    if (is_second()) return false;
    float with_q[4], with_k[4];
    multiply_rows(with_q, with_k);
    if (!owns_diagonal(lane)) return false;
    const bool odd = row_group() & 1;
    const int token = 8 * row_warp() + row_group();
    const float squares_q = odd ? with_q[1] : with_q[0], squares_k = odd ? with_k[3] : with_k[2];
    float inverse_q = 1.0f, inverse_k = 1.0f, norm_k = 1.0f;
    if (call.qk_l2norm) {
      inverse_q = rsqrtf(squares_q + kL2NormEpsilon);
      inverse_k = rsqrtf(squares_k + kL2NormEpsilon);
      norm_k = (squares_k + kL2NormEpsilon) * inverse_k;
    }
    rows.query_key[token] = odd ? with_k[1] : with_k[0];
    rows.write[token] = Config::kNormalizes ? beta : beta * inverse_k * inverse_k;
    const auto power_of_two = [](float x) { return __uint_as_float(__float_as_uint(x) & 0x7f800000u); };
    rows.query_power[token] = power_of_two(inverse_q);  // 1 if q and k are not normalised
    rows.key_power[token] = power_of_two(inverse_k);
    rows.key_norm[token] = Config::kNormalizes ? inverse_k : norm_k;
    rows.output_scale[token] = Config::kNormalizes ? inverse_q : call.scale * inverse_q;
    constexpr float kLimit = static_cast<float>(1 << static_cast<int>(2 * kMaxNormLog2));
    return !(squares_q <= kLimit && squares_k <= kLimit);
  }

  __device__ __forceinline__ float activate_beta(uint32_t bits) const {
    float beta = __uint_as_float(bits);
    if (call.beta_type == DataType::kBFloat16) beta = Packed2<BFloat16>::to_float2(bits).x;
    if (call.beta_type == DataType::kFloat16) beta = Packed2<Float16>::to_float2(bits).x;
    return call.beta_sigmoid ? call.beta_scale * sigmoid(beta) : beta;
  }

  // Products of the warp's rows 8 w .. 8 w + 7, q above k in the A operand, with tokens 8 n .. 8 n + 7: elements 0, 1 belong to
  // q k^T, elements 2, 3 to k k^T.
  struct Products {
    float tile[4][4] = {};
  };

  // Operands of pair products: tiles of q and k (A operand) and of the earlier tokens' k (B operand).
  template <typename Tile>
  struct PairTiles {
    uint32_t q, k, earlier_k;
  };

  // d += the products with token blocks first .. first + kCount - 1.
  template <int kCount, typename Tile>
  __device__ __forceinline__ void multiply(float (&d)[kCount][4], const PairTiles<Tile>& tiles, int first,
                                           bool half) const {
    const int matrix = lane >> 3, row = lane & 7;
    const uint32_t a_tile = matrix & 1 ? tiles.k : tiles.q;
    constexpr int kLoads = kCount == 1 ? 1 : kCount / 2;
    struct Operands {
      uint32_t a[4], b[kLoads][4];
    };
    const auto load = [&](Operands& x, int kt) {
      ptx::ldmatrix_x4(x.a, a_tile + Tile::unit_offset(8 * row_warp() + row, 2 * kt + (matrix >> 1)));
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        // Of one token block, matrices 2 and 3 repeat 0 and 1.
        const int block = first + 2 * n + (kCount == 1 ? 0 : matrix >> 1);
        ptx::ldmatrix_x4(x.b[n], tiles.earlier_k + Tile::unit_offset(8 * block + row, 2 * kt + (matrix & 1)));
      }
    };
    const auto product = [&](float(&acc)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {
      if (half) {
        ptx::mma_m16n8k16_f16(acc, a[0], a[1], a[2], a[3], b0, b1);
      } else {
        ptx::mma_m16n8k16_bf16(acc, a[0], a[1], a[2], a[3], b0, b1);
      }
    };
    constexpr int kAhead = kSharesRows ? 1 : 2;  // as kLoadsAhead
#pragma unroll
    for (int kt = 0; kt < K / 16; kt += kAhead) {
      Operands operands[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load(operands[i], kt + i);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const Operands& x = operands[i];
#pragma unroll
        for (int n = 0; n < kCount; ++n) product(d[n], x.a, x.b[n / 2][2 * (n % 2)], x.b[n / 2][2 * (n % 2) + 1]);
      }
    }
  }

  __device__ __forceinline__ void multiply_with_middle_reference(Products& products) const {
    const uint32_t base = ptx::shared_address(raw);
    const PairTiles<typename Config::KeyTile> tiles{base + Config::kRawQ, base + Config::kRawK, base + Config::kRawG};
    // Token blocks above the diagonal come along; their products, of any value, are not used.
    if constexpr (kSharesRows) {
      if (is_second() && row_warp() < 2) return;
      float two[2][4] = {};
      multiply<2>(two, tiles, is_second() ? 2 : 0, false);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (is_second()) {
          products.tile[2][e] = two[0][e], products.tile[3][e] = two[1][e];
        } else {
          products.tile[0][e] = two[0][e], products.tile[1][e] = two[1][e];
        }
      }
    } else {
      multiply<4>(products.tile, tiles, 0, false);
    }
  }

  // Level by level; see store_level.
  __device__ __forceinline__ void multiply_by_levels(Products& products, const StepOperands<Config>& operands,
                                                     const RowValues& rows) const {
    const bool half = call.qk_l2norm;  // operands are at most 1
    using Tile = typename Config::GatedTile;
    const uint32_t keys = ptx::shared_address(operands.stage) + Config::kGated;
    const PairTiles<Tile> tiles{keys + Config::kGatedQueries, keys, keys};
#pragma unroll 1
    for (int block = C / 2; block > 0; block /= 2) {
      sync();  // the operands of the level before have been read
      operands.store_level(block, rows, half);
      sync();
      if (is_second()) continue;
      if (block == 16) {
        if (row_warp() >= 2) {
          float low[2][4] = {};
          multiply<2>(low, tiles, 0, half);
#pragma unroll
          for (int e = 0; e < 4; ++e) products.tile[0][e] = low[0][e], products.tile[1][e] = low[1][e];
        }
        continue;
      }
      // Blocks of 8 pair the warp's tokens with those of the warp before, smaller ones with each other: a pair of those comes from the level that the
      // highest differing bit names.
      const int earlier = block == 8 ? row_warp() - 1 : row_warp();
      if (block == 8 && !(row_warp() & 1)) continue;
      float d[1][4] = {};
      multiply<1>(d, tiles, earlier, half);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int differing = row_group() ^ (2 * member() + (e & 1));
          const bool of_level = block == 8 || (differing >= block && differing < 2 * block);
          if (n == earlier && of_level) products.tile[n][e] = d[0][e];
        }
      }
    }
    // The powers of two are exact, and so are their inverses.
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float power = (e < 2 ? rows.query_power : rows.key_power)[8 * row_warp() + row_group()];
        products.tile[n][e] *= 1.0f / (power * rows.key_power[8 * n + 2 * member() + (e & 1)]);
      }
    }
  }

  // Whether the warp has the products with token block n. by_levels: as multiply_by_levels() makes them.
  __device__ __forceinline__ bool has_block(int n, bool by_levels) const {
    return !kSharesRows || (by_levels ? !is_second() : is_second() == (n >= 2));
  }

  // Akk for the solve.
  __device__ __forceinline__ void store_akk(const Products& products, const RowValues& rows, bool by_levels) const {
    const int row = 8 * row_warp() + row_group();
    const float write = rows.write[row];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float(&p)[4] = products.tile[n];
      if (n <= row_warp() && has_block(n, by_levels)) {
        *reinterpret_cast<float2*>(&solve_matrix().at(row, 8 * n + 2 * member())) = {write * p[2], write * p[3]};
      }
    }
  }

  // Aqk into the stage. What is not a pair is dropped by selection: it may be inf or NaN.
  __device__ __forceinline__ void store_aqk(const Products& products, const RowValues& rows, bool by_levels) const {
    const int row = 8 * row_warp() + row_group();
    const float diagonal = rows.query_key[row];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (!has_block(n, by_levels)) continue;
      const int column = 8 * n + 2 * member();
      const float(&p)[4] = products.tile[n];
      const auto select = [&](float value, int j) { return j < row ? value : (j == row ? diagonal : 0.0f); };
      *reinterpret_cast<uint32_t*>(stage + Config::kAqkTile + Config::PairTile::pair_offset(row, column)) =
          pack_bf16(select(p[0], column), select(p[1], column + 1));
    }
  }

  // Into the stage: the values of the rows, and Tinv as the sum of three bf16 operands: its entries cancel in products where keys repeat and the gates hardly decay.
  __device__ __forceinline__ void store_inverse(const RowValues& rows) const {
    constexpr int kColumns = C * C / kThreads;  // of a thread
    const int row = thread / (C / kColumns), column = kColumns * (thread % (C / kColumns));
    uint32_t high[kColumns / 2], middle[kColumns / 2], low[kColumns / 2];
    float t[kColumns], write[kColumns];
    load(t, &solve_matrix().at(row, column));  // of any value above the diagonal
    load(write, rows.write + column);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) t[i] = column + i <= row ? t[i] * write[i] : 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const float x = t[2 * i], y = t[2 * i + 1];
      high[i] = pack_bf16(x, y);
      const float2 h = unpack_bf16(high[i]);
      const SplitBf16 rest(x - h.x, y - h.y);
      middle[i] = rest.high, low[i] = rest.low;
    }
    const auto store = [&](int tile, int tile_column, const uint32_t(&v)[kColumns / 2]) {
      uint8_t* const place = stage + tile + Config::PairTile::pair_offset(row, tile_column);
      if constexpr (kColumns == 8) {
        *reinterpret_cast<uint4*>(place) = {v[0], v[1], v[2], v[3]};
      } else {
        *reinterpret_cast<uint2*>(place) = {v[0], v[1]};
      }
    };
    if (column == 0) {
      reinterpret_cast<float*>(stage + Config::kKeyNorm)[row] = rows.key_norm[row];
      reinterpret_cast<float*>(stage + Config::kOutputScale)[row] = rows.output_scale[row];
    }
    store(Config::kInverseTile, column, high);
    store(Config::kInverseTile, C + column, middle);
    store(Config::kAqkTile, C + column, low);
  }

  // The inverse of the solve matrix, in its place, by one warp.
  __device__ __forceinline__ void invert() const {
    if (thread / 32 == kSolveWarp) invert_unit_lower_32x32(solve_matrix(), lane);
  }

  template <int kCount>
  static __device__ __forceinline__ void load(float (&values)[kCount], const float* source) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(source + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }

  __device__ __forceinline__ StepOperands<Config> operands(const GateConstants& constants) const {
    return {raw, stage, scratch, channel_of(thread), thread / (K / 2), tokens, constants.unit};
  }

  // Activates the gates. Returns whether the step's tokens are too far apart for one reference; a barrier of the group.
  __device__ __forceinline__ bool prepare(const StepOperands<Config>& operands, const GateConstants& constants,
                                          const RowValues& rows, uint32_t beta_bits) const {
    if (least_tokens < C) {
      operands.clear_rows_past_end();
      sync();
    }
    const float beta =
        8 * row_warp() + row_group() < tokens ? activate_beta(beta_bits) : 0.0f;  // past the end: no write
    bool far_apart = store_row_values(rows, beta);
    // Levels have pairs in fp16. With beta beyond 1 entries of Tinv are larger than 1, and with gates of which some forget at once and some not at
    // all, pairs in bf16 would miss the contract of accuracy.
    far_apart |= call.gate != GateKind::kSigmoid && beta > 1.0f;
    far_apart |= operands.activate(call, constants.decay_rate, constants.bias, [&] { sync(); });
    return ptx::barrier_any(barrier, Config::kBarrierThreads, far_apart);
  }

  // The gated operands into the stage, and the products of pairs.
  __device__ __forceinline__ void multiply_pairs(Products& products, const StepOperands<Config>& operands,
                                                 const RowValues& rows, bool far_apart) const {
    using ToStage = typename StepOperands<Config>::ToStage;
    operands.store_step_decay();
    if (!far_apart) {
      operands.store_with_middle_reference(ToStage{operands});
      sync();
      multiply_with_middle_reference(products);
    } else {
      multiply_by_levels(products, operands, rows);
      sync();  // the last level's operands have been read
      operands.store_state_operands(ToStage{operands});
      sync();  // totals have been read
    }
  }
};

}  // namespace kda
