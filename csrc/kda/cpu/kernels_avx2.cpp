// The kernels of the CPU forward for AVX2 with FMA.
#if defined(__x86_64__)

#include <cstdint>
#include <cstring>

// From here on, and not for the standard headers above, whose functions other files share.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define KDA_CPU_VECTOR_BYTES 32

namespace kda::cpu {

namespace {

constexpr int kBlockRows = 4, kPanelColumns = 16;  // 8 sums in 16 registers

}  // namespace

}  // namespace kda::cpu

#include "advance_panel.h"
#include "prepare_step.h"

namespace kda::cpu {

const Kernels kAvx2Kernels = {kPanelColumns, &prepare_step, &advance_panel};

}  // namespace kda::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
