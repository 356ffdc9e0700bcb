#include "chunk_fwd_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"
#include "schedule.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace kda::cpu {

namespace {

// Steps that a thread prepares before it advances: 73 KB each at K = V = 128. With the state, and the rows prefetched for
// the next ones, that is 340 KB of its second-level cache. 4 and 6 took as long.
constexpr int64_t kStepsAhead = 2;
// Steps a thread that are prepared side by side where threads work on the same items: 2.3 MB, so few enough for a
// common third-level cache, and so many that threads seldom wait for each other.
constexpr int64_t kSharedStepsPerThread = 32;
// Steps x K x V that are worth a thread: about 0.1 ms, ten times what it takes to wake one.
constexpr int64_t kWorkPerThread = 4 * 128 * 128;

constexpr int64_t kAlignment = 64;  // bytes: the widest vector, and a cache line
static_assert(kChunkTokens % kStepTokens == 0, "a chunk is a number of steps");
constexpr int64_t kStepsPerChunk = kChunkTokens / kStepTokens;

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

const Kernels& kernels_of(InstructionSet set) {
  switch (set) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512:
      return kAvx512Kernels;
    case InstructionSet::kAvx2:
      return kAvx2Kernels;
#endif
    default:
      return kBaselineKernels;
  }
}

// Subnormal numbers as 0 while it lives: products of alphas fall through them, at a hundred times the cost of other
// numbers on many machines, and nothing that fp32 holds to its precision changes.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;

 public:
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// Sizes in floats, each a multiple of a cache line.
struct Layout {
  Layout(const ChunkFwdParams& p, const Kernels& kernels)
      : panels(round_up(p.value_dim, kernels.panel_columns) / kernels.panel_columns),
        padded_key_dim(round_up(p.key_dim, kKeyPadding)),
        panel_state(padded_key_dim * kernels.panel_columns),
        state(panels * panel_state),
        step(3 * kStepTokens * padded_key_dim + 2 * padded_key_dim + panels * kStepTokens * kernels.panel_columns +
             2 * kStepTokens * kStepTokens),
        scratch(std::max<int64_t>(kPrepareScratchRows * padded_key_dim, kStepTokens * kernels.panel_columns)) {}

  // The factors of a step in `memory` [step].
  StepFactors factors(float* memory, int rows) const {
    StepFactors f;
    f.rows = rows;
    for (float** part : {&f.q, &f.k, &f.k_out}) {
      *part = memory;
      memory += kStepTokens * padded_key_dim;
    }
    f.Aqk = memory;
    f.Akk = f.Aqk + kStepTokens * kStepTokens;
    f.decay = f.Akk + kStepTokens * kStepTokens;
    f.v = f.decay + 2 * padded_key_dim;
    return f;
  }

  int64_t panels;          // column panels of V
  int64_t padded_key_dim;  // Kp
  int64_t panel_state;     // [Kp, P]
  int64_t state;           // [panels, Kp, P]
  int64_t step;            // StepFactors
  int64_t scratch;         // of any kernel
};

class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t count) : data_(::operator new(count * sizeof(float), std::align_val_t{kAlignment})) {}
  ~AlignedFloats() { ::operator delete(data_, std::align_val_t{kAlignment}); }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  float* get() const { return static_cast<float*>(data_); }

 private:
  void* data_;
};

struct Sequence {
  int64_t batch = 0;
  int64_t first_token = 0;  // in its row
  int64_t length = 0;
  int64_t first_slot = 0;  // of its chunk states
};

std::vector<Sequence> find_sequences(const ChunkFwdParams& p) {
  std::vector<Sequence> sequences;
  if (p.cu_seqlens.empty()) {
    const int64_t chunks = round_up(p.tokens, kChunkTokens) / kChunkTokens;
    for (int64_t b = 0; b < p.batch; ++b) sequences.push_back({b, 0, p.tokens, b * chunks});
  } else {
    for (size_t n = 0; n + 1 < p.cu_seqlens.size(); ++n) {
      const int64_t begin = p.cu_seqlens[n];
      sequences.push_back({0, begin, p.cu_seqlens[n + 1] - begin, begin / kChunkTokens + static_cast<int64_t>(n)});
    }
  }
  return sequences;
}

float read_state(const void* data, DataType type, int64_t index) {
  if (type == DataType::kFloat32) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;  // bf16
  float x = 0;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// One call of the forward. Steps of an item are numbered from 0; an item's state lies in `Layout::state` floats.
class Forward {
 public:
  Forward(const ChunkFwdParams& params, const Kernels& kernels)
      : p_(params), kernels_(kernels), layout_(params, kernels), sequences_(find_sequences(params)) {
    for (size_t n = 0; n < sequences_.size(); ++n) {
      const int64_t steps = round_up(sequences_[n].length, kStepTokens) / kStepTokens;
      for (int64_t head = 0; head < p_.value_heads; ++head) items_.push_back({static_cast<int64_t>(n), head, steps});
    }
    std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.steps > b.steps; });
    for (int64_t head = 0; head < p_.value_heads; ++head) {
      gate_rates_.push_back(p_.A_log ? static_cast<float>(std::exp(static_cast<double>(p_.A_log[head]))) : 1.0f);
    }
  }

  void run(int threads, const ParallelFor& parallel_for) {
    int64_t steps = 0;
    for (const Item& item : items_) steps += item.steps;
    const int64_t useful = steps * layout_.padded_key_dim * p_.value_dim / kWorkPerThread;
    threads = static_cast<int>(std::clamp<int64_t>(useful, 1, threads));
    const auto count = static_cast<int64_t>(items_.size());
    const int64_t shared = shared_items(items_, threads);
    if (shared > 0) run_together(shared, threads, parallel_for);
    if (shared == count) return;
    const int64_t memory = layout_.state + kStepsAhead * layout_.step + layout_.scratch;
    const int64_t workers = std::min<int64_t>(threads, count - shared);
    const AlignedFloats all(workers * memory);
    std::atomic<int64_t> next{shared};
    parallel_for(workers, [&](int64_t thread) {
      const FlushSubnormals flush;
      for (int64_t i = next++; i < count; i = next++) run_item(items_[i], all.get() + thread * memory);
    });
  }

 private:
  void run_item(const Item& item, float* memory) const {
    float *state = memory, *steps = state + layout_.state, *scratch = steps + kStepsAhead * layout_.step;
    for (int64_t panel = 0; panel < layout_.panels; ++panel) load_state(item, panel, state);
    for (int64_t first = 0; first < item.steps; first += kStepsAhead) {
      const int64_t end = std::min(first + kStepsAhead, item.steps);
      for (int64_t step = first; step < end; ++step) {
        prepare(item, step, steps + (step - first) * layout_.step, scratch);
      }
      for (int64_t panel = 0; panel < layout_.panels; ++panel) advance(item, first, end, panel, state, steps, scratch);
    }
    for (int64_t panel = 0; panel < layout_.panels; ++panel) store_final_state(item, panel, state);
  }

  // The first `count` items, by all threads: in rounds of some steps of each item.
  void run_together(int64_t count, int threads, const ParallelFor& parallel_for) const {
    const int64_t ahead = std::max<int64_t>(1, kSharedStepsPerThread * threads / count);  // steps of an item in a round
    const AlignedFloats states(count * layout_.state), steps(count * ahead * layout_.step);
    const AlignedFloats scratch(threads * layout_.scratch);
    const auto for_each = [&](int64_t units, const std::function<void(int64_t unit, float* scratch)>& body) {
      std::atomic<int64_t> next{0};
      parallel_for(std::min<int64_t>(threads, units), [&](int64_t thread) {
        const FlushSubnormals flush;
        for (int64_t unit = next++; unit < units; unit = next++) body(unit, scratch.get() + thread * layout_.scratch);
      });
    };
    const int64_t panels = layout_.panels;
    for (int64_t first = 0; first == 0 || first < items_[0].steps; first += ahead) {
      for_each(count * ahead, [&](int64_t unit, float* scratch) {
        const Item& item = items_[unit / ahead];
        const int64_t step = first + unit % ahead;
        if (step < item.steps) prepare(item, step, steps.get() + unit * layout_.step, scratch);
      });
      for_each(count * panels, [&](int64_t unit, float* scratch) {
        const Item& item = items_[unit / panels];
        float* state = states.get() + unit / panels * layout_.state;
        const int64_t panel = unit % panels, end = std::min(first + ahead, item.steps);
        if (first == 0) load_state(item, panel, state);
        advance(item, first, end, panel, state, steps.get() + unit / panels * ahead * layout_.step, scratch);
        if (first + ahead >= item.steps && (first == 0 || first < item.steps)) store_final_state(item, panel, state);
      });
    }
  }

  Rows rows_of(const void* data, DataType type, const TensorStrides& stride, const Sequence& sequence, int64_t token,
               int64_t head) const {
    const int64_t offset =
        sequence.batch * stride.batch + (sequence.first_token + token) * stride.token + head * stride.head;
    const int64_t bytes = type == DataType::kFloat32 ? sizeof(float) : sizeof(uint16_t);
    return {static_cast<const char*>(data) + offset * bytes, type, stride.token, stride.dim};
  }

  StepInputs inputs(const Item& item, int64_t step) const {
    const Sequence& sequence = sequences_[item.sequence];
    const int64_t token = step * kStepTokens, key_head = item.head / (p_.value_heads / p_.heads);
    StepInputs in;
    in.rows = static_cast<int>(std::clamp<int64_t>(sequence.length - token, 0, kStepTokens));
    in.q = rows_of(p_.q, p_.activation_type, p_.q_stride, sequence, token, key_head);
    in.k = rows_of(p_.k, p_.activation_type, p_.k_stride, sequence, token, key_head);
    in.v = rows_of(p_.v, p_.activation_type, p_.v_stride, sequence, token, item.head);
    in.g = rows_of(p_.g, p_.gate_type, p_.g_stride, sequence, token, item.head);
    in.beta = rows_of(p_.beta, p_.beta_type, p_.beta_stride, sequence, token, item.head);
    return in;
  }

  void prepare(const Item& item, int64_t step, float* memory, float* scratch) const {
    const StepInputs in = inputs(item, step);
    HeadOptions options;
    options.key_dim = p_.key_dim;
    options.value_dim = p_.value_dim;
    options.padded_key_dim = static_cast<int>(layout_.padded_key_dim);
    options.scale = p_.scale;
    options.qk_l2norm = p_.qk_l2norm;
    options.beta_sigmoid = p_.beta_sigmoid;
    options.beta_scale = p_.beta_scale;
    options.gate = p_.gate;
    options.gate_rate = gate_rates_[item.head];
    options.lower_bound = p_.lower_bound;
    options.dt_bias = p_.dt_bias ? p_.dt_bias + item.head * p_.key_dim : nullptr;
    kernels_.prepare_step(in, options, layout_.factors(memory, in.rows), scratch);
  }

  // Steps first .. end - 1 in one panel.
  void advance(const Item& item, int64_t first, int64_t end, int64_t panel, float* state, float* steps,
               float* scratch) const {
    const Sequence& sequence = sequences_[item.sequence];
    const int64_t column = panel * kernels_.panel_columns, V = p_.value_dim;
    const int64_t bytes = p_.activation_type == DataType::kFloat32 ? sizeof(float) : sizeof(uint16_t);
    for (int64_t step = first; step < end; ++step) {
      if (p_.chunk_states && step % kStepsPerChunk == 0) {
        const int64_t slot = sequence.first_slot + step / kStepsPerChunk;
        store_state(state, panel, p_.chunk_states, p_.chunk_states_stride, slot, item.head);
      }
      const int64_t token = sequence.batch * p_.tokens + sequence.first_token + step * kStepTokens;
      OutputTile out;
      out.data = static_cast<char*>(p_.o) + ((token * p_.value_heads + item.head) * V + column) * bytes;
      out.type = p_.activation_type;
      out.token_stride = p_.value_heads * V;
      out.columns = static_cast<int>(std::min<int64_t>(V - column, kernels_.panel_columns));
      const int64_t rows = std::min<int64_t>(sequence.length - step * kStepTokens, kStepTokens);
      const StepInputs later = inputs(item, step + end - first);
      Upcoming upcoming;
      upcoming.inputs = &later;
      upcoming.first = static_cast<int>(later.rows * panel / layout_.panels);
      upcoming.count = static_cast<int>(later.rows * (panel + 1) / layout_.panels) - upcoming.first;
      upcoming.key_dim = p_.key_dim;
      upcoming.value_dim = p_.value_dim;
      const StepFactors factors = layout_.factors(steps + (step - first) * layout_.step, static_cast<int>(rows));
      kernels_.advance_panel(factors, static_cast<int>(layout_.padded_key_dim), static_cast<int>(panel),
                             state + panel * layout_.panel_state, out, upcoming, scratch);
    }
  }

  void load_state(const Item& item, int64_t panel, float* states) const {
    float* state = states + panel * layout_.panel_state;
    std::fill_n(state, layout_.panel_state, 0.0f);
    if (!p_.initial_state) return;
    const StateStrides& stride = p_.initial_state_stride;
    const int64_t P = kernels_.panel_columns, first = panel * P, columns = std::min<int64_t>(p_.value_dim - first, P);
    const int64_t offset = item.sequence * stride.sequence + item.head * stride.head + first * stride.value;
    for (int64_t d = 0; d < p_.key_dim; ++d) {
      for (int64_t c = 0; c < columns; ++c) {
        state[d * P + c] = read_state(p_.initial_state, p_.state_type, offset + d * stride.key + c * stride.value);
      }
    }
  }

  void store_state(const float* states, int64_t panel, float* to, const StateStrides& stride, int64_t sequence,
                   int64_t head) const {
    const float* state = states + panel * layout_.panel_state;
    const int64_t P = kernels_.panel_columns, first = panel * P, columns = std::min<int64_t>(p_.value_dim - first, P);
    to += sequence * stride.sequence + head * stride.head + first * stride.value;
    if (stride.value == 1) {
      for (int64_t d = 0; d < p_.key_dim; ++d) std::copy_n(state + d * P, columns, to + d * stride.key);
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t d = 0; d < p_.key_dim; ++d) to[c * stride.value + d * stride.key] = state[d * P + c];
      }
    }
  }

  void store_final_state(const Item& item, int64_t panel, const float* states) const {
    if (p_.final_state) store_state(states, panel, p_.final_state, p_.final_state_stride, item.sequence, item.head);
  }

  const ChunkFwdParams& p_;
  const Kernels& kernels_;
  const Layout layout_;
  const std::vector<Sequence> sequences_;
  std::vector<Item> items_;        // longest first
  std::vector<float> gate_rates_;  // [HV] exp(A_log)
};

}  // namespace

bool is_supported(InstructionSet set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (set) {
    case InstructionSet::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case InstructionSet::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case InstructionSet::kBaseline:
      return true;
  }
#endif
  return set == InstructionSet::kBaseline;
}

InstructionSet best_instruction_set() {
  static const InstructionSet best = is_supported(InstructionSet::kAvx512) ? InstructionSet::kAvx512
                                     : is_supported(InstructionSet::kAvx2) ? InstructionSet::kAvx2
                                                                           : InstructionSet::kBaseline;
  return best;
}

std::optional<InstructionSet> parse_instruction_set(const std::string& name) {
  if (name == "baseline") return InstructionSet::kBaseline;
  if (name == "avx2") return InstructionSet::kAvx2;
  if (name == "avx512") return InstructionSet::kAvx512;
  return std::nullopt;
}

void chunk_fwd(const ChunkFwdParams& params, InstructionSet set, int threads, const ParallelFor& parallel_for) {
  Forward(params, kernels_of(set)).run(threads, parallel_for);
}

}  // namespace kda::cpu
