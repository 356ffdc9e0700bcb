// Random inputs of kda::chunk_fwd: on the device for the timing, and the same values on the host for the check.
//
// Raw logits with fused transforms, unless the options say otherwise: q and k are not normalised, g and beta are logits.
// Families of gates:
//   random     g ~ N(0, 1), A_log ~ U(0, 1), dt_bias ~ U(0, 1), lower bound -5
//   long       as a layer with a bounded gate starts: A_log = 0, dt = exp(U(ln 0.001, ln 0.1)) per channel,
//              dt_bias = dt + ln(-expm1(-dt)), g ~ N(0, 0.5^2), lower bound -5
//   unbounded  softplus gate with magnitudes seen in checkpoints: A_log ~ U(-4, ln 201), the last head at ln 201,
//              dt_bias ~ U(-6, 1), g ~ N(0, 3^2)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "cuda_objects.h"
#include "host_reference.h"
#include "kda/kda.h"
#include "options.h"

namespace bench {

inline constexpr double kLowerBound = -5.0;
inline constexpr double kLargestRate = 201.0;  // exp(A_log) of a checkpoint
inline constexpr size_t kActivationBytes = 2;  // bf16 and fp16

// What is measured: the sizes of one call.
struct Shape {
  Options options;
  std::vector<int64_t> lengths;  // of every sequence; rows of a batch are sequences
  int64_t tokens = 0;            // of all sequences
  int64_t sequences = 0;
  bool varlen = false;  // packed, with cu_seqlens

  explicit Shape(const Options& o) : options(o), lengths(o.lengths), varlen(o.lengths.size() > 1) {
    if (!varlen) lengths.resize(o.batch, o.lengths.front());
    sequences = static_cast<int64_t>(lengths.size());
    for (const int64_t length : lengths) tokens += length;
  }
  [[nodiscard]] int64_t row_tokens() const { return tokens / options.batch; }
  [[nodiscard]] int64_t chunks() const {
    int64_t chunks = 0;
    for (const int64_t length : lengths) chunks += chunks_of(length);
    return chunks;
  }
  [[nodiscard]] int64_t qk_elements() const { return tokens * options.heads * options.key_dim; }
  [[nodiscard]] int64_t v_elements() const { return tokens * options.value_heads * options.value_dim; }
  [[nodiscard]] int64_t g_elements() const { return tokens * options.value_heads * options.key_dim; }
  [[nodiscard]] int64_t beta_elements() const { return tokens * options.value_heads; }
  // Of a packed tensor [B, T, heads, dim].
  [[nodiscard]] kda::TokenStrides strides(int64_t heads, int64_t dim) const {
    return {row_tokens() * heads * dim, heads * dim, dim};
  }
  // Of the states of all value heads at one moment of one sequence.
  [[nodiscard]] int64_t head_states_elements() const {
    return int64_t{options.value_heads} * options.key_dim * options.value_dim;
  }
  [[nodiscard]] int64_t state_elements() const { return sequences * head_states_elements(); }
};

inline uint16_t to_bits(float x, bool fp16) {
  return fp16 ? __half_raw(__float2half(x)).x : __nv_bfloat16_raw(__float2bfloat16(x)).x;
}

inline float from_bits(uint16_t bits, bool fp16) {
  if (fp16) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(raw);
  }
  __nv_bfloat16_raw raw;
  raw.x = bits;
  return __bfloat162float(raw);
}

inline std::vector<double> widen(const std::vector<uint16_t>& bits, bool fp16) {
  std::vector<double> x(bits.size());
  std::transform(bits.begin(), bits.end(), x.begin(), [fp16](uint16_t b) { return double{from_bits(b, fp16)}; });
  return x;
}

// Scales each row of `size` elements to the norm kRowNorm. Not to 1: the check shall see it if a kernel normalises rows
// that it was not asked to.
inline constexpr float kRowNorm = 0.9f;
inline void normalize_rows(std::vector<uint16_t>& bits, int size, bool fp16) {
  for (size_t first = 0; first < bits.size(); first += size) {
    float sum = 0;
    for (int d = 0; d < size; ++d) {
      const float x = from_bits(bits[first + d], fp16);
      sum += x * x;
    }
    const float factor = sum > 0 ? kRowNorm / std::sqrt(sum) : 0.0f;
    for (int d = 0; d < size; ++d) bits[first + d] = to_bits(from_bits(bits[first + d], fp16) * factor, fp16);
  }
}

// Exchanges the two dimensions of each [rows, columns] matrix.
inline std::vector<double> transposed(const std::vector<double>& matrices, int64_t rows, int64_t columns) {
  std::vector<double> result(matrices.size());
  const int64_t size = rows * columns;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const int64_t first = i / size * size, row = i % size / columns, column = i % columns;
    result[first + column * rows + row] = matrices[i];
  }
  return result;
}

class Generator {
 public:
  explicit Generator(uint64_t seed) : engine_(seed) {}

  // `count` elements of N(0, sigma^2) in the activation type. At most kPool values are drawn; longer tensors repeat
  // them (the period is prime, so that no two rows are alike).
  std::vector<uint16_t> normal(int64_t count, double sigma, bool fp16) {
    constexpr int64_t kPool = 4194301;
    std::normal_distribution<float> distribution(0.0f, static_cast<float>(sigma));
    std::vector<uint16_t> x(count);
    const int64_t drawn = std::min(count, kPool);
    for (int64_t i = 0; i < drawn; ++i) x[i] = to_bits(distribution(engine_), fp16);
    for (int64_t i = drawn; i < count; i += drawn) {
      std::copy_n(x.begin(), std::min(drawn, count - i), x.begin() + i);
    }
    return x;
  }
  std::vector<float> normal_fp32(int64_t count, double sigma) {
    std::normal_distribution<float> distribution(0.0f, static_cast<float>(sigma));
    std::vector<float> x(count);
    for (float& value : x) value = distribution(engine_);
    return x;
  }
  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }

 private:
  std::mt19937_64 engine_;
};

// Whether q, k, v and g of a set of inputs are aligned: a DeviceBuffer is, by 256 bytes, so their strides decide.
inline bool has_aligned_inputs(const Shape& shape, kda::DataType activation_type) {
  const Options& o = shape.options;
  const kda::TokenStrides qk = shape.strides(o.heads, o.key_dim), v = shape.strides(o.value_heads, o.value_dim),
                          g = shape.strides(o.value_heads, o.key_dim);
  return kda::is_aligned(nullptr, qk, activation_type) && kda::is_aligned(nullptr, v, activation_type) &&
         kda::is_aligned(nullptr, g, o.log_gate ? kda::DataType::kFloat32 : activation_type);
}

// One set of inputs and outputs on the device, and what was uploaded.
class InputSet {
 public:
  // `chunk_slots`: of the plan.
  InputSet(const Shape& shape, int64_t chunk_slots, uint64_t seed) : shape_(shape) {
    const Options& o = shape.options;
    Generator random(seed);
    const double sigma_g = o.gate == GateFamily::kRandom ? 1.0 : o.gate == GateFamily::kLong ? 0.5 : 3.0;
    q_bits = random.normal(shape.qk_elements(), 1.0, o.fp16);
    k_bits = random.normal(shape.qk_elements(), 1.0, o.fp16);
    v_bits = random.normal(shape.v_elements(), 1.0, o.fp16);
    g_bits = random.normal(shape.g_elements(), sigma_g, o.fp16);
    beta_bits = random.normal(shape.beta_elements(), 1.0, o.fp16);
    if (!o.beta_sigmoid) {
      for (const uint16_t bits : beta_bits) beta.push_back(static_cast<float>(sigmoid(from_bits(bits, o.fp16))));
    }
    if (o.initial_state) initial_state = random.normal_fp32(shape.state_elements(), kInitialStateSigma);
    fill_gate_parameters(random);
    if (!o.l2norm) {
      normalize_rows(q_bits, o.key_dim, o.fp16);
      normalize_rows(k_bits, o.key_dim, o.fp16);
    }
    if (o.log_gate) compute_log_gate();
    std::vector<int64_t> cu_seqlens = {0};
    for (const int64_t length : shape.lengths) cu_seqlens.push_back(cu_seqlens.back() + length);

    q_ = DeviceBuffer(q_bits);
    k_ = DeviceBuffer(k_bits);
    v_ = DeviceBuffer(v_bits);
    g_ = o.log_gate ? DeviceBuffer(log_gate) : DeviceBuffer(g_bits);
    beta_ = o.beta_sigmoid ? DeviceBuffer(beta_bits) : DeviceBuffer(beta);
    initial_state_ = DeviceBuffer(initial_state);
    if (!o.log_gate) {
      A_log_ = DeviceBuffer(A_log);
      dt_bias_ = DeviceBuffer(dt_bias);
    }
    if (shape.varlen) cu_seqlens_ = DeviceBuffer(cu_seqlens);
    o_ = DeviceBuffer(shape.v_elements() * kActivationBytes);
    if (o.final_state) final_state_ = DeviceBuffer(shape.state_elements() * sizeof(float));
    if (o.chunk_states) chunk_states_ = DeviceBuffer(chunk_slots * shape.head_states_elements() * sizeof(float));
  }

  // Frees the host's copies; the check alone needs them.
  void drop_host_copies() {
    for (auto* bits : {&q_bits, &k_bits, &v_bits, &g_bits, &beta_bits}) std::vector<uint16_t>().swap(*bits);
    for (auto* values : {&log_gate, &beta, &initial_state}) std::vector<float>().swap(*values);
  }

  [[nodiscard]] kda::ChunkFwdParams params(const kda::ChunkFwdProblem& problem, void* workspace) const {
    const Options& o = shape_.options;
    const kda::DataType type = problem.activation_type;
    kda::ChunkFwdParams p;
    p.problem = problem;
    p.q = q_.get();
    p.k = k_.get();
    p.v = v_.get();
    p.g = g_.get();
    p.beta = beta_.get();
    p.q_stride = p.k_stride = shape_.strides(o.heads, o.key_dim);
    p.v_stride = shape_.strides(o.value_heads, o.value_dim);
    p.g_stride = shape_.strides(o.value_heads, o.key_dim);
    p.beta_stride = shape_.strides(o.value_heads, 1);
    p.gate_type = o.log_gate ? kda::DataType::kFloat32 : type;
    p.beta_type = o.beta_sigmoid ? type : kda::DataType::kFloat32;
    p.A_log = static_cast<const float*>(A_log_.get());
    p.dt_bias = static_cast<const float*>(dt_bias_.get());
    p.initial_state = initial_state_.get();
    p.initial_state_stride_head = int64_t{o.key_dim} * o.value_dim;
    p.initial_state_stride_sequence = shape_.head_states_elements();
    p.state_type = kda::DataType::kFloat32;
    p.state_v_first = o.state_v_first;
    p.cu_seqlens = cu_seqlens_.get();
    p.cu_seqlens_int64 = true;
    p.scale = static_cast<float>(scale());
    p.gate = gate_kind();
    p.lower_bound = p.gate == kda::GateKind::kSigmoid ? static_cast<float>(kLowerBound) : 0.0f;
    p.qk_l2norm = o.l2norm;
    p.beta_sigmoid = o.beta_sigmoid;
    p.beta_scale = static_cast<float>(beta_scale());
    p.o = o_.get();
    p.final_state = static_cast<float*>(final_state_.get());
    p.chunk_states = static_cast<float*>(chunk_states_.get());
    p.workspace = workspace;
    return p;
  }

  [[nodiscard]] HostInputs host_inputs() const {
    const Options& o = shape_.options;
    HostInputs in;
    in.lengths = shape_.lengths;
    in.heads = o.heads;
    in.value_heads = o.value_heads;
    in.key_dim = o.key_dim;
    in.value_dim = o.value_dim;
    in.q = widen(q_bits, o.fp16);
    in.k = widen(k_bits, o.fp16);
    in.v = widen(v_bits, o.fp16);
    in.g = o.log_gate ? std::vector<double>(log_gate.begin(), log_gate.end()) : widen(g_bits, o.fp16);
    in.beta = o.beta_sigmoid ? widen(beta_bits, o.fp16) : std::vector<double>(beta.begin(), beta.end());
    in.beta_sigmoid = o.beta_sigmoid;
    in.A_log.assign(A_log.begin(), A_log.end());
    in.dt_bias.assign(dt_bias.begin(), dt_bias.end());
    in.initial_state = o.initial_state ? key_first({initial_state.begin(), initial_state.end()})
                                       : std::vector<double>(shape_.state_elements(), 0.0);
    in.scale = scale();
    in.gate = o.log_gate ? HostGate::kLog : family_gate();
    in.lower_bound = kLowerBound;
    in.beta_scale = beta_scale();
    in.l2norm = o.l2norm;
    in.chunk_states = o.chunk_states;
    return in;
  }

  // Outputs in the form of HostOutputs.
  [[nodiscard]] std::vector<double> o() const { return widen(o_.to_host<uint16_t>(), shape_.options.fp16); }
  [[nodiscard]] std::vector<double> final_state() const {
    const std::vector<float> states = final_state_.to_host<float>();
    return key_first({states.begin(), states.end()});
  }
  [[nodiscard]] std::vector<double> chunk_states() const {
    const std::vector<float> slots = chunk_states_.to_host<float>();
    const int64_t size = shape_.head_states_elements();
    std::vector<double> states;
    states.reserve(shape_.chunks() * size);
    int64_t first_token = 0, first_chunk = 0;
    for (int64_t n = 0; n < shape_.sequences; ++n) {  // see chunk_slots() in plan.h
      const int64_t chunks = chunks_of(shape_.lengths[n]);
      const auto first = slots.begin() + (shape_.varlen ? first_token / kda::kChunkTokens + n : first_chunk) * size;
      states.insert(states.end(), first, first + chunks * size);
      first_token += shape_.lengths[n];
      first_chunk += chunks;
    }
    return key_first(states);
  }

  // States as the host has them, from the layout of the device.
  [[nodiscard]] std::vector<double> key_first(const std::vector<double>& states) const {
    const Options& o = shape_.options;
    return o.state_v_first ? transposed(states, o.value_dim, o.key_dim) : states;
  }

 private:
  static constexpr double kInitialStateSigma = 0.3;  // about the size of a state that random keys and values build up

  [[nodiscard]] double scale() const { return 1.0 / std::sqrt(static_cast<double>(shape_.options.key_dim)); }
  [[nodiscard]] double beta_scale() const { return shape_.options.negative_eigenvalues ? 2.0 : 1.0; }

  [[nodiscard]] HostGate family_gate() const {
    return shape_.options.gate == GateFamily::kUnbounded ? HostGate::kSoftplus : HostGate::kSigmoid;
  }
  [[nodiscard]] kda::GateKind gate_kind() const {
    if (shape_.options.log_gate) return kda::GateKind::kLog;
    return family_gate() == HostGate::kSoftplus ? kda::GateKind::kSoftplus : kda::GateKind::kSigmoid;
  }

  // log_gate from the logits and the parameters of the gate.
  void compute_log_gate() {
    const int64_t channels = shape_.g_elements() / shape_.tokens, K = shape_.options.key_dim;
    std::vector<double> A(A_log.size());
    std::transform(A_log.begin(), A_log.end(), A.begin(), [](float x) { return std::exp(double{x}); });
    log_gate.resize(g_bits.size());
    for (int64_t i = 0; i < shape_.g_elements(); ++i) {
      const int64_t channel = i % channels;
      const double x = double{from_bits(g_bits[i], shape_.options.fp16)} + dt_bias[channel];
      log_gate[i] = static_cast<float>(log_decay(family_gate(), kLowerBound, A[channel / K], x));
    }
  }

  void fill_gate_parameters(Generator& random) {
    const Options& o = shape_.options;
    A_log.resize(o.value_heads);
    dt_bias.resize(static_cast<size_t>(o.value_heads) * o.key_dim);
    for (float& value : A_log) value = static_cast<float>(draw_A_log(o.gate, random));
    if (o.gate == GateFamily::kUnbounded) A_log.back() = static_cast<float>(std::log(kLargestRate));
    for (float& value : dt_bias) value = static_cast<float>(draw_dt_bias(o.gate, random));
  }

  static double draw_A_log(GateFamily gate, Generator& random) {
    if (gate == GateFamily::kRandom) return random.uniform(0.0, 1.0);
    return gate == GateFamily::kLong ? 0.0 : random.uniform(-4.0, std::log(kLargestRate));
  }

  static double draw_dt_bias(GateFamily gate, Generator& random) {
    if (gate == GateFamily::kRandom) return random.uniform(0.0, 1.0);
    if (gate == GateFamily::kUnbounded) return random.uniform(-6.0, 1.0);
    const double dt = std::exp(random.uniform(std::log(0.001), std::log(0.1)));
    return dt + std::log(-std::expm1(-dt));
  }

  Shape shape_;
  std::vector<uint16_t> q_bits, k_bits, v_bits, g_bits, beta_bits;
  std::vector<float> log_gate, beta, initial_state, A_log, dt_bias;
  DeviceBuffer q_, k_, v_, g_, beta_, initial_state_, A_log_, dt_bias_, cu_seqlens_, o_, final_state_, chunk_states_;
};

}  // namespace bench
