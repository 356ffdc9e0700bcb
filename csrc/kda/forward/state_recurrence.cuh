// Stage 2 of the staged forward: the hidden-state recurrence over the chunks of one sequence,
//   U = U0 - W S,      S' = Diag(e^{G_C}) S + K_decayed^T U,
// writing, for stage 3, the state at the entry of each chunk in bf16 and U as bf16 MMA operands, U in the place of U0; for the backward,
// U in one part, with what that leaves out of the last chunk of a sequence.
//
// Grid: one CTA for each (sequence, value head, value tile). The state is kept transposed, S^T [V, K], in fp32
// accumulators for the whole sequence, so that they feed the next product as its A operand from registers; a warpgroup owns 64
// rows of V and all of K:
//   U^T  = U0^T - S^T W^T                      A = S^T, its accumulators rounded to bf16;  B = W [C, K]
//   S'^T = S^T Diag(e^{G_C}) + U^T K_decayed   A = U^T, as a sum of two bf16 operands;     B = K_decayed [C, K]
// Where sequences are cut, the grid has a CTA for each segment in the place of the sequence, which begins with the state at the end of the
// segment before. That comes from the affine maps of the segments, S_end = M S_entry + B (segment_compose.cuh): a summary of each segment,
// which writes nothing else, finds B from zero, or from the initial state in the first one, and M from the identity without U0.
//
// Where one CTA takes all of V for the backward, it makes U0 = A^-1 Diag(beta) V itself, from A^-1 in one bf16, which the backward has anyway, and beta V
// in two: with many heads memory bounds this stage and the one before, and U0 in fp32 was the largest of what went between them. (With few heads the chain
// bounds it, in which the products of U0 would be.)
//   -U0^T = (-beta V)^T A^-T                   A = rows of V^T times -beta, as a sum of two bf16 operands;  B = A^-1 [C, C]
// Its operands are made beside the last product of the chunk before, and W S is added to it.
//
// Another warpgroup, the movers, keeps a ring of stages filled with bulk copies, through which every chunk of the sequence goes once, and
// gives what the consumers leave in shared memory to the copy engine; rows of V come by 16-byte units, those past the end zero. In a backward they may
// follow stage 1 chunk by chunk (solve_progress.cuh).
//
// Shared memory of one stage (bytes, K = 128): W and K_decayed 16384 each, U0 of the value tile 16384 for each 64 rows,
// chunk_decay 512; in the place of U0, where it is made here, A^-1 8192, beta 256, rows of V 8192 for each 64 of them and 1024. Behind the ring 24576 for
// each 64 rows, through which S and U leave.
// Bound by the chain from S to S': two products with each other's results, K / 16 instructions of 64 x 64 x 16 and 8 of
// 64 x K x 16, and the two conversions between them.
#pragma once

#include <type_traits>

#include "../device/timeline.cuh"
#include "kernel_params.h"
#include "recurrence_values.cuh"

namespace kda {

// kSaves: what the backward needs is written. kSummary: only what becomes of the state in each segment of a cut. Element: of V, if U0 is
// made from it, else void.
template <int K_, int kGroups_, bool kSaves_, bool kSummary_ = false, typename Element_ = void>
struct StateRecurrenceConfig : RecurrenceThreads<kGroups_> {
  using Threads = RecurrenceThreads<kGroups_>;
  using Threads::kRows, Threads::kFillers;
  static constexpr int K = K_, C = kChunkTokens, kGroups = kGroups_;
  static constexpr bool kSaves = kSaves_, kSummary = kSummary_;
  using Element = Element_;
  static constexpr bool kMakesValues = !std::is_void_v<Element>;
  static_assert(!kMakesValues || (kSaves && !kSummary), "of a backward, which has the inverse");
  using KeyTile = BlockedTile<C>;
  static constexpr int kMaxStages = 4;

  static constexpr int kKeyTileBytes = C * K * 2, kPairTileBytes = C * C * 2;
  static constexpr int kDecayBytes = K * 4, kBetaBytes = C * 4;
  static constexpr int kU0Bytes = kRows * C * 4;
  static constexpr int kRowBytes = kRows * 2, kRowPitch = kRowBytes + 16;  // of V: free of bank conflicts

  // Offsets inside one stage.
  static constexpr int kW = 0;
  static constexpr int kKeyDecayed = kW + kKeyTileBytes;
  static constexpr int kU0 = kKeyDecayed + kKeyTileBytes, kInverse = kU0;
  static constexpr int kDecay = kU0 + (kMakesValues ? kPairTileBytes : kU0Bytes);
  static constexpr int kBeta = kDecay + kDecayBytes;
  static constexpr int kLoadedBytes = kBeta + (kMakesValues ? kBetaBytes : 0);  // by bulk copies
  static constexpr int kValues = kLoadedBytes;
  static constexpr int kUsedBytes = kValues + (kMakesValues ? C * kRowPitch : 0);
  static constexpr int kStageBytes = (kUsedBytes + 1023) / 1024 * 1024;  // operands of wgmma start at multiples

  // Who arrives at the barrier of a stage besides the bytes of bulk copies.
  static constexpr int kArrivals = 1 + (kMakesValues ? kFillers : 0);

  using Staged = StagedOperands<K, kSaves ? C / 16 : 0, kRows>;
};

// The same rows of the map itself, one of the tiles [K, K], in tiles of its transpose.
template <int K>
__device__ __forceinline__ void store_map_transposed(StateFragments<K>& rows, float* maps, int64_t tile, int row_tile,
                                                     int lane) {
  float* const map = maps + tile * K * K + row_tile * 16 * 16;
  rows.for_each(lane,
                [&](float value, int row, int channel) { map[(channel / 16 * K + row) * 16 + channel % 16] = value; });
}

// What the high part of U leaves out in the last chunk of a sequence, as operands B: the matrices of its fragments are transposed.
template <typename Config>
__device__ __forceinline__ void store_value_roundings(const ChunkFwdKernelParams& params, const RecurrenceBlock& block,
                                                      const uint32_t (&low)[Config::C / 16][4], int lane) {
  const ChunkFwdProblem& problem = params.call.problem;
  const int64_t tile =
      block.chain(problem.value_heads) * (problem.value_dim / 16) + block.row_tile(ptx::opaque(threadIdx.x));
  uint4* const destination = params.U_low + tile * (Config::C / 16) * 32 + lane;
#pragma unroll
  for (int kt = 0; kt < Config::C / 16; ++kt) {
    destination[kt * 32] = {ptx::movmatrix_trans(low[kt][0]), ptx::movmatrix_trans(low[kt][1]),
                            ptx::movmatrix_trans(low[kt][2]), ptx::movmatrix_trans(low[kt][3])};
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    state_recurrence_kernel(const __grid_constant__ ChunkFwdKernelParams params, int stages) {
  constexpr int K = Config::K, C = Config::C;
  using KeyTile = typename Config::KeyTile;
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.call;
  const int V = call.problem.value_dim, value_heads = call.problem.value_heads;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

  const RecurrenceSegments& segments = params.segments;
  const RecurrenceBlock found(call, segments.chunks, Config::kRows,
                              Config::kSummary && segments.state == nullptr ? 0 : V / Config::kRows,
                              Config::kSummary ? K / Config::kRows : 0, lane);
  // Beside stage 1 the movers wait for each chunk instead, and in the end for all.
  if (params.followed_ctas == 0) {
    ptx::wait_for_kernel_before();  // before any return: who waits for this kernel relies on those before it, too
  }
  if (!found.segment.is_used) {
    ptx::wait_for_kernel_before();
    return;
  }
  // The end of the last segment is wanted by no other one; from the first on, the state is known.
  if (Config::kSummary && (found.segment.is_last || (found.is_map && found.segment.is_first))) return;

  const StageRing stage_ring = {static_cast<uint32_t>(ptx::opaque(ptx::shared_address(shared))), stages,
                                Config::kStageBytes};
  if (Config::kSummary && found.is_map) {  // U0 = 0
    for (int i = threadIdx.x; i < stages * (Config::kU0Bytes / 16); i += Config::kThreads) {
      const int stage = i / (Config::kU0Bytes / 16), unit = i % (Config::kU0Bytes / 16);
      *reinterpret_cast<uint4*>(shared + stage * Config::kStageBytes + Config::kU0 + 16 * unit) = {0, 0, 0, 0};
    }
  }
  stage_ring.init(shared, found, Config::kArrivals, Config::kConsumers);
  if (threadIdx.x == 0) mark(params, Mark::kStateBegin, 0);
  ptx::launch_dependents();  // the reverse recurrence needs nothing of this one, and finds room beside it
  uint8_t* const staging = shared + staging_offset<Config>(stages);
  using Staged = typename Config::Staged;

  if (Config::is_mover()) {
    ptx::setmaxnreg_dec<Config::kMoverRegisters>();
    const RecurrenceBlock block = stage_ring.block(shared);
    const int64_t first_tile = block.first_tile;
    const int chunks = static_cast<int>(block.segment.chunks), first_row_tile = block.first_row_tile;
    const bool is_map = Config::kSummary && block.is_map;
    if (Config::is_mover(Config::kStores)) {
      if (Config::kSummary || lane > 0) return;
      const int64_t first_operands = first_tile * (V / 16) + first_row_tile;
      const int64_t operands_of_chunk = static_cast<int64_t>(value_heads) * (V / 16);
      uint8_t* states = params.state + first_operands * Staged::kStateBytes;
      uint8_t* values = reinterpret_cast<uint8_t*>(params.U_rounded) + first_operands * Staged::kValueBytes;
      stage_ring.store_staged(chunks, stage_ring.stored(shared),
                              [&] { Staged::template store<false>(states, values, staging, operands_of_chunk); });
      return;
    }
    if (Config::is_mover(Config::kTells)) {
      if (Config::kSummary || lane > 0 || params.progress == nullptr) return;
      StageRing::tell_stored(chunks, stage_ring.stored(shared), [&](int chunk) {
        mark(params, Mark::kStateChunks, chunk);
        return params.progress + first_tile + int64_t{chunk} * value_heads;
      });
      return;
    }
    SolvedChunks solved = {params, chunks, /*is_reversed=*/false};
    const MovedValues<Config> rows(call, block, threadIdx.x - Config::kConsumers);
    const auto fill = [&](int chunk, int i) {
      const uint32_t stage = stage_ring.stage(i), barrier = stage_ring.full(i);
      if constexpr (Config::kMakesValues) {
        rows.copy(shared + i * Config::kStageBytes + Config::kValues, chunk, barrier, params.vectorized);
      }
      if (warp > Config::kConsumers / 32) return;
      solved.wait_for(chunk, Config::kRows, lane);
      if (lane > 0) return;
      const int64_t tile = first_tile + int64_t{chunk} * value_heads;
      ptx::mbarrier_arrive_expect_tx(barrier, Config::kLoadedBytes - (is_map ? Config::kU0Bytes : 0));
      ptx::cp_async_bulk_load(stage + Config::kW, params.W + tile * Config::kKeyTileBytes, Config::kKeyTileBytes,
                              barrier);
      if constexpr (Config::kMakesValues) {
        ptx::cp_async_bulk_load(stage + Config::kInverse, params.inverse + tile * Config::kPairTileBytes,
                                Config::kPairTileBytes, barrier);
        ptx::cp_async_bulk_load(stage + Config::kBeta, params.beta + tile * C, Config::kBetaBytes, barrier);
      } else if (!is_map) {
        ptx::cp_async_bulk_load(stage + Config::kU0, params.U + (tile * (V / 16) + first_row_tile) * (C / 8) * 32,
                                Config::kU0Bytes, barrier);
      }
      ptx::cp_async_bulk_load(stage + Config::kKeyDecayed, params.K_decayed + tile * Config::kKeyTileBytes,
                              Config::kKeyTileBytes, barrier);
      ptx::cp_async_bulk_load(stage + Config::kDecay, params.chunk_decay + tile * K, Config::kDecayBytes, barrier);
    };
    stage_ring.fill_stages(chunks, fill, [](RingPosition) {});
    ptx::wait_for_kernel_before();
    return;
  }
  ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
  const RecurrenceBlock block = stage_ring.block(shared);
  const SegmentLocation& segment = block.segment;
  const int64_t first_tile = block.first_tile;
  const int chunks = static_cast<int>(segment.chunks);
  const bool is_map = Config::kSummary && block.is_map;

  // Rows 16 * row_tile .. + 15 of S^T.
  const int row_tile = block.row_tile(threadIdx.x), first_row = row_tile * 16;
  StateFragments<K> state;
  if (segment.is_first) {
    load_initial_state(state, call, segment.sequence, block.value_head, first_row, lane);
  } else if constexpr (Config::kSummary) {
    begin_summary(state, is_map, first_row, lane);
  } else {  // the end of the segment before
    state.load_fragments(block.fragments<K>(segments.state, call, threadIdx.x, -1), lane);
  }

  uint4* u_operands = params.U + (first_tile * (V / 16) + row_tile) * (C / 8) * 32 + lane;  // of the current chunk

  const int last_chunk = segment.is_last ? chunks - 1 : -1;  // of the sequence

  RingPosition ring;
  ValueOperands<Config> values;
  if constexpr (Config::kMakesValues) {
    if (chunks > 0) {
      ptx::mbarrier_wait_parity(stage_ring.full(0), 0);
      values.load(stage_ring.stage(0), shared, warp, lane);
    }
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float u[C / 8][4];  // (W S)^T; where U0 is made here, less U0^T
    if constexpr (Config::kMakesValues) values.multiply(u, stage_ring.stage(ring.stage));
    if (!Config::kSummary && __builtin_expect(call.chunk_states != nullptr, 0)) {
      store_state(call.chunk_states, first_tile + int64_t{chunk} * value_heads, state, call, first_row, lane);
    }
    uint32_t s[K / 16][4];
    state.to_operands(s);

    if constexpr (!Config::kMakesValues) {
      ptx::mbarrier_wait_parity(stage_ring.full(ring.stage), ring.parity);
    }
    const uint32_t stage = stage_ring.stage(ring.stage);
    const uint8_t* const stage_data = shared + ring.stage * Config::kStageBytes;

    scale_channels(state, stage_data + Config::kDecay, lane);

    wgmma::fence();
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      const uint64_t w = wgmma::descriptor(stage + Config::kW + channels_at<KeyTile>(kt), 0);
      wgmma::m64n64k16_bf16<false>(u, s[kt], w, Config::kMakesValues || kt > 0);
    }
    wgmma::commit_group();

    const float4* const u0 = reinterpret_cast<const float4*>(stage_data + Config::kU0) + warp * (C / 8) * 32 + lane;
    float4 corrected[C / 8];
#pragma unroll
    for (int n = 0; n < C / 8; ++n) corrected[n] = Config::kMakesValues ? float4{0, 0, 0, 0} : u0[n * 32];
    wgmma::wait_group<0>();
    wgmma::pin(u);

    // U^T as A operands: their high parts, and what those leave out. Each is on its way while the next is made.
    uint32_t high[C / 16][4], low[C / 16][4];
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&ws)[4] = u[2 * kt + half];
        const float4& c = corrected[2 * kt + half];
        const SplitBf16 upper(c.x - ws[0], c.y - ws[1]), lower(c.z - ws[2], c.w - ws[3]);
        high[kt][2 * half] = upper.high, high[kt][2 * half + 1] = lower.high;
        low[kt][2 * half] = upper.low, low[kt][2 * half + 1] = lower.low;
      }
      const uint64_t keys = wgmma::descriptor(stage + Config::kKeyDecayed + tokens_at(kt), KeyTile::kBlockBytes);
      wgmma::fence();
      multiply_rows<true>(state.acc, high[kt], keys);
      multiply_rows<true>(state.acc, low[kt], keys);
    }
    wgmma::commit_group();
    if (!Config::kSummary && params.wants_output) {
#pragma unroll
      for (int kt = 0; kt < C / 16; ++kt) {
        u_operands[2 * kt * 32] = {high[kt][0], high[kt][1], high[kt][2], high[kt][3]};
        u_operands[(2 * kt + 1) * 32] = {low[kt][0], low[kt][1], low[kt][2], low[kt][3]};
      }
    }
    if constexpr (Config::kSaves) {
      if (chunk == last_chunk) store_value_roundings<Config>(params, stage_ring.block(shared), low, lane);
    }
    if constexpr (!Config::kSummary) {
      if (chunk > 0) ptx::mbarrier_wait_parity(stage_ring.taken(), (chunk - 1) & 1);
#pragma unroll
      for (int kt = 0; kt < K / 16; ++kt) Staged::put_state(staging, warp, s[kt], kt, lane);
      if constexpr (Config::kSaves) {
#pragma unroll
        for (int kt = 0; kt < C / 16; ++kt) {
          Staged::put_values(staging, warp, {high[kt][0], high[kt][1], high[kt][2], high[kt][3]}, kt, lane);
        }
      }
      ptx::mbarrier_arrive(stage_ring.staged());
    }
    if constexpr (Config::kMakesValues) {  // of the next chunk, beside the products
      RingPosition next = ring;
      next.advance(stages);
      if (chunk + 1 < chunks) {
        ptx::mbarrier_wait_parity(stage_ring.full(next.stage), next.parity);
        values.load(stage_ring.stage(next.stage), shared + next.stage * Config::kStageBytes, warp, lane);
      }
    }
    wgmma::wait_group<0>();
    if constexpr (Config::kMakesValues) {
      // Into registers that no product defines: else the compiler waits for -U0 of the next chunk before it reads them.
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state.acc[n][i] = ptx::copied(state.acc[n][i]);
      }
    } else {
      wgmma::pin(state.acc);
    }
    // Every thread says that it has read the stage: one lane could say so for its warp after a __syncwarp(), but
    // racecheck does not see that order, and a clean report is worth more than 31 arrivals.
    ptx::mbarrier_arrive(stage_ring.empty(ring.stage));
    u_operands += static_cast<int64_t>(value_heads) * (V / 16) * (C / 8) * 32;
    ring.advance(stages);
  }

  // Read again, as it was not kept over the loop.
  const RecurrenceBlock end = stage_ring.block(shared);
  const int thread = ptx::opaque(threadIdx.x), end_row_tile = end.row_tile(thread);
  if constexpr (Config::kSummary) {
    if (end.is_map) {
      if (segments.map != nullptr) store_map(state, segments.map, end.segment_tile, end_row_tile, lane);
      if (segments.transposed_map != nullptr) {
        store_map_transposed(state, segments.transposed_map, end.segment_tile, end_row_tile, lane);
      }
    } else {
      state.store_fragments(end.fragments<K>(segments.state, call, thread), lane);
    }
  } else if (end.segment.is_last && call.final_state != nullptr) {
    store_state(call.final_state, end.chain(value_heads), state, call, end_row_tile * 16, lane);
  }
}

}  // namespace kda
