// Stage 2 of the staged forward: the hidden-state recurrence over the chunks of one sequence,
//   U = U0 - W S,      S' = Diag(e^{G_C}) S + K_decayed^T U,
// writing, for stage 3, the state at the entry of each chunk and U as bf16 MMA operands, U in the place of U0; for the backward,
// operands of S rather than of its transpose, and U in one part.
//
// Grid: one CTA for each (sequence, value head, value tile). The state is kept transposed, S^T [V, K], in fp32
// accumulators for the whole sequence, so that they feed the next product as its A operand from registers; a warpgroup owns 64
// rows of V and all of K:
//   U^T  = U0^T - S^T W^T                      A = S^T, its accumulators rounded to bf16;  B = W [C, K]
//   S'^T = S^T Diag(e^{G_C}) + U^T K_decayed   A = U^T, as a sum of two bf16 operands;     B = K_decayed [C, K]
// Another warpgroup, the movers, keeps a ring of stages filled with bulk copies, through which every chunk of the sequence goes once, and
// stores the operands that the consumers leave in shared memory.
//
// Shared memory of one stage (bytes, K = 128): W and K_decayed 16384 each, U0 of the value tile 16384 for each 64 rows,
// chunk_decay 512. Behind the ring 24576 for each 64 rows, through which S and U leave.
// Bound by the chain from S to S': two products with each other's results, K / 16 instructions of 64 x 64 x 16 and 8 of
// 64 x K x 16, and the two conversions between them.
#pragma once

#include "kernel_params.h"
#include "recurrence.cuh"

namespace kda {

// kSaves: what the backward needs is written.
template <int K_, int kGroups_, bool kSaves_>
struct StateRecurrenceConfig : RecurrenceThreads<kGroups_> {
  static constexpr int K = K_, C = kChunkTokens, kGroups = kGroups_;
  static constexpr bool kSaves = kSaves_;
  using KeyTile = BlockedTile<C>;
  static constexpr int kMaxStages = 4;

  static constexpr int kKeyTileBytes = C * K * 2;
  static constexpr int kDecayBytes = K * 4;
  static constexpr int kU0Bytes = kGroups * kRecurrenceRows * C * 4;

  // Offsets inside one stage.
  static constexpr int kW = 0;
  static constexpr int kKeyDecayed = kW + kKeyTileBytes;
  static constexpr int kU0 = kKeyDecayed + kKeyTileBytes;
  static constexpr int kDecay = kU0 + kU0Bytes;
  static constexpr int kLoadedBytes = kDecay + kDecayBytes;
  static constexpr int kStageBytes = (kLoadedBytes + 1023) / 1024 * 1024;  // operands of wgmma start at multiples

  using Staged = StagedOperands<K, kSaves ? C / 16 : 0>;
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    state_recurrence_kernel(const __grid_constant__ ChunkFwdKernelParams params, int stages) {
  constexpr int K = Config::K, C = Config::C;
  using KeyTile = typename Config::KeyTile;
  extern __shared__ __align__(1024) uint8_t shared[];
  const ChunkFwdParams& call = params.call;
  const int V = call.problem.value_dim, value_heads = call.problem.value_heads;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

  const int value_tiles = V / (kRecurrenceRows * Config::kGroups);
  const int first_row_tile =
      static_cast<int>(blockIdx.x % value_tiles) * (kRecurrenceRows / 16 * Config::kGroups);  // in units of 16 rows
  const int value_head = static_cast<int>(blockIdx.x / value_tiles % value_heads);
  const int64_t sequence = blockIdx.x / value_tiles / value_heads;
  const SequenceRange range = sequence_range(call, sequence);
  const int64_t first_slot = first_chunk_slot(call, sequence, range);
  const int64_t chunks = (range.end - range.begin + C - 1) / C;

  const StageRing stage_ring = {static_cast<uint32_t>(ptx::opaque(ptx::shared_address(shared))), stages,
                                Config::kStageBytes};
  stage_ring.init(1, Config::kConsumers, 128);
  uint8_t* const staging = shared + staging_offset<Config>(stages);
  using Staged = typename Config::Staged;
  const int64_t first_tile = first_slot * value_heads + value_head;

  if (Config::is_mover()) {
    ptx::setmaxnreg_dec<Config::kMoverRegisters>();
    const auto fill = [&](int64_t chunk, int i) {
      if (threadIdx.x > Config::kConsumers) return;
      const int64_t tile = first_tile + chunk * value_heads;
      const uint32_t stage = stage_ring.stage(i), barrier = stage_ring.full(i);
      ptx::mbarrier_arrive_expect_tx(barrier, Config::kLoadedBytes);
      ptx::cp_async_bulk_load(stage + Config::kW, params.W + tile * Config::kKeyTileBytes, Config::kKeyTileBytes,
                              barrier);
      ptx::cp_async_bulk_load(stage + Config::kU0, params.U + (tile * (V / 16) + first_row_tile) * (C / 8) * 32,
                              Config::kU0Bytes, barrier);
      ptx::cp_async_bulk_load(stage + Config::kKeyDecayed, params.K_decayed + tile * Config::kKeyTileBytes,
                              Config::kKeyTileBytes, barrier);
      ptx::cp_async_bulk_load(stage + Config::kDecay, params.chunk_decay + tile * K, Config::kDecayBytes, barrier);
    };
    const int first_mine = warp - Config::kConsumers / 32;
    const int64_t operand_tile = first_tile * (V / 16) + first_row_tile + first_mine;
    const int64_t tiles_of_chunk = static_cast<int64_t>(value_heads) * (V / 16);
    uint4* states = params.state + operand_tile * (K / 16) * 32;
    uint4* values = params.U_rounded + operand_tile * (C / 16) * 32;
    const auto store = [&](int64_t) {
#pragma unroll
      for (int i = 0; i < Config::kGroups; ++i) {
        uint8_t* const area = staging + (first_mine + 4 * i) * Staged::kBytes;
        Staged::template store_state<Config::kSaves>(states + i * 4 * (K / 16) * 32, ptx::shared_address(area), lane);
        if constexpr (Config::kSaves) Staged::store_values(values + i * 4 * (C / 16) * 32, area, lane);
      }
      states += tiles_of_chunk * (K / 16) * 32;
      values += tiles_of_chunk * (C / 16) * 32;
    };
    stage_ring.move(chunks, fill, store);
    return;
  }
  ptx::setmaxnreg_inc<Config::kConsumerRegisters>();

  // Rows 16 * row_tile .. + 15 of S^T.
  const int row_tile = first_row_tile + warp;
  const int64_t row_stride = call.state_v_first ? K : 1, channel_stride = call.state_v_first ? 1 : V;
  const int64_t first_row = row_tile * 16 * row_stride;
  StateFragments<K> state;
  if (call.initial_state != nullptr) {
    const int64_t offset =
        sequence * call.initial_state_stride_sequence + value_head * call.initial_state_stride_head + first_row;
    const int element_bytes = call.state_type == DataType::kFloat32 ? 4 : 2;
    state.load(static_cast<const uint8_t*>(call.initial_state) + offset * element_bytes, call.state_type, row_stride,
               channel_stride, lane);
  } else {
    state.for_each(lane, [](float& value, int, int) { value = 0.0f; });
  }

  uint4* u_operands = params.U + (first_tile * (V / 16) + row_tile) * (C / 8) * 32 + lane;  // of the current chunk
  uint8_t* const area = staging + warp * Staged::kBytes;

  RingPosition ring;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (__builtin_expect(call.chunk_states != nullptr, 0)) {
      const int64_t tile = first_tile + chunk * value_heads;
      state.store(call.chunk_states + tile * K * V + first_row, row_stride, channel_stride, lane);
    }
    uint32_t s[K / 16][4];
    state.to_operands(s);

    ptx::mbarrier_wait_parity(stage_ring.full(ring.stage), ring.parity);
    const uint32_t stage = stage_ring.stage(ring.stage);
    const uint8_t* const stage_data = shared + ring.stage * Config::kStageBytes;

    scale_channels(state, stage_data + Config::kDecay, lane);

    float u[C / 8][4];  // (W S)^T
    wgmma::fence();
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      const uint64_t w = wgmma::descriptor(stage + Config::kW + channels_at<KeyTile>(kt), 0);
      wgmma::m64n64k16_bf16<false>(u, s[kt], w, kt > 0);
    }
    wgmma::commit_group();

    const float4* const u0 = reinterpret_cast<const float4*>(stage_data + Config::kU0) + warp * (C / 8) * 32 + lane;
    float4 corrected[C / 8];
#pragma unroll
    for (int n = 0; n < C / 8; ++n) corrected[n] = u0[n * 32];
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
    if (params.wants_output) {
#pragma unroll
      for (int kt = 0; kt < C / 16; ++kt) {
        u_operands[2 * kt * 32] = {high[kt][0], high[kt][1], high[kt][2], high[kt][3]};
        u_operands[(2 * kt + 1) * 32] = {low[kt][0], low[kt][1], low[kt][2], low[kt][3]};
      }
    }
    if (chunk > 0) ptx::mbarrier_wait_parity(stage_ring.taken(), (chunk - 1) & 1);
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) Staged::put_state(ptx::shared_address(area), s[kt], kt, lane);
    if constexpr (Config::kSaves) {
#pragma unroll
      for (int kt = 0; kt < C / 16; ++kt) {
        Staged::put_values(area, {high[kt][0], high[kt][1], high[kt][2], high[kt][3]}, kt, lane);
      }
    }
    ptx::mbarrier_arrive(stage_ring.staged());
    wgmma::wait_group<0>();
    wgmma::pin(state.acc);
    // Every thread says that it has read the stage: one lane could say so for its warp after a __syncwarp(), but
    // racecheck does not see that order, and a clean report is worth more than 31 arrivals.
    ptx::mbarrier_arrive(stage_ring.empty(ring.stage));
    u_operands += static_cast<int64_t>(value_heads) * (V / 16) * (C / 8) * 32;
    ring.advance(stages);
  }

  if (call.final_state != nullptr) {
    state.store(call.final_state + (sequence * value_heads + value_head) * K * V + first_row, row_stride,
                channel_stride, lane);
  }
}

}  // namespace kda
