// Host-only planning of kda::chunk_fwd: which path a call takes, how its grid is cut, and how its workspace is laid
// out.
//
// Pure functions over plain structs: no CUDA header, no global state, so that they are tested by tables on any machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "types.h"

namespace kda {

// The least lower_bound of a bounded gate.
inline constexpr float kMinLowerBound = -5.0f;

// What the plan of a forward call depends on. Never the contents of a tensor.
struct ChunkFwdProblem {
  int64_t batch = 1;                               // B
  int64_t tokens = 0;                              // T, tokens of one batch row
  int64_t sequences = 1;                           // N: B, or len(cu_seqlens) - 1
  bool varlen = false;                             // cu_seqlens is given (then batch == 1)
  int heads = 1;                                   // H, heads of q and k
  int value_heads = 1;                             // HV, heads of v, g, beta and the states; a multiple of H
  int key_dim = 128;                               // K
  int value_dim = 128;                             // V
  DataType activation_type = DataType::kBFloat16;  // of q, k, v and o
  bool bounded_gate = false;                       // no log-gate is below kMinLowerBound
  bool contractive = false;                        // keys of norm 1 and beta in [0, 2]: no tokens enlarge a state
  bool aligned_inputs = true;                      // inputs_are_aligned(): the copy engine needs it
  int compute_capability = 0;                      // major * 10 + minor of the device; 0: no CUDA device
  int sm_count = 0;                                // multiprocessors of the device
};

// Whether the copy engine can fetch rows of q, k, v and g.
[[nodiscard]] inline bool copy_engine_reaches(const ChunkFwdProblem& problem) {
  constexpr int64_t kMaxCoordinate = (int64_t{1} << 31) - 128;  // of a token or a batch row
  return problem.aligned_inputs && problem.tokens <= kMaxCoordinate && problem.batch <= kMaxCoordinate;
}

// CTAs of stage 1 of the staged path: as many as are resident, which go from one (chunk slot, value head) to the next. tiles: how many of those there are.
inline constexpr int kSolveCtasPerSm = 2;
[[nodiscard]] inline int64_t solve_ctas(const ChunkFwdProblem& problem, int64_t tiles) {
  const int64_t resident = int64_t{problem.sm_count} * kSolveCtasPerSm;
  return resident > 0 && resident < tiles ? resident : tiles;
}

enum class ChunkFwdPath : int32_t {
  kComposite = 0,  // no CUDA kernel: PyTorch operators, or the CPU kernels of a host tensor
  kStaged = 1,     // three kernels: intra-chunk solve, state recurrence, output GEMM; for inputs that are not aligned
  kFused = 2,      // one kernel: producers of the factors of a step feed the recurrence through shared memory
  kStepwise = 3,   // two kernels: the factors of all steps side by side, then a scan; two more if sequences are cut
  kFusedCut =
      4,  // the fused kernel on pieces of sequences, where the gates let it; the kernels of kStepwise for the rest
};

// As the command line and plans as JSON have it: "fused_cut".
[[nodiscard]] const char* name_of(ChunkFwdPath path);

// Whether a path runs the fused kernel, to whose clusters chains are dealt out; and the kernels that cut sequences into segments.
[[nodiscard]] constexpr bool has_clusters(ChunkFwdPath path) {
  return path == ChunkFwdPath::kFused || path == ChunkFwdPath::kFusedCut;
}
[[nodiscard]] constexpr bool has_segments(ChunkFwdPath path) {
  return path == ChunkFwdPath::kStepwise || path == ChunkFwdPath::kFusedCut;
}

// What a caller may fix that the planner otherwise chooses; for tests and measurements.
struct ChunkFwdPlanOptions {
  std::optional<ChunkFwdPath> path;       // a path of kernels; kStaged where that does not cover the call
  std::optional<int> value_tile;          // of kStaged: 64 or 128; at most V
  std::optional<int64_t> clusters;        // of kFused and kFusedCut: at most so many in the grid
  std::optional<int64_t> segment_chunks;  // of kStepwise and kFusedCut; 0: sequences are not cut
};

// Words of a cluster of kFusedCut in the region left_chains: one of each of its CTAs, of which there are at most two.
inline constexpr int kLeftChainWords = 2;

// Bytes of what a consumer needs of a step of one value head, apart from V: gated operands [3 C, K] and tiles [C, 4 C] in bf16, e^{G_C} and
// two scales of each token in fp32.
[[nodiscard]] constexpr int step_image_bytes(int key_dim) {
  constexpr int C = kStepTokens;
  return 2 * (3 * C * key_dim + 4 * C * C) + 4 * (key_dim + 2 * C);
}

// Byte offsets of the regions of the workspace.
struct ChunkFwdWorkspace {
  // Of kStaged, one tile for each (chunk slot, value head), slot-major:
  size_t W = 0;            // Tinv (K ⊙ e^G)            [slots, HV, C, K]   bf16, swizzled tile
  size_t K_decayed = 0;    // K ⊙ e^{G_C − G}           [slots, HV, C, K]   bf16, swizzled tile
  size_t Q_gated = 0;      // scale · Q ⊙ e^G           [slots, HV, C, K]   bf16, swizzled tile
  size_t Aqk = 0;          // scale · Aqk               [slots, HV, C, C]   bf16, swizzled tile
  size_t U = 0;            // Tinv V, fp32 accumulators [slots, HV, V, C]; then, in its place, U as two bf16 operands
  size_t state = 0;        // state at entry of a chunk [slots, HV, V, K]   bf16, swizzled tile
  size_t chunk_decay = 0;  // e^{G_C}                   [slots, HV, K]      fp32
  // Of kFused, one for each cluster: the state of a chain that goes on in another one, if that can be
  size_t handoff_states = 0;  // [clusters, V, K]     fp32, fragments
  size_t handoff_flags = 0;   // whether it is there  [clusters, V / 64]   uint32
  // Of kFusedCut:
  size_t left_chains = 0;  // which chains are left to kStepwise  [clusters, 2]  uint32
  // Of kStepwise and kFusedCut:
  size_t step_images = 0;  // factors of each step      [step slots, HV]    see step_image_bytes()
  // Of a cut, one for each (segment slot, value head):
  size_t segment_map = 0;    // M of each segment     [segment slots, HV, K, K]  fp32, transposed, in tiles of operands
  size_t segment_state = 0;  // B of each segment, then the state at its end  [segment slots, HV, V, K]  fp32, fragments
  size_t segment_faded = 0;  // whether M is 0        [segment slots, HV]  uint32
  size_t total_bytes = 0;
};

struct ChunkFwdPlan {
  ChunkFwdPath path = ChunkFwdPath::kComposite;
  const char* reason = "";  // one clause: why this path
  int64_t chunk_slots = 0;  // grid extent over chunks; see chunk_slots()
  int64_t step_slots = 0;   // of kStepwise and kFusedCut: grid extent over steps; see step_slots()
  int value_tile = 0;       // V columns of one CTA of the state recurrence, of the fused kernel or of the scan
  int64_t clusters =
      0;  // of kFused and kFusedCut: of V / 64 CTAs each, side by side; chains are dealt out in equal shares

  // The cut of sequences into segments, whose affine maps S -> M S + B are computed side by side before the scan.
  int64_t segment_chunks = 0;  // chunks of one segment; 0: sequences are not cut
  int64_t segment_slots =
      0;  // grid extent over segments; see segment_slots(). The number of sequences if they are not cut

  ChunkFwdWorkspace workspace;
};

// Slots that hold the chunks of all sequences. For equal lengths chunk c of sequence n has slot n * ceil(T / C) + c.
// With cu_seqlens it has slot cu_seqlens[n] / C + n + c: slots of different sequences never meet, whatever the lengths
// are, and no host code needs to read them. T / C + N slots always suffice; some stay unused.
[[nodiscard]] int64_t chunk_slots(const ChunkFwdProblem& problem);

// Likewise for steps of kStepTokens.
[[nodiscard]] int64_t step_slots(const ChunkFwdProblem& problem);

// Slots that hold the segments of all sequences, as chunk_slots() does for chunks: a slot for every segment_chunks * C
// tokens, and one more for each sequence. Without a cut (0) a slot for each sequence.
[[nodiscard]] int64_t segment_slots(const ChunkFwdProblem& problem, int64_t segment_chunks);

[[nodiscard]] ChunkFwdPlan plan_chunk_fwd(const ChunkFwdProblem& problem, const ChunkFwdPlanOptions& options = {});

// Byte offsets of what the first two stages leave for the gradients, in one piece of memory that the forward saves or
// the backward computes again. A region holds one tile for each (chunk slot, value head), slot-major. No gradient is
// among it: the backward only reads it.
struct ChunkIntermediates {
  size_t W = 0, K_decayed = 0, Q_gated = 0, Aqk = 0;  // as in ChunkFwdWorkspace; read by the reverse recurrence alone
  size_t U = 0;                                       // U as bf16 operands                      [slots, HV, V, C]
  size_t chunk_decay = 0;                             // as in ChunkFwdWorkspace
  size_t state = 0;    // state at entry of a chunk               [slots, HV, V, K]     bf16, swizzled tile
  size_t inverse = 0;  // (I + Akk)^-1                           [slots, HV, C, C]     bf16, swizzled tile
  // What bf16 leaves out at the ends of sequences, a tile for each (sequence, value head):
  size_t U_low = 0;        // of U in the last chunk              [N, HV, V, C]         bf16 operands
  size_t Q_gated_low = 0;  // of Q_gated in the first chunk       [N, HV, C, K]         bf16, swizzled tile
  size_t total_bytes = 0;
};

// ChunkIntermediates::total_bytes of a call that kernels cover, and a number for any other: it depends on sizes alone.
[[nodiscard]] size_t intermediate_bytes(const ChunkFwdProblem& problem);

// Byte offsets of what a cut of the recurrences over chunks takes, a tile for each (segment slot, value head).
struct SegmentRegions {
  size_t map = 0;             // M of each segment  [segment slots, HV, K, K]  fp32, transposed, in tiles of operands
  size_t transposed_map = 0;  // M^T likewise; of a backward
  size_t state = 0;           // of the recurrence of the state, as segment_state of ChunkFwdWorkspace
  size_t dstate = 0;          // the same of its gradient, at the beginning of a segment; of a backward
};

// Byte offsets of the regions of the workspace of the forward that saves intermediates.
struct ChunkSavingWorkspace {
  size_t U0 = 0;            // region U of ChunkFwdWorkspace
  size_t beta = 0;          // as in ChunkBwdWorkspace
  SegmentRegions segments;  // of a cut
  size_t total_bytes = 0;
};

// Byte offsets of the regions of the workspace of the backward. by_levels and those of the sums are written when the regions of
// ChunkIntermediates that the reverse recurrence alone reads are of no more use, and take their place, unless the
// forward has saved them or stage 4 works beside that recurrence.
struct ChunkBwdWorkspace {
  size_t intermediates = 0;  // those of ChunkIntermediates; none if the forward has saved them
  size_t dstate = 0;  // dS', gradient of the state at the exit of a chunk  [slots, HV, V, K]  bf16, swizzled tile
  size_t dU = 0;      // gradient of U as bf16 operands          [slots, HV, V, C]
  size_t U0 =
      0;  // Tinv V, fp32 accumulators, in the place of those two until they are written, unless the recurrences run side by
          // side; none if the forward has saved, or the recurrence makes it  [slots, HV, V, C]
  size_t beta = 0;  // then: after its transforms, likewise in the place of those two  [slots, HV, C]  fp32
  // What bf16 leaves out in the last chunk of a sequence, a tile for each (sequence, value head):
  size_t dstate_low = 0;  // of the gradient of the final state         [N, HV, V, K]  bf16, fragment order
  size_t dU_low = 0;      // of dU                                      [N, HV, V, C]  bf16 operands
  size_t by_levels = 0;   // whether a chunk's gradients are left to the levels of pairs  [slots, HV]  uint32
  size_t progress =
      0;  // of the recurrences in each chunk, and of stage 1  [slots, HV] + 2 + its CTAs that are followed  uint32; if stages work beside
          // each other
  size_t dA_log = 0;  // sums over each chunk, by channel        [slots, HV, K]        fp32; only with an activated gate
  size_t ddt_bias = 0;      // likewise
  size_t dq = 0, dk = 0;    // of each value head                     [B, T, HV, K]         fp32; only if HV > H
  SegmentRegions segments;  // of a cut
  size_t total_bytes = 0;
};

struct ChunkBwdPlan {
  ChunkFwdPath path = ChunkFwdPath::kComposite;
  const char* reason = "";        // one clause: why this path
  int64_t chunk_slots = 0;        // as in ChunkFwdPlan
  int value_tile = 0;             // V columns of one CTA of the recurrence of the gradient
  int state_tile = 0;             // and of that of the state: the same whether its intermediates are saved or not
  bool saved = false;             // the intermediates are those that the forward has saved
  bool makes_values = false;      // the recurrence of the state, of all of V, makes U0 = Tinv V, rather than stage 1
  bool side_by_side = false;      // the recurrence of the state and that of its gradient find room at the same time
  bool gradients_beside = false;  // and stage 4 works beside them on chunks that both have left
  int64_t early_gradients = 0;    // then: CTAs of stage 4 that find a multiprocessor from the beginning
  int64_t followed_ctas =
      0;  // of stage 1, whose last turn the recurrences follow chunk by chunk; 0: they wait for its end

  // The cut of sequences into segments: the recurrences, from zero, and the maps of all segments are computed side by side before the
  // recurrences that write.
  int64_t segment_chunks = 0;  // chunks of one segment; 0: sequences are not cut
  int64_t segment_slots = 0;   // as in ChunkFwdPlan

  ChunkIntermediates intermediates;
  ChunkBwdWorkspace workspace;
  ChunkSavingWorkspace saving_workspace;
};

// What a caller may fix; for tests and measurements.
struct ChunkBwdPlanOptions {
  std::optional<int> value_tile;          // 64 or 128; at most V, and 64 where sequences are cut
  std::optional<int64_t> segment_chunks;  // 0: sequences are not cut
};

// Of the backward, and of the forward that saves for it. activated_gate: the log-gate is computed from A_log or dt_bias, whose gradients
// need room.
[[nodiscard]] ChunkBwdPlan plan_chunk_bwd(const ChunkFwdProblem& problem, bool activated_gate, bool saved = false,
                                          const ChunkBwdPlanOptions& options = {});

// The plan as one JSON object, for the command line and for logs.
[[nodiscard]] std::string to_json(const ChunkFwdProblem& problem, const ChunkFwdPlan& plan);
[[nodiscard]] std::string to_json(const ChunkBwdPlan& plan);

}  // namespace kda
