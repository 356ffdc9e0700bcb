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

  [[nodiscard]] double us(const Load& load, double segment_chunks) const {
    const double segments = segment_chunks == 0 ? 1 : std::ceil(load.chunks / segment_chunks);
    const double steps = Load::kStepsPerChunk * (segments > 1 ? segment_chunks : load.chunks);
    const double factors = load.steps() * (wide_ ? 0.0155 : 0.0105) * (bounded_ ? 1.0 : 1.15);
    const double ctas_of_scan = load.chains() * segments;
    // Alone, and where others share the memory.
    const double step_us = ctas_of_scan < load.sm_count / 2 ? (wide_ ? 1.5 : 1.05) : (wide_ ? 1.7 : 1.2);
    const double scan =
        std::max(turns(ctas_of_scan, load.sm_count * scans_per_sm_) * steps * step_us, load.steps() * traffic_us());
    double cut = 0;
    if (segment_chunks != 0) cut = 2 * kLaunch + 4.0;  // the last steps of each segment, and their composition
    if (segments > 1) {
      // Maps of steep gates are known after these steps, those of gates with a long memory are not: the mean of both. A gate without a bound is rarely
      // steep in all channels.
      const double ctas = load.chains() * (segments - 1) * (map_rows_ + value_rows_) / kScanRows;
      const double summary = turns(ctas, load.sm_count * (wide_ ? 3 : 4)) * steps * (wide_ ? 1.75 : 1.0);
      const double compose = (segments - 2) * 1.4 * turns(load.chains() * value_rows_ / kComposeRows, load.sm_count);
      cut += (summary + compose) * (bounded_ ? 0.5 : 0.9);
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

}  // namespace

StepwiseEstimate estimate_stepwise(const ChunkFwdProblem& p) {
  constexpr int kMostSegments = 64;  // beyond, their composition eats up what they gain
  const StepwiseModel model(p);
  const auto cost = [&](int64_t chunks) {
    return expected_us(p, [&](const Load& load) { return model.us(load, static_cast<double>(chunks)); });
  };
  StepwiseEstimate best = {0, cost(0)};
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

FusedEstimate estimate_fused(const ChunkFwdProblem& p, std::optional<int64_t> most_scans) {
  constexpr double kLaunchUs = 12.0;     // launch, first loads, last stores
  constexpr double kStepsToBegin = 2.5;  // from one chain to the next, without a partial step
  constexpr double kLevels = 1.5;        // of a gate without a bound, whose steps take the levels (step_operands.cuh)
  constexpr int64_t kMakersOfScan = 3;   // CTAs; their groups' images fill its ring
  const bool wide = p.key_dim == 128;
  const double make_us = (wide ? 1.9 : 1.2) * (p.bounded_gate ? 1.0 : kLevels);  // a step, on one multiprocessor
  const double scan_us = wide ? 1.0 : 0.75;
  const int64_t ctas = std::max(p.sm_count, 2);
  const int64_t chains = std::max<int64_t>(p.sequences * p.value_heads, 1);
  const int64_t most = std::max<int64_t>(most_scans.value_or(ctas), 1);
  FusedEstimate best = {0, 0, 0.0};
  for (int64_t scans = 1; scans <= std::min({chains, most, ctas - 1}); ++scans) {
    const int64_t makers = std::min(ctas - scans, kMakersOfScan * scans);
    if (4 * makers < scans) break;  // a group for each
    const double us = expected_us(p, [&](const Load& load) {
      const double chain = load.chunks * Load::kStepsPerChunk + kStepsToBegin;
      const double share = std::max(load.chains() * chain / static_cast<double>(scans), chain);
      return kLaunchUs + std::max(share * scan_us, load.steps() * make_us / static_cast<double>(makers));
    });
    if (best.scans == 0 || us < best.us) best = {scans, makers, us};
  }
  return best;
}

}  // namespace kda
