// Division by a number that the host knows, in three instructions instead of two dozen.
#pragma once

#include <cstdint>

namespace kda {

// Granlund and Montgomery, "Division by invariant integers using multiplication", figure 4.1. divisor: 1 .. 2^31.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor) << 32) / divisor + 1);
  }

  struct Result {
    uint32_t quotient, remainder;
  };
  // n < 2^31.
  __device__ __forceinline__ Result divide(uint32_t n) const {
    const uint32_t quotient = (__umulhi(n, multiplier_) + n) >> shift_;
    return {quotient, n - quotient * divisor_};
  }
  __device__ __forceinline__ uint32_t value() const { return divisor_; }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace kda
