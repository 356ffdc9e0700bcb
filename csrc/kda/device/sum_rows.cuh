// Sums over the rows of a 16-token tile in the layout of MMA fragments.
#pragma once

namespace kda {

// Sums 8 channel values over the 8 lanes of equal lane % 4 (the rows of a tile); each lane is left with the result
// of channel lane / 4. Seven exchanges.
__device__ __forceinline__ float sum_rows(const float (&values)[8], int lane) {
  float four[4], two[2];
  const bool upper16 = lane & 16, upper8 = lane & 8, upper4 = lane & 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float received = __shfl_xor_sync(0xffffffffu, upper16 ? values[c] : values[c + 4], 16);
    four[c] = (upper16 ? values[c + 4] : values[c]) + received;
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float received = __shfl_xor_sync(0xffffffffu, upper8 ? four[c] : four[c + 2], 8);
    two[c] = (upper8 ? four[c + 2] : four[c]) + received;
  }
  const float received = __shfl_xor_sync(0xffffffffu, upper4 ? two[0] : two[1], 4);
  return (upper4 ? two[1] : two[0]) + received;
}

}  // namespace kda
