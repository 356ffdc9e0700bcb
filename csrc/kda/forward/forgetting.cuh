// Where nothing is left of a state: the map of some tokens, S_end = M S_entry + B, vanishes. And which chains the fused kernel, cut, has left
// to the stepwise stages because it does not.
#pragma once

#include "../device/gate.cuh"
#include "step_params.h"

namespace kda {

// What is dropped of the state at the entry is below 2^-93 of it: less than fp32 resolves of any state to which the tokens add something.
inline constexpr float kNegligibleMap = 0x1p-100f;
// Steps whose map is looked at.
inline constexpr int kTailSteps = 2;

// Keys of norm 1 and beta in [0, 2]: the norm of a map never grows, so that where the map of a few tokens is negligible, that of these and all tokens
// before them is, too.
__device__ __forceinline__ bool is_contractive(const ChunkFwdParams& call) {
  return call.qk_l2norm && call.beta_sigmoid;
}

// Of the kernels after a fused one that cuts chains, the first waits for its end before it lets the next one start, and each of the others reads what is left
// before it does: so they know it without waiting for the one before, and where nothing is left they end side by side.

// Whether any word of those of which a lane has its share is as wanted. Called by whole warps; every warp gets the same answer.
template <typename Predicate>
__device__ __forceinline__ bool any_left(const LeftChains& left, int lane, Predicate is_wanted) {
  bool found = false;
#pragma unroll 4
  for (int i = lane; i < left.count; i += 32) found |= is_wanted(ptx::load_relaxed(left.words + i));
  return __any_sync(0xffffffffu, found);
}

// Whether the fused kernel has done all; not if there was none. Likewise.
__device__ __forceinline__ bool none_left(const LeftChains& left, int lane) {
  return left.words != nullptr && !any_left(left, lane, [](uint32_t word) { return word != 0; });
}

// Likewise.
__device__ __forceinline__ bool is_left(const LeftChains& left, int64_t chain, int lane) {
  const auto names_chain = [&](uint32_t word) { return word == static_cast<uint32_t>(chain) + 1; };
  return left.words == nullptr || any_left(left, lane, names_chain);
}

// The same for kernels that ask often, of most chains from shared memory.
template <int kChains>
struct LeftChainSet {
  uint32_t bits[kChains / 32];

  // By all threads of the CTA. Needs a barrier after it.
  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < kChains / 32; i += blockDim.x) bits[i] = 0;
  }
  __device__ __forceinline__ void fill(const LeftChains& left) {
    for (int i = threadIdx.x; i < left.count; i += blockDim.x) {
      const uint32_t word = ptx::load_relaxed(left.words + i);
      if (word - 1 < kChains) atomicOr(&bits[(word - 1) / 32], 1u << (word - 1) % 32);
    }
  }
  __device__ __forceinline__ bool has(const LeftChains& left, int64_t chain, int lane) const {
    if (chain >= kChains) return is_left(left, chain, lane);
    return left.words == nullptr || (bits[chain / 32] >> chain % 32 & 1);
  }
};

}  // namespace kda
