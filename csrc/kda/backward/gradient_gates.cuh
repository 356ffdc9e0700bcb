// Gates in stage 4 of the backward: from g to log2 of the decays of a block, from gradients of the cumulative log-gate to dg, and to parts of dA_log and
// ddt_bias; and the parameters of a chunk that are kept until it is the next.
#pragma once

#include "gradient_copies.cuh"

namespace kda {

template <typename Config>
struct GradientGates : GradientCopies<Config> {
  using Copies = GradientCopies<Config>;
  using Blocks = BlockGradients<Config>;
  using Block = typename Blocks::Block;
  using Blocks::block, Blocks::call, Blocks::channel, Blocks::first_tile, Blocks::is_second, Blocks::lane,
      Blocks::location, Blocks::member, Blocks::params, Blocks::shared, Blocks::tile, Blocks::token, Blocks::totals,
      Blocks::value_head;
  using Copies::is_whole, Copies::kTensorCopies;
  static constexpr int K = Config::K, C = Config::C, kBlockTiles = Config::kBlockTiles;

  // Where the lane's elements of a tile are in a GateTile of fp32. Tokens and channels change bits of a unit's number in a row; the rest are constant
  // distances. (Those of 16 bits are moved as matrices.)
  struct WideGates {
    using Tile = typename Config::GateTile;
    static constexpr uint32_t kRow = Tile::kRowBytes;
    uint8_t* const gates;
    uint32_t first;
    __device__ __forceinline__ WideGates(uint8_t* all, int tt, int group, int row, int member) : gates(all) {
      const uint32_t group_bytes = group * 64, lane_bytes = static_cast<uint32_t>(row) * 4;
      first = Tile::unit_offset(2 * member, group_bytes % kRow / 16 + lane_bytes / 16) + lane_bytes % 16 +
              group_bytes / kRow * Tile::kBlockBytes + tt * 16 * kRow;
    }
    __device__ __forceinline__ float& at(int b, int hi, int p) const {
      return *reinterpret_cast<float*>(gates + (first ^ (2 * hi ^ p) * 16) + (8 * b + p) * kRow);
    }
  };
  template <typename Function>
  __device__ __forceinline__ void with_gate_type(Function f) const {
    if (call().gate_type == DataType::kFloat32) {
      f(0.0f);
    } else if (call().gate_type == DataType::kBFloat16) {
      f(BFloat16());
    } else {
      f(Float16());
    }
  }

  // g of the lane's elements of a tile.
  __device__ __forceinline__ ChannelTile copied_gate(int tt) const {
    ChannelTile gates;
    with_gate_type([&](auto element) {
      using Gate = decltype(element);
      if constexpr (std::is_same_v<Gate, float>) {
        const WideGates lane_gates(shared + Config::kGates, tt, this->group(), this->row, member);
        gates = ChannelTile::make([&](int b, int hi, int p) { return lane_gates.at(b, hi, p); });
      } else {
        gates = this->load_channels(Config::kGates, tt).template unpack<Gate>();
      }
    });
    return gates;
  }

  // dg of a tile, for the copy engine.
  __device__ __forceinline__ void leave_gate_gradient(const ChannelTile& gradients, int tt) const {
    with_gate_type([&](auto element) {
      using Gate = decltype(element);
      if constexpr (std::is_same_v<Gate, float>) {
        const WideGates lane_gates(shared + Config::kGateGradient, tt, this->group(), this->row, member);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int b = i >> 2, hi = i >> 1 & 1, p = i & 1;
          lane_gates.at(b, hi, p) = gradients.at(b, hi, p);
        }
      } else {
        this->template store_channels<Gate>(gradients, Config::kGateGradient, tt);
      }
    });
  }

  // How far apart the tokens of a block are.
  struct Range {
    bool is_wide, is_too_wide;  // for one reference with any q and k, and for one at all
  };

  // log2 of P of the block's tokens; the totals of its tiles into shared memory.
  __device__ __forceinline__ Range activate(Block& exponent) const {
    const GateOfTile activation = kept_gate();
    Range range = {};
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      const int tt = first_tile() + i;
      ChannelTile& x = exponent[i];
      x = activation.log2_alpha(copied_gate(tt));
      if (location.tokens < C) {
        x.for_each([&](float& gate, int b, int, int p) {
          if (token(tt, b, p) >= location.tokens) gate = 0.0f;
        });
      }
      float total[2];
      prefix_sums(x, total, lane);
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        range.is_wide |= !(total[hi] >= -kMaxLog2Range);
        range.is_too_wide |= !(total[hi] >= -kWideLog2Range);
        if (member == 0) totals(tt)[channel(hi)] = total[hi];
      }
      if (i == 0) x.for_each([&](float& sum, int, int hi, int) { sum -= total[hi]; });
    }
    return range;
  }

  __device__ __forceinline__ void keep_exponents(const Block& exponent) const {
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) this->keep(this->exponents(i), exponent[i]);
  }

  __device__ __forceinline__ float& channel_sum(typename Config::ChannelArray array, int block, int hi) const {
    return reinterpret_cast<float*>(shared + Config::kChannels)[(array * Config::kBlocks + block) * K + channel(hi)];
  }

  // From gradients of G to sums up to the end of the block; leaves what the other block needs of them.
  __device__ __forceinline__ void leave_channel_sums(Block& cumulative, const float (&crossing)[2]) const {
    float after[2] = {};
#pragma unroll
    for (int i = kBlockTiles - 1; i >= 0; --i) suffix_sums(cumulative[i], after, lane);
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float sum = sum_tokens(crossing[hi]);
      if (member == 0) {
        channel_sum(Config::kCrossing, block(), hi) = sum;
        channel_sum(Config::kGradient, block(), hi) = after[hi];
      }
    }
  }

  // dg of the block, and its sums for the gate's parameters.
  __device__ __forceinline__ void store_gates(Block& cumulative) const {
    const GateOfTile activation = kept_gate();
    const float size = this->inverse_unit();
    float outside[2];  // what crosses the whole block
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      outside[hi] = channel_sum(Config::kCrossing, 0, hi) + channel_sum(Config::kCrossing, 1, hi);
    }
    float later[2] = {};
    if (!is_second()) later[0] = channel_sum(Config::kGradient, 1, 0), later[1] = channel_sum(Config::kGradient, 1, 1);
    float of_rate[2] = {}, of_bias[2] = {};
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      cumulative[i].for_each([&](float& x, int, int hi, int) { x = size * ((x + later[hi]) + outside[hi]); });
      this->clear_rows_past_end(cumulative[i], first_tile() + i);
    }
    if (activation.kind != GateKind::kLog) {  // a log-gate in range of one reference has a gradient, whatever it is
      Block gates;
      load_gates_again<2>(gates);
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) activation.differentiate(cumulative[i], gates[i], of_rate, of_bias);
    }
    if (Config::kGateGradientFits && is_whole()) {
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) leave_gate_gradient(cumulative[i], first_tile() + i);
    } else {
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) this->store_gate_gradient(cumulative[i], first_tile() + i);
    }
    if (params.dA_log_parts == nullptr) return;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      const float rate = sum_tokens(of_rate[hi]), bias = sum_tokens(of_bias[hi]);
      if (member == 0) {
        channel_sum(Config::kOfRate, block(), hi) = rate;
        channel_sum(Config::kOfBias, block(), hi) = bias;
      }
    }
  }

  __device__ __forceinline__ void store_gate_parameters() const {
    if (params.dA_log_parts == nullptr || is_second() || member != 0 || location.tokens == 0) return;
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      params.dA_log_parts[tile * K + channel(hi)] =
          channel_sum(Config::kOfRate, 0, hi) + channel_sum(Config::kOfRate, 1, hi);
      params.ddt_bias_parts[tile * K + channel(hi)] =
          channel_sum(Config::kOfBias, 0, hi) + channel_sum(Config::kOfBias, 1, hi);
    }
  }

  // What a chunk needs of parameters of a token or a channel, one element a thread: beta of token `thread` as it came, A_log, dt_bias of a channel; and
  // where they are kept until the chunk is the next.
  static constexpr int kRateThread = C, kFirstBiasThread = 2 * C;
  __device__ __forceinline__ float raw_parameter() const {
    const ChunkFwdParams& c = call();
    const int thread = this->thread, k = thread - kFirstBiasThread;
    if (thread < C || c.gate == GateKind::kLog || location.tokens == 0) return this->raw_beta();
    if (thread == kRateThread && c.A_log != nullptr) return c.A_log[value_head];
    return k >= 0 && k < K && c.dt_bias != nullptr ? c.dt_bias[int64_t{value_head} * K + k] : 0.0f;
  }
  __device__ __forceinline__ float& kept_bias(int k) const {
    return reinterpret_cast<float*>(shared + Config::kBias)[this->turn * K + k];
  }
  __device__ __forceinline__ float& kept_rate() const {
    return reinterpret_cast<float*>(shared + Config::kRate)[this->turn];
  }
  __device__ __forceinline__ void keep_parameter(float value) const {
    const int thread = this->thread, k = thread - kFirstBiasThread;
    if (thread < C) {
      this->tokens(Config::kNextBeta)[thread] = value;
    } else if (thread == kRateThread) {
      kept_rate() = call().A_log != nullptr ? expf(value) : 1.0f;
    } else if (k >= 0 && k < K) {
      kept_bias(k) = value;
    }
  }
  __device__ __forceinline__ GateOfTile kept_gate() const {
    if (call().gate == GateKind::kLog) return {GateKind::kLog, 1.0f, 0.0f, {0.0f, 0.0f}};
    return {call().gate, kept_rate(), call().lower_bound, {kept_bias(channel(0)), kept_bias(channel(1))}};
  }

  // g once more for its derivative, as the next chunk's comes to where it was: what a warp needs is copied by the warp. Not fp32, for which there is no room.
  __device__ __forceinline__ bool copies_gates_again() const {
    return call().gate != GateKind::kLog && call().gate_type != DataType::kFloat32 && params.forward.vectorized;
  }
  __device__ __forceinline__ uint8_t* gates_again() const {
    return shared + Config::kGatesAgain + this->warp * Config::kGatesOfWarpBytes;
  }
  __device__ __forceinline__ void copy_gates_again() const {
    if (copies_gates_again() && location.tokens > 0) {
      static_assert(Config::kBlockTokens == 32);
      const ChunkFwdParams& c = call();
      const int t = min(first_tile() * 16 + lane, location.tokens - 1);
      const uint16_t* const row = static_cast<const uint16_t*>(c.g) +
                                  (location.batch * c.g_stride.batch + (location.first_token + t) * c.g_stride.token +
                                   value_head * c.g_stride.head + 16 * this->group());
      const uint32_t to = ptx::shared_address(gates_again() + lane * 32);
      ptx::cp_async_16(to, row, 16);
      ptx::cp_async_16(to + 16, row + 8, 16);
    }
    ptx::cp_async_commit_group();
  }
  // kLater: groups of copies behind that of copy_gates_again(), where rows are copied in such groups.
  template <int kLater>
  __device__ __forceinline__ void load_gates_again(Block& gates) const {
    if (!copies_gates_again()) {
      this->load_gates(gates, first_tile());
      return;
    }
    ptx::cp_async_wait_group<kTensorCopies ? 0 : kLater>();
    __syncwarp();
    // The lane's row of the four matrices of a tile, as TileOperands::load_a_trans() has them.
    const uint32_t first =
        ptx::shared_address(gates_again()) + ((lane & 7) + (lane >> 4) * 8) * 32 + (lane >> 3 & 1) * 16;
    const auto load = [&](auto element) {
#pragma unroll
      for (int i = 0; i < kBlockTiles; ++i) {
        ChannelOperand operand;
        ptx::ldmatrix_x4_trans(operand.pair, first + i * 16 * 32);
        gates[i] = operand.template unpack<decltype(element)>();
      }
    };
    if (call().gate_type == DataType::kBFloat16) {
      load(BFloat16());
    } else {
      load(Float16());
    }
  }

  __device__ __forceinline__ float copied_beta() const {
    return this->thread < C ? this->tokens(Config::kNextBeta)[this->thread] : 0.0f;
  }
};

}  // namespace kda
