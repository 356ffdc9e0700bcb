// Stage 3 of the backward: the recurrence of the state's gradient, from the last chunk of a sequence to its first,
//   dU = Aqk^T dO + K_decayed dS',      dS = Diag(e^{G_C}) dS' + Q_gated^T dO - W^T dU,
// writing, for stage 4, dS' of each chunk (the gradient of the state at its exit) in bf16 and dU as bf16 MMA operands; at the end the gradient of the
// initial state.
//
// Grid as in stage 2 of the forward: one CTA for each (sequence, value head, value tile). The gradient is kept
// transposed, dS^T [V, K], in fp32 accumulators; a warpgroup owns 64 rows of V and all of K:
//   dU^T = dO^T Aqk + dS'^T K_decayed^T                         A = dO^T; dS'^T
//   dS^T = dS'^T Diag(e^{G_C}) + dO^T Q_gated - dU^T W          A = dO^T; dU^T as a sum of two
// In the last chunk dS' is the gradient of the final state, which may meet few tokens: there it enters as a sum of two operands, too, as no
// average hides a rounding in the gradient of beta of the last tokens; what its bf16 operands leave out goes to stage 4, too. Likewise
// what Q_gated leaves out of the first chunk is multiplied, after the last step: the gradient of the initial state is that of few tokens.
// Where sequences are cut, as in stage 2: a summary of each segment finds what its outputs alone leave of the gradient at its beginning, or with
// the gradient of the final state in the last one; how the gradient passes through a segment is told by the transpose of its map.
//
// Another warpgroup, the movers, keeps a ring of stages filled: bulk copies of what lies in the workspace, and units of 16 bytes of
// dO, which each of its threads copies, as bulk copies of its rows would be issued one by one. It gives what the consumers leave to the copy engine.
//
// Shared memory of one stage (bytes, K = 128): W, K_decayed, Q_gated 16384 each, Aqk 8192, chunk_decay 512, and for dO
// 64 rows of two bytes for each value row and 16 more, which keep ldmatrix free of bank conflicts.
// Behind the ring 24576 for each 64 rows, through which dS' and dU leave.
// Bound by the chain from dS' to dS: K / 16 instructions of 64 x 64 x 16, 8 of 64 x K x 16 and the conversions between them; 4 of each, with dO,
// are beside it.
#pragma once

#include <type_traits>

#include "../device/timeline.cuh"
#include "../forward/recurrence.cuh"
#include "kernel_params.h"

namespace kda {

// kSummary: only what becomes of the gradient in each segment of a cut.
template <int K_, typename Element_, int kGroups_, bool kSummary_ = false>
struct ReverseRecurrenceConfig : RecurrenceThreads<kGroups_> {
  static constexpr int K = K_, C = kChunkTokens, kGroups = kGroups_;
  static constexpr bool kSummary = kSummary_;
  using Element = Element_;
  using KeyTile = BlockedTile<C>;
  static constexpr int kMaxStages = 3;

  static constexpr int kKeyTileBytes = C * K * 2, kPairTileBytes = C * C * 2, kDecayBytes = K * 4;
  static constexpr int kRowBytes = kGroups * kRecurrenceRows * 2, kRowPitch = kRowBytes + 16;  // of dO

  // Offsets inside one stage.
  static constexpr int kW = 0;
  static constexpr int kKeyDecayed = kW + kKeyTileBytes;
  static constexpr int kQGated = kKeyDecayed + kKeyTileBytes;
  static constexpr int kAqk = kQGated + kKeyTileBytes;
  static constexpr int kDecay = kAqk + kPairTileBytes;
  static constexpr int kOutputGradient = kDecay + kDecayBytes;
  static constexpr int kStageBytes = (kOutputGradient + C * kRowPitch + 1023) / 1024 * 1024;

  using Staged = StagedOperands<K, C / 16, kGroups * kRecurrenceRows>;
};

// Whether a segment's chunks leave a gradient of the initial state that is wanted.
template <typename Config>
__device__ __forceinline__ bool leaves_initial_gradient(const ChunkBwdKernelParams& params,
                                                        const SegmentLocation& segment) {
  return !Config::kSummary && segment.is_first && segment.chunks > 0 && params.dinitial_state != nullptr;
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    reverse_recurrence_kernel(const __grid_constant__ ChunkBwdKernelParams params, int stages) {
  constexpr int K = Config::K, C = Config::C;
  using KeyTile = typename Config::KeyTile;
  using Element = typename Config::Element;
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.forward.call;
  const int V = call.problem.value_dim, value_heads = call.problem.value_heads;
  const RecurrenceSegments& segments = params.forward.segments;
  const RecurrenceBlock found(call, segments.chunks, Config::kRows, V / Config::kRows, 0, threadIdx.x & 31);
  if (!found.segment.is_used || (Config::kSummary && found.segment.is_first)) {
    ptx::wait_for_kernel_before();  // see below
    return;
  }

  const StageRing stage_ring = {static_cast<uint32_t>(ptx::opaque(ptx::shared_address(shared))), stages,
                                Config::kStageBytes};
  stage_ring.init(shared, found, 1 + Config::kFillers, Config::kConsumers);
  if (threadIdx.x == 0) mark(params.forward, Mark::kReverseBegin, 0);
  ptx::launch_dependents();
  uint8_t* const staging = shared + staging_offset<Config>(stages);
  using Staged = typename Config::Staged;

  if (Config::is_mover()) {
    ptx::setmaxnreg_dec<Config::kMoverRegisters>();
    const RecurrenceBlock block = stage_ring.block(shared);
    const SegmentLocation& segment = block.segment;
    const int chunks = static_cast<int>(segment.chunks), first_row_tile = block.first_row_tile,
              value_head = block.value_head;
    const int64_t first_tile = block.first_tile, last_tile = first_tile + int64_t{chunks - 1} * value_heads;
    if (Config::is_mover(Config::kStores)) {
      if (Config::kSummary || threadIdx.x % 32 > 0) return;
      const int64_t last_operands = last_tile * (V / 16) + first_row_tile;
      const int64_t operands_of_chunk = static_cast<int64_t>(value_heads) * (V / 16);
      uint8_t* states = params.dstate + last_operands * Staged::kStateBytes;
      uint8_t* values = reinterpret_cast<uint8_t*>(params.dU) + last_operands * Staged::kValueBytes;
      stage_ring.store_staged(chunks, stage_ring.stored(shared),
                              [&] { Staged::template store<true>(states, values, staging, operands_of_chunk); });
      return;
    }
    if (Config::is_mover(Config::kTells)) {
      uint32_t* const progress = params.forward.progress;
      if (Config::kSummary || threadIdx.x % 32 > 0 || progress == nullptr) return;
      StageRing::tell_stored(chunks, stage_ring.stored(shared), [&](int step) {
        mark(params.forward, Mark::kReverseChunks, step);
        return progress + last_tile - int64_t{step} * value_heads;
      });
      return;
    }
    // One thread asks for the bulk copies, and each copies 16-byte units of dO; rows past the end are zero.
    constexpr int kUnits = Config::kRowBytes / 16, kRowsAtOnce = Config::kFillers / kUnits;
    const SequenceRange range = sequence_range(call, segment.sequence);
    const int64_t first_token = range.begin + segment.first_chunk * C;  // of the segment
    const int tokens = static_cast<int>(min(range.end - first_token, segment.chunks * C));
    const int token_stride = value_heads * V;
    const int thread = ptx::opaque(threadIdx.x) - Config::kConsumers, lane = thread & 31, unit = thread % kUnits,
              first_row = thread / kUnits;
    const Element* const outputs = static_cast<const Element*>(params.dO) +
                                   ((range.batch * call.problem.tokens + first_token) * value_heads + value_head) * V +
                                   first_row_tile * 16 + 8 * unit;
    SolvedChunks solved = {params.forward, chunks, /*is_reversed=*/true};
    const auto fill = [&](int step, int i) {
      const int chunk = chunks - 1 - step;
      if (thread < 32) solved.wait_for(step, Config::kRows, lane);
      const int64_t tile = first_tile + int64_t{chunk} * value_heads;
      const uint32_t stage = stage_ring.stage(i), barrier = stage_ring.full(i);
      if (thread == 0) {
        ptx::mbarrier_arrive_expect_tx(barrier, Config::kOutputGradient);
        ptx::cp_async_bulk_load(stage + Config::kAqk, params.forward.Aqk + tile * Config::kPairTileBytes,
                                Config::kPairTileBytes, barrier);
        ptx::cp_async_bulk_load(stage + Config::kKeyDecayed, params.forward.K_decayed + tile * Config::kKeyTileBytes,
                                Config::kKeyTileBytes, barrier);
        ptx::cp_async_bulk_load(stage + Config::kDecay, params.forward.chunk_decay + tile * K, Config::kDecayBytes,
                                barrier);
        ptx::cp_async_bulk_load(stage + Config::kQGated, params.forward.Q_gated + tile * Config::kKeyTileBytes,
                                Config::kKeyTileBytes, barrier);
        ptx::cp_async_bulk_load(stage + Config::kW, params.forward.W + tile * Config::kKeyTileBytes,
                                Config::kKeyTileBytes, barrier);
      }
      const int rows = min(tokens - chunk * C, C);
      const Element* const first = outputs + int64_t{chunk} * C * token_stride;
      const uint32_t destination = stage + Config::kOutputGradient + 16 * unit;
#pragma unroll 4
      for (int j = 0; j < C / kRowsAtOnce; ++j) {
        const int row = first_row + j * kRowsAtOnce;
        const bool in_range = row < rows;
        ptx::cp_async_16(destination + row * Config::kRowPitch, first + int64_t{in_range ? row : 0} * token_stride,
                         in_range ? 16 : 0);
      }
      ptx::cp_async_mbarrier_arrive_noinc(barrier);
    };
    // What Q_gated leaves out of the first chunk, which solved.wait_for() has seen. Read again, as there are few registers.
    const auto fill_last = [&](RingPosition position) {
      const RecurrenceBlock& of = stage_ring.block(ptx::opaque(shared));
      if (!leaves_initial_gradient<Config>(params, of.segment)) return;
      ptx::mbarrier_wait_parity(stage_ring.empty(position.stage), position.parity);
      const uint32_t barrier = stage_ring.full(position.stage);
      if (ptx::opaque(threadIdx.x) == Config::kConsumers) {
        const int64_t chain = of.chain(call.problem.value_heads);
        ptx::mbarrier_arrive_expect_tx(barrier, Config::kKeyTileBytes);
        ptx::cp_async_bulk_load(stage_ring.stage(position.stage) + Config::kQGated,
                                params.forward.Q_gated_low + chain * Config::kKeyTileBytes, Config::kKeyTileBytes,
                                barrier);
      }
      ptx::mbarrier_arrive(barrier);
    };
    stage_ring.fill_stages(chunks, fill, fill_last);
    ptx::wait_for_kernel_before();  // who waits for this kernel relies on the recurrence of the state, too
    return;
  }
  ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
  const RecurrenceBlock block = stage_ring.block(shared);
  const SegmentLocation& segment = block.segment;
  const int chunks = static_cast<int>(segment.chunks);
  const int warp = ptx::opaque(threadIdx.x) >> 5, lane = threadIdx.x & 31;

  // This warp's rows of the state of the sequence.
  const auto state_offset = [&](const RecurrenceBlock& of, int thread, const StateStrides& stride) {
    return of.chain(value_heads) * K * V + of.row_tile(thread) * 16 * stride.row;
  };
  StateFragments<K> dstate;
  if (segment.is_last && params.dfinal_state != nullptr) {
    const StateStrides stride(call);
    dstate.load(params.dfinal_state + state_offset(block, threadIdx.x, stride), DataType::kFloat32, stride.row,
                stride.channel, lane);
  } else if (segment.is_last || Config::kSummary) {
    dstate.for_each(lane, [](float& value, int, int) { value = 0.0f; });
  } else {  // the beginning of the segment behind
    dstate.load_fragments(block.fragments<K>(segments.dstate, call, threadIdx.x, 1), lane);
  }

  // Where a lane's rows of an operand A = dO^T lie inside a stage, for the first 16 tokens.
  const int matrix = lane >> 3;
  const uint32_t output_gradient =
      Config::kOutputGradient + ((lane & 7) + (matrix >> 1) * 8) * Config::kRowPitch + (2 * warp + (matrix & 1)) * 16;
  const auto load_output_gradient = [&](uint32_t(&dO)[C / 16][4], uint32_t stage) {
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      ptx::ldmatrix_x4_trans(dO[kt], stage + output_gradient + 16 * kt * Config::kRowPitch);
      if constexpr (!std::is_same_v<Element, BFloat16>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 values = Packed2<Element>::to_float2(dO[kt][i]);
          dO[kt][i] = pack_bf16(values.x, values.y);
        }
      }
    }
  };
  const auto multiply_queries = [&](const uint32_t(&dO)[C / 16][4], uint32_t stage) {
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      const uint64_t queries = wgmma::descriptor(stage + Config::kQGated + tokens_at(kt), KeyTile::kBlockBytes);
      multiply_rows<true>(dstate.acc, dO[kt], queries);
    }
    wgmma::commit_group();
  };

  // The warp's tile of 16 rows of V in what is kept of the last chunk of each sequence alone.
  const auto low_tile = [&] { return block.chain(value_heads) * (V / 16) + block.row_tile(ptx::opaque(threadIdx.x)); };

  RingPosition ring;
  for (int step = 0; step < chunks; ++step) {
    ptx::mbarrier_wait_parity(stage_ring.full(ring.stage), ring.parity);
    const uint32_t stage = stage_ring.stage(ring.stage);

    uint32_t dO[C / 16][4];
    load_output_gradient(dO, stage);
    // Before the products, which read shared memory faster than anything else can beside them.
    float2 factors[K / 8];
    const float* const decay =
        reinterpret_cast<const float*>(shared + ring.stage * Config::kStageBytes + Config::kDecay) + 2 * (lane & 3);
#pragma unroll
    for (int n = 0; n < K / 8; ++n) factors[n] = *reinterpret_cast<const float2*>(decay + 8 * n);

    float du[C / 8][4];
    const auto keys = [&](int kt) {
      return wgmma::descriptor(stage + Config::kKeyDecayed + channels_at<KeyTile>(kt), 0);
    };
    const bool is_exact = step == 0 && segment.is_last && params.dfinal_state != nullptr;
    if (is_exact) {  // what a rounded gradient of the final state leaves out
      uint32_t high[K / 16][4], low[K / 16][4];
#pragma unroll
      for (int kt = 0; kt < K / 16; ++kt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float(&values)[4] = dstate.acc[2 * kt + half];
          split_half(high[kt], low[kt], half, values[0], values[1], values[2], values[3]);
        }
      }
      wgmma::fence();
#pragma unroll
      for (int kt = 0; kt < K / 16; ++kt) wgmma::m64n64k16_bf16<false>(du, low[kt], keys(kt), kt > 0);
      wgmma::commit_group();
      if constexpr (!Config::kSummary) {  // as operands of dS'
        uint4* const destination = params.dstate_low + low_tile() * (K / 16) * 32 + lane;
#pragma unroll
        for (int kt = 0; kt < K / 16; ++kt) {
          destination[kt * 32] = transposed_fragment({low[kt][0], low[kt][1], low[kt][2], low[kt][3]});
        }
      }
      wgmma::wait_group<0>();
      wgmma::pin(du);
    }
    wgmma::fence();
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
      const uint64_t pairs = wgmma::descriptor(stage + Config::kAqk + tokens_at(kt), 0);
      wgmma::m64n64k16_bf16<true>(du, dO[kt], pairs, kt > 0 || is_exact);
    }
    uint32_t exits[K / 16][4];  // dS'
    dstate.to_operands(exits);
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      wgmma::fence();
      wgmma::m64n64k16_bf16<false>(du, exits[kt], keys(kt), true);
    }
    wgmma::commit_group();
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
      dstate.acc[n][0] *= factors[n].x, dstate.acc[n][1] *= factors[n].y;
      dstate.acc[n][2] *= factors[n].x, dstate.acc[n][3] *= factors[n].y;
    }
    wgmma::fence();
    multiply_queries(dO, stage);
    wgmma::wait_group<1>();
    wgmma::pin(du);

    // -dU^T as A operands.
    constexpr uint32_t kSigns = 0x80008000u;
    uint32_t du_high[C / 16][4], du_low[C / 16][4];
#pragma unroll
    for (int kt = 0; kt < C / 16; ++kt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&values)[4] = du[2 * kt + half];
        split_half(du_high[kt], du_low[kt], half, -values[0], -values[1], -values[2], -values[3]);
      }
      const uint64_t w = wgmma::descriptor(stage + Config::kW + tokens_at(kt), KeyTile::kBlockBytes);
      wgmma::fence();
      multiply_rows<true>(dstate.acc, du_high[kt], w);
      multiply_rows<true>(dstate.acc, du_low[kt], w);
    }
    wgmma::commit_group();
    if constexpr (!Config::kSummary) {
      if (is_exact) {
        uint4* const destination = params.dU_low + low_tile() * (C / 16) * 32 + lane;
#pragma unroll
        for (int kt = 0; kt < C / 16; ++kt) {
          const uint32_t(&operand)[4] = du_low[kt];
          destination[kt * 32] = {operand[0] ^ kSigns, operand[1] ^ kSigns, operand[2] ^ kSigns, operand[3] ^ kSigns};
        }
      }
      if (step > 0) ptx::mbarrier_wait_parity(stage_ring.taken(), (step - 1) & 1);
#pragma unroll
      for (int kt = 0; kt < K / 16; ++kt) Staged::put_state(staging, warp, exits[kt], kt, lane);
#pragma unroll
      for (int kt = 0; kt < C / 16; ++kt) {
        const uint32_t(&operand)[4] = du_high[kt];
        Staged::put_values(staging, warp,
                           {operand[0] ^ kSigns, operand[1] ^ kSigns, operand[2] ^ kSigns, operand[3] ^ kSigns}, kt,
                           lane);
      }
      ptx::mbarrier_arrive(stage_ring.staged());
    }
    wgmma::wait_group<0>();
    // Into registers that no product defines: else the compiler waits for one before it reads them beside the next.
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dstate.acc[n][i] = ptx::copied(dstate.acc[n][i]);
    }
    ptx::mbarrier_arrive(stage_ring.empty(ring.stage));  // by every thread, as in the forward
    ring.advance(stages);
  }

  // Read again, as it was not kept over the loop.
  const RecurrenceBlock end = stage_ring.block(shared);
  const int thread = ptx::opaque(threadIdx.x);
  if constexpr (Config::kSummary) {
    dstate.store_fragments(end.fragments<K>(segments.dstate, call, thread), lane);
    return;
  }
  if (!end.segment.is_first || params.dinitial_state == nullptr) return;
  if (leaves_initial_gradient<Config>(params, end.segment)) {  // dO of the first chunk is still in the stage before
    static_assert(stages_of_ring<Config>() > 1);
    uint32_t dO[C / 16][4];
    load_output_gradient(dO, stage_ring.stage((ring.stage == 0 ? stages : ring.stage) - 1));
    ptx::mbarrier_wait_parity(stage_ring.full(ring.stage), ring.parity);
    wgmma::fence();
    multiply_queries(dO, stage_ring.stage(ring.stage));
    wgmma::wait_group<0>();
    wgmma::pin(dstate.acc);
  }
  const StateStrides stride(call);
  const int64_t offset = state_offset(end, thread, stride);
  if (call.state_type == DataType::kFloat32) {
    dstate.store(static_cast<float*>(params.dinitial_state) + offset, stride.row, stride.channel, lane);
  } else {
    dstate.store(static_cast<BFloat16*>(params.dinitial_state) + offset, stride.row, stride.channel, lane);
  }
}

}  // namespace kda
