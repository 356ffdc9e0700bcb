// Vectors of floats for the kernels of one instruction set, in the vector extension that GCC and Clang share. Included
// by kernels_<set>.cpp after it has chosen the set and KDA_CPU_VECTOR_BYTES. All of it is local to that file.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#define KDA_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

namespace kda::cpu {

namespace {

constexpr int kLanes = KDA_CPU_VECTOR_BYTES / sizeof(float);

typedef float Floats __attribute__((vector_size(KDA_CPU_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(KDA_CPU_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(KDA_CPU_VECTOR_BYTES / 2)));

template <typename Vector>
KDA_INLINE Vector load_vector(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

KDA_INLINE Floats load(const float* from) { return load_vector<Floats>(from); }

template <typename Vector>
KDA_INLINE void store(void* to, Vector x) {
  std::memcpy(to, &x, sizeof(x));
}

// x - 0 is x, also for -0, so that this is a broadcast.
KDA_INLINE Floats broadcast(float x) { return x - Floats{}; }

KDA_INLINE Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }
KDA_INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }

// --- Sums over lanes -------------------------------------------------------------------------------------------------

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KDA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef KDA_SHUFFLE  // GCC before 12
#define KDA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// {a0 + a1, a2 + a3, .., b0 + b1, ..}
KDA_INLINE Floats add_neighbours(Floats a, Floats b) {
#if KDA_CPU_VECTOR_BYTES == 64
  return KDA_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         KDA_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif KDA_CPU_VECTOR_BYTES == 32
  return KDA_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + KDA_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return KDA_SHUFFLE(a, b, 0, 2, 4, 6) + KDA_SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

// Lane i of the result is the sum over the lanes of x[i].
template <int kCount = kLanes>
KDA_INLINE Floats sum_each(const Floats* x) {
  if constexpr (kCount == 2) {
    return add_neighbours(x[0], x[1]);
  } else {
    return add_neighbours(sum_each<kCount / 2>(x), sum_each<kCount / 2>(x + kCount / 2));
  }
}

// --- Functions -------------------------------------------------------------------------------------------------------

// e^x to about one unit in the last place; 0 where it is below the normal numbers. NaN stays NaN. With kMinusOne
// e^x - 1, for |x| <= ln(2) / 2 only.
template <bool kMinusOne = false>
KDA_INLINE Floats exp(Floats x) {
  constexpr float kLowest = -86.6f, kHighest = 88.0f;  // 2^-125 and 2^127 are normal numbers
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;  // the high part has 16 bits: n * high is exact
  constexpr float kRound = 12582912.0f;                               // 1.5 * 2^23: adding it rounds to an integer
  constexpr int kRoundBits = 0x4b400000, kExponentBias = 127, kMantissaBits = 23;
  // Selects keep x where a comparison is false, so that NaN passes.
  Floats y = x < kLowest ? broadcast(kLowest) : x;
  y = y > kHighest ? broadcast(kHighest) : y;
  const Floats shifted = y * kLog2E + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (y - n * kLn2High) - n * kLn2Low;
  // Taylor-like polynomial of least error on |r| <= ln(2) / 2 (Cephes, expf)
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  if constexpr (kMinusOne) return p;
  p += 1.0f;
  const Floats power = as_floats((as_ints(shifted) - kRoundBits + kExponentBias) << kMantissaBits);
  return x < kLowest ? Floats{} : p * power;
}

KDA_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x| in [0, 1];
// log(1 + u) = 2 artanh(s), s = u / (2 + u), a series in s^2 <= 1/9.
KDA_INLINE Floats softplus(Floats x) {
  const Floats u = exp(x > 0.0f ? -x : x);
  const Floats s = u / (u + 2.0f);
  const Floats z = s * s;
  Floats p = z * (1.0f / 15) + 1.0f / 13;
  p = p * z + 1.0f / 11;
  p = p * z + 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  p = p * z + 1.0f;
  return (x > 0.0f ? x : Floats{}) + 2.0f * s * p;
}

// --- Types of 16 bits ------------------------------------------------------------------------------------------------

KDA_INLINE Floats from_bfloat16(Halves x) { return as_floats(__builtin_convertvector(x, Ints) << 16); }

KDA_INLINE Halves to_bfloat16(Floats x) {
  const Ints bits = as_ints(x);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);                            // to nearest, ties to even
  const Ints nan = (bits & 0x7fffffff) > 0x7f800000 ? (bits | 0x00400000) : rounded;  // NaN must not round to infinity
  return __builtin_convertvector((nan >> 16) & 0xffff, Halves);
}

KDA_INLINE Floats from_float16(Halves x) {
  constexpr int kRebias = 112 << 23;  // exponent bias 127 instead of 15
  const Ints half = __builtin_convertvector(x, Ints);
  const Ints magnitude = (half & 0x7fff) << 13;
  const Ints sign = (half & 0x8000) << 16;
  Ints normal = magnitude + kRebias;
  normal = magnitude >= (31 << 23) ? normal + kRebias : normal;  // infinity and NaN
  // A subnormal is m * 2^-24: without a float that is subnormal, as those may be read as 0.
  const Floats subnormal = as_floats(magnitude + kRebias + (1 << 23)) - 6.103515625e-5f;  // 2^-14
  return as_floats((magnitude < (1 << 23) ? as_ints(subnormal) : normal) | sign);
}

KDA_INLINE Halves to_float16(Floats x) {
  constexpr int kInfinity = 0x7f800000;
  const Ints bits = as_ints(x);
  const Ints magnitude = bits & 0x7fffffff;
  const Ints sign = (bits >> 16) & 0x8000;
  // Normal: rebias and round to nearest, ties to even; what exceeds the largest number carries into the exponent.
  Ints half = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  half = half > 0x7c00 ? 0x7c00 - Ints{} : half;
  // Below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the last bits, rounded likewise.
  const Ints small = as_ints(as_floats(magnitude) + 0.5f) - 0x3f000000;
  half = magnitude < (113 << 23) ? small : half;
  half = magnitude >= kInfinity ? (magnitude > kInfinity ? 0x7e00 - Ints{} : 0x7c00 - Ints{}) : half;
  return __builtin_convertvector(half | sign, Halves);
}

}  // namespace

}  // namespace kda::cpu
