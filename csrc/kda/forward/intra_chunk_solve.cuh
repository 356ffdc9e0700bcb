// Stage 1 of the staged path: the intra-chunk solve. For every chunk of 64 tokens and value head, G the cumulative log-gate and k of norm 1 if
// keys are normalised:
//   Aqk[i,j] = scale * sum_d q_i k_j exp(G_i - G_j)    (i >= j)
//   Akk[i,j] = beta_i * sum_d k_i k_j exp(G_i - G_j)   (i > j)
//   Tinv = (I + Akk)^-1 Diag(beta),   U0 = Tinv V unless the recurrence of the state makes it,   W = Tinv (K ⊙ e^G)
// and the operands of the later stages,
//   Q_gated = scale * Q ⊙ e^G,   K_decayed = K ⊙ e^{G_C - G},   chunk_decay = e^{G_C}.
// For a backward, of the first chunk of a sequence also what Q_gated in bf16 leaves out.
//
// Grid: as many CTAs as are resident, of 8 warps; each goes from turn to turn of the grid (TileOfTurn) among tiles of (chunk slot, value head), past slots without tokens, in
// their order in memory, or where recurrences follow from the ends of the sequences to their middle (solve_progress.cuh).
// The next chunk's rows are copied as soon as their place is free, so that its work begins without a wait. The chunk is two steps of 32 tokens, earlier
// and later, of four warps each, which make pairs inside of them as in the forward (step_producer.cuh). For a pair across the steps exp(G_i - G_j) is
// split at the boundary between them: it is a product of rows of Q ⊙ e^G and K ⊙ e^G of the later step and of K ⊙ e^{G_C - G} of the earlier one. From
// the solve on a warp owns columns of W or rows of U0^T.
//
// Numerics: gate factors as in step_operands.cuh; if one step is out of range of one reference, both go by levels. q and k are normalised in fp32
// before they are gated and rounded. The diagonal of Aqk comes from q and k as they are in memory, whose products are exact. Tinv enters as the sum
// of two bf16 operands. The inverse is taken at fp32 accuracy (triangular_inverse.cuh). W of the later step is (Tinv K ⊙ e^G of that step) ⊙ e^{G_C}
// of the earlier one, in fp32, and the rest.
//
// Shared memory (bytes, K = V = 128):
//   rows of q, k, g 49152, with a second half of the gates in fp32 65536  ->  operands of pairs  ->  rows of the next chunk, but for g of the earlier
//   step and the totals 18432  ->  Akk and its inverse 17408  ->  g of the next chunk
//   K ⊙ e^G 16384  ->  W, in place;   Q ⊙ e^G 16384  ->  V
//   Aqk 8192  ->  high and low part of Tinv 12288
//   values of rows and channels, and where the chunks are 3024
// Registers: at most 128, so that two CTAs fit a multiprocessor. Every barrier is one of the whole CTA.
// Bound by its own instructions and latency between barriers, with memory not far behind at many heads: 64 KiB in and 97 KiB out for a chunk.
#pragma once

#include "../device/timeline.cuh"
#include "intra_chunk_layout.cuh"
#include "intra_chunk_operands.cuh"
#include "solve_progress.cuh"

namespace kda {

template <typename Config>
struct IntraChunkSolve {
  using Element = typename Config::Element;
  using Operands = IntraChunkOperands<Config>;
  using Producer = StepProducer<Config>;
  using KeyTile = typename Config::KeyTile;      // of a step
  using GatedTile = typename Config::GatedTile;  // of the chunk
  using PairTile = typename Config::ChunkPairTile;
  static constexpr int K = Config::K, V = Config::V, C = kChunkTokens;
  // Of 16 columns of W or rows of U0^T, that a warp takes together, as their products share operands of Tinv. fp16 has two operands of V: registers.
  static constexpr int kUnits = std::is_same_v<Element, BFloat16> && (K + V) / 16 > Config::kWarps ? 2 : 1;

  const ChunkFwdKernelParams& params;
  const TensorMaps& maps;
  uint8_t* const shared;
  const int thread, lane;
  const SolvePlace& place;
  const ChunkLocation location;
  const int value_head;
  const int64_t tile;

  __device__ __forceinline__ int warp() const { return thread >> 5; }
  __device__ __forceinline__ int group() const { return lane >> 2; }
  __device__ __forceinline__ int member() const { return lane & 3; }
  __device__ __forceinline__ int step() const { return thread / Config::kGroupThreads; }
  __device__ __forceinline__ bool is_later() const { return step() == 1; }
  // Whether the recurrence of the state makes U0.
  __device__ __forceinline__ bool makes_values_later() const { return params.beta != nullptr; }
  __device__ __forceinline__ uint8_t* raw(int of_step) const { return shared + (1 - of_step) * Config::kRawBytes; }
  __device__ __forceinline__ uint8_t* scratch(int of_step) const {
    return shared + Config::kScratch + of_step * Config::kScratchBytes;
  }
  __device__ __forceinline__ RowValues rows(int of_step) const {
    return RowValues(shared + Config::kRowValues + of_step * Config::kRowValuesBytes);
  }
  __device__ __forceinline__ SolveMatrix Akk() const { return {reinterpret_cast<float*>(shared + Config::kSolve)}; }
  __device__ __forceinline__ uint32_t* next_beta() const {
    return reinterpret_cast<uint32_t*>(shared + Config::kNextBeta);
  }
  __device__ __forceinline__ float* next_rate() const { return reinterpret_cast<float*>(shared + Config::kNextRate); }
  __device__ __forceinline__ float* next_bias() const { return reinterpret_cast<float*>(shared + Config::kNextBias); }
  __device__ __forceinline__ float* earlier_decay() const {
    return reinterpret_cast<float*>(shared + Config::kEarlierDecay);
  }

  // Rows of kRowBytes bytes of the chunk that are not aligned, those past the end zero: place(token, unit) is where a unit of 16 bytes goes.
  template <int kRowBytes, typename Place>
  __device__ __forceinline__ void load_rows(const void* base, const TokenStrides& stride, int head, int element_bytes,
                                            Place place) const {
    constexpr int kUnits = kRowBytes / 16;
    const int unit = thread % kUnits;
    const uint8_t* const source =
        static_cast<const uint8_t*>(base) +
        (location.batch * stride.batch + location.first_token * stride.token + head * stride.head) * element_bytes +
        16 * unit;
#pragma unroll 1
    for (int token = thread / kUnits; token < C; token += Config::kThreads / kUnits) {
      *reinterpret_cast<uint4*>(place(token, unit)) =
          token < location.tokens ? load_8x16bit(source + token * stride.token * element_bytes) : uint4{0, 0, 0, 0};
    }
  }

  // Copies by the copy engine, which barriers count, in each of the CTA's chunks once: of q, k and the later step's g, of the earlier step's g, and of V.
  enum class Copies { kFirst, kLast, kValues };
  __device__ __forceinline__ uint32_t loaded(Copies copies) const {
    return ptx::shared_address(shared) + Config::kBarriers + 8 * static_cast<int>(copies);
  }
  // parity: of the number of the CTA's chunk.
  __device__ __forceinline__ void wait_for(Copies copies, int parity) const {
    ptx::mbarrier_wait_parity(loaded(copies), parity);
  }

  // q, k and g, if they are aligned: first those that lie where nothing is read any more when the pairs of the chunk before have been multiplied, then
  // g of the earlier step, in the place of the inverse. After a barrier that a fence of all threads precedes, by one thread of each warp of the later
  // step, which have fewer products to store. Rows past the end are of any content.
  enum CopyingThread { kOfRows = 128, kOfValues = 160, kOfLaterRows = 192, kOfGates = 224 };
  static constexpr int kFirstArrivals = 3;
  template <typename Copy>
  __device__ __forceinline__ void copy_inputs(Copies copies, CopyingThread by, int bytes, Copy copy) const {
    if (thread != by || !params.vectorized || location.tokens == 0) return;
    ptx::mbarrier_arrive_expect_tx(loaded(copies), bytes);
    copy([&](const CUtensorMap& map, int of_step, int region, int head) {
      ptx::cp_async_bulk_tensor_load(ptx::shared_address(raw(of_step)) + region, &map, 0,
                                     static_cast<int>(location.first_token) + of_step * Config::C, 0, head,
                                     static_cast<int>(location.batch), loaded(copies));
    });
  }
  __device__ __forceinline__ void copy_gates(Copies copies, int of_step) const {
    const bool is_fp32 = params.call.gate_type == DataType::kFloat32;
    copy_inputs(copies, kOfGates, (is_fp32 ? 2 : 1) * Config::kKeyTileBytes,
                [&](auto copy) { copy(maps.g, of_step, Config::kRawG, value_head); });
  }
  __device__ __forceinline__ void load_first_inputs() const {
#pragma unroll
    for (int i = 0; i < Config::kSteps; ++i) {
      copy_inputs(Copies::kFirst, i == 0 ? kOfRows : kOfLaterRows, 2 * Config::kKeyTileBytes, [&](auto copy) {
        copy(maps.q, i, Config::kRawQ, place.key_head);
        copy(maps.k, i, Config::kRawK, place.key_head);
      });
    }
    copy_gates(Copies::kFirst, 1);
  }
  __device__ __forceinline__ void load_last_inputs() const { copy_gates(Copies::kLast, 0); }

  // What a chunk needs of parameters of a token or a channel, one element a thread, as they are in memory, as a conversion would wait for the load: beta
  // of token `thread`, A_log, dt_bias of a channel.
  static constexpr int kRateThread = C, kFirstBiasThread = 128;
  __device__ __forceinline__ uint32_t raw_parameter() const {
    const ChunkFwdParams& call = params.call;
    if (location.tokens == 0) return 0;
    if (thread < location.tokens) {
      const TokenStrides& stride = call.beta_stride;
      const int64_t index =
          location.batch * stride.batch + (location.first_token + thread) * stride.token + value_head * stride.head;
      return call.beta_type == DataType::kFloat32 ? static_cast<const uint32_t*>(call.beta)[index]
                                                  : static_cast<const uint16_t*>(call.beta)[index];
    }
    const int channel = thread - kFirstBiasThread;
    if (call.dt_bias != nullptr && channel >= 0 && channel < K) {
      return __float_as_uint(call.dt_bias[value_head * K + channel]);
    }
    if (call.A_log != nullptr && thread == kRateThread) return __float_as_uint(call.A_log[value_head]);
    return 0;
  }
  // Until its chunk comes.
  __device__ __forceinline__ void keep_parameter(uint32_t bits) const {
    const int channel = thread - kFirstBiasThread;
    if (thread < C) {
      next_beta()[thread] = bits;
    } else if (thread == kRateThread) {
      *next_rate() = params.call.A_log != nullptr ? expf(__uint_as_float(bits)) : 1.0f;
    } else if (channel >= 0 && channel < K) {
      next_bias()[channel] = __uint_as_float(bits);
    }
  }

  // If they are not, by all.
  __device__ __forceinline__ void load_unaligned_inputs() const {
    const ChunkFwdParams& call = params.call;
    const auto rows_at = [&](int region) {
      return [this, region](int token, int unit) {
        return raw(token / Config::C) + region + KeyTile::unit_offset(token % Config::C, unit);
      };
    };
    load_rows<2 * K>(call.q, call.q_stride, place.key_head, 2, rows_at(Config::kRawQ));
    load_rows<2 * K>(call.k, call.k_stride, place.key_head, 2, rows_at(Config::kRawK));
    if (call.gate_type == DataType::kFloat32) {
      load_rows<4 * K>(call.g, call.g_stride, value_head, 4, rows_at(Config::kRawG));
    } else {
      load_rows<2 * K>(call.g, call.g_stride, value_head, 2, rows_at(Config::kRawG));
    }
  }

  // V, by one thread or, if inputs are not aligned, by all. After a barrier that a fence of all threads precedes: they have read what was there.
  __device__ __forceinline__ void load_values() const {
    const ChunkFwdParams& call = params.call;
    if (makes_values_later()) return;
    if (params.vectorized) {
      if (thread != kOfValues) return;
      const int token = static_cast<int>(location.first_token), batch = static_cast<int>(location.batch);
      ptx::mbarrier_arrive_expect_tx(loaded(Copies::kValues), C * V * 2);
#pragma unroll
      for (int i = 0; i < Config::kSteps; ++i) {
#pragma unroll
        for (int block = 0; block < V / 64; ++block) {
          const uint32_t rows =
              ptx::shared_address(shared + Config::kValues) + GatedTile::unit_offset(i * Config::C, 8 * block);
          ptx::cp_async_bulk_tensor_load(rows, &maps.v, 0, token + i * Config::C, block, value_head, batch,
                                         loaded(Copies::kValues));
        }
      }
      return;
    }
    load_rows<2 * V>(call.v, call.v_stride, value_head, 2, [this](int token, int unit) {
      return shared + Config::kValues + GatedTile::unit_offset(token, unit);
    });
  }

  // Waits for V. Rows past the end, where those of another sequence may lie, become zero: a barrier then follows for all.
  __device__ __forceinline__ void wait_for_values(int parity) const {
    if (!params.vectorized || makes_values_later()) return;
    wait_for(Copies::kValues, parity);
    if (location.tokens == C) return;
#pragma unroll 1
    for (int i = thread; i < C * V / 8; i += Config::kThreads) {
      const int token = i / (V / 8);
      if (token < location.tokens) continue;
      *reinterpret_cast<uint4*>(shared + Config::kValues + GatedTile::unit_offset(token, i % (V / 8))) = {0, 0, 0, 0};
    }
  }

  // e^{G_C} of the chunk: from the sum of the log-gates, so that very slow gates keep their bits over thousands of chunks.
  __device__ __forceinline__ void store_decay(const Operands& operands, float2 own, float2 other) const {
    if (is_later() || operands.group != 0) return;
    *reinterpret_cast<float2*>(earlier_decay() + operands.channel) = {ptx::ex2(own.x), ptx::ex2(own.y)};
    *reinterpret_cast<float2*>(params.chunk_decay + tile * K + operands.channel) = {ptx::ex2(own.x + other.x),
                                                                                    ptx::ex2(own.y + other.y)};
  }

  // Pairs of the later step's tokens 8 w .. 8 w + 7 with 16 of the earlier step's: elements 0, 1 belong to q k^T, 2, 3 to k k^T. With `inside`, also the
  // pairs of the own step, as StepProducer::multiply_with_middle_reference(): chains of products run side by side.
  __device__ __forceinline__ void multiply_across(const Producer& make, float (&across)[2][4],
                                                  float (*inside)[4]) const {
    const int matrix = lane >> 3, row = lane & 7;
    const uint32_t keys = ptx::shared_address(shared) + Config::kGated + Config::kRowsOfStepBytes;
    const uint32_t later = matrix & 1 ? keys : keys + Config::kGatedQueries;
    const uint32_t earlier = ptx::shared_address(raw(0)) + Config::kSecondGate;
    const uint32_t own = ptx::shared_address(raw(step()));
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      const auto load_b = [&](uint32_t(&b)[4], uint32_t tile, int block) {
        ptx::ldmatrix_x4(b, tile + KeyTile::unit_offset(8 * (block + (matrix >> 1)) + row, 2 * kt + (matrix & 1)));
      };
      const int unit = 2 * kt + (matrix >> 1);
      uint32_t a[4], b[4], own_a[4], own_b[2][4];
      ptx::ldmatrix_x4(a, later + GatedTile::unit_offset(8 * make.row_warp() + row, unit));
      load_b(b, earlier, 2 * step());
      if (inside != nullptr) {
        const uint32_t tile = own + (matrix & 1 ? Config::kRawK : Config::kRawQ);
        ptx::ldmatrix_x4(own_a, tile + KeyTile::unit_offset(8 * make.row_warp() + row, unit));
        load_b(own_b[0], own + Config::kRawG, 0);
        load_b(own_b[1], own + Config::kRawG, 2);
      }
      const auto product = [](float(&d)[4], const uint32_t(&x)[4], uint32_t y0, uint32_t y1) {
        ptx::mma_m16n8k16_bf16(d, x[0], x[1], x[2], x[3], y0, y1);
      };
      product(across[0], a, b[0], b[1]);
      product(across[1], a, b[2], b[3]);
      if (inside != nullptr) {
        // Token blocks above the diagonal come along; their products, of any value, are not used.
#pragma unroll
        for (int n = 0; n < 4; ++n) product(inside[n], own_a, own_b[n / 2][2 * (n % 2)], own_b[n / 2][2 * (n % 2) + 1]);
      }
    }
  }

  // Products of q and k as they came to those of q / |q| and k / |k|.
  __device__ __forceinline__ void normalize(const Producer& make, typename Producer::Products& products) const {
    const RowValues own = rows(step());
    const int row = 8 * make.row_warp() + group();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        products.tile[n][e] *=
            (e < 2 ? own.output_scale : own.key_norm)[row] * own.key_norm[8 * n + 2 * member() + e % 2];
      }
    }
  }

  // Aqk and Akk of the warp's rows. What is not a pair is dropped by selection: it may be inf or NaN.
  __device__ __forceinline__ void store_products(const Producer& make, const typename Producer::Products& products,
                                                 const float (&across)[2][4]) const {
    const float scale = params.call.scale;
    const int pair = 2 * member(), first = Config::C * step();
    const int row = 8 * make.row_warp() + group();  // of a step
    const RowValues own = rows(step());
    const float strength = own.write[row], later_strength = rows(1).write[row];
    const float diagonal = own.query_key[row] * (own.output_scale[row] * own.key_norm[row]);
    // Place of the lane's pair in the first block of 8 of blocks that begin at a multiple of 4: block n is at an exclusive or of 16 n.
    const auto place_of = [&](int i, int j) { return Config::kAqk + PairTile::pair_offset(i, j + pair); };
    const auto store_aqk = [&](uint32_t place, uint32_t packed) {
      *reinterpret_cast<uint32_t*>(shared + place) = packed;
    };
    static_assert(Config::kAqk % 128 == 0);
    const uint32_t inside = place_of(first + row, first);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = 8 * n + pair;
      const float(&p)[4] = products.tile[n];
      const auto select = [&](float value, int j) { return j < row ? value : (j == row ? diagonal : 0.0f); };
      store_aqk(inside ^ (n << 4), pack_bf16(scale * select(p[0], column), scale * select(p[1], column + 1)));
      if (n <= make.row_warp()) {
        *reinterpret_cast<float2*>(&Akk().at(first + row, first + column)) = {strength * p[2], strength * p[3]};
      }
      if (!is_later()) store_aqk(inside ^ ((4 + n) << 4), 0);
    }
    const uint32_t below = place_of(Config::C + row, 16 * step());
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = 16 * step() + 8 * n + pair;
      const float(&p)[4] = across[n];
      store_aqk(below ^ (n << 4), pack_bf16(scale * p[0], scale * p[1]));
      *reinterpret_cast<float2*>(&Akk().at(Config::C + row, column)) = {later_strength * p[2], later_strength * p[3]};
    }
  }

  // A tile in shared memory to one in memory, as it is.
  __device__ __forceinline__ void copy_aqk() const {
    const uint4* const source = reinterpret_cast<const uint4*>(shared + Config::kAqk);
    uint4* const destination = reinterpret_cast<uint4*>(params.Aqk + tile * Config::kChunkPairTileBytes);
#pragma unroll
    for (int i = 0; i < Config::kChunkPairTileBytes / 16; i += Config::kThreads) {
      destination[i + thread] = source[i + thread];
    }
  }

  // From the inverse, whose blocks of 8 on the diagonal have zeros above it: itself in one bf16 to memory, for the backward (one is enough there,
  // docs/lab-notebook.md), and Tinv as the sum of two bf16 operands. Entries of Tinv are up to beta in magnitude and cancel in its products where the
  // gates hardly decay and keys repeat: one bf16 is not enough there. A thread has 16 columns of a row; blocks of 16 above the diagonal are
  // left out.
  __device__ __forceinline__ void store_inverse() const {
    const int row = thread / 4, first = 16 * (thread % 4);
    const uint32_t offset = PairTile::unit_offset(row, first / 8);
    // first is a multiple of 16: the second unit is at offset ^ 16
    const auto store = [&](uint8_t* destination, uint32_t at, const uint32_t(&v)[8]) {
      *reinterpret_cast<uint4*>(destination + at) = {v[0], v[1], v[2], v[3]};
      *reinterpret_cast<uint4*>(destination + (at ^ 16)) = {v[4], v[5], v[6], v[7]};
    };
    if (makes_values_later() && first == 0) params.beta[tile * C + row] = rows(row / Config::C).write[row % Config::C];
    if (first > row) {
      if (params.inverse != nullptr) store(params.inverse + tile * Config::kChunkPairTileBytes, offset, {});
      return;
    }
    float t[16], write[16];
    const auto load = [&](int i) {  // a block of 8
      const int up = InverseBlocks::shift(row / 8, (first + i) / 8);
      const float* const source = &Akk().at(row - 8 * up, first + i + 8 * up);
      const float4 low = *reinterpret_cast<const float4*>(source), high = *reinterpret_cast<const float4*>(source + 4);
      t[i] = low.x, t[i + 1] = low.y, t[i + 2] = low.z, t[i + 3] = low.w;
      t[i + 4] = high.x, t[i + 5] = high.y, t[i + 6] = high.z, t[i + 7] = high.w;
    };
    load(0);
    if (row - first >= 8) {
      load(8);
    } else {  // a block of 8 above the diagonal
#pragma unroll
      for (int i = 8; i < 16; ++i) t[i] = 0.0f;
    }
    Producer::load(write, rows(first / Config::C).write + first % Config::C);
    uint32_t high[8], low[8];
    if (params.inverse != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) high[i] = pack_bf16(t[2 * i], t[2 * i + 1]);
      store(params.inverse + tile * Config::kChunkPairTileBytes, offset, high);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const SplitBf16 split(t[2 * i] * write[2 * i], t[2 * i + 1] * write[2 * i + 1]);
      high[i] = split.high, low[i] = split.low;
    }
    store(shared + Config::kTinv, offset, high);
    constexpr uint32_t kHalfRow = C / 2 * 2;  // bytes
    store(shared + Config::kTinv, row < C / 2 ? offset ^ kHalfRow : offset + C / 2 * PairTile::kRowBytes, low);
  }

  // Where the low part of Tinv has its elements, as rows and columns of the high part.
  static __device__ __forceinline__ constexpr int low_row(int row) { return row < C / 2 ? row : row + C / 2; }
  static __device__ __forceinline__ constexpr int low_column(int row, int column) {
    return row < C / 2 ? column + C / 2 : column;
  }

  // W = Tinv (K ⊙ e^G) for kUnits times 16 channels, by one warp, over K ⊙ e^G and from there to memory.
  template <int kUnits>
  __device__ __forceinline__ void multiply_keys(int channel) const {
    const uint32_t base = ptx::shared_address(shared);
    const uint32_t keys = base + Config::kGated, inverse = base + Config::kTinv;
    // Of the lane's row in the tile of rows 0 .. 15, from where rows are constant offsets.
    uint32_t columns[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      columns[u] = GatedTile::unit_address(keys, 0, lane & 15, lane >> 4, channel + 16 * u);
    }
    constexpr int kTileBytes = 16 * GatedTile::kRowBytes;
    float acc[kUnits][4][2][4] = {};
    const auto multiply = [&](int kt) {
      uint32_t b[kUnits][4];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) ptx::ldmatrix_x4_trans(b[u], columns[u] + kt * kTileBytes);
#pragma unroll
      for (int mt = kt; mt < 4; ++mt) {
        uint32_t a[2][4];  // high and low part
        PairTile::load_a(a[0], inverse, 16 * mt, 16 * kt, lane);
        PairTile::load_a(a[1], inverse, low_row(16 * mt), low_column(16 * mt, 16 * kt), lane);
#pragma unroll
        for (const auto& x : a) {
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            ptx::mma_m16n8k16_bf16(acc[u][mt][0], x[0], x[1], x[2], x[3], b[u][0], b[u][1]);
            ptx::mma_m16n8k16_bf16(acc[u][mt][1], x[0], x[1], x[2], x[3], b[u][2], b[u][3]);
          }
        }
      }
    };
    multiply(2);
    multiply(3);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 decay =
            *reinterpret_cast<const float2*>(earlier_decay() + channel + 16 * u + 8 * n + 2 * member());
#pragma unroll
        for (int mt = 2; mt < 4; ++mt) {
          float(&x)[4] = acc[u][mt][n];
          x[0] *= decay.x, x[1] *= decay.y, x[2] *= decay.x, x[3] *= decay.y;
        }
      }
    }
    multiply(0);
    multiply(1);
    __syncwarp();  // the warp has read all of its columns
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int mt = 0; mt < 4; ++mt) {
        const float(&x)[2][4] = acc[u][mt];
        ptx::stmatrix_x4(columns[u] + mt * kTileBytes, pack_bf16(x[0][0], x[0][1]), pack_bf16(x[0][2], x[0][3]),
                         pack_bf16(x[1][0], x[1][1]), pack_bf16(x[1][2], x[1][3]));
      }
    }
    __syncwarp();
    constexpr int kRowUnits = 2 * kUnits, kRows = 32 / kRowUnits;  // units of 16 bytes; rows at once
    static_assert(kRows % 8 == 0, "the order of a lane's units is the same");
    const uint32_t offset = GatedTile::unit_offset(lane / kRowUnits, channel / 8 + lane % kRowUnits);
    const uint8_t* const source = shared + Config::kGated + offset;
    uint8_t* const destination = params.W + tile * Config::kChunkKeyTileBytes + offset;
#pragma unroll
    for (int token = 0; token < C; token += kRows) {
      *reinterpret_cast<uint4*>(destination + token * GatedTile::kRowBytes) =
          *reinterpret_cast<const uint4*>(source + token * GatedTile::kRowBytes);
    }
  }

  // U0^T = V^T Tinv^T for kUnits times 16 rows, by one warp, straight to the workspace in accumulator order.
  __device__ __forceinline__ void multiply_values(int row) const {
    const uint32_t base = ptx::shared_address(shared);
    const uint32_t inverse = base + Config::kTinv;
    uint32_t values[kUnits];  // of the lane's row in the tile of rows 0 .. 15
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      values[u] =
          GatedTile::unit_address(base + Config::kValues, 0, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1, row + 16 * u);
    }
    float acc[kUnits][8][4] = {};
#pragma unroll
    for (int kt = 0; kt < 4; ++kt) {
      SplitBf16 value[kUnits][4];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, values[u] + kt * 16 * GatedTile::kRowBytes);  // as load_a_trans()
#pragma unroll
        for (int i = 0; i < 4; ++i) value[u][i] = Packed2<Element>::split(a[i]);
      }
#pragma unroll
      for (int nt = kt; nt < 4; ++nt) {
        uint32_t b[2][4];  // high and low part
        PairTile::load_b(b[0], inverse, 16 * nt, 16 * kt, lane);
        PairTile::load_b(b[1], inverse, low_row(16 * nt), low_column(16 * nt, 16 * kt), lane);
        const auto multiply = [&](uint32_t SplitBf16::* part, const uint32_t(&x)[4]) {
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            const SplitBf16(&v)[4] = value[u];
            ptx::mma_m16n8k16_bf16(acc[u][2 * nt], v[0].*part, v[1].*part, v[2].*part, v[3].*part, x[0], x[1]);
            ptx::mma_m16n8k16_bf16(acc[u][2 * nt + 1], v[0].*part, v[1].*part, v[2].*part, v[3].*part, x[2], x[3]);
          }
        };
        multiply(&SplitBf16::high, b[0]);
        multiply(&SplitBf16::high, b[1]);
        if constexpr (!std::is_same_v<Element, BFloat16>) multiply(&SplitBf16::low, b[0]);
      }
    }
    float4* const destination =
        reinterpret_cast<float4*>(params.U) + (tile * (V / 16) + row / 16) * (C / 8) * 32 + lane;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float(&x)[4] = acc[u][n];
        destination[(u * (C / 8) + n) * 32] = {x[0], x[1], x[2], x[3]};
      }
    }
  }

  // As StepProducer::prepare(), of both steps.
  __device__ __forceinline__ bool prepare(const Producer& make, Operands& operands, const GateConstants& constants,
                                          uint32_t beta_bits, int parity) const {
    if (location.tokens < C) {
      operands.clear_rows_past_end();
      __syncthreads();
    }
    const float beta = 8 * make.row_warp() + group() < make.tokens ? make.activate_beta(beta_bits) : 0.0f;
    bool far_apart = make.store_row_values(rows(step()), beta);
    far_apart |= params.call.gate != GateKind::kSigmoid && beta > 1.0f;
    if (params.vectorized && !is_later()) wait_for(Copies::kLast, parity);
    far_apart |= operands.activate(params.call, constants.decay_rate, constants.bias);
    return __syncthreads_or(far_apart);  // one answer for both steps: they go through the same barriers
  }

  // The operands of all products of keys and queries, in the place of the rows and to memory. Returns whether pairs went by levels: then their products
  // are made already.
  __device__ __forceinline__ bool make_operands(typename Producer::Products& products, const Producer& make,
                                                int parity) const {
    const ChunkFwdParams& call = params.call;
    if (!params.vectorized) load_unaligned_inputs();
    const GateConstants constants(call, *next_rate(),
                                  *reinterpret_cast<const float2*>(next_bias() + make.channel_of(make.thread)));
    const RowValues values = rows(step());
    Operands operands(make.operands(constants));
    const uint32_t beta_bits = next_beta()[Config::C * step() + 8 * make.row_warp() + group()];
    if (params.vectorized) {
      wait_for(Copies::kFirst, parity);
    } else {
      __syncthreads();
    }

    const bool far_apart = prepare(make, operands, constants, beta_bits, parity);
    const StepOperands<Config> others = {raw(0),         shared,      scratch(1 - step()), operands.channel,
                                         operands.group, make.tokens, constants.unit};
    const float2 other = others.total_of(0, Operands::kGroups);
    store_decay(operands, operands.total_of(0, Operands::kGroups), other);
    const int64_t offset = tile * Config::kChunkKeyTileBytes + step() * Config::kRowsOfStepBytes;
    uint8_t* const queries_low = place.first_of_chain < 0
                                     ? nullptr
                                     : params.Q_gated_low + int64_t{place.first_of_chain} * Config::kChunkKeyTileBytes +
                                           step() * Config::kRowsOfStepBytes;
    const typename Operands::Destination destination(operands, params.Q_gated + offset, queries_low,
                                                     params.K_decayed + offset, values, is_later(), call.scale,
                                                     {ptx::ex2(other.x), ptx::ex2(other.y)});
    if (far_apart) {
      operands.leave_gates();
      make.multiply_by_levels(products, operands, values);
      make.sync();  // the last level's operands have been read
      operands.store_state_operands(destination);
    } else if (call.qk_l2norm) {
      operands.template store_with_middle_reference<true>(destination);
    } else {
      operands.template store_with_middle_reference<false>(destination);
    }
    return far_apart;
  }

  __device__ __forceinline__ Producer producer() const {
    const int first = Config::C * step(), of_group = thread % Config::kGroupThreads;
    const int tokens = min(max(location.tokens - first, 0), Config::C);
    uint8_t* const stage = shared + step() * Config::kRowsOfStepBytes;
    return {params.call, raw(step()), stage, scratch(step()), tokens, location.tokens - Config::C, 0, of_group, lane};
  }

  // at(i): the CTA's chunk `turn` + i, looked up in shared memory again by each part, as there are few registers. find: finds chunk
  // `turn` + 2, by one warp.
  template <typename At, typename Find>
  static __device__ __forceinline__ void run(unsigned turn, At at, Find find) {
    const auto here = [&] { return at(0); };
    const auto next = [&] { return at(1); };
    {
      typename Producer::Products products;
      float across[2][4] = {};
      {
        const IntraChunkSolve solve = here();
        const bool far_apart = solve.make_operands(products, solve.producer(), ptx::opaque(turn) & 1);
        __syncthreads();
        const IntraChunkSolve solve_pairs = here();
        const Producer make = solve_pairs.producer();
        if (!far_apart) {
          products = {};
          solve_pairs.multiply_across(make, across, products.tile);
        } else {
          solve_pairs.normalize(make, products);
          solve_pairs.multiply_across(make, across, nullptr);
        }
      }
      ptx::fence_proxy_async_shared();
      __syncthreads();  // all operands of pairs have been read
      here().load_values();
      next().load_first_inputs();
      const IntraChunkSolve solve = here();
      solve.store_products(solve.producer(), products, across);
    }
    const uint32_t parameter = next().raw_parameter();
    __syncthreads();
    here().copy_aqk();
    {
      const IntraChunkSolve solve = here();
      int barriers = 0;
      invert_unit_lower_64x64(solve.Akk(), solve.warp(), solve.lane, [&] {
        if (++barriers == 4) find();  // the finding warp has had one product, where others had four
        __syncthreads();
      });
    }
    next().keep_parameter(parameter);
    __syncthreads();
    here().store_inverse();
    here().wait_for_values(ptx::opaque(turn) & 1);
    ptx::fence_proxy_async_shared();  // the inverse has been read
    __syncthreads();
    next().load_last_inputs();
    const IntraChunkSolve solve = here();
    if (solve.makes_values_later()) {
#pragma unroll
      for (int first = 16 * solve.warp(); first < K; first += 16 * Config::kWarps) {
        solve.template multiply_keys<1>(first);
      }
      return;
    }
#pragma unroll
    for (int first = 16 * kUnits * solve.warp(); first < K + V; first += 16 * kUnits * Config::kWarps) {
      if (first < K) {
        solve.template multiply_keys<kUnits>(first);
      } else {
        solve.multiply_values(first - K);
      }
    }
  }
};

// What the stages that work beside each other count in, by the whole grid.
__device__ __forceinline__ void clear_progress(const ChunkFwdKernelParams& params) {
  if (params.progress == nullptr) return;
  const int64_t words = params.chunk_slots * params.call.problem.value_heads + 2 + params.followed_ctas;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < words; i += int64_t{gridDim.x} * blockDim.x) {
    params.progress[i] = 0;
  }
  __threadfence();
  __syncthreads();
}

// Where a CTA begins in the order of the tiles. Those that share a multiprocessor, of two a multiprocessor, are neighbours: then a last turn of fewer tiles
// leaves whole multiprocessors to the recurrences.
__device__ __forceinline__ uint32_t first_index(const ChunkFwdKernelParams& params) {
  static_assert(kSolveCtasPerSm == 2);
  const uint32_t half = gridDim.x / 2;
  if (params.followed_ctas == 0 || gridDim.x % 2 == 1) return blockIdx.x;
  return blockIdx.x < half ? 2 * blockIdx.x : 2 * (blockIdx.x - half) + 1;
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    intra_chunk_solve_kernel(const __grid_constant__ IntraChunkSolveParams given) {
  ChunkFwdKernelParams params = given.stage;
  fix<Config::kKind>(params.call);
  if constexpr (Config::kKind != CallKind::kAny) params.vectorized = true;
  using Solve = IntraChunkSolve<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  if (threadIdx.x == 0) mark(params, Mark::kSolveBegin, 0);
  clear_progress(params);
  ptx::launch_dependents();
  static_assert((Config::kThreads & (Config::kThreads - 1)) == 0);
  SolvePlace* const places = reinterpret_cast<SolvePlace*>(shared + Config::kPlaces);

  const auto place_of = [&](unsigned turn) -> SolvePlace& {
    return places[static_cast<unsigned>(ptx::opaque(turn)) % kSolvePlaces];
  };

  // The CTA's next chunk that has tokens, of those from a tile on, found by one warp.
  constexpr int kFindingWarp = 3;
  // Recurrences that follow want a last turn of neighbours.
  const uint32_t shift = params.followed_ctas > 0 ? 0 : TileOfTurn::kShift;
  const auto find = [&](TileOfTurn tile, unsigned turn) {
    const int thread = ptx::opaque(threadIdx.x), lane = thread & 31;
    if (thread >> 5 != kFindingWarp) return;
    const ChunkFwdParams& call = params.call;
    const ChunkDivisors& divisors = given.divisors;
    const uint32_t value_heads = call.problem.value_heads, heads = call.problem.heads;
    const int64_t tiles = params.chunk_slots * value_heads;  // fewer than 2^31
    const auto index_from_ends = [&] {
      const auto [chain_turn, chain] = divisors.chains.divide(tile.index);
      return ChunkIndex(divisors, chain, SolveOrder(divisors).chunk_at(chain_turn));
    };
    SolvePlace place = {{0, 0, 0}, 0, 0, 0, tile, -1};
#pragma unroll 1
    for (; tile.index < tiles && place.location.tokens == 0; tile = tile.next(gridDim.x, shift)) {
      const ChunkIndex chunk = params.followed_ctas > 0 ? index_from_ends() : ChunkIndex(divisors, tile.index);
      const int value_head = static_cast<int>(chunk.value_head);
      const int key_head = heads == value_heads ? value_head : value_head / static_cast<int>(value_heads / heads);
      const SlotOfSequence found = chunk.found(call, lane);
      const bool is_first = params.Q_gated_low != nullptr && found.is_first;
      const int chain = static_cast<int>(found.sequence) * static_cast<int>(value_heads) + value_head;
      place = {found.location, chunk.tile(divisors), value_head, key_head, tile, is_first ? chain : -1};
    }
    if (lane == 0) place_of(turn) = place;
  };
  const auto at = [&](unsigned turn) -> Solve {
    // What follows from the turn and from the thread is not kept. That the latter is below kThreads makes its quotients shifts.
    const SolvePlace& place = place_of(turn);
    const int thread = ptx::opaque(threadIdx.x) & (Config::kThreads - 1);
    return {params, given.maps, shared, thread, thread & 31, place, place.location, place.value_head, place.tile};
  };

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(at(0).loaded(Solve::Copies::kFirst), Solve::kFirstArrivals);
    ptx::mbarrier_init(at(0).loaded(Solve::Copies::kLast), 1);
    ptx::mbarrier_init(at(0).loaded(Solve::Copies::kValues), 1);
    ptx::fence_mbarrier_init();
  }
  find(TileOfTurn::begin(first_index(params)), 0);
  __syncthreads();
  at(0).load_first_inputs();
  at(0).load_last_inputs();
  at(0).keep_parameter(at(0).raw_parameter());
  find(places[0].at.next(gridDim.x, shift), 1);
  __syncthreads();
#pragma unroll 1
  for (unsigned turn = 0; at(turn).location.tokens > 0; ++turn) {
    if (threadIdx.x == 0) mark(params, Mark::kSolveChunk, places[turn % kSolvePlaces].tile);
    Solve::run(
        turn, [&](unsigned i) { return at(turn + i); },
        [&] { find(place_of(turn + 1).at.next(gridDim.x, shift), turn + 2); });
    if (params.followed_ctas > 0) SolveProgress(params).tell(place_of(turn).at.index);
  }
  if (threadIdx.x == 0) mark(params, Mark::kSolveEnd, 0);
}

}  // namespace kda
