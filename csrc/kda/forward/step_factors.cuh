// The first stage of the stepwise forward: everything of each step of 32 tokens that does not depend on the state, into an image in the
// workspace (StepImage). The formulas are those of step_producer.cuh and step_operands.cuh.
//
// Grid: one CTA for each (step slot, value head), of four warps; of eight where there are too few of them to fill the device (K = 128). After a fused
// kernel a CTA for a few of them: where nothing is left, each takes its time to begin and to end.
// Shared memory (bytes, K = 128): rows of q, k, g 24576, which become pair operands and then the tiles of Tinv and Aqk; the second half
// of the gates in fp32 8192, which becomes K ⊙ e^{G_C - G}; K ⊙ e^G and Q ⊙ e^G 16384; the solve and values of rows 6144.
// So four CTAs share a multiprocessor: one's copies and its one inverting warp run beside the products of others.
// Registers: at most 128 a thread.
// Bound by its own instructions and the use of shared memory; 24 KiB in and 33 KiB out for a step are not far behind at many heads.
#pragma once

#include "../device/chunk_location.cuh"
#include "call_kind.h"
#include "forgetting.cuh"
#include "step_producer.cuh"

namespace kda {

template <int K_, int kWarps, typename Element_, CallKind kKind_>
struct StepFactorsConfig : StepTiles<K_> {
  using Tiles = StepTiles<K_>;
  using Tiles::C, Tiles::K, Tiles::kKeyTileBytes, Tiles::kPairTileBytes;
  using Element = Element_;
  static constexpr CallKind kKind = kKind_;
  static constexpr int kGroupThreads = 32 * kWarps, kBarrierThreads = kGroupThreads, kCtasPerSm = K == 128 ? 4 : 5;

  static constexpr int kRawQ = 0, kRawK = kKeyTileBytes, kRawG = 2 * kKeyTileBytes, kSecondGate = 3 * kKeyTileBytes;
  static constexpr int kGated = 4 * kKeyTileBytes;
  static constexpr int kKeysDecayed =
      kSecondGate;  // each pair of channels in the place of its second gate, by the same thread
  static constexpr int kInverseTile = 0, kAqkTile = kPairTileBytes;  // over rows that have been read
  static constexpr int kVectors = kGated + 2 * kKeyTileBytes;
  static constexpr int kStepDecay = kVectors;
  static constexpr int kKeyNorm = kVectors + Tiles::kKeyNormVector;
  static constexpr int kOutputScale = kVectors + Tiles::kOutputScaleVector;

  // Scratch.
  static constexpr int kScratch = kVectors + Tiles::kVectorBytes;
  static constexpr int kSolve = 0;  // Akk, then its inverse   [C, 36] fp32
  static constexpr int kTotals =
      kSolve;  // log-decay of each group of tokens   [groups, K] fp32; no longer needed when Akk comes
  static constexpr int kTokenGroups = kGroupThreads / (K / 2), kTokensPerThread = C / kTokenGroups;
  static_assert(kTokenGroups * K * 4 <= SolveMatrix32::kBytes);
  static constexpr int kRowValues = kSolve + SolveMatrix32::kBytes;  // see RowValues
  static constexpr int kScratchBytes = kRowValues + 6 * C * 4;
  static constexpr int kBarrier = kScratch + kScratchBytes;
  static constexpr int kSharedBytes = kBarrier + 8;
  static_assert(2 * kPairTileBytes <= 2 * kKeyTileBytes);
  static_assert(kCtasPerSm * (kSharedBytes + 1024 + 128) <= 228 * 1024);
};

// kAfterFused: there was a fused kernel, which may have left nothing.
template <typename Config, bool kAfterFused>
__global__ void __launch_bounds__(Config::kGroupThreads, Config::kCtasPerSm)
    step_factors_kernel(const __grid_constant__ StepKernelParams given) {
  StepKernelParams params = given;
  fix<Config::kKind>(params.call);
  constexpr int C = Config::C, kBarrierId = 1;
  using Image = StepImage<Config::K>;
  const ChunkFwdParams& call = params.call;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t shared_base = ptx::shared_address(shared), loaded = shared_base + Config::kBarrier;
  const uint32_t value_heads = call.problem.value_heads;

  // Through the first-level cache: there are many CTAs.
  const auto find_left_here = [&](int64_t chain, int lane) {
    return find_left(params.left, chain, lane, [](const uint2* words) { return *words; });
  };
  if constexpr (kAfterFused) {
    ptx::wait_for_kernel_before();
    if (!find_left_here(0, threadIdx.x & 31).anything) return;
  }
  ptx::launch_dependents();
  const auto init_barrier = [&] {
    ptx::mbarrier_init(loaded, 1);
    ptx::fence_mbarrier_init();
  };
  if constexpr (kAfterFused) {
    if (threadIdx.x == 0) init_barrier();
    __syncthreads();
  }

  // tile: of (step slot, value head). Returns whether it was made.
  const auto make_tile = [&](uint32_t tile, uint32_t parity) {
    // Else the compiler keeps what follows from the thread from one tile to the next, and has no registers for it.
    const int thread = kAfterFused ? ptx::opaque(static_cast<int>(threadIdx.x)) : threadIdx.x, lane = thread & 31;
    const uint32_t slot = tile / value_heads;
    const int value_head = static_cast<int>(tile - slot * value_heads);
    const int key_head = value_head / static_cast<int>(value_heads / call.problem.heads);
    const auto [sequence, location, is_first, is_last] = find_slot(call, slot, C, lane);
    if (location.tokens == 0) return false;
    if (kAfterFused && !find_left_here(sequence * value_heads + value_head, lane).chain) return false;

    if (thread == 0) {
      if constexpr (kAfterFused) {
        ptx::cp_async_bulk_wait_read_all();  // of the tile before
      } else {
        init_barrier();
      }
      const int token = static_cast<int>(location.first_token), batch = static_cast<int>(location.batch);
      const bool gate_is_fp32 = call.gate_type == DataType::kFloat32;
      ptx::mbarrier_arrive_expect_tx(loaded, (gate_is_fp32 ? 4 : 3) * Config::kKeyTileBytes);
      ptx::cp_async_bulk_tensor_load(shared_base + Config::kRawQ, &given.maps.q, 0, token, 0, key_head, batch, loaded);
      ptx::cp_async_bulk_tensor_load(shared_base + Config::kRawK, &given.maps.k, 0, token, 0, key_head, batch, loaded);
      ptx::cp_async_bulk_tensor_load(shared_base + Config::kRawG, &given.maps.g, 0, token, 0, value_head, batch,
                                     loaded);
    }
    const StepProducer<Config> make{
        call, shared, shared, shared + Config::kScratch, location.tokens, location.tokens, kBarrierId, thread, lane};
    const GateConstants constants(call, value_head, make.channel_of(thread));
    const uint32_t beta = BetaReader(call, location.batch, location.first_token, location.first_token + location.tokens,
                                     value_head, thread)
                              .next(call, C);
    const RowValues rows(shared + Config::kScratch + Config::kRowValues);
    const StepOperands<Config> operands = make.operands(constants);
    __syncthreads();
    ptx::mbarrier_wait_parity(loaded, parity);

    typename StepProducer<Config>::Products products;
    const bool far_apart = make.prepare(operands, constants, rows, beta);
    make.multiply_pairs(products, operands, rows, far_apart);
    uint8_t* const image = params.images + int64_t{tile} * Image::kImageBytes;
    ptx::fence_proxy_async_shared();
    __syncthreads();  // the pair operands have been read, the gated ones are there
    if (thread == 0) {
      // In parts of at most 8 KiB: of larger ones initcheck believes that a part was not written.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int offset = half * Config::kKeyTileBytes;
        ptx::cp_async_bulk_store(image + Image::kGated + offset, shared_base + Config::kGated + offset,
                                 Config::kKeyTileBytes);
      }
      ptx::cp_async_bulk_store(image + Image::kKeysDecayed, shared_base + Config::kKeysDecayed, Config::kKeyTileBytes);
      ptx::cp_async_bulk_commit_group();
    }
    make.store_akk(products, rows, far_apart);
    make.store_aqk(products, rows, far_apart);
    __syncthreads();
    make.invert();
    __syncthreads();
    make.store_inverse(rows);
    ptx::fence_proxy_async_shared();
    __syncthreads();
    if (thread == 0) {
      ptx::cp_async_bulk_store(image + Image::kInverseTile, shared_base + Config::kInverseTile,
                               2 * Config::kPairTileBytes);
      ptx::cp_async_bulk_store(image + Image::kVectors, shared_base + Config::kVectors, Config::kVectorBytes);
      ptx::cp_async_bulk_commit_group();
    }
    return true;
  };
  if constexpr (kAfterFused) {
    const uint32_t tiles = static_cast<uint32_t>(params.step_slots) * value_heads;
    uint32_t parity = 0;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) parity ^= make_tile(tile, parity);
  } else {
    make_tile(blockIdx.x, 0);
  }
  if (threadIdx.x == 0) ptx::cp_async_bulk_wait_read_all();  // the shared memory is given back
}

}  // namespace kda
