#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace kda {

int64_t chunk_slots(const ChunkFwdProblem& p) {
  if (p.varlen) return p.tokens / kChunkTokens + p.sequences;
  return p.batch * ((p.tokens + kChunkTokens - 1) / kChunkTokens);
}

int64_t segment_slots(const ChunkFwdProblem& p, int64_t segment_chunks) {
  if (segment_chunks == 0 || p.sequences == 0) return p.sequences;
  const int64_t segment_tokens = segment_chunks * kChunkTokens;
  if (p.varlen) return p.tokens / segment_tokens + p.sequences;
  return p.batch * std::max((p.tokens + segment_tokens - 1) / segment_tokens, int64_t{1});
}

namespace {

constexpr size_t kAlignment = 256;  // of every workspace region; also what cudaMalloc guarantees

// Reserves `bytes` at the end of the workspace and returns their offset.
size_t reserve(ChunkFwdWorkspace& workspace, size_t bytes) {
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

// A pass of the recurrence runs one CTA for each of `items` (segment slots and value heads, or the like) and tile of `rows` rows. Cut
// rows only as far as it takes to give every multiprocessor a CTA: each further cut reads the factors of a chunk once more. Within 5 %
// of the best tile at every point of the sweep in bench/results (python -m bench.sweep).
int choose_tile(const ChunkFwdProblem& p, int64_t items, int rows) {
  constexpr int kSmallestTile = 32;
  int tile = rows;
  while (tile > kSmallestTile && items * (rows / tile) < p.sm_count) tile /= 2;
  return tile;
}

int64_t choose_segment_chunks(const ChunkFwdProblem& p) { return getenv("KDA_L") ? atoi(getenv("KDA_L")) : 0; }

// Tokens of the longest sequence. The lengths in cu_seqlens are not known on the host: taken as equal.
double longest_sequence(const ChunkFwdProblem& p) {
  if (!p.varlen || p.sequences == 0) return static_cast<double>(p.tokens);
  return static_cast<double>(p.tokens) / static_cast<double>(p.sequences);
}

struct FusedEstimate {
  int value_tile;
  double us;
};

// Time of the fused kernel: its CTAs, one a multiprocessor, take turns, and each walks through its steps. Measured on an H200, as all
// constants here.
FusedEstimate estimate_fused(const ChunkFwdProblem& p, std::optional<int> value_tile) {
  constexpr int kStepTokens = 32;
  constexpr double kTurnUs = 9.0;  // launch, first loads, last stores
  const auto step_us = [&](int tile) {
    if (p.key_dim == 128) return tile == 64 ? 2.7 : 3.3;
    return tile == 64 ? 2.0 : 2.25;
  };
  const auto estimate = [&](int tile) {
    const double ctas = static_cast<double>(p.sequences) * p.value_heads * (p.value_dim / tile);
    const double turns = std::ceil(ctas / std::max(p.sm_count, 1)),
                 steps = std::ceil(longest_sequence(p) / kStepTokens);
    return FusedEstimate{tile, turns * (steps * step_us(tile) + kTurnUs)};
  };
  if (value_tile) return estimate(*value_tile);
  const FusedEstimate narrow = estimate(64);
  if (p.value_dim == 64) return narrow;
  const FusedEstimate wide = estimate(128);
  return wide.us <= narrow.us ? wide : narrow;
}

// Time of the three stages without a cut: their launches, work for every token, value head and channel, and a chain of chunks if that takes
// longer than its share of the work.
double estimate_staged_us(const ChunkFwdProblem& p) {
  constexpr double kLaunchesUs = 30.0, kParallelUs = 6.2e-6, kRecurrenceUs = 2.6e-6, kChunkUs = 1.3;
  const double work = static_cast<double>(p.batch) * p.tokens * p.value_heads * (p.key_dim + p.value_dim);
  const double chain = std::ceil(longest_sequence(p) / kChunkTokens) * kChunkUs;
  return kLaunchesUs + kParallelUs * work + std::max(kRecurrenceUs * work, chain);
}

// Why a call that kernels cover does not take the fused one; null if it does.
const char* reason_for_staged(const ChunkFwdProblem& p, std::optional<ChunkFwdPath> forced,
                              const FusedEstimate& fused) {
  constexpr int64_t kMaxCoordinate = (int64_t{1} << 31) - 2 * kChunkTokens;  // of the copy engine
  if (!p.aligned_inputs)
    return "rows of q, k, v or g are not multiples of 16 bytes apart, as the fused kernel needs them";
  if (p.tokens > kMaxCoordinate || p.batch > kMaxCoordinate) return "more tokens than the fused kernel can address";
  if (forced) return *forced == ChunkFwdPath::kStaged ? "asked for" : nullptr;
  if (!p.bounded_gate) return "the gate has no bound, which costs the fused kernel more than the stages";
  if (estimate_staged_us(p) < fused.us) return "too few chains of steps to fill the device with the fused kernel";
  return nullptr;
}

const char* name_of(ChunkFwdPath path) {
  switch (path) {
    case ChunkFwdPath::kComposite:
      return "composite";
    case ChunkFwdPath::kStaged:
      return "staged";
    case ChunkFwdPath::kFused:
      return "fused";
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
  if (plan.path == ChunkFwdPath::kFused) {
    ctas.add("fused_scan", p.sequences * p.value_heads * (p.value_dim / plan.value_tile));
  }
  if (plan.path != ChunkFwdPath::kStaged) return ctas;
  const int64_t tiles = plan.chunk_slots * p.value_heads;
  ctas.add("intra_chunk_solve", tiles);
  const int64_t segments = plan.segment_slots * p.value_heads;
  if (plan.segment_chunks > 0) {
    constexpr int kComposeRows = 16;
    ctas.add("segment_summary", segments * ((p.value_dim + p.key_dim) / plan.segment_tile));
    ctas.add("segment_compose", p.sequences * p.value_heads * (p.value_dim / kComposeRows));
  }
  ctas.add("state_recurrence", segments * (p.value_dim / plan.value_tile));
  // With cu_seqlens, one slot more: it clears rows past the last entry.
  ctas.add("output_gemm", tiles + (p.varlen && p.tokens > 0 ? p.value_heads : 0));
  return ctas;
}

}  // namespace

ChunkFwdPlan plan_chunk_fwd(const ChunkFwdProblem& p, const ChunkFwdPlanOptions& options) {
  ChunkFwdPlan plan;
  plan.chunk_slots = chunk_slots(p);
  if (const char* reason = reason_for_composite(p)) {
    plan.reason = reason;
    return plan;
  }
  const FusedEstimate fused = estimate_fused(p, options.value_tile);
  if (const char* reason = reason_for_staged(p, options.path, fused)) {
    plan.reason = reason;
  } else {
    plan.path = ChunkFwdPath::kFused;
    plan.reason = "enough chains of steps to fill the device";
    plan.value_tile = fused.value_tile;
    return plan;
  }
  plan.path = ChunkFwdPath::kStaged;
  plan.segment_chunks = options.segment_chunks ? *options.segment_chunks : choose_segment_chunks(p);
  plan.segment_slots = segment_slots(p, plan.segment_chunks);
  const int64_t segments = plan.segment_slots * p.value_heads;
  plan.value_tile = options.value_tile ? *options.value_tile : choose_tile(p, segments, p.value_dim);

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
  if (plan.segment_chunks > 0) {
    plan.segment_tile =
        getenv("KDA_ST") ? atoi(getenv("KDA_ST")) : choose_tile(p, 2 * segments, std::min(p.key_dim, p.value_dim));
    w.segment_map = reserve(w, segments * K * K * kFp32);
    w.segment_state = reserve(w, segments * V * K * kFp32);
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
  json.add("segment_chunks", plan.segment_chunks);
  json.add("segment_slots", plan.segment_slots);
  json.add("segment_tile", int64_t{plan.segment_tile});
  json.add("stage_ctas", stage_ctas(p, plan));
  json.add("workspace_bytes", static_cast<int64_t>(plan.workspace.total_bytes));
  return json.str();
}

}  // namespace kda
