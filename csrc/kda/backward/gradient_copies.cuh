// What a CTA of stage 4 of the backward copies from memory for a chunk, and the gradients that it stores by the copy engine.
//
// A thread asks the copy engine; barriers count what has come. In kernels for any kind of call (Config::kTensorCopies is false) threads copy rows by
// cp.async, in groups, and store them.
#pragma once

#include "../device/timeline.cuh"
#include "block_gradients.cuh"
#include "gradients_params.h"

namespace kda {

template <typename Config>
struct GradientCopies : BlockGradients<Config> {
  using Blocks = BlockGradients<Config>;
  using Element = typename Config::Element;
  using Blocks::address, Blocks::call, Blocks::lane, Blocks::location, Blocks::params, Blocks::shared, Blocks::tile,
      Blocks::value_head;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;
  static constexpr bool kTensorCopies = Config::kTensorCopies;

  const GradientTensorMaps& maps;  // if kTensorCopies

  // Copies by the copy engine, which barriers count: of values, of states, of g, and of q and k.
  enum class Copy { kValues, kStates, kGates, kKeys };
  static constexpr int kCopies = 4;
  // The warps whose first lanes ask for them, and for stores. Each takes a while, in which the others wait for it at the next barrier.
  enum class Asking {
    kQueries,
    kKeys,
    kValues,
    kRows,
    kGates,
    kStates,
    kAhead,
    kValueGradients,
    kNone,
    kGateGradients
  };
  __device__ __forceinline__ bool asks_for(Asking what) const {
    return this->warp == static_cast<int>(what) % Config::kWarps && lane == 0;
  }
  // How many of them arrive at a barrier.
  static constexpr int arrivals(int copies) { return copies == static_cast<int>(Copy::kGates) ? 1 : 2; }
  // Those for which nothing is copied of no chunk: the others ask for what they copy in its own chunk.
  static constexpr int early_arrivals(int copies) {
    if (copies == static_cast<int>(Copy::kKeys)) return 0;
    return copies == static_cast<int>(Copy::kStates) && Config::kGateGradientFits ? 1 : arrivals(copies);
  }
  __device__ __forceinline__ uint32_t barrier(Copy copies) const {
    return address(Config::kBarriers + static_cast<int>(copies) * 8);
  }
  // Rows of the chunk, and of what follows it in the tensor.
  __device__ __forceinline__ void copy_rows(Copy copies, int offset, const CUtensorMap& map) const {
    ptx::cp_async_bulk_tensor_load(address(offset), &map, 0, static_cast<int>(location.first_token), 0, value_head,
                                   static_cast<int>(location.batch), barrier(copies));
  }
  __device__ __forceinline__ void store_tile(const CUtensorMap& map, int offset) const {
    ptx::cp_async_bulk_tensor_store(&map, 0, static_cast<int>(location.first_token), 0, value_head,
                                    static_cast<int>(location.batch), address(offset));
    ptx::cp_async_bulk_commit_group();
  }
  // Whether rows of 64 tokens are the chunk's: else those past its end belong to another sequence.
  __device__ __forceinline__ bool is_whole() const { return location.tokens == C; }

  template <typename Gate>
  __device__ __forceinline__ void copy_gates_of() const {
    const ChunkFwdParams& c = call();
    const Gate* const first =
        static_cast<const Gate*>(c.g) +
        (location.batch * c.g_stride.batch + location.first_token * c.g_stride.token + value_head * c.g_stride.head);
    this->template load_rows<typename Config::GateTile, K>(Config::kGates, first, c.g_stride.token,
                                                           params.forward.vectorized);
  }

  __device__ __forceinline__ void copy_gates() const {
    if constexpr (kTensorCopies) {
      if (!asks_for(Asking::kGates)) return;
      const bool is_used = location.tokens > 0;
      const int bytes = C * K * (call().gate_type == DataType::kFloat32 ? 4 : 2);
      ptx::mbarrier_arrive_expect_tx(barrier(Copy::kGates), is_used ? bytes : 0);
      if (is_used) copy_rows(Copy::kGates, Config::kGates, maps.g);
      return;
    }
    if (location.tokens > 0) {
      if (call().gate_type == DataType::kFloat32) {
        copy_gates_of<float>();
      } else if (call().gate_type == DataType::kBFloat16) {
        copy_gates_of<BFloat16>();
      } else {
        copy_gates_of<Float16>();
      }
    }
    ptx::cp_async_commit_group();
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_tile(Copy copies, int offset, const void* tiles) const {
    ptx::cp_async_bulk_load(address(offset), static_cast<const uint8_t*>(tiles) + tile * kBytes, kBytes,
                            barrier(copies));
  }

  __device__ __forceinline__ void copy_values() const {
    const bool is_used = location.tokens > 0;
    if (asks_for(Asking::kValues)) {
      if (is_used && params.forward.progress != nullptr) {
        const uint32_t* const progress = params.forward.progress + tile;
        mark(params.forward, Mark::kGradientsWait, tile);
        while (ptx::load_acquire(progress) < params.progress_wanted) __nanosleep(100);
        mark(params.forward, Mark::kGradientsThere, tile);
        ptx::fence_proxy_async_global();
      }
      constexpr int kBytes = 2 * Config::kValueTileBytes + Config::kPairTileBytes;
      ptx::mbarrier_arrive_expect_tx(barrier(Copy::kValues), is_used ? kBytes : 0);
      if (!is_used) return;
      copy_tile<Config::kValueTileBytes>(Copy::kValues, Config::kY, params.dU);
      copy_tile<Config::kValueTileBytes>(Copy::kValues, Config::kU, params.forward.U_rounded);
      copy_tile<Config::kPairTileBytes>(Copy::kValues, Config::kInverse, params.forward.inverse);
    } else if (asks_for(Asking::kRows)) {
      const bool copies_rows = kTensorCopies && is_used;
      ptx::mbarrier_arrive_expect_tx(barrier(Copy::kValues), copies_rows ? Config::kValueTileBytes : 0);
      if (copies_rows) copy_rows(Copy::kValues, Config::kOutputGradient, maps.dO);
    }
  }

  __device__ __forceinline__ void copy_states() const {
    if constexpr (!kTensorCopies) {
      if (location.tokens > 0) this->load_output_gradient();
      ptx::cp_async_commit_group();
    }
    if (!asks_for(Asking::kStates)) return;
    const bool is_used = location.tokens > 0;
    copy_state(is_used, Config::kState, params.forward.state);
    if constexpr (!Config::kGateGradientFits) copy_state(is_used, Config::kDState, params.dstate);
  }
  __device__ __forceinline__ void copy_state(bool is_used, int offset, const void* states) const {
    ptx::mbarrier_arrive_expect_tx(barrier(Copy::kStates), is_used ? Config::kStateBytes : 0);
    if (!is_used) return;
    if (params.forward.progress != nullptr) ptx::fence_proxy_async_global();  // the values' thread has waited
    copy_tile<Config::kStateBytes>(Copy::kStates, offset, states);
  }

  // turn: of the chunk, modulo 2.
  __device__ __forceinline__ void wait_for(Copy copies, int turn) const {
    ptx::mbarrier_wait_parity(barrier(copies), turn);
  }

  __device__ __forceinline__ void copy_keys() const {
    if constexpr (kTensorCopies) return;
    if (location.tokens > 0) this->load_queries_and_keys();
    ptx::cp_async_commit_group();
  }

  // The copy engine, which stores dq, dk and dg of the chunk before from where q, k and dS' come, is asked for these in their own chunk, and to have them at
  // hand in the one before.
  __device__ __forceinline__ void prefetch() const {
    if (!kTensorCopies || !asks_for(Asking::kAhead) || location.tokens == 0) return;
    const int token = static_cast<int>(location.first_token), batch = static_cast<int>(location.batch);
    ptx::prefetch_tensor_to_l2(&maps.q, 0, token, 0, value_head, batch);
    ptx::prefetch_tensor_to_l2(&maps.k, 0, token, 0, value_head, batch);
    if constexpr (Config::kGateGradientFits) {
      ptx::prefetch_to_l2(reinterpret_cast<const uint8_t*>(params.dstate) + tile * Config::kStateBytes,
                          Config::kStateBytes);
    }
  }
  __device__ __forceinline__ void copy_over_gradients() const {
    if constexpr (kTensorCopies) {
      if (asks_for(Asking::kQueries)) copy_over_gradient(Config::kQuery, maps.q);
      if (asks_for(Asking::kKeys)) copy_over_gradient(Config::kKey, maps.k);
    }
    if (Config::kGateGradientFits && asks_for(Asking::kGateGradients)) {
      ptx::cp_async_bulk_wait_read_all();
      copy_state(location.tokens > 0, Config::kDState, params.dstate);
    }
  }
  __device__ __forceinline__ void copy_over_gradient(int offset, const CUtensorMap& map) const {
    ptx::cp_async_bulk_wait_read_all();
    const bool is_used = location.tokens > 0;
    ptx::mbarrier_arrive_expect_tx(barrier(Copy::kKeys), is_used ? Config::kKeyTileBytes : 0);
    if (is_used) copy_rows(Copy::kKeys, offset, map);
  }

  // Of a chunk that is not whole.
  template <int kBytes>
  __device__ __forceinline__ void clear_copied_rows(int offset) const {
    constexpr int kUnits = kBytes / 16 / C;
    for (int i = this->thread; i < C * kUnits; i += Config::kThreads) {
      const int t = i / kUnits;
      const uint32_t at = offset + BlockedTile<C>::unit_offset(t, i % kUnits);
      if (t >= location.tokens) *reinterpret_cast<uint4*>(shared + at) = {0, 0, 0, 0};
    }
  }
  // q, k and dO of the chunk are there; rows past its end are zero.
  __device__ __forceinline__ void wait_for_rows(int turn) const {
    if constexpr (!kTensorCopies) {
      ptx::cp_async_wait_all();
      if constexpr (!std::is_same_v<Element, BFloat16>) this->convert_output_gradient();
      return;
    }
    wait_for(Copy::kKeys, turn);
    if (is_whole()) return;
    clear_copied_rows<Config::kValueTileBytes>(Config::kOutputGradient);
    clear_copied_rows<Config::kKeyTileBytes>(Config::kQuery);
    clear_copied_rows<Config::kKeyTileBytes>(Config::kKey);
  }

  // dV, before and after a barrier that follows others.
  __device__ __forceinline__ void store_value_gradient() const {
    if (!kTensorCopies || !is_whole()) {
      this->template store_rows<typename Config::ValueTile, V>(params.dv, Config::kValueGradient, this->value_row(0),
                                                               call().problem.value_heads);
    } else if (asks_for(Asking::kValueGradients)) {
      store_tile(maps.dv, Config::kValueGradient);
    }
  }
  __device__ __forceinline__ void wait_for_stores() const {
    if (kTensorCopies && asks_for(Asking::kValueGradients)) ptx::cp_async_bulk_wait_read_all();
  }

  // dq and dk, which lie where q and k were, and dg.
  __device__ __forceinline__ void store_gradients() const {
    if (asks_for(Asking::kQueries)) store_tile(maps.dq, Config::kQuery);
    if (asks_for(Asking::kKeys)) store_tile(maps.dk, Config::kKey);
    if (Config::kGateGradientFits && asks_for(Asking::kGateGradients)) store_tile(maps.dg, Config::kGateGradient);
  }
};

}  // namespace kda
