// The kernels of the CPU forward for what the compiler assumes of every machine: SSE2 on x86-64, NEON on ARM.
#define KDA_CPU_VECTOR_BYTES 16

namespace kda::cpu {

namespace {

constexpr int kBlockRows = 4, kPanelColumns = 8;  // 8 sums in 16 registers

}  // namespace

}  // namespace kda::cpu

#include "advance_panel.h"
#include "prepare_step.h"

namespace kda::cpu {

const Kernels kBaselineKernels = {kPanelColumns, &prepare_step, &advance_panel};

}  // namespace kda::cpu
