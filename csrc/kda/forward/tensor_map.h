// Tensor maps for the copy engine, encoded on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../kda.h"

namespace kda {

// A tensor [B, T, heads, dim] as the kernels load it: boxes of `rows` tokens and `columns` elements of one head, in blocks of 128 bytes of each
// row, swizzled. columns * element_bytes is a multiple of 128; base and strides are multiples of 16 bytes.
struct TokenTensor {
  const void* base;
  TokenStrides stride;  // elements
  int64_t batch, tokens, heads, dim;
  DataType type;
};

[[nodiscard]] cudaError_t encode_tensor_map(CUtensorMap& map, const TokenTensor& tensor, int rows, int columns);

}  // namespace kda
