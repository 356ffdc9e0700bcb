// Stage 1 of the staged path: the intra-chunk solve. For every chunk of 64 tokens and value head, G the cumulative log-gate and k of norm 1 if
// keys are normalised:
//   Aqk[i,j] = scale * sum_d q_i k_j exp(G_i - G_j)    (i >= j)
//   Akk[i,j] = beta_i * sum_d k_i k_j exp(G_i - G_j)   (i > j)
//   Tinv = (I + Akk)^-1 Diag(beta),   U0 = Tinv V,   W = Tinv (K ⊙ e^G)
// and the operands of the later stages,
//   Q_gated = scale * Q ⊙ e^G,   K_decayed = K ⊙ e^{G_C - G},   chunk_decay = e^{G_C}.
//
// Grid: one CTA for each (chunk slot, value head); 8 warps. The chunk is two steps of 32 tokens, earlier and later, of four warps each, which make
// pairs inside of them as in the forward (step_producer.cuh). For a pair across the steps exp(G_i - G_j) is split at the boundary between them: it
// is a product of rows of Q ⊙ e^G and K ⊙ e^G of the later step and of K ⊙ e^{G_C - G} of the earlier one. From the solve on a warp owns 16 columns
// of W or 16 rows of U0^T.
//
// Numerics: gate factors as in step_operands.cuh; if one step is out of range of one reference, both go by levels. q and k are normalised in fp32
// before they are gated and rounded. The diagonal of Aqk comes from q and k as they are in memory, whose products are exact. Tinv enters as the sum
// of two bf16 operands. The inverse is taken at fp32 accuracy (triangular_inverse.cuh). W of the later step is (Tinv K ⊙ e^G of that step) ⊙ e^{G_C}
// of the earlier one, in fp32, and the rest.
//
// Shared memory (bytes, K = V = 128):
//   rows of q, k, g 49152, with a second half of the gates in fp32 65536  ->  operands of pairs  ->  Akk and its inverse 17408, Aqk, high and low
//   part of Tinv 8192 each, V 16384
//   K ⊙ e^G 16384  ->  W, in place;   Q ⊙ e^G 16384
//   values of rows and channels 4352
// Registers: at most 128, so that two CTAs fit a multiprocessor. Every barrier is one of the whole CTA.
// Bound by latency between barriers, with memory not far behind at many heads: 64 KiB in and 97 KiB out for a chunk.
#pragma once

#include "intra_chunk_layout.cuh"
#include "step_producer.cuh"

namespace kda {

template <typename Config>
struct IntraChunkSolve {
  using Element = typename Config::Element;
  using Operands = StepOperands<Config>;
  using Producer = StepProducer<Config>;
  using KeyTile = typename Config::KeyTile;      // of a step
  using GatedTile = typename Config::GatedTile;  // of the chunk
  using PairTile = typename Config::ChunkPairTile;
  static constexpr int K = Config::K, V = Config::V, C = kChunkTokens;

  const ChunkFwdKernelParams& params;
  const TensorMaps& maps;
  uint8_t* const shared;
  const int thread, lane;
  const ChunkLocation location;
  const int value_head;
  const int64_t tile;  // slot * HV + value_head

  __device__ __forceinline__ int key_head() const {
    return value_head / (params.call.problem.value_heads / params.call.problem.heads);
  }
  __device__ __forceinline__ int warp() const { return thread >> 5; }
  __device__ __forceinline__ int group() const { return lane >> 2; }
  __device__ __forceinline__ int member() const { return lane & 3; }
  __device__ __forceinline__ int step() const { return thread / Config::kGroupThreads; }
  __device__ __forceinline__ bool is_later() const { return step() == 1; }
  __device__ __forceinline__ uint8_t* raw(int of_step) const { return shared + of_step * Config::kRawBytes; }
  __device__ __forceinline__ uint8_t* scratch(int of_step) const {
    return shared + Config::kScratch + of_step * Config::kScratchBytes;
  }
  __device__ __forceinline__ RowValues rows(int of_step) const {
    return RowValues(scratch(of_step) + Config::kRowValues);
  }
  __device__ __forceinline__ SolveMatrix Akk() const { return {reinterpret_cast<float*>(shared + Config::kSolve)}; }
  __device__ __forceinline__ float* beta() const { return reinterpret_cast<float*>(shared + Config::kBeta); }
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

  __device__ __forceinline__ uint32_t loaded(int i) const {
    return ptx::shared_address(shared) + Config::kBarriers + 8 * i;
  }

  // q, k and g, if they are aligned, by one thread. Rows past the end are of any content.
  __device__ __forceinline__ void load_inputs() const {
    const bool gate_is_fp32 = params.call.gate_type == DataType::kFloat32;
    const int token = static_cast<int>(location.first_token), batch = static_cast<int>(location.batch);
    const int of_key = key_head();
    ptx::mbarrier_arrive_expect_tx(loaded(0), Config::kSteps * (gate_is_fp32 ? 4 : 3) * Config::kKeyTileBytes);
#pragma unroll
    for (int i = 0; i < Config::kSteps; ++i) {
      const uint32_t rows = ptx::shared_address(raw(i));
      const int first = token + i * Config::C;
      ptx::cp_async_bulk_tensor_load(rows + Config::kRawQ, &maps.q, 0, first, 0, of_key, batch, loaded(0));
      ptx::cp_async_bulk_tensor_load(rows + Config::kRawK, &maps.k, 0, first, 0, of_key, batch, loaded(0));
      ptx::cp_async_bulk_tensor_load(rows + Config::kRawG, &maps.g, 0, first, 0, value_head, batch, loaded(0));
    }
  }

  // If they are not, by all.
  __device__ __forceinline__ void load_unaligned_inputs() const {
    const ChunkFwdParams& call = params.call;
    const auto place = [&](int region) {
      return [this, region](int token, int unit) {
        return raw(token / Config::C) + region + KeyTile::unit_offset(token % Config::C, unit);
      };
    };
    load_rows<2 * K>(call.q, call.q_stride, key_head(), 2, place(Config::kRawQ));
    load_rows<2 * K>(call.k, call.k_stride, key_head(), 2, place(Config::kRawK));
    if (call.gate_type == DataType::kFloat32) {
      load_rows<4 * K>(call.g, call.g_stride, value_head, 4, place(Config::kRawG));
    } else {
      load_rows<2 * K>(call.g, call.g_stride, value_head, 2, place(Config::kRawG));
    }
  }

  // V, by the first thread or, if inputs are not aligned, by all. After a barrier that a fence of all threads precedes: they have read what was there.
  __device__ __forceinline__ void load_values() const {
    const ChunkFwdParams& call = params.call;
    if (params.vectorized) {
      if (thread != 0) return;
      const int token = static_cast<int>(location.first_token), batch = static_cast<int>(location.batch);
      ptx::mbarrier_arrive_expect_tx(loaded(1), C * V * 2);
#pragma unroll
      for (int i = 0; i < Config::kSteps; ++i) {
#pragma unroll
        for (int block = 0; block < V / 64; ++block) {
          const uint32_t rows =
              ptx::shared_address(shared + Config::kValues) + GatedTile::unit_offset(i * Config::C, 8 * block);
          ptx::cp_async_bulk_tensor_load(rows, &maps.v, 0, token + i * Config::C, block, value_head, batch, loaded(1));
        }
      }
      return;
    }
    load_rows<2 * V>(call.v, call.v_stride, value_head, 2, [this](int token, int unit) {
      return shared + Config::kValues + GatedTile::unit_offset(token, unit);
    });
  }

  // Waits for V. Rows past the end, where those of another sequence may lie, become zero: a barrier then follows for all.
  __device__ __forceinline__ void wait_for_values() const {
    if (!params.vectorized) return;
    ptx::mbarrier_wait_parity(loaded(1), 0);
    if (location.tokens == C) return;
#pragma unroll 1
    for (int i = thread; i < C * V / 8; i += Config::kThreads) {
      const int token = i / (V / 8);
      if (token < location.tokens) continue;
      *reinterpret_cast<uint4*>(shared + Config::kValues + GatedTile::unit_offset(token, i % (V / 8))) = {0, 0, 0, 0};
    }
  }

  // Operands of a step are made of q / |q| and k / |k|, and go to the later stages in memory and to what follows here.
  template <bool kIsLater>
  struct Destination {
    using Token = typename Operands::Token;
    static constexpr bool kScales = true;
    const Operands& operands;
    uint8_t* const queries;  // rows of the step of Q_gated
    uint8_t* const keys;     // rows of the step of K_decayed
    const RowValues rows;
    const float2 query_factor;  // scale, times the decay of the earlier step
    const float2 later_decay;   // for the earlier step
    float inverse_q[4], inverse_k[4];

    __device__ __forceinline__ Destination(const Operands& operands_, uint8_t* queries_, uint8_t* keys_,
                                           const RowValues& rows_, float scale, float2 other_decay)
        : operands(operands_),
          queries(queries_),
          keys(keys_),
          rows(rows_),
          query_factor{kIsLater ? scale * other_decay.x : scale, kIsLater ? scale * other_decay.y : scale},
          later_decay(other_decay) {}

    template <typename First>
    __device__ __forceinline__ void prepare(First first) {
      const int four = first();
      Producer::load(inverse_q, rows.output_scale + four);
      Producer::load(inverse_k, rows.key_norm + four);
    }
    __device__ __forceinline__ float2 scaled_query(Token t, float2 q) const {
      return {q.x * inverse_q[t.n], q.y * inverse_q[t.n]};
    }
    __device__ __forceinline__ float2 scaled_key(Token t, float2 k) const {
      return {k.x * inverse_k[t.n], k.y * inverse_k[t.n]};
    }
    __device__ __forceinline__ void query(Token t, float2 x) const {
      if constexpr (kIsLater) *operands.gated_query(t) = pack_bf16(x.x, x.y);
      *operands.template pair<GatedTile>(queries, t) = pack_bf16(x.x * query_factor.x, x.y * query_factor.y);
    }
    __device__ __forceinline__ void key(Token t, float2 x) const { *operands.gated_key(t) = pack_bf16(x.x, x.y); }
    __device__ __forceinline__ void decayed_key(Token t, float2 x) const {
      uint32_t packed = pack_bf16(x.x, x.y);
      if constexpr (!kIsLater) {
        *operands.row_pair(Config::kSecondGate, t) = packed;
        packed = pack_bf16(x.x * later_decay.x, x.y * later_decay.y);
      }
      *operands.template pair<GatedTile>(keys, t) = packed;
    }
  };

  // e^{G_C} of the chunk: from the sum of the log-gates, so that very slow gates keep their bits over thousands of chunks.
  __device__ __forceinline__ void store_decay(const Operands& operands, float2 own, float2 other) const {
    if (is_later() || operands.group != 0) return;
    *reinterpret_cast<float2*>(earlier_decay() + operands.channel) = {ptx::ex2(own.x), ptx::ex2(own.y)};
    *reinterpret_cast<float2*>(params.chunk_decay + tile * K + operands.channel) = {ptx::ex2(own.x + other.x),
                                                                                    ptx::ex2(own.y + other.y)};
  }

  // Pairs of the later step's tokens 8 w .. 8 w + 7 with 16 of the earlier step's: elements 0, 1 belong to q k^T, 2, 3 to k k^T.
  __device__ __forceinline__ void multiply_across(const Producer& make, float (&d)[2][4]) const {
    const int matrix = lane >> 3, row = lane & 7;
    const uint32_t keys = ptx::shared_address(shared) + Config::kGated + Config::kRowsOfStepBytes;
    const uint32_t later = matrix & 1 ? keys : keys + Config::kGatedQueries;
    const uint32_t earlier = ptx::shared_address(raw(0)) + Config::kSecondGate;
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      uint32_t a[4], b[4];
      ptx::ldmatrix_x4(a, later + GatedTile::unit_offset(8 * make.row_warp() + row, 2 * kt + (matrix >> 1)));
      ptx::ldmatrix_x4(b, earlier + KeyTile::unit_offset(16 * step() + 8 * (matrix >> 1) + row, 2 * kt + (matrix & 1)));
      ptx::mma_m16n8k16_bf16(d[0], a[0], a[1], a[2], a[3], b[0], b[1]);
      ptx::mma_m16n8k16_bf16(d[1], a[0], a[1], a[2], a[3], b[2], b[3]);
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

  // Aqk and Akk of the warp's rows, and beta. What is not a pair is dropped by selection: it may be inf or NaN.
  __device__ __forceinline__ void store_products(const Producer& make, const typename Producer::Products& products,
                                                 const float (&across)[2][4]) const {
    const float scale = params.call.scale;
    const int pair = 2 * member(), first = Config::C * step();
    const int row = 8 * make.row_warp() + group();  // of a step
    const RowValues own = rows(step());
    const float strength = own.write[row], later_strength = rows(1).write[row];
    const float diagonal = own.query_key[row] * (own.output_scale[row] * own.key_norm[row]);
    if (member() == 0) beta()[first + row] = strength;
    const auto store_aqk = [&](int i, int j, float x, float y) {
      *reinterpret_cast<uint32_t*>(shared + Config::kAqk + PairTile::pair_offset(i, j)) =
          pack_bf16(scale * x, scale * y);
    };
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = 8 * n + pair;
      const float(&p)[4] = products.tile[n];
      const auto select = [&](float value, int j) { return j < row ? value : (j == row ? diagonal : 0.0f); };
      store_aqk(first + row, first + column, select(p[0], column), select(p[1], column + 1));
      if (n <= make.row_warp()) {
        *reinterpret_cast<float2*>(&Akk().at(first + row, first + column)) = {strength * p[2], strength * p[3]};
      }
      if (!is_later()) store_aqk(row, Config::C + column, 0.0f, 0.0f);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = 16 * step() + 8 * n + pair;
      const float(&p)[4] = across[n];
      store_aqk(Config::C + row, column, p[0], p[1]);
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
    if (first > row) return;
    float t[16], write[16];
    Producer::load(t, &Akk().at(row, first));
    Producer::load(write, beta() + first);
    if (row - first < 8) {  // a block of 8 above the diagonal
#pragma unroll
      for (int i = 8; i < 16; ++i) t[i] = 0.0f;
    }
    const uint32_t offset[2] = {PairTile::unit_offset(row, first / 8), PairTile::unit_offset(row, first / 8 + 1)};
    const auto store = [&](uint8_t* destination, const uint32_t(&v)[8]) {
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        *reinterpret_cast<uint4*>(destination + offset[unit]) = {v[4 * unit], v[4 * unit + 1], v[4 * unit + 2],
                                                                 v[4 * unit + 3]};
      }
    };
    uint32_t high[8], low[8];
    if (params.inverse != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) high[i] = pack_bf16(t[2 * i], t[2 * i + 1]);
      store(params.inverse + tile * Config::kChunkPairTileBytes, high);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const SplitBf16 split(t[2 * i] * write[2 * i], t[2 * i + 1] * write[2 * i + 1]);
      high[i] = split.high, low[i] = split.low;
    }
    store(shared + Config::kTinvHigh, high);
    store(shared + Config::kTinvLow, low);
  }

  // W = Tinv (K ⊙ e^G) for 16 channels, by one warp, over K ⊙ e^G and from there to memory.
  __device__ __forceinline__ void multiply_keys(int channel) const {
    const uint32_t base = ptx::shared_address(shared);
    const uint32_t keys = base + Config::kGated, high = base + Config::kTinvHigh, low = base + Config::kTinvLow;
    float acc[4][2][4] = {};
    const auto multiply = [&](int kt) {
      uint32_t b[4];
      GatedTile::load_b_trans(b, keys, 16 * kt, channel, lane);
#pragma unroll
      for (int mt = kt; mt < 4; ++mt) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          uint32_t a[4];
          PairTile::load_a(a, part == 0 ? high : low, 16 * mt, 16 * kt, lane);
          ptx::mma_m16n8k16_bf16(acc[mt][0], a[0], a[1], a[2], a[3], b[0], b[1]);
          ptx::mma_m16n8k16_bf16(acc[mt][1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
    };
    multiply(2);
    multiply(3);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 decay = *reinterpret_cast<const float2*>(earlier_decay() + channel + 8 * n + 2 * member());
#pragma unroll
      for (int mt = 2; mt < 4; ++mt) {
        acc[mt][n][0] *= decay.x, acc[mt][n][1] *= decay.y;
        acc[mt][n][2] *= decay.x, acc[mt][n][3] *= decay.y;
      }
    }
    multiply(0);
    multiply(1);
    __syncwarp();  // the warp has read all of its columns
#pragma unroll
    for (int mt = 0; mt < 4; ++mt) {
      const float(&x)[2][4] = acc[mt];
      const uint32_t packed[4] = {pack_bf16(x[0][0], x[0][1]), pack_bf16(x[0][2], x[0][3]), pack_bf16(x[1][0], x[1][1]),
                                  pack_bf16(x[1][2], x[1][3])};
      GatedTile::store_a(packed, keys, 16 * mt, channel, lane);
    }
    __syncwarp();
    uint8_t* const destination = params.W + tile * Config::kChunkKeyTileBytes;
#pragma unroll
    for (int token = 0; token < C; token += 16) {
      const uint32_t offset = GatedTile::unit_offset(token + lane / 2, channel / 8 + lane % 2);
      *reinterpret_cast<uint4*>(destination + offset) =
          *reinterpret_cast<const uint4*>(shared + Config::kGated + offset);
    }
  }

  // U0^T = V^T Tinv^T for 16 rows, by one warp, straight to the workspace in accumulator order.
  __device__ __forceinline__ void multiply_values(int row_tile) const {
    const uint32_t base = ptx::shared_address(shared);
    const uint32_t high_tile = base + Config::kTinvHigh, low_tile = base + Config::kTinvLow;
    float acc[8][4] = {};
#pragma unroll
    for (int kt = 0; kt < 4; ++kt) {
      uint32_t a[4];
      GatedTile::load_a_trans(a, base + Config::kValues, 16 * kt, 16 * row_tile, lane);
      uint32_t value[4], value_low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const SplitBf16 split = Packed2<Element>::split(a[i]);
        value[i] = split.high, value_low[i] = split.low;
      }
#pragma unroll
      for (int nt = kt; nt < 4; ++nt) {
        uint32_t high[4], low[4];
        PairTile::load_b(high, high_tile, 16 * nt, 16 * kt, lane);
        PairTile::load_b(low, low_tile, 16 * nt, 16 * kt, lane);
        const auto multiply = [&](const uint32_t(&v)[4], const uint32_t(&b)[4]) {
          ptx::mma_m16n8k16_bf16(acc[2 * nt], v[0], v[1], v[2], v[3], b[0], b[1]);
          ptx::mma_m16n8k16_bf16(acc[2 * nt + 1], v[0], v[1], v[2], v[3], b[2], b[3]);
        };
        multiply(value, high);
        multiply(value, low);
        if constexpr (!std::is_same_v<Element, BFloat16>) multiply(value_low, high);
      }
    }
    float4* const destination =
        reinterpret_cast<float4*>(params.U) + (tile * (V / 16) + row_tile) * (C / 8) * 32 + lane;
#pragma unroll
    for (int n = 0; n < 8; ++n) destination[n * 32] = {acc[n][0], acc[n][1], acc[n][2], acc[n][3]};
  }

  __device__ __forceinline__ void run() const {
    const ChunkFwdParams& call = params.call;
    if (!params.vectorized) load_unaligned_inputs();
    const int first = Config::C * step(), of_group = thread % Config::kGroupThreads;
    const int tokens = min(max(location.tokens - first, 0), Config::C);
    uint8_t* const stage = shared + step() * Config::kRowsOfStepBytes;
    const Producer make{call, raw(step()), stage, scratch(step()), tokens, location.tokens - Config::C,
                        0,    of_group,    lane};
    const GateConstants constants(call, value_head, make.channel_of(of_group));
    const uint32_t beta_bits = BetaReader(call, location.batch, location.first_token + first,
                                          location.first_token + location.tokens, value_head, of_group)
                                   .next(call, Config::C);
    const RowValues values = rows(step());
    const Operands operands = make.operands(constants);
    if (params.vectorized) {
      ptx::mbarrier_wait_parity(loaded(0), 0);
    } else {
      __syncthreads();
    }

    // One answer for both steps: they go through the same barriers.
    const bool far_apart = make.prepare(operands, constants, values, beta_bits);
    typename Producer::Products products;
    {
      const Operands others = {raw(0),         shared, scratch(1 - step()), operands.channel,
                               operands.group, tokens, constants.unit};
      const float2 other = others.total_of(0, Operands::kGroups);
      store_decay(operands, operands.total_of(0, Operands::kGroups), other);
      const float2 other_decay = {ptx::ex2(other.x), ptx::ex2(other.y)};
      const int64_t offset = tile * Config::kChunkKeyTileBytes + step() * Config::kRowsOfStepBytes;
      if (far_apart) {
        make.multiply_by_levels(products, operands, values);
        make.sync();  // the last level's operands have been read
      }
      const auto store = [&](auto destination) {
        if (!far_apart) {
          operands.store_with_middle_reference(destination);
        } else {
          operands.store_state_operands(destination);
        }
      };
      uint8_t* const queries = params.Q_gated + offset;
      uint8_t* const keys = params.K_decayed + offset;
      if (is_later()) {
        store(Destination<true>(operands, queries, keys, values, call.scale, other_decay));
      } else {
        store(Destination<false>(operands, queries, keys, values, call.scale, other_decay));
      }
    }
    __syncthreads();
    if (!far_apart) {
      make.multiply_with_middle_reference(products);
    } else {
      normalize(make, products);
    }
    float across[2][4] = {};
    multiply_across(make, across);
    ptx::fence_proxy_async_shared();
    __syncthreads();  // all operands of pairs have been read

    load_values();
    store_products(make, products, across);
    __syncthreads();
    copy_aqk();
    invert_unit_lower_64x64(Akk(), warp(), lane, [&] { make.sync(); });
    __syncthreads();
    store_inverse();
    wait_for_values();
    __syncthreads();
#pragma unroll
    for (int unit = warp(); unit < (K + V) / 16; unit += Config::kWarps) {
      if (unit < K / 16) {
        multiply_keys(16 * unit);
      } else {
        multiply_values(unit - K / 16);
      }
    }
  }
};

// What the recurrences and those beside them count in, by the whole grid.
__device__ __forceinline__ void clear_progress(const ChunkFwdKernelParams& params) {
  if (params.progress == nullptr) return;
  const int64_t words = params.chunk_slots * params.call.problem.value_heads + 1;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < words; i += int64_t{gridDim.x} * blockDim.x) {
    params.progress[i] = 0;
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    intra_chunk_solve_kernel(const __grid_constant__ IntraChunkSolveParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  clear_progress(params.stage);
  struct Chunk {
    ChunkLocation location;
    int value_head;
  };
  Chunk& chunk = *reinterpret_cast<Chunk*>(shared + Config::kChunk);
  static_assert(sizeof(Chunk) <= Config::kChunkBytes);
  const int thread = threadIdx.x, lane = thread & 31;
  const auto solve = [&] {
    return IntraChunkSolve<Config>{params.stage, params.maps,    shared,           thread,
                                   lane,         chunk.location, chunk.value_head, blockIdx.x};
  };
  if (thread < 32) {
    const ChunkFwdParams& call = params.stage.call;
    const unsigned value_heads = call.problem.value_heads, slot = blockIdx.x / value_heads;
    const ChunkLocation location = locate_chunk(call, slot, lane);
    if (lane == 0) {
      chunk = {location, static_cast<int>(blockIdx.x - slot * value_heads)};
      const IntraChunkSolve<Config> here = solve();
      ptx::mbarrier_init(here.loaded(0), 1);
      ptx::mbarrier_init(here.loaded(1), 1);
      ptx::fence_mbarrier_init();
      if (location.tokens > 0 && params.stage.vectorized) here.load_inputs();
    }
  }
  __syncthreads();
  if (chunk.location.tokens == 0) return;
  solve().run();
}

}  // namespace kda
