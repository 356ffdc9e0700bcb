#include "plan.h"

#include <algorithm>

#include "plan_models.h"

namespace kda {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

namespace {

int64_t slots_of(const ChunkFwdProblem& p, int slot_tokens) {
  if (p.varlen) return p.tokens / slot_tokens + p.sequences;
  return p.batch * ceil_div(p.tokens, slot_tokens);
}

}  // namespace

const char* name_of(ChunkFwdPath path) {
  switch (path) {
    case ChunkFwdPath::kComposite:
      return "composite";
    case ChunkFwdPath::kStaged:
      return "staged";
    case ChunkFwdPath::kFused:
      return "fused";
    case ChunkFwdPath::kStepwise:
      return "stepwise";
    case ChunkFwdPath::kFusedCut:
      return "fused_cut";
  }
  return "unknown";
}

int64_t chunk_slots(const ChunkFwdProblem& p) { return slots_of(p, kChunkTokens); }

int64_t step_slots(const ChunkFwdProblem& p) { return slots_of(p, kStepTokens); }

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

// Chains of the recurrence: (sequence, value head).
int64_t chains_of(const ChunkFwdProblem& p) { return p.sequences * p.value_heads; }

// A recurrence runs one CTA for each (sequence, value head, value tile), alone on its multiprocessor, with 64 rows of V for each
// warpgroup: two CTAs where both find a multiprocessor at once, else one, which reads the factors of a chunk once.
int choose_value_tile(const ChunkFwdProblem& p) {
  constexpr int kSmallestTile = 64;  // of a warpgroup
  const bool is_alone = chains_of(p) * (p.value_dim / kSmallestTile) <= p.sm_count;
  return is_alone ? kSmallestTile : p.value_dim;
}

// CTAs of both recurrences of the backward beside which stage 4 finds enough multiprocessors to begin on.
int64_t most_ctas_beside(const ChunkFwdProblem& p) { return p.sm_count * 3 / 4; }

// Whether stage 4 may work beside both recurrences. Not with cu_seqlens, as no contents may let it wait for a chunk that no sequence has, or count one
// twice; and not with parts of dq and dk, which would need room of their own.
bool may_work_beside(const ChunkFwdProblem& p, bool saved) { return !saved && !p.varlen && p.value_heads == p.heads; }

// Multiprocessors that work in the last turn of stage 1, in which its CTAs of one multiprocessor take tiles before those of the next do.
int64_t last_solve_turn_sms(const ChunkFwdProblem& p, int64_t tiles) {
  const int64_t ctas = solve_ctas(p, tiles), in_last = tiles - (tiles - 1) / ctas * ctas;
  return (in_last + kSolveCtasPerSm - 1) / kSolveCtasPerSm;
}

// Of the recurrences of the backward: rather whole rows, if half of the CTAs leave room for stage 4 where all do not (b32_8192 916 us instead of 969).
int choose_backward_value_tile(const ChunkFwdProblem& p, bool saved) {
  const int tile = choose_value_tile(p);
  const int64_t most = may_work_beside(p, saved) ? most_ctas_beside(p) : 0, whole_rows = 2 * chains_of(p);
  return whole_rows * (p.value_dim / tile) > most && whole_rows <= most ? p.value_dim : tile;
}

// Why a call that kernels cover takes the three stages; null if it does not.
const char* reason_for_staged(const ChunkFwdProblem& p, std::optional<ChunkFwdPath> forced) {
  if (!p.aligned_inputs)
    return "rows of q, k, v or g are not multiples of 16 bytes apart, as the copy engine needs them";
  if (!copy_engine_reaches(p)) return "more tokens than the copy engine can address";
  return forced == ChunkFwdPath::kStaged ? "asked for" : nullptr;
}

// Why a call may not be fused and cut; null if it may.
const char* reason_against_fused_cut(const ChunkFwdProblem& p) {
  constexpr int64_t kMostChains = 0xfffffffe;  // a chain is told in a word
  if (!p.contractive)
    return "q and k are not normalised, or beta is not known to be in [0, 2]: a state may grow over a cut";
  return chains_of(p) > kMostChains ? "more sequences and heads than a word can tell" : nullptr;
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

// Thread blocks (CTAs) of each stage. Those of step_factors after a fused kernel go from one of these to the next.
JsonObject stage_ctas(const ChunkFwdProblem& p, const ChunkFwdPlan& plan) {
  JsonObject ctas;
  const int64_t segments = plan.segment_slots * p.value_heads;
  if (has_clusters(plan.path)) {
    ctas.add("fused_scan", plan.clusters * (p.value_dim / plan.value_tile));
  }
  if (has_segments(plan.path)) {
    ctas.add("step_factors", plan.step_slots * p.value_heads);
    if (plan.segment_chunks > 0) {
      ctas.add("segment_summary", segments * ((p.value_dim + p.key_dim) / kScanRows));
      ctas.add("segment_compose", chains_of(p) * (p.value_dim / kComposeRows));
    }
    ctas.add("state_scan", segments);
  }
  if (plan.path == ChunkFwdPath::kStaged) {
    const int64_t tiles = plan.chunk_slots * p.value_heads;
    ctas.add("intra_chunk_solve", solve_ctas(p, tiles));
    ctas.add("state_recurrence", chains_of(p) * (p.value_dim / plan.value_tile));
    // With cu_seqlens, one slot more: it clears rows past the last entry.
    ctas.add("output_gemm", tiles + (p.varlen && p.tokens > 0 ? p.value_heads : 0));
  }
  return ctas;
}

void reserve_staged(ChunkFwdWorkspace& w, const ChunkFwdProblem& p, const ChunkFwdPlan& plan) {
  constexpr size_t kBf16 = 2, kFp32 = 4, C = kChunkTokens;
  const size_t tiles = static_cast<size_t>(plan.chunk_slots) * p.value_heads, K = p.key_dim, V = p.value_dim;
  w.W = reserve(w, tiles * C * K * kBf16);
  w.K_decayed = reserve(w, tiles * C * K * kBf16);
  w.Q_gated = reserve(w, tiles * C * K * kBf16);
  w.Aqk = reserve(w, tiles * C * C * kBf16);
  w.U = reserve(w, tiles * V * C * kFp32);
  w.state = reserve(w, tiles * V * K * kBf16);
  w.chunk_decay = reserve(w, tiles * K * kFp32);
}

// Whether a chain may go from one cluster to another: unless each cluster has whole ones for certain.
bool shares_chains(const ChunkFwdProblem& p, int64_t clusters) {
  return chains_of(p) > clusters && (p.varlen || chains_of(p) % clusters != 0);
}

void reserve_fused(ChunkFwdWorkspace& w, const ChunkFwdProblem& p, const ChunkFwdPlan& plan) {
  constexpr size_t kFp32 = 4;
  if (!shares_chains(p, plan.clusters)) return;
  const auto clusters = static_cast<size_t>(plan.clusters);
  w.handoff_states = reserve(w, clusters * p.value_dim * p.key_dim * kFp32);
  w.handoff_flags = reserve(w, clusters * (p.value_dim / plan.value_tile) * sizeof(uint32_t));
}

void reserve_stepwise(ChunkFwdWorkspace& w, const ChunkFwdProblem& p, const ChunkFwdPlan& plan) {
  constexpr size_t kFp32 = 4;
  const size_t heads = p.value_heads, K = p.key_dim, V = p.value_dim;
  w.step_images = reserve(w, plan.step_slots * heads * step_image_bytes(p.key_dim));
  if (plan.segment_chunks == 0) return;
  const size_t segments = plan.segment_slots * heads;
  w.segment_map = reserve(w, segments * K * K * kFp32);
  w.segment_state = reserve(w, segments * V * K * kFp32);
  w.segment_faded = reserve(w, segments * sizeof(uint32_t));
}

}  // namespace

ChunkFwdPlan plan_chunk_fwd(const ChunkFwdProblem& p, const ChunkFwdPlanOptions& options) {
  ChunkFwdPlan plan;
  plan.chunk_slots = chunk_slots(p);
  if (const char* reason = reason_for_composite(p)) {
    plan.reason = reason;
    return plan;
  }
  if (const char* reason = reason_for_staged(p, options.path)) {
    plan.path = ChunkFwdPath::kStaged;
    plan.reason = reason;
    plan.value_tile = options.value_tile ? *options.value_tile : choose_value_tile(p);
    reserve_staged(plan.workspace, p, plan);
    return plan;
  }
  // One CTA a multiprocessor.
  const int64_t side_by_side = std::max<int64_t>(p.sm_count / (p.value_dim / kScanRows), 1);
  const int64_t most = std::max<int64_t>(options.clusters.value_or(side_by_side), 1);
  const int64_t clusters = std::min({side_by_side, most, std::max<int64_t>(chains_of(p), 1)});
  const int64_t cut_clusters = std::min(side_by_side, most);
  const CutEstimate stepwise = estimate_stepwise(p);
  const char* const against_cut = reason_against_fused_cut(p);
  const GatesEstimate alone = estimate_stepwise(p, stepwise.segment_chunks);
  const GatesEstimate cut = estimate_fused_cut(p, cut_clusters, alone);
  // Not for K = 64: there it was slower than the stepwise path (h16_8192, 99 us instead of 89 with steep gates, 148 instead of 132).
  const bool cut_is_better = against_cut == nullptr && p.bounded_gate && p.key_dim == 128 && cut.is_better_than(alone);
  const double unfused_us = cut_is_better ? cut.mean() : stepwise.us;
  plan.path = estimate_fused_us(p, clusters) < unfused_us ? ChunkFwdPath::kFused
              : cut_is_better                             ? ChunkFwdPath::kFusedCut
                                                          : ChunkFwdPath::kStepwise;
  plan.reason = plan.path == ChunkFwdPath::kFused ? "its estimate is below that of the stepwise path"
                : plan.path == ChunkFwdPath::kFusedCut
                    ? "its estimate is below those of the fused and of the stepwise path"
                    : "its estimate is below that of the fused kernel";
  if (options.path) {
    plan.path = *options.path;
    plan.reason = "asked for";
    if (plan.path == ChunkFwdPath::kFusedCut && against_cut != nullptr) {
      plan.path = ChunkFwdPath::kStepwise;
      plan.reason = against_cut;
    }
  }
  if (plan.path == ChunkFwdPath::kFused) {
    plan.value_tile = kScanRows;
    plan.clusters = clusters;
    reserve_fused(plan.workspace, p, plan);
    return plan;
  }
  plan.step_slots = step_slots(p);
  if (plan.path == ChunkFwdPath::kFusedCut) {
    plan.value_tile = kScanRows;
    plan.clusters = cut_clusters;
    plan.workspace.left_chains = reserve(plan.workspace, plan.clusters * kLeftChainWords * sizeof(uint32_t));
  } else {
    plan.value_tile = p.value_dim;
  }
  plan.segment_chunks = options.segment_chunks.value_or(stepwise.segment_chunks);
  plan.segment_slots = segment_slots(p, plan.segment_chunks);
  reserve_stepwise(plan.workspace, p, plan);
  return plan;
}

size_t intermediate_bytes(const ChunkFwdProblem& p) {
  constexpr size_t kBf16 = 2, kFp32 = 4, C = kChunkTokens;
  const size_t K = p.key_dim, V = p.value_dim;
  const size_t tile = C * (3 * K + 2 * C + V) * kBf16 + V * K * kBf16 + K * kFp32;
  return static_cast<size_t>(chunk_slots(p)) * p.value_heads * tile + chains_of(p) * C * (K + V) * kBf16;
}

namespace {

// of_gradient: the reverse recurrence is cut as well; of_state: that of the state is.
template <typename Workspace>
void reserve_segments(Workspace& w, const ChunkFwdProblem& p, const ChunkBwdPlan& plan, bool of_state,
                      bool of_gradient) {
  constexpr size_t kFp32 = 4;
  if (plan.segment_chunks == 0) return;
  const size_t K = p.key_dim, V = p.value_dim, segments = static_cast<size_t>(plan.segment_slots) * p.value_heads;
  if (of_state) {
    w.segments.map = reserve(w, segments * K * K * kFp32);
    w.segments.state = reserve(w, segments * V * K * kFp32);
  }
  if (of_gradient) {
    w.segments.transposed_map = reserve(w, segments * K * K * kFp32);
    w.segments.dstate = reserve(w, segments * V * K * kFp32);
  }
}

}  // namespace

ChunkBwdPlan plan_chunk_bwd(const ChunkFwdProblem& p, bool activated_gate, bool saved,
                            const ChunkBwdPlanOptions& options) {
  ChunkBwdPlan plan;
  plan.chunk_slots = chunk_slots(p);
  plan.saved = saved;
  if (const char* reason = reason_for_composite(p)) {
    plan.reason = reason;
    return plan;
  }
  plan.path = ChunkFwdPath::kStaged;
  plan.reason = "K, V and the types are covered by the kernels";
  plan.segment_chunks = options.segment_chunks ? *options.segment_chunks : choose_segment_chunks(p);
  plan.segment_slots = segment_slots(p, plan.segment_chunks);
  const auto choose_tile = [&](bool is_saved) {
    return plan.segment_chunks > 0 ? kScanRows : options.value_tile.value_or(choose_backward_value_tile(p, is_saved));
  };
  plan.value_tile = choose_tile(saved), plan.state_tile = choose_tile(false);
  const int64_t ctas = chains_of(p) * (p.value_dim / plan.value_tile);  // of one recurrence, alone
  plan.side_by_side = plan.segment_chunks > 0 || 2 * ctas <= p.sm_count;
  plan.makes_values = plan.state_tile > kScanRows;  // there are many chains, and memory bounds stages 1 and 2

  plan.gradients_beside =
      may_work_beside(p, saved) && plan.side_by_side && plan.segment_chunks == 0 && 2 * ctas <= most_ctas_beside(p);
  const size_t tiles = static_cast<size_t>(plan.chunk_slots) * p.value_heads;
  if (plan.gradients_beside && tiles > 0) {
    plan.early_gradients = p.sm_count - 2 * ctas;
    if (last_solve_turn_sms(p, tiles) <= plan.early_gradients) plan.followed_ctas = solve_ctas(p, tiles);
  }

  constexpr size_t kBf16 = 2, kFp32 = 4, C = kChunkTokens;
  const size_t K = p.key_dim, V = p.value_dim, chains = static_cast<size_t>(chains_of(p));
  ChunkIntermediates& i = plan.intermediates;
  for (size_t* region : {&i.W, &i.K_decayed, &i.Q_gated}) *region = reserve(i, tiles * C * K * kBf16);
  i.Aqk = reserve(i, tiles * C * C * kBf16);
  const size_t reused_bytes = i.total_bytes;  // from here on the gradients are made of it
  i.U = reserve(i, tiles * V * C * kBf16);
  i.state = reserve(i, tiles * V * K * kBf16);
  i.inverse = reserve(i, tiles * C * C * kBf16);
  i.chunk_decay = reserve(i, tiles * K * kFp32);
  i.U_low = reserve(i, chains * V * C * kBf16);
  i.Q_gated_low = reserve(i, chains * C * K * kBf16);

  ChunkBwdWorkspace& w = plan.workspace;
  w.by_levels = reserve(w, tiles * sizeof(uint32_t));
  if (activated_gate) {
    for (size_t* region : {&w.dA_log, &w.ddt_bias}) *region = reserve(w, tiles * K * kFp32);
  }
  if (p.value_heads > p.heads) {
    const size_t elements = static_cast<size_t>(p.batch) * p.tokens * p.value_heads * K;
    for (size_t* region : {&w.dq, &w.dk}) *region = reserve(w, elements * kFp32);
  }
  if (!saved) {  // their first regions lie over the end of what has been reserved
    if (plan.gradients_beside) w.progress = reserve(w, (tiles + 2 + plan.followed_ctas) * sizeof(uint32_t));
    const size_t over = plan.gradients_beside ? 0 : reused_bytes;
    w.intermediates = w.total_bytes > over ? w.total_bytes - over : 0;
    w.total_bytes = w.intermediates + i.total_bytes;
  }
  w.dstate = reserve(w, tiles * V * K * kBf16);
  w.dU = reserve(w, tiles * V * C * kBf16);
  if (!saved) {
    // [slots, HV, C] or [slots, HV, V, C] in fp32: less than both, as K >= C
    const size_t bytes = tiles * C * kFp32 * (plan.makes_values ? 1 : V);
    (plan.makes_values ? w.beta : w.U0) = plan.side_by_side ? reserve(w, bytes) : w.dstate;
  }
  w.dstate_low = reserve(w, chains * V * K * kBf16);
  w.dU_low = reserve(w, chains * V * C * kBf16);
  reserve_segments(w, p, plan, !saved, true);

  plan.saving_workspace.U0 = reserve(plan.saving_workspace, tiles * V * C * kFp32);
  if (plan.makes_values) plan.saving_workspace.beta = reserve(plan.saving_workspace, tiles * C * kFp32);
  reserve_segments(plan.saving_workspace, p, plan, true, false);
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
  json.add("clusters", plan.clusters);
  json.add("segment_chunks", plan.segment_chunks);
  json.add("segment_slots", plan.segment_slots);
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
  json.add("state_tile", int64_t{plan.state_tile});
  json.add("makes_values", int64_t{plan.makes_values});
  json.add("side_by_side", int64_t{plan.side_by_side});
  json.add("gradients_beside", int64_t{plan.gradients_beside});
  json.add("early_gradients", plan.early_gradients);
  json.add("followed_ctas", plan.followed_ctas);
  json.add("segment_chunks", plan.segment_chunks);
  json.add("segment_slots", plan.segment_slots);
  json.add("intermediate_bytes", static_cast<int64_t>(plan.intermediates.total_bytes));
  json.add("workspace_bytes", static_cast<int64_t>(plan.workspace.total_bytes));
  return json.str();
}

}  // namespace kda
