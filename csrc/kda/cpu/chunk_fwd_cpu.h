// The forward of Kimi Delta Attention on the CPU, in fp32 inside, without torch.
//
// A sequence is taken in steps of C = 32 tokens. With the state S at entry of a step and G_i the sum of its log-gates
// up to token i (docs/design.md, Mathematics):
//
//   prepare   Akk[i,j] = beta_i k_i k_j exp(G_i - G_j) (i > j)     independent of S, as are the gated q and k
//             Aqk[i,j] = q_i k_j exp(G_i - G_j) (i >= j)           (prepare_step.h)
//   advance   U  = beta V - beta (K * e^G) S - Akk U               from step to step, each panel of columns of V by
//             O  = (Q * e^G) S + Aqk U                             itself (advance_panel.h)
//             S' = Diag(e^{G_C}) S + (K * e^{G_C - G})^T U
//
// A thread takes a sequence and value head at a time, a few steps of it prepared ahead so that they stay in its cache.
// What would leave threads idle at the end is taken by all of them instead: steps are prepared side by side, then
// advanced panel by panel. Neither this nor the number of threads changes a bit of the result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../types.h"

namespace kda::cpu {

// Element strides of a [B, T, heads, dim] tensor. For beta [B, T, HV] `dim` is not used.
struct TensorStrides {
  int64_t batch = 0;
  int64_t token = 0;
  int64_t head = 0;
  int64_t dim = 1;
};

// Element strides of states [N or slots, HV, K, V], in whatever order they lie in memory.
struct StateStrides {
  int64_t sequence = 0;
  int64_t head = 0;
  int64_t key = 0;
  int64_t value = 0;
};

struct ChunkFwdParams {
  int64_t batch = 1;    // B
  int64_t tokens = 0;   // T, of one batch row
  int heads = 1;        // H
  int value_heads = 1;  // HV, a multiple of H
  int key_dim = 128;    // K
  int value_dim = 128;  // V

  DataType activation_type = DataType::kFloat32;  // of q, k, v and o
  DataType gate_type = DataType::kFloat32;        // of g
  DataType beta_type = DataType::kFloat32;
  const void* q = nullptr;     // [B, T, H, K]
  const void* k = nullptr;     // [B, T, H, K]
  const void* v = nullptr;     // [B, T, HV, V]
  const void* g = nullptr;     // [B, T, HV, K]
  const void* beta = nullptr;  // [B, T, HV]
  TensorStrides q_stride, k_stride, v_stride, g_stride, beta_stride;
  const float* A_log = nullptr;    // [HV], or null
  const float* dt_bias = nullptr;  // [HV, K], or null

  const void* initial_state = nullptr;  // [N, HV, K, V], or null: zeros
  DataType state_type = DataType::kFloat32;
  StateStrides initial_state_stride;

  // Offsets of the sequences, N + 1 of them, never decreasing, from 0 to at most T (then B is 1); empty: N = B
  // sequences of T tokens.
  std::vector<int64_t> cu_seqlens;

  float scale = 1.0f;
  GateKind gate = GateKind::kLog;
  float lower_bound = 0.0f;
  bool qk_l2norm = false;
  bool beta_sigmoid = false;
  float beta_scale = 1.0f;

  // Tokens of no sequence and slots of no chunk are not written. plan.h says what slots are.
  void* o = nullptr;              // [B, T, HV, V] contiguous
  float* final_state = nullptr;   // [N, HV, K, V], or null
  float* chunk_states = nullptr;  // [slots, HV, K, V] at entry of each chunk, or null
  StateStrides final_state_stride, chunk_states_stride;
};

enum class InstructionSet : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this machine that there are kernels for.
[[nodiscard]] InstructionSet best_instruction_set();

// Whether this machine has it.
[[nodiscard]] bool is_supported(InstructionSet set);

// By name: baseline, avx2, avx512.
[[nodiscard]] std::optional<InstructionSet> parse_instruction_set(const std::string& name);

// Runs body(0) .. body(count - 1), on several threads if that may be, and returns when all have.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t index)>& body)>;

// Computes o and the states, on at most `threads` threads. Allocates working memory in proportion
// to threads, and to nothing that grows with T. Throws std::bad_alloc.
void chunk_fwd(const ChunkFwdParams& params, InstructionSet set, int threads, const ParallelFor& parallel_for);

}  // namespace kda::cpu
