#include "tensor_map.h"

#include <cudaTypedefs.h>

namespace kda {
namespace {

// The driver's function; the library links the runtime alone.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    constexpr unsigned kCudaVersion = 12000;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kCudaVersion, cudaEnableDefault, &found);
    const bool ok = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(ok ? entry : nullptr);
  }();
  return function;
}

}  // namespace

cudaError_t encode_tensor_map(CUtensorMap& map, const TokenTensor& t, int rows, int columns) {
  constexpr int kRank = 5, kBlockBytes = 128;
  const auto encode = encode_function();
  if (encode == nullptr) return cudaErrorNotSupported;
  const int element_bytes = t.type == DataType::kFloat32 ? 4 : 2, block = kBlockBytes / element_bytes;
  const auto extent = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  // A dimension of one element may have any stride in PyTorch; here it must be one that the encoder takes.
  const auto bytes = [&](int64_t stride, int64_t size) {
    return static_cast<cuuint64_t>(size > 1 ? stride * element_bytes : kBlockBytes);
  };
  const cuuint64_t sizes[kRank] = {extent(block), extent(t.tokens), extent(t.dim / block), extent(t.heads),
                                   extent(t.batch)};
  const cuuint64_t strides[kRank - 1] = {bytes(t.stride.token, t.tokens), kBlockBytes, bytes(t.stride.head, t.heads),
                                         bytes(t.stride.batch, t.batch)};
  const cuuint32_t box[kRank] = {static_cast<cuuint32_t>(block), static_cast<cuuint32_t>(rows),
                                 static_cast<cuuint32_t>(columns / block), 1, 1};
  const cuuint32_t steps[kRank] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = t.type == DataType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : t.type == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(&map, type, kRank, const_cast<void*>(t.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace kda
