#include "plan.h"

namespace kda {

int64_t chunk_slots(const ChunkFwdProblem& p) {
  if (p.varlen) return p.tokens / kChunkTokens + p.sequences;
  return p.batch * ((p.tokens + kChunkTokens - 1) / kChunkTokens);
}

namespace {

constexpr size_t kAlignment = 256;

// Reserves `bytes` at the end of the workspace and returns their offset.
size_t reserve(ChunkFwdWorkspace& workspace, size_t bytes) {
  const size_t offset = workspace.total_bytes;
  workspace.total_bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return offset;
}

const char* reason_for_composite(const ChunkFwdProblem& p) {
  if (p.compute_capability != 90) return "the kernels need a Hopper GPU (compute capability 9.0)";
  if (p.activation_type == DataType::kFloat32) return "the kernels take bf16 and fp16 activations, not fp32";
  if (p.key_dim != 64 && p.key_dim != 128) return "the kernels cover K in {64, 128}";
  if (p.value_dim != 64 && p.value_dim != 128) return "the kernels cover V in {64, 128}";
  return nullptr;
}

// The recurrence runs one CTA for each (sequence, value head, value tile). Cut V only as far as it takes to give every
// multiprocessor a CTA: each further cut reads the factors of a chunk once more.
int choose_value_tile(const ChunkFwdProblem& p) {
  constexpr int kSmallestTile = 32;
  int tile = p.value_dim;
  while (tile > kSmallestTile && p.sequences * p.value_heads * (p.value_dim / tile) < p.sm_count) tile /= 2;
  return tile;
}

} // namespace

ChunkFwdPlan plan_chunk_fwd(const ChunkFwdProblem& p) {
  ChunkFwdPlan plan;
  plan.chunk_slots = chunk_slots(p);
  if (const char* reason = reason_for_composite(p)) {
    plan.reason = reason;
    return plan;
  }
  plan.path = ChunkFwdPath::kStaged;
  plan.reason = "K, V and the types are covered by the kernels";
  plan.value_tile = choose_value_tile(p);

  constexpr size_t kBf16 = 2, kFp32 = 4, C = kChunkTokens;
  const size_t tiles = static_cast<size_t>(plan.chunk_slots) * p.value_heads;
  const size_t K = p.key_dim, V = p.value_dim;
  ChunkFwdWorkspace& w = plan.workspace;
  w.W = reserve(w, tiles * C * K * kBf16);
  w.K_decayed = reserve(w, tiles * C * K * kBf16);
  w.Q_gated = reserve(w, tiles * C * K * kBf16);
  w.Aqk = reserve(w, tiles * C * C * kBf16);
  w.U0 = reserve(w, tiles * V * C * kFp32);
  w.U = reserve(w, tiles * V * C * kBf16);
  w.state = reserve(w, tiles * V * K * kBf16);
  w.chunk_decay = reserve(w, tiles * K * kFp32);
  return plan;
}

std::string to_json(const ChunkFwdProblem& p, const ChunkFwdPlan& plan) {
  const bool staged = plan.path == ChunkFwdPath::kStaged;
  std::string json = "{";
  json += "\"path\": \"" + std::string(staged ? "staged" : "composite") + "\"";
  json += ", \"reason\": \"" + std::string(plan.reason) + "\"";
  json += ", \"sequences\": " + std::to_string(p.sequences);
  json += ", \"chunk_slots\": " + std::to_string(plan.chunk_slots);
  json += ", \"value_tile\": " + std::to_string(plan.value_tile);
  json += ", \"workspace_bytes\": " + std::to_string(plan.workspace.total_bytes);
  return json + "}";
}

} // namespace kda
