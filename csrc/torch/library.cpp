// Registers the operators: their schema, and those implementations that run on any device. What runs on CUDA is
// registered in chunk_fwd_cuda.cpp; what is written in Python, in the package.
#include <torch/csrc/stable/library.h>

#include <climits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "build_info.h"
#include "checks.h"
#include "coverage.h"
#include "kda/plan.h"
#include "schema.h"

namespace kda::binding {

namespace {

using torch::stable::detail::from;

void boxed_check_chunk_fwd(StableIValue* stack, uint64_t, uint64_t) { check_chunk_fwd(read_arguments(stack)); }

void boxed_check_chunk_bwd(StableIValue* stack, uint64_t, uint64_t) { check_chunk_bwd(read_bwd_arguments(stack)); }

void boxed_composite_reason(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = from(std::string(composite_reason(read_arguments(stack))));
}

template <typename Value>
[[noreturn]] void fail_plan(const char* operation, const char* argument, const std::string& expected,
                            const Value& got) {
  std::ostringstream message;
  message << "kda::" << operation << ": argument `" << argument << "`: expected " << expected << ", got " << got;
  throw std::runtime_error(message.str());
}

// What a planning operator is asked about; bounded_gate, contractive and aligned_inputs are for the caller to say.
struct PlanRequest {
  const char* operation;
  const std::vector<int64_t>& lengths;
  int64_t batch, heads, value_heads, key_dim, value_dim;
  const std::string& activation_dtype;
  bool varlen;
  int64_t compute_capability, sm_count;

  [[nodiscard]] int at_least(int64_t smallest, int64_t value, const char* argument) const {
    if (value < smallest || value > INT_MAX) {
      fail_plan(operation, argument, "at least " + std::to_string(smallest), value);
    }
    return static_cast<int>(value);
  }

  [[nodiscard]] DataType activation_type() const {
    if (activation_dtype == "bfloat16") return DataType::kBFloat16;
    if (activation_dtype == "float16") return DataType::kFloat16;
    if (activation_dtype == "float32") return DataType::kFloat32;
    fail_plan(operation, "activation_dtype", "bfloat16, float16 or float32", activation_dtype);
  }

  [[nodiscard]] ChunkFwdProblem problem() const {
    if (varlen && batch != 1) fail_plan(operation, "batch", "1 with varlen", batch);
    if (!varlen && lengths.size() != 1) fail_plan(operation, "lengths", "one length without varlen", lengths.size());
    ChunkFwdProblem problem;
    problem.tokens = 0;
    for (int64_t length : lengths) {
      if (length < 0) fail_plan(operation, "lengths", "lengths of at least 0", length);
      problem.tokens += length;
    }
    problem.batch = at_least(0, batch, "batch");
    problem.sequences = varlen ? static_cast<int64_t>(lengths.size()) : batch;
    problem.varlen = varlen;
    problem.heads = at_least(1, heads, "heads");
    problem.value_heads = at_least(1, value_heads, "value_heads");
    if (value_heads % heads != 0) {
      fail_plan(operation, "value_heads", "a multiple of " + std::to_string(heads), value_heads);
    }
    problem.key_dim = at_least(1, key_dim, "key_dim");
    problem.value_dim = at_least(1, value_dim, "value_dim");
    problem.activation_type = activation_type();
    problem.compute_capability = at_least(0, compute_capability, "compute_capability");
    problem.sm_count = at_least(0, sm_count, "sm_count");
    return problem;
  }
};

std::string plan_chunk_fwd_json(std::vector<int64_t> lengths, int64_t batch, int64_t heads, int64_t value_heads,
                                int64_t key_dim, int64_t value_dim, std::string activation_dtype, bool varlen,
                                int64_t compute_capability, int64_t sm_count, bool bounded_gate, bool contractive) {
  const PlanRequest request{
      "plan_chunk_fwd",   lengths, batch, heads, value_heads, key_dim, value_dim, activation_dtype, varlen,
      compute_capability, sm_count};
  ChunkFwdProblem problem = request.problem();
  problem.bounded_gate = bounded_gate;
  problem.contractive = contractive;
  return to_json(problem, plan_chunk_fwd(problem));
}

std::string plan_chunk_bwd_json(std::vector<int64_t> lengths, int64_t batch, int64_t heads, int64_t value_heads,
                                int64_t key_dim, int64_t value_dim, std::string activation_dtype, bool varlen,
                                int64_t compute_capability, int64_t sm_count, bool activated_gate, bool saved) {
  const PlanRequest request{
      "plan_chunk_bwd",   lengths, batch, heads, value_heads, key_dim, value_dim, activation_dtype, varlen,
      compute_capability, sm_count};
  return to_json(plan_chunk_bwd(request.problem(), activated_gate, saved));
}

}  // namespace

}  // namespace kda::binding

STABLE_TORCH_LIBRARY(kda, m) {
  for (const char* schema : kda::binding::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(kda, CompositeExplicitAutograd, m) {
  m.impl("check_chunk_fwd", &kda::binding::boxed_check_chunk_fwd);
  m.impl("check_chunk_bwd", &kda::binding::boxed_check_chunk_bwd);
  m.impl("composite_reason", &kda::binding::boxed_composite_reason);
  m.impl("check_cu_seqlens", TORCH_BOX(&kda::binding::check_cu_seqlens));
  m.impl("plan_chunk_fwd", TORCH_BOX(&kda::binding::plan_chunk_fwd_json));
  m.impl("plan_chunk_bwd", TORCH_BOX(&kda::binding::plan_chunk_bwd_json));
  m.impl("build_info", TORCH_BOX(&kda::binding::build_info_json));
}
