#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <climits>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "coverage.h"

namespace kda::binding {

namespace {

constexpr double kSmallestLowerBound = -5.0;

// --- Messages: only built once something is wrong -------------------------------------------------------------------

template <typename... Parts>
[[noreturn]] void fail_in(const char* name, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << "kda::" << name << ": argument `" << argument << "`: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
[[noreturn]] void fail(const char* argument, const Parts&... parts) {
  fail_in("chunk_fwd", argument, parts...);
}

template <typename Range>
std::string join(const Range& values) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (int64_t value : values) {
    text << separator << value;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

struct DeviceId {
  int32_t type = 0;
  int32_t index = 0;
  bool operator==(const DeviceId& other) const { return type == other.type && index == other.index; }
};

DeviceId device_of(const Tensor& tensor) {
  DeviceId id;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &id.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &id.index));
  return id;
}

std::string name_of(const DeviceId& device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  std::string name = "device type " + std::to_string(device.type);
  if (device.type == aoti_torch_device_type_cuda()) name = "cuda";
  if (device.type == aoti_torch_device_type_meta()) name = "meta";
  return device.index < 0 ? name : name + ":" + std::to_string(device.index);
}

// --- One property of one tensor -------------------------------------------------------------------------------------

// The dispatcher passes None for a tensor on as a tensor that is not defined.
void check_given(const char* argument, const Tensor& tensor) {
  if (!tensor.defined()) fail(argument, "expected a tensor, got None");
}

void check_strided(const char* argument, const Tensor& tensor) {
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  if (layout != aoti_torch_layout_strided())
    fail(argument, "expected a dense (strided) tensor, got a sparse or nested one");
}

void check_rank(const char* argument, const Tensor& tensor, int64_t rank, const char* shape) {
  check_strided(argument, tensor);
  if (tensor.dim() != rank) {
    fail(argument, "expected ", rank, " dimension", rank == 1 ? " " : "s ", shape, ", got shape ",
         join(tensor.sizes()));
  }
}

void check_shape(const char* argument, const Tensor& tensor, const char* shape,
                 std::initializer_list<int64_t> expected) {
  check_strided(argument, tensor);
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = sizes[i] == expected.begin()[i];
  if (!same) fail(argument, "expected shape ", shape, " = ", join(expected), ", got ", join(sizes));
}

void check_device(const char* argument, const Tensor& tensor, const DeviceId& expected) {
  const DeviceId device = device_of(tensor);
  if (!(device == expected)) {
    fail(argument, "expected device ", name_of(expected), " as `q` is, got ", name_of(device));
  }
}

bool is_activation_type(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float ||
         type == ScalarType::Double;
}

// g and beta: any floating type that is not wider than what the call computes in.
void check_gate_type(const char* argument, const Tensor& tensor, ScalarType activation) {
  const ScalarType type = type_of(tensor);
  if (activation == ScalarType::Double ? is_activation_type(type)
                                       : is_activation_type(type) && type != ScalarType::Double) {
    return;
  }
  fail(argument, "expected dtype bfloat16, float16 or float32 (float64 with float64 activations only), got ",
       name_of(type));
}

// A_log and dt_bias: float32, or the type of float64 activations.
void check_parameter_type(const char* argument, const Tensor& tensor, ScalarType activation) {
  const ScalarType type = type_of(tensor);
  if (type == ScalarType::Float || (type == ScalarType::Double && activation == ScalarType::Double)) return;
  fail(argument, "expected dtype float32 (float64 with float64 activations only), got ", name_of(type));
}

// --- Groups of arguments --------------------------------------------------------------------------------------------

void check_activations(const ChunkFwdArguments& args, const DeviceId& device) {
  check_rank("q", args.q, 4, "[B, T, H, K]");
  const auto q = args.q.sizes();
  const int64_t B = q[0], T = q[1], H = q[2], K = q[3];
  const ScalarType type = type_of(args.q);
  if (!is_activation_type(type)) {
    fail("q", "expected dtype bfloat16, float16, float32 or float64, got ", name_of(type));
  }
  if (H < 1 || H > INT_MAX) fail("q", "expected at least one head (H >= 1), got shape ", join(q));
  if (K < 1 || K > INT_MAX) fail("q", "expected a head size of at least 1 (K >= 1), got shape ", join(q));

  check_shape("k", args.k, "[B, T, H, K]", {B, T, H, K});
  if (type_of(args.k) != type) {
    fail("k", "expected dtype ", name_of(type), " as `q` has, got ", name_of(type_of(args.k)));
  }
  check_device("k", args.k, device);

  check_rank("v", args.v, 4, "[B, T, HV, V]");
  const auto v = args.v.sizes();
  const int64_t HV = v[2], V = v[3];
  if (v[0] != B || v[1] != T) {
    fail("v", "expected shape [B, T, HV, V] = [", B, ", ", T, ", HV, V], got ", join(v));
  }
  if (HV < 1 || HV > INT_MAX || HV % H != 0) {
    fail("v", "expected a number of value heads HV that is a multiple of H = ", H, ", got HV = ", HV, " in shape ",
         join(v));
  }
  if (V < 1 || V > INT_MAX) fail("v", "expected a head size of at least 1 (V >= 1), got shape ", join(v));
  if (type_of(args.v) != type) {
    fail("v", "expected dtype ", name_of(type), " as `q` has, got ", name_of(type_of(args.v)));
  }
  check_device("v", args.v, device);

  check_shape("g", args.g, "[B, T, HV, K]", {B, T, HV, K});
  check_gate_type("g", args.g, type);
  check_device("g", args.g, device);

  check_shape("beta", args.beta, "[B, T, HV]", {B, T, HV});
  check_gate_type("beta", args.beta, type);
  check_device("beta", args.beta, device);
}

// [HV], or as checkpoints carry it with further dimensions of size 1.
void check_A_log_shape(const Tensor& A_log, int64_t HV) {
  check_strided("A_log", A_log);
  const auto sizes = A_log.sizes();
  bool right = A_log.numel() == HV && sizes.size() >= 1;
  for (int64_t size : sizes) right = right && (size == 1 || size == HV);
  if (!right) fail("A_log", "expected shape [HV] = [", HV, "], got ", join(sizes));
}

void check_dt_bias_shape(const Tensor& dt_bias, int64_t HV, int64_t K) {
  check_strided("dt_bias", dt_bias);
  const auto sizes = dt_bias.sizes();
  const bool flat = sizes.size() == 1 && sizes[0] == HV * K;
  const bool by_head = sizes.size() == 2 && sizes[0] == HV && sizes[1] == K;
  if (!flat && !by_head) {
    fail("dt_bias", "expected shape [HV * K] = [", HV * K, "] or [HV, K] = [", HV, ", ", K, "], got ", join(sizes));
  }
}

void check_gate(const ChunkFwdArguments& args, const DeviceId& device) {
  const ScalarType type = type_of(args.q);
  const int64_t HV = args.v.size(2), K = args.q.size(3);
  if (!args.use_gate) {
    constexpr const char* kUnused = "expected None without use_gate (then `g` is the log-gate itself), got ";
    if (args.A_log) fail("A_log", kUnused, "a tensor");
    if (args.dt_bias) fail("dt_bias", kUnused, "a tensor");
    if (args.lower_bound) fail("lower_bound", kUnused, *args.lower_bound);
    return;
  }
  if (args.lower_bound && !(*args.lower_bound >= kSmallestLowerBound && *args.lower_bound < 0)) {
    fail("lower_bound", "expected a value in [-5, 0), got ", *args.lower_bound);
  }
  if (args.A_log) {
    check_A_log_shape(*args.A_log, HV);
    check_parameter_type("A_log", *args.A_log, type);
    check_device("A_log", *args.A_log, device);
  } else if (!args.lower_bound) {
    fail("A_log", "expected a tensor of shape [HV] = [", HV, "] with use_gate and no lower_bound, got None");
  }
  if (args.dt_bias) {
    check_dt_bias_shape(*args.dt_bias, HV, K);
    check_parameter_type("dt_bias", *args.dt_bias, type);
    check_device("dt_bias", *args.dt_bias, device);
  }
}

void check_cu_seqlens_form(const Tensor& cu_seqlens) {
  check_rank("cu_seqlens", cu_seqlens, 1, "[N + 1]");
  const ScalarType type = type_of(cu_seqlens);
  if (type != ScalarType::Int && type != ScalarType::Long) {
    fail("cu_seqlens", "expected dtype int32 or int64, got ", name_of(type));
  }
  if (cu_seqlens.size(0) < 1) fail("cu_seqlens", "expected shape [N + 1] with at least 1 element, got [0]");
}

template <typename Int>
void check_values(const Int* values, int64_t count, int64_t tokens, bool padding_allowed) {
  if (values[0] != 0) fail("cu_seqlens", "expected it to start at 0, got ", values[0]);
  for (int64_t i = 1; i < count; ++i) {
    if (values[i] < values[i - 1]) {
      fail("cu_seqlens", "expected values that never decrease, got ", values[i - 1], " at index ", i - 1, " and ",
           values[i], " at index ", i);
    }
  }
  const int64_t last = values[count - 1];
  if (padding_allowed ? last > tokens : last != tokens) {
    fail("cu_seqlens", "expected it to end at ", padding_allowed ? "or before " : "", "T = ", tokens, ", got ", last);
  }
}

void check_values(const Tensor& cu_seqlens, int64_t tokens, bool padding_allowed) {
  Tensor host = cu_seqlens;
  if (!host.is_cpu()) host = torch::stable::to(host, torch::stable::Device(DeviceType::CPU));
  if (!host.is_contiguous()) host = torch::stable::contiguous(host);
  if (type_of(host) == ScalarType::Int) {
    check_values(static_cast<const int32_t*>(host.data_ptr()), host.numel(), tokens, padding_allowed);
  } else {
    check_values(static_cast<const int64_t*>(host.data_ptr()), host.numel(), tokens, padding_allowed);
  }
}

void check_sequences(const ChunkFwdArguments& args, const DeviceId& device, bool padding_allowed) {
  const Tensor& cu_seqlens = *args.cu_seqlens;
  check_cu_seqlens_form(cu_seqlens);
  check_device("cu_seqlens", cu_seqlens, device);
  if (args.q.size(0) != 1) {
    fail("q", "expected batch size B = 1 with `cu_seqlens`, got ", args.q.size(0), " in shape ", join(args.q.sizes()));
  }
  if (args.check_cu_seqlens || cu_seqlens.is_cpu()) check_values(cu_seqlens, args.q.size(1), padding_allowed);
}

void check_initial_state(const ChunkFwdArguments& args, const DeviceId& device) {
  const Tensor& state = *args.initial_state;
  const ChunkFwdSizes n = sizes_of(args);
  if (args.state_v_first) {
    check_shape("initial_state", state, "[N, HV, V, K] (state_v_first)",
                {n.sequences, n.value_heads, n.value_dim, n.key_dim});
  } else {
    check_shape("initial_state", state, "[N, HV, K, V]", {n.sequences, n.value_heads, n.key_dim, n.value_dim});
  }
  const ScalarType type = type_of(state);
  const bool wide = type == ScalarType::Double && type_of(args.q) == ScalarType::Double;
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && !wide) {
    fail("initial_state", "expected dtype float32 or bfloat16 (float64 with float64 activations only), got ",
         name_of(type));
  }
  check_device("initial_state", state, device);
}

// The gradient of an output: in the output's shape, of any floating type that can be converted to the output's.
void check_gradient(const char* argument, const Tensor& gradient, const char* shape,
                    std::initializer_list<int64_t> expected, const DeviceId& device) {
  constexpr const char* kName = "chunk_bwd";
  const auto sizes = gradient.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = sizes[i] == expected.begin()[i];
  if (!same) fail_in(kName, argument, "expected shape ", shape, " = ", join(expected), ", got ", join(sizes));
  const DeviceId actual = device_of(gradient);
  if (!(actual == device)) {
    fail_in(kName, argument, "expected device ", name_of(device), " as `q` is, got ", name_of(actual));
  }
  if (!is_activation_type(gradient.scalar_type())) {
    fail_in(kName, argument, "expected dtype bfloat16, float16, float32 or float64, got ",
            name_of(gradient.scalar_type()));
  }
}

// Bytes of chunk_fwd_saving for a call of the same sizes, or none.
void check_intermediates(const Tensor& intermediates, const ChunkFwdArguments& args, const DeviceId& device) {
  constexpr const char *kName = "chunk_bwd", *kArgument = "intermediates";
  const DeviceId actual = device_of(intermediates);
  if (!(actual == device)) {
    fail_in(kName, kArgument, "expected device ", name_of(device), " as `q` is, got ", name_of(actual));
  }
  if (intermediates.scalar_type() != ScalarType::Byte) {
    fail_in(kName, kArgument, "expected dtype uint8, got ", name_of(intermediates.scalar_type()));
  }
  const auto bytes = static_cast<int64_t>(intermediate_bytes(problem_of(args, Device{})));
  const bool right = intermediates.dim() == 1 && (intermediates.numel() == 0 || intermediates.numel() == bytes) &&
                     intermediates.is_contiguous();
  if (!right) {
    fail_in(kName, kArgument, "expected what chunk_fwd_saving returned for these inputs, packed and of shape [", bytes,
            "] or [0], got shape ", join(intermediates.sizes()));
  }
}

}  // namespace

void check_cu_seqlens(const Tensor& cu_seqlens, int64_t tokens) {
  check_given("cu_seqlens", cu_seqlens);
  check_cu_seqlens_form(cu_seqlens);
  check_values(cu_seqlens, tokens, false);
}

void check_chunk_fwd(const ChunkFwdArguments& args, bool padding_allowed) {
  check_given("q", args.q);
  check_given("k", args.k);
  check_given("v", args.v);
  check_given("g", args.g);
  check_given("beta", args.beta);
  const DeviceId device = device_of(args.q);
  check_activations(args, device);
  if (args.scale && !std::isfinite(*args.scale)) fail("scale", "expected a finite number, got ", *args.scale);
  check_gate(args, device);
  if (args.allow_neg_eigval && !args.use_beta_sigmoid) {
    fail("allow_neg_eigval", "expected False without use_beta_sigmoid, got True");
  }
  if (args.cu_seqlens) check_sequences(args, device, padding_allowed);
  if (args.initial_state) check_initial_state(args, device);
}

void check_chunk_bwd(const ChunkBwdArguments& args) {
  check_chunk_fwd(args.forward);
  const ChunkFwdSizes n = sizes_of(args.forward);
  const DeviceId device = device_of(args.forward.q);
  check_gradient("do", args.dO, "[B, T, HV, V]", {n.batch, n.tokens, n.value_heads, n.value_dim}, device);
  if (args.intermediates) check_intermediates(*args.intermediates, args.forward, device);
  if (!args.dfinal_state) return;
  if (args.forward.state_v_first) {
    check_gradient("dfinal_state", *args.dfinal_state, "[N, HV, V, K] (state_v_first)",
                   {n.sequences, n.value_heads, n.value_dim, n.key_dim}, device);
  } else {
    check_gradient("dfinal_state", *args.dfinal_state, "[N, HV, K, V]",
                   {n.sequences, n.value_heads, n.key_dim, n.value_dim}, device);
  }
}

}  // namespace kda::binding
