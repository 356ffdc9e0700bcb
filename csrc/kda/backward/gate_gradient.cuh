// The gate of the elements of a tile, and its derivatives. Every exponential formed here has an argument <= 0.
#pragma once

#include "../device/gate.cuh"
#include "channel_tile.cuh"

namespace kda {

struct GateOfTile {
  GateKind kind;
  float decay_rate;  // exp(A_log), or 1
  float lower_bound;
  float bias[2];  // dt_bias of the lane's channels, or 0

  // log2 of alpha from g. The kind is looked at once for all elements.
  __device__ __forceinline__ ChannelTile log2_alpha(const ChannelTile& g) const {
    if (kind == GateKind::kSigmoid) {
      return ChannelTile::make([&](int block, int row, int parity) {
        return lower_bound * kLog2E * sigmoid(decay_rate * (g.at(block, row, parity) + bias[row]));
      });
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
      gradients.for_each([&](float& gradient, int block, int row, int parity) {
        const float logit = decay_rate * (g.at(block, row, parity) + bias[row]);
        const float e = ptx::ex2(-fabsf(logit) * kLog2E), inverse = ptx::rcp(1.0f + e);
        const float slope = gradient * (lower_bound * (e * inverse) * inverse);
        dA_log[row] += slope != 0.0f ? slope * logit : 0.0f;  // 0 * inf is not 0
        gradient = slope * decay_rate;
        ddt_bias[row] += gradient;
      });
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
