// Random inputs of kda::chunk_fwd: on the device for the timing, and the same values on the host for the check.
//
// Raw logits with fused transforms: q and k are not normalised, g and beta are logits. Families of gates:
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
  int64_t tokens = 0;
  int64_t sequences = 0;
  bool varlen = false;

  Shape(const Options& o)
      : options(o), sequences(static_cast<int64_t>(o.lengths.size())), varlen(o.lengths.size() > 1) {
    for (const int64_t length : o.lengths) tokens += length;
  }
  [[nodiscard]] int64_t qk_elements() const { return tokens * options.heads * options.key_dim; }
  [[nodiscard]] int64_t v_elements() const { return tokens * options.value_heads * options.value_dim; }
  [[nodiscard]] int64_t g_elements() const { return tokens * options.value_heads * options.key_dim; }
  [[nodiscard]] int64_t beta_elements() const { return tokens * options.value_heads; }
  [[nodiscard]] int64_t state_elements() const {
    return sequences * options.value_heads * options.key_dim * options.value_dim;
  }
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

// One set of inputs and outputs on the device. `host` keeps what was uploaded, if asked for.
class InputSet {
 public:
  InputSet(const Shape& shape, uint64_t seed) : shape_(shape) {
    const Options& o = shape.options;
    Generator random(seed);
    const double sigma_g = o.gate == GateFamily::kRandom ? 1.0 : o.gate == GateFamily::kLong ? 0.5 : 3.0;
    q_bits = random.normal(shape.qk_elements(), 1.0, o.fp16);
    k_bits = random.normal(shape.qk_elements(), 1.0, o.fp16);
    v_bits = random.normal(shape.v_elements(), 1.0, o.fp16);
    g_bits = random.normal(shape.g_elements(), sigma_g, o.fp16);
    beta_bits = random.normal(shape.beta_elements(), 1.0, o.fp16);
    initial_state = random.normal_fp32(shape.state_elements(), kInitialStateSigma);
    fill_gate_parameters(random);
    std::vector<int64_t> cu_seqlens = {0};
    for (const int64_t length : o.lengths) cu_seqlens.push_back(cu_seqlens.back() + length);

    q_ = DeviceBuffer(q_bits);
    k_ = DeviceBuffer(k_bits);
    v_ = DeviceBuffer(v_bits);
    g_ = DeviceBuffer(g_bits);
    beta_ = DeviceBuffer(beta_bits);
    initial_state_ = DeviceBuffer(initial_state);
    A_log_ = DeviceBuffer(A_log);
    dt_bias_ = DeviceBuffer(dt_bias);
    cu_seqlens_ = DeviceBuffer(cu_seqlens);
    o_ = DeviceBuffer(shape.v_elements() * kActivationBytes);
    if (o.final_state) final_state_ = DeviceBuffer(shape.state_elements() * sizeof(float));
  }

  // Frees the host's copies; the check alone needs them.
  void drop_host_copies() {
    for (auto* bits : {&q_bits, &k_bits, &v_bits, &g_bits, &beta_bits}) std::vector<uint16_t>().swap(*bits);
    std::vector<float>().swap(initial_state);
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
    p.q_stride = p.k_stride = strides(o.heads, o.key_dim);
    p.v_stride = strides(o.value_heads, o.value_dim);
    p.g_stride = strides(o.value_heads, o.key_dim);
    p.beta_stride = strides(o.value_heads, 1);
    p.gate_type = type;
    p.beta_type = type;
    p.A_log = static_cast<const float*>(A_log_.get());
    p.dt_bias = static_cast<const float*>(dt_bias_.get());
    p.initial_state = initial_state_.get();
    p.initial_state_stride_head = int64_t{o.key_dim} * o.value_dim;
    p.initial_state_stride_sequence = o.value_heads * p.initial_state_stride_head;
    p.state_type = kda::DataType::kFloat32;
    p.cu_seqlens = shape_.varlen ? cu_seqlens_.get() : nullptr;
    p.cu_seqlens_int64 = true;
    p.scale = static_cast<float>(scale());
    p.gate = o.gate == GateFamily::kUnbounded ? kda::GateKind::kSoftplus : kda::GateKind::kSigmoid;
    p.lower_bound = o.gate == GateFamily::kUnbounded ? 0.0f : static_cast<float>(kLowerBound);
    p.qk_l2norm = true;
    p.beta_sigmoid = true;
    p.o = o_.get();
    p.final_state = static_cast<float*>(final_state_.get());
    p.workspace = workspace;
    return p;
  }

  [[nodiscard]] HostInputs host_inputs() const {
    const Options& o = shape_.options;
    HostInputs in;
    in.lengths = o.lengths;
    in.heads = o.heads;
    in.value_heads = o.value_heads;
    in.key_dim = o.key_dim;
    in.value_dim = o.value_dim;
    in.q = widen(q_bits, o.fp16);
    in.k = widen(k_bits, o.fp16);
    in.v = widen(v_bits, o.fp16);
    in.g = widen(g_bits, o.fp16);
    in.beta = widen(beta_bits, o.fp16);
    in.A_log.assign(A_log.begin(), A_log.end());
    in.dt_bias.assign(dt_bias.begin(), dt_bias.end());
    in.initial_state.assign(initial_state.begin(), initial_state.end());
    in.scale = scale();
    in.softplus_gate = o.gate == GateFamily::kUnbounded;
    in.lower_bound = kLowerBound;
    return in;
  }
  [[nodiscard]] std::vector<double> o() const { return widen(o_.to_host<uint16_t>(), shape_.options.fp16); }
  [[nodiscard]] std::vector<double> final_state() const {
    const std::vector<float> state = final_state_.to_host<float>();
    return {state.begin(), state.end()};
  }

 private:
  static constexpr double kInitialStateSigma = 0.3;  // about the size of a state that random keys and values build up

  [[nodiscard]] double scale() const { return 1.0 / std::sqrt(static_cast<double>(shape_.options.key_dim)); }
  [[nodiscard]] kda::TokenStrides strides(int64_t heads, int64_t dim) const {
    return {shape_.tokens * heads * dim, heads * dim, dim};
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
  std::vector<float> initial_state, A_log, dt_bias;
  DeviceBuffer q_, k_, v_, g_, beta_, initial_state_, A_log_, dt_bias_, cu_seqlens_, o_, final_state_;
};

}  // namespace bench
