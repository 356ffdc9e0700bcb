// Command line of the benchmark binaries.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace bench {

// A wrong flag or value; the message says which and what was expected.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class GateFamily { kRandom, kLong, kUnbounded };

struct Options {
  std::vector<int64_t> lengths = {8192};
  int heads = 96;
  int value_heads = 0;  // 0: same as heads
  int key_dim = 128;
  int value_dim = 128;
  GateFamily gate = GateFamily::kRandom;
  bool fp16 = false;
  int iterations = 50;
  int warmup = 5;
  bool final_state = true;
  std::string json_path;
  bool help = false;
};

inline constexpr const char* kHelp = R"(bench_chunk_fwd: checks and times kda::chunk_fwd on the first CUDA device

  --lengths L[,L...]   tokens of each sequence; NxL repeats a length: 8192, 1300,547,2048, 8x1024   (default 8192)
  --heads H            heads of q and k                                                             (default 96)
  --value-heads HV     heads of v, g, beta and the states; a multiple of H                          (default H)
  --key-dim K          (default 128)
  --value-dim V        (default 128)
  --gate FAMILY        random: bounded gate, memory of about a token                                (default)
                       long: bounded gate as a layer initialises it, half-lives of 1 to 220 tokens
                       unbounded: softplus gate, log-decays down to about -2000 a token
  --dtype TYPE         bf16 or fp16: q, k, v, g, beta and o                                         (default bf16)
  --iterations N       timed graph replays                                                          (default 50)
  --warmup N           replays before them                                                          (default 5)
  --no-final-state     do not write the final state
  --json FILE          also write the result to FILE
  --help               this text

First a small case with the same heads' grouping, sizes, gate and type is checked against a token recurrence in double
precision on the host. Inputs are random, and rotate through buffers that exceed the L2 cache.
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

inline Options parse_options(int argc, char** argv) {
  Options options;
  constexpr int kMaxHeads = 1 << 16, kMaxDim = 1 << 12, kMaxIterations = 1 << 20;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--help" || flag == "-h") {
      options.help = true;
      return options;
    }
    if (flag == "--no-final-state") {
      options.final_state = false;
      continue;
    }
    const char* known[] = {"--lengths", "--heads",      "--value-heads", "--key-dim", "--value-dim",
                           "--gate",    "--iterations", "--dtype",       "--warmup",  "--json"};
    bool is_known = false;
    for (const char* name : known) is_known = is_known || flag == name;
    if (!is_known) throw UsageError("unknown flag '" + flag + "'");
    if (i + 1 == argc) throw UsageError(flag + ": expected a value");
    const std::string value = argv[++i];
    if (flag == "--lengths") options.lengths = parse_lengths(flag, value);
    if (flag == "--heads") options.heads = static_cast<int>(parse_integer(flag, value, 1, kMaxHeads));
    if (flag == "--value-heads") options.value_heads = static_cast<int>(parse_integer(flag, value, 1, kMaxHeads));
    if (flag == "--key-dim") options.key_dim = static_cast<int>(parse_integer(flag, value, 1, kMaxDim));
    if (flag == "--value-dim") options.value_dim = static_cast<int>(parse_integer(flag, value, 1, kMaxDim));
    if (flag == "--iterations") options.iterations = static_cast<int>(parse_integer(flag, value, 1, kMaxIterations));
    if (flag == "--warmup") options.warmup = static_cast<int>(parse_integer(flag, value, 0, kMaxIterations));
    if (flag == "--json") options.json_path = value;
    if (flag == "--gate") {
      if (value != "random" && value != "long" && value != "unbounded") {
        throw UsageError("--gate: expected random, long or unbounded, got '" + value + "'");
      }
      options.gate = value == "random" ? GateFamily::kRandom
                     : value == "long" ? GateFamily::kLong
                                       : GateFamily::kUnbounded;
    }
    if (flag == "--dtype") {
      if (value != "bf16" && value != "fp16") throw UsageError("--dtype: expected bf16 or fp16, got '" + value + "'");
      options.fp16 = value == "fp16";
    }
  }
  if (options.value_heads == 0) options.value_heads = options.heads;
  if (options.value_heads % options.heads != 0) {
    throw UsageError("--value-heads: expected a multiple of --heads = " + std::to_string(options.heads) + ", got " +
                     std::to_string(options.value_heads));
  }
  int64_t tokens = 0;
  for (const int64_t length : options.lengths) tokens += length;
  if (tokens == 0) throw UsageError("--lengths: expected at least one token");
  return options;
}

inline const char* name_of(GateFamily gate) {
  return gate == GateFamily::kRandom ? "random" : gate == GateFamily::kLong ? "long" : "unbounded";
}

}  // namespace bench
