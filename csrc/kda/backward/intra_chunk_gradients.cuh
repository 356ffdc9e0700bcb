// Stage 4 of the backward: the gradients inside each chunk. With S at its entry, dS' at its exit, U and dU from the
// recurrences, A = I + Akk, G the cumulative log-gate, and sums over pairs i >= j of tokens of the chunk:
//   Y = A^{-T} dU,   dV = beta Y,   dbeta_i = Y_i . U_i / beta_i
//   Dqk = scale tril(dO U^T),   Dkk = -beta strict_tril(Y U^T), the gradients of the pairs
//   dq_i = scale e^{G_i} (dO S^T)_i + sum_j Dqk_ij k_j e^{G_i - G_j}
//   dk_i = -beta_i e^{G_i} (Y S^T)_i + e^{G_C - G_i} (U dS'^T)_i + sum_j Dkk_ij k_j e^{G_i - G_j} as the later token, and
//          sum over later tokens t of (Dkk_ti k_t + Dqk_ti q_t) e^{G_t - G_i} as the earlier one
//   dg_t = the sum of what crosses token t: q dq + k dk of the later tokens less k dk of the earlier ones, the terms of
//        the states included
// and then the derivatives of the transforms.
//
// Grid: kCtasPerSm CTAs of K / 8 warps for each multiprocessor, which take a chunk slot of a value head after the other; rows past
// the last sequence are left to level_gradients.cuh. First a warp owns rows of V, and a warpgroup a matrix of pairs (value_gradients.cuh), then a warp 16
// channels of one of two blocks of 32 tokens, transposed (channel_tile.cuh): decay factors, operands and results have one layout (block_gradients.cuh).
// What a chunk needs is copied as soon as the one before has no more use for the room, by the copy engine, which the first lanes of several warps ask: each takes
// a while, in which the others wait for it at the next barrier. It also stores dq, dk, dv and dg of whole chunks from tiles in shared memory; where those of dq, dk and dg
// lie, q, k and dS' come next, so that these are asked for in their own chunk, from the L2 cache. Kernels for any kind of call copy rows by cp.async, in groups
// whose order the waits count on, and store them by threads.
//
// Numerics: in each block one reference in its middle serves all pairs, as in step_operands.cuh. A chunk whose gates
// decay too much on either side of it, whose q or k are too large for that (see kWideLog2Range), or which has a beta that
// nothing can be divided by, is left to level_gradients.cuh by a flag. Operands are single bf16. The terms of dg that belong to pairs
// cancel between their two tokens outside of what they cross; both sides take the same rounded operands, so that they cancel to fp32.
//
// Shared memory (bytes, K = V = 128): g, then log2 of P, 32768; dU, then Y, 16384; U 16384; the inverse 8192; S and dS', then operands of pairs, 65536;
// dO 16384; q and k, then dq and dk, 32768; two matrices of pairs 16384; 18 KiB over tokens and channels.
// Registers: at most 128 for 16 warps. Nothing is kept from phase to phase but sums and operands: where a lane's elements lie, and where the chunk is, is found
// again, as a spilled register is a round trip to L2. Bound by latencies, at half of the issue slots: 39 000 instructions a chunk and head, 51 000 with raw inputs.
#pragma once

#include "gradient_gates.cuh"

namespace kda {

template <typename Config>
struct IntraChunkGradients : GradientGates<Config> {
  using Blocks = BlockGradients<Config>;
  using Values = ValueGradients<Config>;
  using Gates = GradientGates<Config>;
  using Element = typename Config::Element;
  using Sums = typename Blocks::Sums;
  using Block = typename Blocks::Block;
  using Range = typename Gates::Range;
  using Copy = typename Gates::Copy;
  using Blocks::location, Blocks::params, Blocks::tile;
  using Gates::kTensorCopies;
  static constexpr int K = Config::K;

  __device__ __forceinline__ void leave_to_levels(bool wanted) const {
    if (this->thread == 0 && location.tokens > 0) params.by_levels[tile] = wanted;
  }

  // here(), next(): this chunk, and the one to copy from memory meanwhile, looked up in shared memory again by each part, as there are few
  // registers. find_next(): where the next one is. turn: of the chunk, modulo 2. Returns whether the chunk is
  // done: else it is left to the levels, nothing of the next one is on its way, nor has it been looked for.
  template <typename Here, typename Next, typename Find>
  static __device__ __forceinline__ bool run(int turn, Here here, Next next, Find find_next) {
    bool is_wide;
    {
      if constexpr (kTensorCopies) here().wait_for(Copy::kGates, turn);
      Block exponent;
      const Range range = here().activate(exponent);
      is_wide = range.is_wide;
      here().copy_over_gradients();
      if (here().store_beta(here().copied_beta(), range.is_too_wide)) {
        here().leave_to_levels(true);
        return false;
      }
      here().keep_exponents(exponent);
    }
    {
      typename Values::SolveOperands operands;
      here().wait_for(Copy::kValues, turn);
      here().load_operands(operands);
      here().store_decays();
      __syncthreads();
      here().solve(operands);
    }
    here().wait_for_rows(turn);
    ptx::fence_proxy_async_shared();  // Y, U and dO, before the products that read them, and dV
    is_wide = __syncthreads_or(is_wide);

    here().store_value_gradient();
    typename Values::Pairs pairs;
    here().multiply_pairs(pairs);
    const float most = is_wide ? kWideSquaredNorm : kMaxSquaredNorm;
    bool is_large = !(here().store_norms() <= most);
    if constexpr (!Config::kUnitNorms) is_large = __syncthreads_or(is_large);
    find_next();
    here().scale_pairs(pairs);
    here().beta_gradient();
    here().wait_for_stores();
    is_large = __syncthreads_or(is_large);
    here().leave_to_levels(is_large);
    if (is_large) return false;
    const float unit = here().store_pairs(pairs);
    here().wait_for(Copy::kStates, turn);
    Sums sums;
    float crossing[2] = {};
    Block written;
    typename Blocks::LaterOperands later_operands;
    here().template multiply_state<1>({&written}, Config::kDState, {Config::kU},
                                      [&] { here().add_crossing_state(crossing, unit); });
    {
      Block queries, keys;
      here().template multiply_state<2>({&queries, &keys}, Config::kState, {Config::kOutputGradient, Config::kY},
                                        [] {});
      here().add_read(sums, later_operands, queries, keys, unit);
    }
    __syncthreads();
    next().copy_values();
    const float next_parameter = next().raw_parameter();
    here().leave_operands(later_operands);
    typename Blocks::EarlierOperands operands;
    here().add_written(sums, crossing, operands, written, unit);
    here().add_pairs_as_earlier(sums, operands);
    ptx::fence_proxy_async_shared();  // what is exchanged, before states are copied there
    __syncthreads();
    here().add_pairs_as_later(sums, operands);
    here().add_pairs_across(sums);
    if (here().call().qk_l2norm) {
      here().store_dots(sums.dq, 0);
      here().store_dots(sums.dk, 1);
    }
    here().leave_channel_sums(sums.cumulative, crossing);
    next().keep_parameter(next_parameter);
    __syncthreads();
    here().copy_gates_again();
    next().copy_gates();
    next().copy_states();
    next().prefetch();
    if (here().call().qk_l2norm) {
      here().sum_dots();
      __syncthreads();
    }
    here().finish(sums.dq, 0);
    here().finish(sums.dk, 1);
    here().store_gates(sums.cumulative);
    if constexpr (kTensorCopies) {
      ptx::fence_proxy_async_shared();  // dq, dk and dg, before they are stored
    } else {
      ptx::cp_async_wait_group<1>();  // g of the next chunk
    }
    __syncthreads();
    here().store_gate_parameters();
    if (kTensorCopies && here().is_whole()) {
      here().store_gradients();
      return true;
    }
    if (here().params.dq_parts != nullptr) {
      next().copy_keys();
      return true;
    }
    typename Blocks::template RowUnits<K> dq, dk;
    here().template take_rows<typename Config::KeyTile>(dq, Config::kQuery);
    here().template take_rows<typename Config::KeyTile>(dk, Config::kKey);
    __syncthreads();
    next().copy_keys();
    here().store_rows(dq, here().params.dq, here().key_row(0), here().call().problem.heads);
    here().store_rows(dk, here().params.dk, here().key_row(0), here().call().problem.heads);
    return true;
  }
};

// The chunk of a sequence that is there as the turn-th one, when both recurrences go through it at the same pace: from its middle to its ends.
__device__ __forceinline__ uint32_t chunk_left_at(const ChunkDivisors& divisors, uint32_t turn) {
  const uint32_t middle = divisors.chunks.value() / 2;
  return turn % 2 == 1 ? middle - (turn + 1) / 2 : middle + turn / 2;
}

// The place of the index-th tile, which there is: in their order in memory, or beside the recurrences in that in which they leave them, all sequences, which
// have equal lengths, and heads at the same pace. By a whole warp.
__device__ __forceinline__ ChunkPlace place_of(const ChunkFwdKernelParams& params, const ChunkDivisors& divisors,
                                               uint32_t index, int lane) {
  const ChunkFwdParams& call = params.call;
  ChunkPlace place;
  uint32_t head, slot, row, chunk;
  if (params.progress != nullptr) {
    const auto [turn, chain] = divisors.chains.divide(index);
    const auto [sequence, chain_head] = divisors.value_heads.divide(chain);
    row = sequence, head = chain_head, chunk = chunk_left_at(divisors, turn);
    slot = row * divisors.chunks.value() + chunk;
  } else {
    const auto [of_tile, tile_head] = divisors.value_heads.divide(index);
    const auto [sequence, sequence_chunk] = divisors.chunks.divide(of_tile);
    slot = of_tile, head = tile_head, row = sequence, chunk = sequence_chunk;
  }
  place.slot = slot;
  place.value_head = static_cast<int>(head);
  place.tile = slot * divisors.value_heads.value() + head;
  place.location = call.cu_seqlens == nullptr ? locate_chunk_of_row(call, row, chunk) : locate_chunk(call, slot, lane);
  return place;
}

// Some of the CTAs that come early, spread over the device.
__device__ __forceinline__ bool is_rehearsing(const ChunkBwdKernelParams& params, int cta) {
  constexpr int kRehearsing = 8;
  const int early = static_cast<int>(params.early_ctas), stride = early > kRehearsing ? early / kRehearsing : 1;
  return cta < early && cta % stride == 0;
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    intra_chunk_gradients_kernel(const __grid_constant__ IntraChunkGradientsParams given) {
  ChunkBwdKernelParams params = given.stage;
  fix<Config::kKind>(params.forward.call);
  if constexpr (Config::kKind != CallKind::kAny) params.forward.vectorized = true, params.dq_parts = nullptr;
  if constexpr (Config::kKind == CallKind::kProcessed) params.dA_log_parts = nullptr;
  using Gradients = IntraChunkGradients<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  ChunkPlace* const places = reinterpret_cast<ChunkPlace*>(shared + Config::kPlaces);

  // The first chunk of a CTA is none: it goes on from there to its first tile as from one to the next. Beside the recurrences some CTAs go through it as
  // through others, again and again until there is a tile: so all find their instructions, 39 KB of them, in the L2 cache, where what the
  // recurrences read and write would not leave them.
  bool rehearses = is_rehearsing(params, blockIdx.x);
  const ChunkPlace nowhere = {{0, 0, 0}, 0, -1, 0};
  const int64_t slots = params.forward.chunk_slots;

  const uint32_t tiles = static_cast<uint32_t>(slots * params.forward.call.problem.value_heads);  // fewer than 2^31
  const int warp =
      __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) >> 5, 0);  // so the compiler knows that lanes agree

  // One warp, which has little to do meanwhile, looks for the next place; past the last tile it has no tokens. Beside the recurrences, CTAs
  // that find room early take more tiles than others, in the order in which these are left: the number of one is asked for early in a chunk.
  constexpr int kFindingWarp = Config::kWarps > 8 ? 8 : 0;
  const auto take_index = [&]() -> uint32_t {
    const bool takes = params.forward.progress != nullptr && warp == kFindingWarp && (threadIdx.x & 31) == 0;
    return takes ? atomicAdd(params.forward.progress + tiles, 1u) : 0;
  };
  const auto find = [&](unsigned turns, uint32_t taken) {
    if (warp != kFindingWarp) return;
    const int lane = ptx::opaque(threadIdx.x) & 31;
    const ChunkPlace& before = places[turns & 1 ^ 1];
    const uint32_t index = params.forward.progress != nullptr ? __shfl_sync(0xffffffffu, taken, 0)
                           : before.slot < 0                  ? blockIdx.x
                                                              : static_cast<uint32_t>(before.tile) + gridDim.x;
    ChunkPlace place = {{0, 0, 0}, index, slots, 0};
    if (index < tiles) place = place_of(params.forward, given.divisors, index, lane);
    if (lane == 0) places[turns & 1] = place;
  };
  const auto at = [&](int turn) -> Gradients {
    const ChunkPlace& place = places[turn];
    const int thread = ptx::opaque(threadIdx.x), lane = thread & 31;  // what follows from it is not kept
    return {{{{{{{params, shared, thread, warp, lane, lane >> 2, lane & 3, place.location, place.value_head, place.tile,
                  turn}}}},
              given.maps}}};
  };

  if (threadIdx.x == 0) {
    mark(params.forward, Mark::kGradientsBegin, 0);
    const uint32_t barriers = ptx::shared_address(shared + Config::kBarriers);
#pragma unroll
    for (int i = 0; i < Gradients::kCopies; ++i) {
      ptx::mbarrier_init(barriers + 8 * i, Gradients::arrivals(i));
      for (int j = 0; j < Gradients::early_arrivals(i); ++j) ptx::mbarrier_arrive(barriers + 8 * i);
    }
    ptx::fence_mbarrier_init();
    places[0] = places[1] = nowhere;
  }
  if (rehearses) {  // norms in range
    for (int i = threadIdx.x; i < 2 * Config::kKeyTileBytes / 16; i += Config::kThreads) {
      reinterpret_cast<uint4*>(shared + Config::kQuery)[i] = {0, 0, 0, 0};
    }
  }
  __syncthreads();
  ptx::launch_dependents();
  // All of a chunk is copied; the first one's gates, which are an input, before the recurrences have ended.
  const auto copy = [&](int turn) {
    at(turn).copy_gates();
    if (params.forward.progress == nullptr) ptx::wait_for_kernel_before();
    at(turn).copy_values();
    __syncthreads();  // the recurrences have left the tile
    at(turn).copy_states();
    at(turn).copy_keys();
    at(turn).keep_parameter(at(turn).raw_parameter());
    ptx::cp_async_wait_group<2>();
    __syncthreads();
  };
  const auto there_is_a_tile = [&] {
    const uint32_t first = chunk_left_at(given.divisors, 0) * given.divisors.value_heads.value();
    return ptx::load_acquire(params.forward.progress + first) >= params.progress_wanted;
  };
#pragma unroll 1
  for (unsigned turns = 0; places[turns & 1].slot < slots; ++turns) {
    const int turn = turns & 1;
    const auto here = [&] { return at(turn); };
    const auto next = [&] { return at(turn ^ 1); };
    rehearses = rehearses && !__syncthreads_or(threadIdx.x == 0 && there_is_a_tile());
    const uint32_t taken = rehearses ? 0 : take_index();
    bool is_found = rehearses;
    const auto find_next = [&] {
      if (!is_found) find(turns + 1, taken);
      is_found = true;
    };
    const ChunkPlace& place = places[turn];
    if (place.location.tokens > 0 || rehearses) {
      if (threadIdx.x == 0) mark(params.forward, Mark::kGradientsChunk, place.tile);
      if (Gradients::run(turn, here, next, find_next)) continue;
    } else {
      here().copy_over_gradients();
      if (place.slot >= 0) {
        clear_parts<Config>(params, place.tile);
        if (threadIdx.x == 0) params.by_levels[place.tile] = RowsPastEnd(params.forward.call, place.slot).count > 0;
      }
    }
    ptx::cp_async_wait_all();
    here().wait_for(Gradients::Copy::kValues, turn);
    here().wait_for(Gradients::Copy::kStates, turn);
    if constexpr (Config::kTensorCopies) {
      here().wait_for(Gradients::Copy::kGates, turn);
      here().wait_for(Gradients::Copy::kKeys, turn);
      ptx::fence_proxy_async_shared();
    }
    __syncthreads();  // all are done with this chunk, and with the one before
    find_next();
    __syncthreads();
    copy(turn ^ 1);
  }
  if (threadIdx.x == 0) mark(params.forward, Mark::kGradientsEnd, 0);
  if constexpr (Config::kTensorCopies) ptx::cp_async_bulk_wait_all();
  ptx::wait_for_kernel_before();  // who waits for this kernel relies on those before it, too
}

}  // namespace kda
