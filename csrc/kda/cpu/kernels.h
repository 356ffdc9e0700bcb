// What the driver of the CPU forward (chunk_fwd_cpu.cpp) and its kernels agree on. The kernels are compiled once for
// each instruction set; this header has no code, so that nothing of one set can end up in another.
#pragma once

#include <cstdint>

#include "../types.h"

namespace kda::cpu {

// Tokens of a step of the recurrence, and of a tile of it. Half of kChunkTokens: products inside a step cost in
// proportion to its length, those with the state do not depend on it, and 32 tokens hide the reading and writing of the
// state.
inline constexpr int kStepTokens = 32;
inline constexpr int kTileTokens = 16;

// The key dimension is padded to a multiple of this, the widest vector, whatever the instruction set is.
inline constexpr int kKeyPadding = 16;

// The inputs of one step: tokens of one sequence and value head. Each pointer is at the first token; strides in
// elements.
struct Rows {
  const void* data = nullptr;
  DataType type = DataType::kFloat32;
  int64_t token_stride = 0;
  int64_t stride = 1;  // of the last dimension
};

// What is the same for all tokens of a value head.
struct HeadOptions {
  int key_dim = 0;
  int value_dim = 0;
  int padded_key_dim = 0;
  float scale = 1.0f;
  bool qk_l2norm = false;
  bool beta_sigmoid = false;
  float beta_scale = 1.0f;
  GateKind gate = GateKind::kLog;
  float gate_rate = 1.0f;          // exp(A_log)
  float lower_bound = 0.0f;        // kSigmoid
  const float* dt_bias = nullptr;  // [K] or null
};

struct StepInputs {
  Rows q, k, v, g, beta;  // [rows, K], [rows, K], [rows, V], [rows, K], [rows]
  int rows = 0;           // 1 .. kStepTokens
};

// Tokens of q, k, v and g that a later step takes, to be fetched into the second-level cache meanwhile: rows of heads
// lie apart in memory, where no hardware looks for them.
struct Upcoming {
  const StepInputs* inputs = nullptr;  // of the later step
  int first = 0, count = 0;
  int key_dim = 0, value_dim = 0;
};

// What a step is without the state, C = kStepTokens, Kp the padded key dimension. Rows behind the end of a sequence are
// 0. With panels of P columns, [panels, C, P] is V cut into column panels.
struct StepFactors {
  int rows = 0;
  float* q = nullptr;      // [C, Kp] scale * q * e^G
  float* k = nullptr;      // [C, Kp] -beta * k * e^G
  float* k_out = nullptr;  // [C, Kp] k * e^(G_C - G)
  float* decay = nullptr;  // [2, Kp] e^(G_C) as 0 or 1, plus the rest: see prepare_step.h
  float* v = nullptr;      // [panels, C, P] beta * v
  float* Aqk = nullptr;    // [C, C], lower triangle
  float* Akk = nullptr;    // [C, C] -Akk, strictly lower triangle
};

// Where the outputs of one step and one panel go.
struct OutputTile {
  void* data = nullptr;  // the panel's first column of the step's first token
  DataType type = DataType::kFloat32;
  int64_t token_stride = 0;
  int columns = 0;  // of the panel, without padding
};

// Rows of Kp floats that prepare_step works in: alpha of a tile, and the product of alpha over each of two tiles.
inline constexpr int kPrepareScratchRows = kTileTokens + 2;

// The kernels of one instruction set.
struct Kernels {
  int panel_columns = 0;  // P, columns of V that one call of advance_panel takes

  // The factors of one step. `scratch` holds kPrepareScratchRows * Kp floats.
  void (*prepare_step)(const StepInputs& inputs, const HeadOptions& options, const StepFactors& factors,
                       float* scratch) = nullptr;

  // o of one step in the columns of one panel, and the panel's state [Kp, P] at the step's end. `scratch` holds C * P
  // floats.
  void (*advance_panel)(const StepFactors& factors, int padded_key_dim, int panel, float* state,
                        const OutputTile& output, const Upcoming& upcoming, float* scratch) = nullptr;
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace kda::cpu
