#include "plan.h"

namespace kda {

int64_t chunk_slots(const ChunkFwdProblem& p) {
  if (p.varlen) return p.tokens / kChunkTokens + p.sequences;
  return p.batch * ((p.tokens + kChunkTokens - 1) / kChunkTokens);
}

namespace {

constexpr size_t kAlignment = 256;  // of every workspace region; also what cudaMalloc guarantees

// Reserves `bytes` at the end of the workspace and returns their offset.
template <typename Workspace>
size_t reserve(Workspace& workspace, size_t bytes) {
  const size_t offset = workspace.total_bytes;
  workspace.total_bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return offset;
}

const char* reason_for_composite(const ChunkFwdProblem& p) {
  if (p.compute_capability == 0) return "no CUDA device";
  if (p.compute_capability != 90) return "the kernels need a Hopper GPU (compute capability 9.0)";
  if (p.activation_type == DataType::kFloat32) return "the kernels take bf16 and fp16 activations, not fp32";
  if (p.key_dim != 64 && p.key_dim != 128) return "the kernels cover K in {64, 128}";
  if (p.value_dim != 64 && p.value_dim != 128) return "the kernels cover V in {64, 128}";
  return nullptr;
}

// The recurrence runs one CTA for each (sequence, value head, value tile). Cut V only as far as it takes to give every
// multiprocessor a CTA: each further cut reads the factors of a chunk once more. Within 5 % of the best tile at every point of the
// sweep in bench/results (python -m bench.sweep).
int choose_value_tile(const ChunkFwdProblem& p) {
  constexpr int kSmallestTile = 32;
  int tile = p.value_dim;
  while (tile > kSmallestTile && p.sequences * p.value_heads * (p.value_dim / tile) < p.sm_count) tile /= 2;
  return tile;
}

const char* name_of(ChunkFwdPath path) {
  switch (path) {
    case ChunkFwdPath::kComposite:
      return "composite";
    case ChunkFwdPath::kStaged:
      return "staged";
  }
  return "unknown";
}

// Builds one flat JSON object. Keys and strings are literals of this file without characters that need escaping.
class JsonObject {
 public:
  void add(const char* key, const char* value) { add_raw(key, '"' + std::string(value) + '"'); }
  void add(const char* key, int64_t value) { add_raw(key, std::to_string(value)); }
  void add(const char* key, const JsonObject& value) { add_raw(key, value.str()); }
  [[nodiscard]] std::string str() const { return '{' + body_ + '}'; }

 private:
  void add_raw(const char* key, const std::string& value) {
    if (!body_.empty()) body_ += ", ";
    body_ += '"' + std::string(key) + "\": " + value;
  }

  std::string body_;
};

// Thread blocks (CTAs) of each stage.
JsonObject stage_ctas(const ChunkFwdProblem& p, const ChunkFwdPlan& plan) {
  JsonObject ctas;
  if (plan.path != ChunkFwdPath::kStaged) return ctas;
  const int64_t tiles = plan.chunk_slots * p.value_heads;
  ctas.add("intra_chunk_solve", tiles);
  ctas.add("state_recurrence", p.sequences * p.value_heads * (p.value_dim / plan.value_tile));
  // With cu_seqlens, one slot more: it clears rows past the last entry.
  ctas.add("output_gemm", tiles + (p.varlen && p.tokens > 0 ? p.value_heads : 0));
  return ctas;
}

}  // namespace

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
  w.U = reserve(w, tiles * V * C * kFp32);
  w.state = reserve(w, tiles * V * K * kBf16);
  w.chunk_decay = reserve(w, tiles * K * kFp32);
  return plan;
}

ChunkBwdPlan plan_chunk_bwd(const ChunkFwdProblem& p, bool activated_gate) {
  ChunkBwdPlan plan;
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
  ChunkBwdWorkspace& w = plan.workspace;
  for (size_t* region : {&w.W, &w.K_decayed, &w.Q_gated}) *region = reserve(w, tiles * C * K * kBf16);
  for (size_t* region : {&w.Aqk, &w.inverse}) *region = reserve(w, tiles * C * C * kBf16);
  for (size_t* region : {&w.U, &w.dU}) *region = reserve(w, tiles * V * C * 2 * kBf16);
  for (size_t* region : {&w.state, &w.dstate}) *region = reserve(w, tiles * V * K * kBf16);
  w.chunk_decay = reserve(w, tiles * K * kFp32);
  if (activated_gate) {
    for (size_t* region : {&w.dA_log, &w.ddt_bias}) *region = reserve(w, tiles * K * kFp32);
  }
  if (p.value_heads > p.heads) {
    const size_t elements = static_cast<size_t>(p.batch) * p.tokens * p.value_heads * K;
    for (size_t* region : {&w.dq, &w.dk}) *region = reserve(w, elements * kFp32);
  }
  return plan;
}

std::string to_json(const ChunkFwdProblem& p, const ChunkFwdPlan& plan) {
  JsonObject json;
  json.add("path", name_of(plan.path));
  json.add("reason", plan.reason);
  json.add("sequences", p.sequences);
  json.add("chunk_tokens", int64_t{kChunkTokens});
  json.add("chunk_slots", plan.chunk_slots);
  json.add("value_tile", int64_t{plan.value_tile});
  json.add("stage_ctas", stage_ctas(p, plan));
  json.add("workspace_bytes", static_cast<int64_t>(plan.workspace.total_bytes));
  return json.str();
}

}  // namespace kda
