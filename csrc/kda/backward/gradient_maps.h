// What stage 4 of the backward receives: tensor maps of the rows that it takes and leaves.
#pragma once

#include <cuda.h>

#include "kernel_params.h"

namespace kda {

// As encode_tensor_map() describes the tensors, for copies of a chunk of one head; every row of 16 bytes is aligned, and a key head has one value head.
struct GradientTensorMaps {
  CUtensorMap q, k, g, dO, dq, dk, dv;
};

struct IntraChunkGradientsParams {
  ChunkBwdKernelParams stage;
  GradientTensorMaps maps;  // if the kernel is of a kind that copies by them
};

[[nodiscard]] cudaError_t make_gradient_maps(GradientTensorMaps& maps, const ChunkBwdKernelParams& params);

}  // namespace kda
