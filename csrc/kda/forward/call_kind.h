// Kinds of calls that are common: what they have in common is constant in kernels of their own. A kernel that looks at types and transforms at run
// time has code for all of them, of which a call runs a part; that part is then scattered over more than the instruction cache holds.
#pragma once

#include <type_traits>

#include "../device/elements.cuh"
#include "../kda.h"

namespace kda {

enum class CallKind {
  kAny,
  kProcessed,  // gates and beta as they enter the recurrence, in fp32, and q and k as they are
  kRaw,        // bounded gates and beta from bf16 logits, and q and k to be normalised
};

// Calls f(field, value) for each field of a call that has one value in all calls of a kind.
template <CallKind kKind, typename Call, typename Function>
__host__ __device__ constexpr void for_each_fixed(Call& call, Function f) {
  if constexpr (kKind == CallKind::kProcessed) {
    f(call.gate_type, DataType::kFloat32);
    f(call.beta_type, DataType::kFloat32);
    f(call.gate, GateKind::kLog);
    f(call.qk_l2norm, false);
    f(call.beta_sigmoid, false);
  } else if constexpr (kKind == CallKind::kRaw) {
    f(call.gate_type, DataType::kBFloat16);
    f(call.beta_type, DataType::kBFloat16);
    f(call.gate, GateKind::kSigmoid);
    f(call.qk_l2norm, true);
    f(call.beta_sigmoid, true);
  }
}

template <CallKind kKind>
[[nodiscard]] constexpr bool is_of_kind(const ChunkFwdParams& call) {
  bool is_same = true;
  for_each_fixed<kKind>(call, [&](const auto& field, auto value) { is_same = is_same && field == value; });
  return is_same;
}

// Tells the compiler what is constant, in a copy of the call.
template <CallKind kKind>
__device__ __forceinline__ void fix(ChunkFwdParams& call) {
  for_each_fixed<kKind>(call, [](auto& field, auto value) { field = value; });
}

template <CallKind kKind>
using CallKindConstant = std::integral_constant<CallKind, kKind>;

// Calls f with the kind of a call, as a CallKindConstant. Those that are not kAny have bf16 activations, and are plain: whatever else their kernels count on.
template <typename Element, typename Function>
auto for_call_kind(const ChunkFwdParams& call, bool is_plain, Function f) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    if (is_plain && is_of_kind<CallKind::kProcessed>(call)) return f(CallKindConstant<CallKind::kProcessed>());
    if (is_plain && is_of_kind<CallKind::kRaw>(call)) return f(CallKindConstant<CallKind::kRaw>());
  }
  return f(CallKindConstant<CallKind::kAny>());
}

}  // namespace kda
