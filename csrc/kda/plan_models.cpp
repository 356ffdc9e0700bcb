#include "plan_models.h"

#include <algorithm>
#include <cmath>

namespace kda {

namespace {

// A call as the models see it. The lengths in cu_seqlens are not known on the host: they are taken as equal, or as one long sequence and
// others of no length.
struct Load {
  double sequences, chunks;  // of the same length
  double heads;              // of values
  double sm_count;

  Load(const ChunkFwdProblem& p, double sequences, double tokens)
      : sequences(sequences),
        chunks(std::ceil(tokens / kChunkTokens)),
        heads(p.value_heads),
        sm_count(std::max(p.sm_count, 1)) {}

  static Load of_equal_lengths(const ChunkFwdProblem& p) {
    const auto sequences = static_cast<double>(p.sequences), tokens = static_cast<double>(p.tokens);
    return {p, sequences, p.varlen && p.sequences > 0 ? std::ceil(tokens / sequences) : tokens};
  }

  static Load of_one_sequence(const ChunkFwdProblem& p) { return {p, 1.0, static_cast<double>(p.tokens)}; }

  [[nodiscard]] double chains() const { return sequences * heads; }
  [[nodiscard]] double steps() const { return chains() * chunks * kStepsPerChunk; }

  static constexpr int kStepsPerChunk = kChunkTokens / kStepTokens;
};

// The mean over what the lengths may be. Most batches are near to equal ones: what the longest sequence costs is seen only where it is far longer
// than the mean.
template <typename Cost>
double expected_us(const ChunkFwdProblem& p, Cost cost) {
  constexpr double kEqual = 0.97;
  const double equal = cost(Load::of_equal_lengths(p));
  return p.varlen && p.sequences > 1 ? kEqual * equal + (1 - kEqual) * cost(Load::of_one_sequence(p)) : equal;
}

// CTAs take turns where there are more than run side by side; of many turns the later ones fill gaps.
double turns(double ctas, double side_by_side) {
  const double share = ctas / side_by_side;
  return share <= 2 ? std::max(std::ceil(share), 1.0) : share;
}

// Time of the stepwise path in microseconds, with sequences cut into segments of some chunks, or not (0). The constants were measured on an
// H200 (docs/lab-notebook.md), for K = V of 128 and of 64, and give its times to 15 %.
class StepwiseModel {
 public:
  explicit StepwiseModel(const ChunkFwdProblem& p)
      : wide_(p.key_dim == 128),
        bounded_(p.bounded_gate),
        map_rows_(p.key_dim),
        value_rows_(p.value_dim),
        scans_per_sm_(p.value_dim == 128 ? 1 : 2) {}

  // slow: which share of the calls have gates that do not forget within a few steps.
  [[nodiscard]] double us(const Load& load, double segment_chunks, double slow) const {
    const double segments = segment_chunks == 0 ? 1 : std::ceil(load.chunks / segment_chunks);
    const double steps = Load::kStepsPerChunk * (segments > 1 ? segment_chunks : load.chunks);
    const double factors = load.steps() * (wide_ ? 0.0155 : 0.0105) * (bounded_ ? 1.0 : 1.15);
    const double ctas_of_scan = load.chains() * segments;
    // Alone, and where others share the memory.
    const double step_us = ctas_of_scan < load.sm_count / 2 ? (wide_ ? 1.5 : 1.05) : (wide_ ? 1.7 : 1.2);
    const double scan =
        std::max(turns(ctas_of_scan, load.sm_count * scans_per_sm_) * steps * step_us, load.steps() * traffic_us());
    double cut = 0;
    if (segment_chunks != 0) cut = 2 * kLaunch + 7.0;  // the last steps of each segment, and their composition
    if (segments > 1) {
      // Maps of steep gates are known after these steps, those of gates with a long memory are not.
      const double ctas = load.chains() * (segments - 1) * (map_rows_ + value_rows_) / kScanRows;
      const double summary = turns(ctas, load.sm_count * (wide_ ? 3 : 4)) * steps * (wide_ ? 1.75 : 1.0);
      const double compose = (segments - 2) * 1.4 * turns(load.chains() * value_rows_ / kComposeRows, load.sm_count);
      cut += (summary + compose) * slow;
    }
    return 2 * kLaunch + factors + scan + cut;
  }

 private:
  static constexpr double kLaunch = 4.0;  // of a kernel: its launch, first loads and last stores

  // Of a step in the scan, where memory bounds it.
  [[nodiscard]] double traffic_us() const { return (wide_ ? 0.0122 : 0.0083) + 0.00002 * value_rows_; }

  bool wide_, bounded_;
  double map_rows_, value_rows_;
  double scans_per_sm_;
};

// Time of the two recurrences over chunks of the backward, likewise, with sequences cut into segments of some chunks, or not (0): of one
// CTA for each 64 rows, and of the memory.
class RecurrenceModel {
 public:
  explicit RecurrenceModel(const ChunkFwdProblem& p)
      : wide_(p.key_dim == 128),
        map_tiles_(p.key_dim / kScanRows),
        value_tiles_(p.value_dim / kScanRows),
        K_(p.key_dim),
        V_(p.value_dim) {}

  [[nodiscard]] double us(const Load& load, double segment_chunks) const {
    constexpr double kRecurrences = 2, kLaunch = 4.0, kCompose = 1.6;  // a segment
    constexpr double kBytesOfUs = 4.1e6;
    const double segments = segment_chunks == 0 ? 1 : std::ceil(load.chunks / segment_chunks);
    const double chunks = segments > 1 ? segment_chunks : load.chunks;
    const double all_chunks = load.chains() * load.chunks;
    const auto pass = [&](double tiles, double bytes) {
      const double chain = turns(load.chains() * tiles, load.sm_count) * chunks * (wide_ ? 1.5 : 1.2);
      return kLaunch + std::max(chain, all_chunks * bytes / kBytesOfUs);
    };
    const double last = pass(segments * kRecurrences * value_tiles_, read_bytes() + written_bytes());
    if (segment_chunks == 0) return last;
    const double maps = std::max(segments - 2, 0.0);
    const double row_tiles = load.chains() * kRecurrences * V_ / kComposeRows;
    return pass((segments - 1) * kRecurrences * value_tiles_ + maps * map_tiles_, read_bytes()) + kLaunch +
           maps * kCompose * turns(row_tiles, load.sm_count) + last;
  }

 private:
  // Of a chunk of one value head: W, K_decayed, U0; the same with Q_gated, Aqk, dO. Then S, U, dS, dU.
  [[nodiscard]] double read_bytes() const { return 10 * C * K_ + 6 * C * V_ + 2 * C * C; }
  [[nodiscard]] double written_bytes() const { return 4 * K_ * V_ + 4 * C * V_; }

  static constexpr double C = kChunkTokens;
  bool wide_;
  double map_tiles_, value_tiles_, K_, V_;
};

// The cut with the least cost(chunks of a segment).
template <typename Cost>
CutEstimate best_cut(const ChunkFwdProblem& p, Cost cost_of_load) {
  constexpr int kMostSegments = 64;  // beyond, their composition eats up what they gain
  const auto cost = [&](int64_t chunks) {
    return expected_us(p, [&](const Load& load) { return cost_of_load(load, static_cast<double>(chunks)); });
  };
  CutEstimate best = {0, cost(0)};
  if (p.sequences == 0) return best;
  const auto consider = [&](double chunks_of_sequence) {
    for (int segments = 2; segments <= kMostSegments && segments <= chunks_of_sequence;
         segments += std::max(1, segments / 8)) {
      const auto chunks = static_cast<int64_t>(std::ceil(chunks_of_sequence / segments));
      if (const double us = cost(chunks); us < best.us) best = {chunks, us};
    }
  };
  consider(Load::of_equal_lengths(p).chunks);
  if (p.varlen && p.sequences > 1) consider(Load::of_one_sequence(p).chunks);
  return best;
}

}  // namespace

CutEstimate estimate_stepwise(const ChunkFwdProblem& p) {
  const StepwiseModel model(p);
  const double slow = p.bounded_gate ? 0.5 : 0.9;  // a gate without a bound is rarely steep in all channels
  return best_cut(p, [&](const Load& load, double chunks) { return model.us(load, chunks, slow); });
}

GatesEstimate estimate_stepwise(const ChunkFwdProblem& p, int64_t segment_chunks) {
  const StepwiseModel model(p);
  const auto us = [&](double slow) {
    return expected_us(p, [&](const Load& load) { return model.us(load, static_cast<double>(segment_chunks), slow); });
  };
  return {us(0.0), us(1.0)};
}

int64_t choose_segment_chunks(const ChunkFwdProblem& p) {
  const RecurrenceModel model(p);
  return best_cut(p, [&](const Load& load, double chunks) { return model.us(load, chunks); }).segment_chunks;
}

namespace {

// Of the fused kernel, in microseconds.
constexpr double kFusedLaunch = 9.0;  // launch, first loads, last stores

double fused_step_us(const ChunkFwdProblem& p) {
  constexpr double kLevels = 1.7;  // of a gate without a bound, whose steps take the levels (step_operands.cuh)
  const double bounded_us = p.key_dim == 128 ? (p.value_dim == 128 ? 1.66 : 2.85) : (p.value_dim == 128 ? 1.27 : 2.07);
  return bounded_us * (p.bounded_gate ? 1.0 : kLevels);
}

}  // namespace

double estimate_fused_us(const ChunkFwdProblem& p, int64_t clusters) {
  constexpr double kStepsToBegin = 2.5;  // from one chain to the next, without a partial step
  const double step_us = fused_step_us(p);
  const auto available = static_cast<double>(std::max<int64_t>(clusters, 1));
  return expected_us(p, [&](const Load& load) {
    const double chain = load.chunks * Load::kStepsPerChunk + kStepsToBegin;
    return kFusedLaunch + std::max(load.chains() * chain / available, chain) * step_us;
  });
}

GatesEstimate estimate_fused_cut(const ChunkFwdProblem& p, int64_t clusters, const GatesEstimate& stepwise) {
  // Measured with 4096 to 16384 steps on an H200. Steep gates: launch, a look at the gates, first loads, and the kernels after that, which find nothing to do.
  // Slow ones: the look, and how much later CTAs that ask what is left come to their steps.
  constexpr double kAround = 30.0, kLook = 6.0, kLookOfStep = 0.002;
  constexpr double kStepsToBegin = 2.0, kTail = 2.0;  // on the line of chains; steps whose map is looked at
  const double step_us = fused_step_us(p), before = kTail * (std::ceil(1.0 * p.key_dim / p.value_dim) + 1);
  const auto available = static_cast<double>(std::max<int64_t>(clusters, 1));
  const double steep_us = expected_us(p, [&](const Load& load) {
    const double chain = load.chunks * Load::kStepsPerChunk + kStepsToBegin;
    return kAround + (std::ceil(load.chains() * chain / available) + before) * step_us;
  });
  const double look = expected_us(p, [&](const Load& load) { return kLook + kLookOfStep * load.steps(); });
  return {steep_us, look + stepwise.slow_us};
}

}  // namespace kda
