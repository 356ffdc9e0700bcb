// Command line of the benchmark binaries.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kda/plan.h"

namespace bench {

inline constexpr int kAsPlanned = -1;  // of a flag: the plan's own choice

// A wrong flag or value; the message says which and what was expected.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class GateFamily { kRandom, kLong, kUnbounded };

// The paths of the forward that --path can ask for.
inline constexpr kda::ChunkFwdPath kPaths[] = {kda::ChunkFwdPath::kStepwise, kda::ChunkFwdPath::kFusedCut,
                                               kda::ChunkFwdPath::kFused, kda::ChunkFwdPath::kStaged};

struct Options {
  std::vector<int64_t> lengths = {8192};
  int batch = 1;  // rows of equal length, without cu_seqlens; above 1, `lengths` holds the length of each row
  int heads = 96;
  int value_heads = 0;  // 0: same as heads
  int key_dim = 128;
  int value_dim = 128;
  GateFamily gate = GateFamily::kRandom;
  bool fp16 = false;
  bool log_gate = false;              // g is the log-gate in fp32, else logits that the kernel activates
  bool beta_sigmoid = true;           // beta is a logit in the activation type, else beta itself in fp32
  bool saved = false;                 // of the backward: the forward has saved its intermediates
  bool l2norm = true;                 // the kernel normalises q and k, else they have norm 0.9 already
  bool negative_eigenvalues = false;  // beta is twice the sigmoid of its logit
  bool initial_state = true;
  bool final_state = true;
  bool chunk_states = false;
  bool state_v_first = false;
  std::optional<kda::ChunkFwdPath> path;  // none: the plan's own choice
  int value_tile = kAsPlanned;            // of the staged path
  int clusters = kAsPlanned;              // of the fused path
  int segment_chunks = kAsPlanned;        // 0: sequences are not cut
  int iterations = 50;
  int warmup = 5;
  std::string json_path;
  bool help = false;
};

// The flags that all binaries have, by section of their --help.
inline constexpr const char* kHelpShape = R"(Shape
  --lengths L[,L...]   tokens of each sequence; NxL repeats a length: 8192, 1300,547,2048, 8x1024   (default 8192)
  --batch B            B rows of the one length, without cu_seqlens                                 (default 1)
  --heads H            heads of q and k                                                             (default 96)
  --value-heads HV     heads of v, g, beta and the states; a multiple of H                          (default H)
  --key-dim K          (default 128)
  --value-dim V        (default 128)
  --dtype TYPE         bf16 or fp16: q, k, v, g, beta and o                                         (default bf16)
)";

inline constexpr const char* kHelpInputs = R"(
Inputs and features
  --gate FAMILY        random: bounded gate, memory of about a token                                (default)
                       long: bounded gate as a layer initialises it, half-lives of 1 to 220 tokens
                       unbounded: softplus gate, log-decays down to about -2000 a token
  --log-gate           g is the log-gate in fp32, computed from the family beforehand; else the kernel activates logits
  --no-l2norm          q and k are scaled to norm 0.9 beforehand; else normalised by the kernel
  --no-beta-sigmoid    beta in fp32, its sigmoid taken beforehand; else the kernel takes that of logits
  --negative-eigenvalues  beta = 2 sigmoid(logit); else sigmoid(logit)
  --no-initial-state   start from zeros
  --state-v-first      states are [V, K]; else [K, V]
)";

inline constexpr const char* kHelpMeasuring = R"(
Measuring
  --iterations N       timed graph replays                                                          (default 50)
  --warmup N           replays before them                                                          (default 5)
  --json FILE          also write the result to FILE
  --help               this text
)";

inline constexpr const char* kHelpStatus = R"(Inputs are random, and rotate through buffers that exceed the L2 cache.
Exit status: 0; 1 if the check fails; 2 for wrong flags or no usable device.
)";

inline int64_t parse_integer(const std::string& flag, const std::string& text, int64_t minimum, int64_t maximum) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < minimum || value > maximum) {
    throw UsageError(flag + ": expected an integer in [" + std::to_string(minimum) + ", " + std::to_string(maximum) +
                     "], got '" + text + "'");
  }
  return value;
}

// "1300,547,8x1024" -> the length of each sequence.
inline std::vector<int64_t> parse_lengths(const std::string& flag, const std::string& text) {
  constexpr int64_t kMaxLength = int64_t{1} << 30, kMaxSequences = 1 << 20;
  std::vector<int64_t> lengths;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    std::string item = text.substr(begin, comma - begin);
    int64_t repeat = 1;
    if (const size_t times = item.find('x'); times != std::string::npos) {
      repeat = parse_integer(flag, item.substr(0, times), 1, kMaxSequences);
      item = item.substr(times + 1);
    }
    lengths.insert(lengths.end(), repeat, parse_integer(flag, item, 0, kMaxLength));
    if (lengths.size() > static_cast<size_t>(kMaxSequences)) throw UsageError(flag + ": too many sequences");
    begin = comma + 1;
  }
  return lengths;
}

// Flags without a value: what they set, and to what.
struct Switch {
  const char* name;
  bool Options::* member;
  bool value;
};
inline constexpr Switch kSwitches[] = {
    {"--log-gate", &Options::log_gate, true},
    {"--no-l2norm", &Options::l2norm, false},
    {"--no-beta-sigmoid", &Options::beta_sigmoid, false},
    {"--negative-eigenvalues", &Options::negative_eigenvalues, true},
    {"--no-initial-state", &Options::initial_state, false},
    {"--no-final-state", &Options::final_state, false},
    {"--chunk-states", &Options::chunk_states, true},
    {"--state-v-first", &Options::state_v_first, true},
    {"--saved", &Options::saved, true},
};

struct IntegerFlag {
  const char* name;
  int Options::* member;
  int minimum, maximum;
};
inline constexpr int kMaxHeads = 1 << 16, kMaxDim = 1 << 12, kMaxIterations = 1 << 20, kMaxBatch = 1 << 16;
// Of the state recurrence (staged): a warpgroup owns 64 rows of the transposed state, a CTA has one or two.
inline constexpr int kValueRowsOfGroup = 64, kMaxValueTile = 2 * kValueRowsOfGroup;
inline constexpr int kMaxClusters = 1 << 16, kMaxSegmentChunks = 1 << 24;
inline constexpr IntegerFlag kIntegerFlags[] = {
    {"--batch", &Options::batch, 1, kMaxBatch},
    {"--heads", &Options::heads, 1, kMaxHeads},
    {"--value-heads", &Options::value_heads, 1, kMaxHeads},
    {"--key-dim", &Options::key_dim, 1, kMaxDim},
    {"--value-dim", &Options::value_dim, 1, kMaxDim},
    {"--value-tile", &Options::value_tile, kValueRowsOfGroup, kMaxValueTile},
    {"--clusters", &Options::clusters, 1, kMaxClusters},
    {"--segment-chunks", &Options::segment_chunks, 0, kMaxSegmentChunks},
    {"--iterations", &Options::iterations, 1, kMaxIterations},
    {"--warmup", &Options::warmup, 0, kMaxIterations},
};

inline bool parse_switch(Options& options, const std::string& flag) {
  for (const Switch& known : kSwitches) {
    if (flag != known.name) continue;
    options.*known.member = known.value;
    return true;
  }
  return false;
}

inline GateFamily parse_gate(const std::string& flag, const std::string& value) {
  if (value == "random") return GateFamily::kRandom;
  if (value == "long") return GateFamily::kLong;
  if (value == "unbounded") return GateFamily::kUnbounded;
  throw UsageError(flag + ": expected random, long or unbounded, got '" + value + "'");
}

inline std::optional<kda::ChunkFwdPath> parse_path(const std::string& flag, const std::string& value) {
  if (value == "auto") return std::nullopt;
  for (const kda::ChunkFwdPath path : kPaths) {
    if (value == kda::name_of(path)) return path;
  }
  throw UsageError(flag + ": expected auto, stepwise, fused_cut, fused or staged, got '" + value + "'");
}

// Whether `value` is `second`; it must be that or `first`.
inline bool parse_either(const std::string& flag, const std::string& value, const char* first, const char* second) {
  if (value != first && value != second) {
    throw UsageError(flag + ": expected " + first + " or " + second + ", got '" + value + "'");
  }
  return value == second;
}

inline bool is_value_flag(const std::string& flag) {
  for (const IntegerFlag& known : kIntegerFlags) {
    if (flag == known.name) return true;
  }
  return flag == "--lengths" || flag == "--gate" || flag == "--dtype" || flag == "--path" || flag == "--json";
}

inline void parse_value_flag(Options& options, const std::string& flag, const std::string& value) {
  for (const IntegerFlag& known : kIntegerFlags) {
    if (flag == known.name) {
      options.*known.member = static_cast<int>(parse_integer(flag, value, known.minimum, known.maximum));
    }
  }
  if (flag == "--lengths") options.lengths = parse_lengths(flag, value);
  if (flag == "--gate") options.gate = parse_gate(flag, value);
  if (flag == "--dtype") options.fp16 = parse_either(flag, value, "bf16", "fp16");
  if (flag == "--path") options.path = parse_path(flag, value);
  if (flag == "--json") options.json_path = value;
}

inline void check_overrides(const Options& options) {
  using Path = kda::ChunkFwdPath;
  const auto may_be = [&](Path path) { return options.path.value_or(path) == path; };
  if (options.value_tile != kAsPlanned &&
      (options.value_tile % kValueRowsOfGroup != 0 || options.value_dim % options.value_tile != 0)) {
    throw UsageError("--value-tile: expected a multiple of " + std::to_string(kValueRowsOfGroup) +
                     " that divides --value-dim = " + std::to_string(options.value_dim) + ", got " +
                     std::to_string(options.value_tile));
  }
  if (options.value_tile != kAsPlanned && !may_be(Path::kStaged)) {
    throw UsageError("--value-tile: expected --path staged or auto, as the other paths have no tiles of V to choose");
  }
  if (options.clusters != kAsPlanned && !may_be(Path::kFused) && !may_be(Path::kFusedCut)) {
    throw UsageError(
        "--clusters: expected --path fused, fused_cut or auto, as the other paths have no clusters to deal chains to");
  }
  if (options.segment_chunks > 0 && !may_be(Path::kStepwise) && !may_be(Path::kFusedCut)) {
    throw UsageError("--segment-chunks: expected --path stepwise, fused_cut or auto, as the other paths have none");
  }
}

// What flags say about each other.
inline void check_together(const Options& options) {
  if (options.value_heads % options.heads != 0) {
    throw UsageError("--value-heads: expected a multiple of --heads = " + std::to_string(options.heads) + ", got " +
                     std::to_string(options.value_heads));
  }
  check_overrides(options);
  if (options.negative_eigenvalues && !options.beta_sigmoid) {
    throw UsageError("--negative-eigenvalues: expected no --no-beta-sigmoid beside it, as it scales the sigmoid");
  }
  if (options.batch > 1 && options.lengths.size() != 1) {
    throw UsageError("--batch: expected one length, that of each row, got " + std::to_string(options.lengths.size()) +
                     " in --lengths");
  }
  int64_t tokens = 0;
  for (const int64_t length : options.lengths) tokens += length;
  if (tokens == 0) throw UsageError("--lengths: expected at least one token");
}

inline Options parse_options(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--help" || flag == "-h") {
      options.help = true;
      return options;
    }
    if (parse_switch(options, flag)) continue;
    if (!is_value_flag(flag)) throw UsageError("unknown flag '" + flag + "'");
    if (i + 1 == argc) throw UsageError(flag + ": expected a value");
    parse_value_flag(options, flag, argv[++i]);
  }
  if (options.value_heads == 0) options.value_heads = options.heads;
  check_together(options);
  return options;
}

inline const char* name_of(GateFamily gate) {
  return gate == GateFamily::kRandom ? "random" : gate == GateFamily::kLong ? "long" : "unbounded";
}

}  // namespace bench
