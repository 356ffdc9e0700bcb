// Conversions between the element types of tensors, fp32, and packed MMA operands; loads of 8 consecutive elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../plan.h"

namespace kda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// Two fp32 values rounded to bf16; `low` in the low half. The operand format of all products with a gate factor.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(packed);
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

// Two fp32 values as the sum of two bf16 operands: about 16 significant bits.
struct SplitBf16 {
  uint32_t high, low;
  SplitBf16() = default;
  __device__ __forceinline__ SplitBf16(float x, float y) {
    high = pack_bf16(x, y);
    const float2 rounded = unpack_bf16(high);
    low = pack_bf16(x - rounded.x, y - rounded.y);
  }
};

// Two elements of the activation type in one register. split: as bf16 operands, exactly.
template <typename Element>
struct Packed2;

template <>
struct Packed2<BFloat16> {
  static __device__ __forceinline__ float2 to_float2(uint32_t packed) { return unpack_bf16(packed); }
  static __device__ __forceinline__ uint32_t from_floats(float low, float high) { return pack_bf16(low, high); }
  static __device__ __forceinline__ SplitBf16 split(uint32_t packed) {
    SplitBf16 exact;
    exact.high = packed, exact.low = 0;
    return exact;
  }
};

template <>
struct Packed2<Float16> {
  static __device__ __forceinline__ float2 to_float2(uint32_t packed) {
    return __half22float2(reinterpret_cast<const __half2&>(packed));
  }
  static __device__ __forceinline__ uint32_t from_floats(float low, float high) {
    const __half2 packed = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(packed);
  }
  static __device__ __forceinline__ SplitBf16 split(uint32_t packed) {
    const float2 values = to_float2(packed);
    return {values.x, values.y};
  }
};

// Eight consecutive 16-bit elements, wherever they are.
__device__ __forceinline__ uint4 load_8x16bit(const void* source) {
  const uint16_t* elements = static_cast<const uint16_t*>(source);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = elements[2 * i] | static_cast<uint32_t>(elements[2 * i + 1]) << 16;
  return {words[0], words[1], words[2], words[3]};
}

template <typename Element>
__device__ __forceinline__ void unpack_8(float (&values)[8], const uint4& packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Packed2<Element>::to_float2(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// One element of a tensor whose type is known at run time only.
__device__ __forceinline__ float load_1(const void* base, int64_t offset, DataType type) {
  if (type == DataType::kFloat32) return static_cast<const float*>(base)[offset];
  if (type == DataType::kBFloat16) return __bfloat162float(static_cast<const BFloat16*>(base)[offset]);
  return __half2float(static_cast<const Float16*>(base)[offset]);
}

}  // namespace kda
