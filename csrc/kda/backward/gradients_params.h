// What stage 4 of the backward receives, beside what all stages do.
#pragma once

#include <cuda.h>

#include "../forward/chunk_divisors.cuh"
#include "kernel_params.h"

namespace kda {

// Tensor maps of the rows that it takes and leaves, as encode_tensor_map() makes them, for copies of a chunk of one head; every row of 16 bytes is
// aligned, and a key head has one value head.
struct GradientTensorMaps {
  CUtensorMap q, k, g, dO, dq, dk, dv, dg;
};

struct IntraChunkGradientsParams {
  ChunkBwdKernelParams stage;
  ChunkDivisors divisors;
  GradientTensorMaps maps;  // if the kernel is of a kind that copies by them
};

}  // namespace kda
