// The public face of the kernel library: Kimi Delta Attention on CUDA, without torch.
//
//   kda::ChunkFwdProblem problem = {...};
//   kda::ChunkFwdPlan plan = kda::plan_chunk_fwd(problem);
//   ... allocate plan.workspace.total_bytes on the device ...
//   kda::ChunkFwdParams params = {...};
//   cudaError_t status = kda::chunk_fwd(params, plan, stream);
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace kda {

// All pointers are device pointers.
struct ChunkFwdParams {
  ChunkFwdProblem problem;

  const void* q = nullptr;     // [B, T, H, K]   activation_type
  const void* k = nullptr;     // [B, T, H, K]   activation_type
  const void* v = nullptr;     // [B, T, HV, V]  activation_type
  const void* g = nullptr;     // [B, T, HV, K]  gate_type
  const void* beta = nullptr;  // [B, T, HV]     beta_type
  TokenStrides q_stride, k_stride, v_stride, g_stride, beta_stride;
  DataType gate_type = DataType::kFloat32;
  DataType beta_type = DataType::kFloat32;

  const float* A_log = nullptr;    // [HV], or null
  const float* dt_bias = nullptr;  // [HV, K], or null

  const void* initial_state = nullptr;  // [N, HV, K, V] ([N, HV, V, K] if state_v_first), state_type, or null: zeros
  int64_t initial_state_stride_sequence = 0;
  int64_t initial_state_stride_head = 0;
  DataType state_type = DataType::kFloat32;  // of initial_state: kFloat32 or kBFloat16
  bool state_v_first = false;                // of initial_state, final_state and chunk_states

  const void* cu_seqlens = nullptr;  // [N + 1] int32 or int64, or null: N = B sequences of T tokens
  bool cu_seqlens_int64 = false;

  float scale = 1.0f;
  GateKind gate = GateKind::kLog;
  float lower_bound = 0.0f;   // kSigmoid only; in [-5, 0)
  bool qk_l2norm = false;     // q, k <- x * rsqrt(sum x^2 + 1e-6)
  bool beta_sigmoid = false;  // beta <- beta_scale * sigmoid(beta)
  float beta_scale = 1.0f;    // 1, or 2 for negative eigenvalues; with beta_sigmoid only

  void* o = nullptr;             // [B, T, HV, V] contiguous, activation_type
  float* final_state = nullptr;  // [N, HV, K, V] or [N, HV, V, K], contiguous; or null
  float* chunk_states =
      nullptr;                // [slots, HV, K, V] or [slots, HV, V, K]: state at entry of each chunk; unused slots are
                              // not written; or null
  void* workspace = nullptr;  // plan.workspace.total_bytes, 256-byte aligned
};

// Whether 16-byte accesses can read q, k, v and g: what problem.aligned_inputs must say before a plan is made.
[[nodiscard]] inline bool inputs_are_aligned(const ChunkFwdParams& p) {
  const DataType type = p.problem.activation_type;
  return is_aligned(p.q, p.q_stride, type) && is_aligned(p.k, p.k_stride, type) && is_aligned(p.v, p.v_stride, type) &&
         is_aligned(p.g, p.g_stride, p.gate_type);
}

// Enqueues the forward on `stream`: no synchronisation, no allocation, no host read of device memory. Capturable in a CUDA
// graph; the contents of cu_seqlens may change between replays. Returns cudaErrorNotSupported if the plan is not a kernel path, and
// cudaErrorInvalidValue if it was made for a contractive problem, and the call is not.
[[nodiscard]] cudaError_t chunk_fwd(const ChunkFwdParams& params, const ChunkFwdPlan& plan, cudaStream_t stream);

// The forward that also leaves what the gradients need: plan.intermediates.total_bytes at `intermediates`, 256-byte aligned. Its
// workspace has plan.saving_workspace.total_bytes. In stages; o and the states are those of that path.
[[nodiscard]] cudaError_t chunk_fwd_saving(const ChunkFwdParams& params, void* intermediates, const ChunkBwdPlan& plan,
                                           cudaStream_t stream);

// All pointers are device pointers. Gradients are contiguous, each in the shape and type of its input.
struct ChunkBwdParams {
  ChunkFwdParams inputs;  // those of the forward; its outputs and workspace are not used

  const void* dO = nullptr;             // [B, T, HV, V] contiguous, 16-byte aligned, activation_type
  const float* dfinal_state = nullptr;  // as final_state of the forward, contiguous; or null: zeros
  const void* intermediates = nullptr;  // what chunk_fwd_saving left, 16-byte aligned; null unless plan.saved

  void* dq = nullptr;              // [B, T, H, K]   activation_type
  void* dk = nullptr;              // [B, T, H, K]   activation_type
  void* dv = nullptr;              // [B, T, HV, V]  activation_type
  void* dg = nullptr;              // [B, T, HV, K]  gate_type
  void* dbeta = nullptr;           // [B, T, HV]     beta_type
  float* dA_log = nullptr;         // [HV], or null
  float* ddt_bias = nullptr;       // [HV, K], or null
  void* dinitial_state = nullptr;  // [N, HV, K, V] or [N, HV, V, K], state_type; or null
  void* workspace = nullptr;       // plan.workspace.total_bytes, 256-byte aligned
};

// Enqueues the backward on `stream`, with the promises of chunk_fwd.
[[nodiscard]] cudaError_t chunk_bwd(const ChunkBwdParams& params, const ChunkBwdPlan& plan, cudaStream_t stream);

}  // namespace kda
