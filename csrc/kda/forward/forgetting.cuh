// Where nothing is left of a state: the map of some tokens, S_end = M S_entry + B, vanishes. And which chains the fused kernel, cut, has left
// to the stepwise stages because it does not.
#pragma once

#include "../device/ptx.cuh"
#include "step_params.h"

namespace kda {

// What is dropped of the state at the entry is below 2^-93 of it: less than fp32 resolves of any state to which the tokens add something.
inline constexpr float kNegligibleMap = 0x1p-100f, kNegligibleMapLog2 = -100.0f;
// Steps whose map is looked at.
inline constexpr int kTailSteps = 2;

// Keys of norm 1 and beta in [0, 2]: the norm of a map never grows, so that where the map of a few tokens is negligible, that of these and all tokens
// before them is, too.
__host__ __device__ __forceinline__ bool is_contractive(const ChunkFwdParams& call) {
  return call.qk_l2norm && call.beta_sigmoid;
}

// What a kernel after a fused one that cuts chains finds left. Of these kernels the first waits for the end of the fused one before it lets the next one
// start, and each of the others looks at this before it waits for the one before: where nothing is left they end side by side.
struct WhatIsLeft {
  bool anything, chain;  // anything at all; the chain that was asked about
};

// Called by whole warps; every warp gets the same answer. Of a call without such a kernel all is left. load: of the words of a cut.
template <typename Load>
__device__ __forceinline__ WhatIsLeft find_left(const LeftChains& left, int64_t chain, int lane, Load load) {
  if (left.cuts == nullptr) return {true, true};
  bool anything = false, is_left = false;
#pragma unroll 4
  for (int i = lane; i < left.count; i += 32) {
    const uint2 words = load(left.cuts + i);
    anything |= (words.x | words.y) != 0;
    is_left |= words.x == static_cast<uint32_t>(chain) + 1 || words.y == static_cast<uint32_t>(chain) + 1;
  }
  return {__any_sync(0xffffffffu, anything) != 0, __any_sync(0xffffffffu, is_left) != 0};
}
__device__ __forceinline__ WhatIsLeft find_left(const LeftChains& left, int64_t chain, int lane) {
  return find_left(left, chain, lane, [](const uint2* words) { return ptx::load_relaxed(words); });
}

}  // namespace kda
