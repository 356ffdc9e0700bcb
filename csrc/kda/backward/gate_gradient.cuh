// The gate of the elements of a tile, and its derivatives. Every exponential of base 2 formed here has an argument of at most 126.
#pragma once

#include "../device/gate.cuh"
#include "channel_tile.cuh"

namespace kda {

struct GateOfTile {
  GateKind kind;
  float decay_rate;  // exp(A_log), or 1
  float lower_bound;
  float bias[2];  // dt_bias of the lane's channels, or 0

  // Of kSigmoid, log2(e) times what the sigmoid is taken of, decay_rate (g + bias), by one multiply-add; and of that e^-x and 1 / (1 + e^-x), the sigmoid. It is
  // kept where both are normal numbers: beyond, a sigmoid is 0 or 1 to any accuracy, and so are products with it. NaN stays.
  struct Logits {
    float rate, of_bias[2];
    __device__ __forceinline__ explicit Logits(const GateOfTile& gate)
        : rate(gate.decay_rate * kLog2E), of_bias{rate * gate.bias[0], rate * gate.bias[1]} {}
    __device__ __forceinline__ float operator()(float g, int row) const {
      constexpr float kMost = 126.0f;
      return ptx::clamp(fmaf(g, rate, of_bias[row]), kMost);
    }
  };
  struct Sigmoid {
    float e, value;
    __device__ __forceinline__ explicit Sigmoid(float logit) : e(ptx::ex2(-logit)), value(ptx::rcp(1.0f + e)) {}
    __device__ __forceinline__ float slope() const { return e * value * value; }
  };

  // log2 of alpha from g. The kind is looked at once for all elements.
  __device__ __forceinline__ ChannelTile log2_alpha(const ChannelTile& g) const {
    if (kind == GateKind::kSigmoid) {
      const Logits logits(*this);
      const float bound = lower_bound * kLog2E;
      return ChannelTile::make(
          [&](int block, int row, int parity) { return bound * Sigmoid(logits(g.at(block, row, parity), row)).value; });
    }
    if (kind == GateKind::kSoftplus) {
      return ChannelTile::make([&](int block, int row, int parity) {
        return -decay_rate * kLog2E * softplus(g.at(block, row, parity) + bias[row]);
      });
    }
    return ChannelTile::make([&](int block, int row, int parity) { return g.at(block, row, parity) * kLog2E; });
  }

  __device__ __forceinline__ ChannelTile alpha(const ChannelTile& g) const {
    ChannelTile alpha = log2_alpha(g);
    alpha.for_each([](float& x, int, int, int) { x = ptx::ex2(x); });
    return alpha;
  }

  // From the gradients of the log-gates to those of g, in place; adds to the sums over tokens for A_log and dt_bias.
  // alpha = 0 has no gradient.
  __device__ __forceinline__ void differentiate(ChannelTile& gradients, const ChannelTile& g, float (&dA_log)[2],
                                                float (&ddt_bias)[2]) const {
    if (kind == GateKind::kSigmoid) {
      const Logits logits(*this);
      const float to_g = lower_bound * decay_rate;
      float of_logits[2] = {};
      gradients.for_each([&](float& gradient, int block, int row, int parity) {
        const float logit = logits(g.at(block, row, parity), row);
        const float slope = gradient * Sigmoid(logit).slope();
        of_logits[row] = fmaf(slope, logit, of_logits[row]);
        gradient = slope * to_g;
        ddt_bias[row] += gradient;
      });
      const float to_A_log = lower_bound * (1.0f / kLog2E);
#pragma unroll
      for (int row = 0; row < 2; ++row) dA_log[row] = fmaf(of_logits[row], to_A_log, dA_log[row]);
    } else if (kind == GateKind::kSoftplus) {
      gradients.for_each([&](float& gradient, int block, int row, int parity) {
        const float x = g.at(block, row, parity) + bias[row], log_alpha = -decay_rate * softplus(x);
        const float kept = ptx::ex2(log_alpha * kLog2E) == 0.0f ? 0.0f : gradient;
        dA_log[row] += kept != 0.0f ? kept * log_alpha : 0.0f;
        gradient = kept * (-decay_rate * sigmoid(x));
        ddt_bias[row] += gradient;
      });
    } else {
      gradients.for_each([&](float& gradient, int block, int row, int parity) {
        if (ptx::ex2(g.at(block, row, parity) * kLog2E) == 0.0f) gradient = 0.0f;
      });
    }
  }
};

}  // namespace kda
