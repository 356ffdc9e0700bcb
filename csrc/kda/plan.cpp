#include "plan.h"

#include <algorithm>
#include <cmath>

namespace kda {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t chunk_slots(const ChunkFwdProblem& p) {
  if (p.varlen) return p.tokens / kChunkTokens + p.sequences;
  return p.batch * ceil_div(p.tokens, kChunkTokens);
}

int64_t segment_slots(const ChunkFwdProblem& p, int64_t segment_chunks) {
  if (segment_chunks == 0 || p.sequences == 0) return p.sequences;
  const int64_t segment_tokens = segment_chunks * kChunkTokens;
  if (p.varlen) return p.tokens / segment_tokens + p.sequences;
  return p.batch * std::max(ceil_div(p.tokens, segment_tokens), int64_t{1});
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

// Without a cut, the recurrence runs one CTA for each (sequence, value head, value tile). Cut V only as far as it takes
// to give every multiprocessor a CTA: each further cut reads the factors of a chunk once more. Within 5 % of the best
// tile at every point of the sweep in bench/results (python -m bench.sweep).
int choose_value_tile(const ChunkFwdProblem& p) {
  constexpr int kSmallestTile = 32;
  int tile = p.value_dim;
  while (tile > kSmallestTile && p.sequences * p.value_heads * (p.value_dim / tile) < p.sm_count) tile /= 2;
  return tile;
}

// Rows of S^T or M^T of a CTA of a cut, in both passes: the best, or within 3 % of it, at every point of the sweep in
// docs/lab-notebook.md.
constexpr int kSegmentTile = 64;

// Rows of S^T of a CTA that composes the maps.
constexpr int kComposeRows = 16;

// What the recurrence costs, in microseconds, with and without a cut. The constants were measured on an H200
// (docs/lab-notebook.md) and give its kernels to 15 %.
class RecurrenceModel {
 public:
  // The host knows T and N alone: sequences of a packed batch are taken as equally long.
  explicit RecurrenceModel(const ChunkFwdProblem& p)
      : chunks_(ceil_div(p.varlen ? ceil_div(p.tokens, p.sequences) : p.tokens, kChunkTokens)),
        items_(static_cast<double>(p.sequences) * p.value_heads),
        key_dim_(p.key_dim),
        value_dim_(p.value_dim),
        rows_of_device_(static_cast<double>(kSegmentTile) * p.sm_count) {}

  // Chunks of the longest sequence.
  [[nodiscard]] int64_t chunks() const { return chunks_; }

  [[nodiscard]] double uncut() const { return outputs(chunks_, 1); }

  // What no cut can save.
  [[nodiscard]] double least() const { return 3 * kLaunch + traffic(); }

  // Of `segments` segments of `chunks` chunks. Maps of steep gates are 0 after a chunk, those of gates with a long
  // memory never are: the mean of both.
  [[nodiscard]] double cut(int64_t chunks, int64_t segments) const {
    const double offset_rows = items_ * (segments - 1) * value_dim_, map_rows = items_ * (segments - 2) * key_dim_;
    const double summary = (pass(chunks, offset_rows + map_rows) + pass(chunks, offset_rows)) / 2;
    const double rows_of_compose = rows_of_device_ / kSegmentTile * kComposeRows;
    const double compose = (segments - 2) * kComposeSegment * std::ceil(items_ * value_dim_ / rows_of_compose);
    return summary + kLaunch + compose + outputs(chunks, segments);
  }

 private:
  static constexpr double kLaunch = 4.0;          // a kernel more: its launch, first loads and last stores
  static constexpr double kChainChunk = 1.3;      // a chunk in a CTA that has a multiprocessor to itself
  static constexpr double kSharedChunk = 1.15;    // a chunk and kSegmentTile rows, of several on a multiprocessor
  static constexpr double kComposeSegment = 0.9;  // a segment in a CTA of the composition
  static constexpr double kResident = 2;          // CTAs of kSegmentTile rows on a multiprocessor at the same time
  static constexpr double kBytesPerMicrosecond = 3.7e6;

  // CTAs that go through `chunks` chunks and have `rows` rows in all. Up to two a multiprocessor run from the beginning
  // to the end; of more, the later ones fill gaps.
  [[nodiscard]] double pass(int64_t chunks, double rows) const {
    const double share = rows / rows_of_device_;
    return kLaunch + chunks * std::max(kChainChunk, kSharedChunk * (share <= kResident ? std::ceil(share) : share));
  }

  // W, K_decayed and U0 are read; U and the state are written.
  [[nodiscard]] double traffic() const {
    constexpr double C = kChunkTokens;
    const double bytes = 2 * C * key_dim_ * 2 + value_dim_ * C * (4 + 4) + value_dim_ * key_dim_ * 2;
    return items_ * chunks_ * bytes / kBytesPerMicrosecond;
  }

  // Where traffic bounds it, CTAs that share a multiprocessor take longer than those that do not, and what is left over
  // after the last full round leaves multiprocessors idle: a third of the difference to full rounds was measured.
  [[nodiscard]] double outputs(int64_t chunks, int64_t segments) const {
    constexpr double kUnevenness = 1.0 / 3;
    const double rows = items_ * segments * value_dim_, share = rows / rows_of_device_;
    const double full = std::ceil(share / kResident) * kResident;
    const double uneven = share > 1 ? 1 + kUnevenness * (full / share - 1) : 1.0;
    return std::max(pass(chunks, rows), kLaunch + traffic() * uneven);
  }

  int64_t chunks_;
  double items_, key_dim_, value_dim_;
  double rows_of_device_;  // one CTA of kSegmentTile on each multiprocessor
};

// Chunks of one segment, 0 for no cut: that which costs least, if it saves a tenth.
int64_t choose_segment_chunks(const ChunkFwdProblem& p) {
  constexpr int64_t kMostSegments = 64;  // beyond, their composition eats up what they gain
  constexpr double kWorthwhile = 0.9;
  if (p.sequences == 0) return 0;
  const RecurrenceModel model(p);
  double best = kWorthwhile * model.uncut();
  if (model.least() >= best) return 0;
  int64_t chosen = 0;
  for (int64_t segments = 3; segments <= kMostSegments && segments < model.chunks(); ++segments) {
    const int64_t chunks = ceil_div(model.chunks(), segments);
    const double cost = model.cut(chunks, ceil_div(model.chunks(), chunks));
    if (cost < best) {
      best = cost;
      chosen = chunks;
    }
  }
  return chosen;
}

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

// Time of the three stages: their launches, two of them parallel over chunks, and the recurrence, cut or not.
double estimate_staged_us(const ChunkFwdProblem& p) {
  constexpr double kLaunchesUs = 25.0, kParallelUs = 6.2e-6;  // the latter for each token, value head and channel
  if (p.sequences == 0) return 0.0;
  const double work = static_cast<double>(p.batch) * p.tokens * p.value_heads * (p.key_dim + p.value_dim);
  const RecurrenceModel model(p);
  const int64_t chunks = choose_segment_chunks(p);
  const double recurrence = chunks == 0 ? model.uncut() : model.cut(chunks, ceil_div(model.chunks(), chunks));
  return kLaunchesUs + kParallelUs * work + recurrence;
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
  plan.value_tile = options.value_tile        ? *options.value_tile
                    : plan.segment_chunks > 0 ? kSegmentTile
                                              : choose_value_tile(p);

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
    const size_t segments = static_cast<size_t>(plan.segment_slots) * p.value_heads;
    plan.segment_tile = kSegmentTile;
    w.segment_map = reserve(w, segments * K * K * kFp32);
    w.segment_state = reserve(w, segments * V * K * kFp32);
  }
  return plan;
}

size_t intermediate_bytes(const ChunkFwdProblem& p) {
  constexpr size_t kBf16 = 2, kFp32 = 4, C = kChunkTokens;
  const size_t K = p.key_dim, V = p.value_dim;
  const size_t tile = C * (3 * K + 2 * C + 2 * V) * kBf16 + V * K * kBf16 + K * kFp32;
  return static_cast<size_t>(chunk_slots(p)) * p.value_heads * tile;
}

ChunkBwdPlan plan_chunk_bwd(const ChunkFwdProblem& p, bool activated_gate, bool saved) {
  ChunkBwdPlan plan;
  plan.chunk_slots = chunk_slots(p);
  plan.saved = saved;
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
  ChunkIntermediates& i = plan.intermediates;
  for (size_t* region : {&i.W, &i.K_decayed, &i.Q_gated}) *region = reserve(i, tiles * C * K * kBf16);
  i.Aqk = reserve(i, tiles * C * C * kBf16);
  const size_t reused_bytes = i.total_bytes;  // from here on the gradients are made of it
  i.U = reserve(i, tiles * V * C * 2 * kBf16);
  i.state = reserve(i, tiles * V * K * kBf16);
  i.inverse = reserve(i, tiles * C * C * kBf16);
  i.chunk_decay = reserve(i, tiles * K * kFp32);

  ChunkBwdWorkspace& w = plan.workspace;
  if (activated_gate) {
    for (size_t* region : {&w.dA_log, &w.ddt_bias}) *region = reserve(w, tiles * K * kFp32);
  }
  if (p.value_heads > p.heads) {
    const size_t elements = static_cast<size_t>(p.batch) * p.tokens * p.value_heads * K;
    for (size_t* region : {&w.dq, &w.dk}) *region = reserve(w, elements * kFp32);
  }
  if (!saved) {  // their first regions lie over the end of what has been reserved
    w.intermediates = w.total_bytes > reused_bytes ? w.total_bytes - reused_bytes : 0;
    w.total_bytes = w.intermediates + i.total_bytes;
  }
  w.dstate = reserve(w, tiles * V * K * kBf16);
  w.dU = reserve(w, tiles * V * C * 2 * kBf16);
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

std::string to_json(const ChunkBwdPlan& plan) {
  JsonObject json;
  json.add("path", name_of(plan.path));
  json.add("reason", plan.reason);
  json.add("chunk_tokens", int64_t{kChunkTokens});
  json.add("chunk_slots", plan.chunk_slots);
  json.add("value_tile", int64_t{plan.value_tile});
  json.add("intermediate_bytes", static_cast<int64_t>(plan.intermediates.total_bytes));
  json.add("workspace_bytes", static_cast<int64_t>(plan.workspace.total_bytes));
  return json.str();
}

}  // namespace kda
