#include "coverage.h"

namespace kda::binding {

namespace {

// A stride of a dimension of size 1 (or of an empty tensor) is never used, and torch leaves it arbitrary.
bool last_dimension_is_contiguous(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 || tensor.numel() == 0;
}

bool last_matrix_is_contiguous(const Tensor& tensor) {
  const int64_t rows = tensor.dim() - 2;
  const bool rows_packed =
      tensor.stride(rows) == tensor.size(rows + 1) || tensor.size(rows) == 1 || tensor.numel() == 0;
  return rows_packed && last_dimension_is_contiguous(tensor);
}

// Whether the copy engine and 16-byte loads can take the rows. It takes no stride of zero, which an expanded tensor has.
bool rows_are_aligned(const Tensor& tensor) {
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    if (tensor.stride(dim) == 0 && tensor.size(dim) > 1) return false;
  }
  return is_aligned(tensor.data_ptr(), token_strides(tensor), data_type(type_of(tensor)));
}

}  // namespace

ChunkFwdProblem problem_of(const ChunkFwdArguments& args, const Device& device) {
  const ChunkFwdSizes n = sizes_of(args);
  ChunkFwdProblem problem;
  problem.batch = n.batch;
  problem.tokens = n.tokens;
  problem.sequences = n.sequences;
  problem.varlen = args.cu_seqlens.has_value();
  problem.heads = static_cast<int>(n.heads);
  problem.value_heads = static_cast<int>(n.value_heads);
  problem.key_dim = static_cast<int>(n.key_dim);
  problem.value_dim = static_cast<int>(n.value_dim);
  problem.activation_type = data_type(type_of(args.q));  // float64: layout_reason names it before
  problem.bounded_gate = args.use_gate && args.lower_bound && *args.lower_bound >= kMinLowerBound;
  problem.contractive = args.use_qk_l2norm && args.use_beta_sigmoid;
  problem.aligned_inputs =
      rows_are_aligned(args.q) && rows_are_aligned(args.k) && rows_are_aligned(args.v) && rows_are_aligned(args.g);
  problem.compute_capability = device.compute_capability;
  problem.sm_count = device.sm_count;
  return problem;
}

const char* layout_reason(const ChunkFwdArguments& args) {
  if (type_of(args.q) == ScalarType::Double) return "the kernels take bf16 and fp16 activations, not fp64";
  if (!last_dimension_is_contiguous(args.q)) return "the last dimension of `q` is not contiguous";
  if (!last_dimension_is_contiguous(args.k)) return "the last dimension of `k` is not contiguous";
  if (!last_dimension_is_contiguous(args.v)) return "the last dimension of `v` is not contiguous";
  if (!last_dimension_is_contiguous(args.g)) return "the last dimension of `g` is not contiguous";
  if (args.initial_state && !last_matrix_is_contiguous(*args.initial_state)) {
    return "the last two dimensions of `initial_state` are not contiguous";
  }
  return nullptr;
}

const char* composite_reason(const ChunkFwdArguments& args) {
  if (args.q.is_cpu()) return "";
  if (!args.q.is_cuda()) return "there are kernels for CUDA devices only";
#ifdef KDA_CUDA_WITH_KERNELS
  if (const char* reason = layout_reason(args)) return reason;
  const ChunkFwdPlan plan = plan_chunk_fwd(problem_of(args, cuda_device(args.q.get_device_index())));
  return plan.path == ChunkFwdPath::kComposite ? plan.reason : "";
#else
  return "this build of kda-cuda has no CUDA kernels";
#endif
}

}  // namespace kda::binding
