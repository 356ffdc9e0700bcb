// Where the tokens, channels and operands of a lane are, for the kernels that take the gradients inside a chunk:
// intra_chunk_gradients.cuh and level_gradients.cuh, whose configurations say where the parts lie in shared memory.
#pragma once

#include <type_traits>

#include "../device/chunk_location.cuh"
#include "../device/tile.cuh"
#include "channel_tile.cuh"
#include "gate_gradient.cuh"
#include "kernel_params.h"

namespace kda {

// Below it a token's gradient of beta is taken without dividing by beta.
inline constexpr float kSmallestBeta = 1e-12f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }

__device__ __forceinline__ ChannelOperand to_operand(const uint4& fragment) {
  return {{fragment.x, fragment.y, fragment.z, fragment.w}};
}

// GradientsContext::last_of_chain of a chunk.
__device__ __forceinline__ int last_of_chain(const ChunkBwdKernelParams& params, const SlotOfSequence& at,
                                             int value_head) {
  if (params.dfinal_state == nullptr || !at.is_last) return -1;
  return static_cast<int>(at.sequence) * params.forward.call.problem.value_heads + value_head;
}

template <typename Config_>
struct GradientsContext {
  using Config = Config_;
  using Element = typename Config::Element;
  static constexpr int K = Config::K, V = Config::V, C = Config::C;

  const ChunkBwdKernelParams& params;
  uint8_t* const shared;
  const int thread, warp, lane, row, member;  // row = lane / 4: channel; member = lane % 4: tokens
  const ChunkLocation location;
  const int value_head;
  const int64_t tile;  // slot * HV + value_head
  const int turn;      // of the chunk, modulo 2, in a kernel that has two at hand
  // The index of (sequence, value head), if this is its last chunk and there is a gradient of its final state; else -1. That gradient may meet few
  // tokens, and what the bf16 of it, of U and of dU leaves out is taken as well, where no average would hide it.
  const int last_of_chain;

  __device__ __forceinline__ const ChunkFwdParams& call() const { return params.forward.call; }
  __device__ __forceinline__ int key_head() const {
    const int heads = call().problem.heads, value_heads = call().problem.value_heads;
    return heads == value_heads ? value_head : value_head / (value_heads / heads);
  }

  // The warp's 16 channels.
  __device__ __forceinline__ int group() const { return static_cast<unsigned>(warp) % Config::kGroups; }

  __device__ __forceinline__ int channel(int hi) const { return 16 * group() + row + 8 * hi; }
  __device__ __forceinline__ int token(int tt, int block, int parity) const {
    return 16 * tt + 8 * block + 2 * member + parity;
  }

  // Rows of a contiguous tensor over tokens and value heads, or over tokens and key heads.
  __device__ __forceinline__ int64_t value_row(int token) const {
    return (location.batch * call().problem.tokens + location.first_token + token) * call().problem.value_heads +
           value_head;
  }
  // The row of the chunk's first token in such a tensor of K columns, and in bytes from it to a token.
  template <typename T>
  __device__ __forceinline__ uint8_t* first_channel(void* tensor) const {
    return reinterpret_cast<uint8_t*>(static_cast<T*>(tensor) + value_row(0) * K + channel(0));
  }
  template <typename T>
  __device__ __forceinline__ uint64_t bytes_to_token(int token) const {
    const uint32_t row_bytes = static_cast<uint32_t>(call().problem.value_heads) * static_cast<uint32_t>(K * sizeof(T));
    return uint64_t{static_cast<uint32_t>(token)} * row_bytes;
  }
  __device__ __forceinline__ int64_t key_row(int token) const {
    return (location.batch * call().problem.tokens + location.first_token + token) * call().problem.heads + key_head();
  }

  __device__ __forceinline__ float* tokens(typename Config::TokenArray array) const {
    return reinterpret_cast<float*>(shared + Config::kTokens) + array * C;
  }
  __device__ __forceinline__ float* totals(int tt) const {
    return reinterpret_cast<float*>(shared + Config::kTotals) + tt * K;
  }
  // Values of the lane's four tokens of a tile, by token_index().
  __device__ __forceinline__ void load_tokens(float (&values)[4], typename Config::TokenArray array, int tt) const {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float2 pair = *reinterpret_cast<const float2*>(tokens(array) + token(tt, block, 0));
      values[token_index(block, 0)] = pair.x, values[token_index(block, 1)] = pair.y;
    }
  }
  // The same of kQueryNorm or kKeyNorm.
  __device__ __forceinline__ void load_norms(float (&norms)[4], typename Config::TokenArray array, int tt) const {
    if constexpr (Config::kUnitNorms) {
#pragma unroll
      for (int i = 0; i < 4; ++i) norms[i] = 1.0f;
    } else {
      load_tokens(norms, array, tt);
    }
  }

  // What U and dS' in bf16 leave out in the last chunk of a chain: of U of 16 rows of V and the tokens of a tile, as operand B; of dS' of the warp's
  // channels and 16 of V, as operand A.
  __device__ __forceinline__ uint4 value_roundings(int row_tile, int tt) const {
    return params.forward.U_low[((int64_t{last_of_chain} * (V / 16) + row_tile) * (C / 16) + tt) * 32 + lane];
  }
  __device__ __forceinline__ uint4 dstate_roundings(int row_tile) const {
    return params.dstate_low[((int64_t{last_of_chain} * (V / 16) + row_tile) * (K / 16) + group()) * 32 + lane];
  }
  // The same of U and dU where a warp has 16 rows of V: added to values of U, and times A^{-1} to those of Y.
  __device__ __forceinline__ void add_value_roundings(ChannelTile& values, int row_tile, int tt) const {
    const uint4 x = value_roundings(row_tile, tt);
    const ChannelOperand rows = {
        {ptx::movmatrix_trans(x.x), ptx::movmatrix_trans(x.y), ptx::movmatrix_trans(x.z), ptx::movmatrix_trans(x.w)}};
    const ChannelTile low = rows.unpack<BFloat16>();
    values.for_each([&](float& value, int block, int row, int parity) { value += low.at(block, row, parity); });
  }
  __device__ __forceinline__ void add_solved_roundings(ChannelTile& y, int row_tile, int tt) const {
    const uint4* const dU = params.dU_low + (int64_t{last_of_chain} * (V / 16) + row_tile) * (C / 16) * 32 + lane;
#pragma unroll 2
    for (int kt = tt; kt < C / 16; ++kt) {
      uint32_t b[4];
      Config::PairTile::load_b_trans(b, address(Config::kInverse), 16 * kt, 16 * tt, lane);
      const ChannelOperand operand = to_operand(dU[kt * 32]);
      operand.multiply(y.value[0], b[0], b[1]);
      operand.multiply(y.value[1], b[2], b[3]);
    }
  }
  // sums[i] of the warp's channels and tile first_tile + i += what the rounded operands of U dS'^T leave out. U lies at `values`; dstate(i): the warp's
  // operand of 16 of V.
  template <int N, typename Fragment>
  __device__ __forceinline__ void add_roundings(ChannelTile (&sums)[N], int first_tile, int values,
                                                Fragment dstate) const {
    constexpr int kAtOnce = 4;  // of V / 16, whose loads are on their way together
#pragma unroll 1
    for (int first = 0; first < V / 16; first += kAtOnce) {
      uint4 dstate_low[kAtOnce], values_low[kAtOnce][N];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        dstate_low[j] = dstate_roundings(first + j);
#pragma unroll
        for (int i = 0; i < N; ++i) values_low[j][i] = value_roundings(first + j, first_tile + i);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const ChannelOperand high = dstate(first + j), low = to_operand(dstate_low[j]);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const uint4& u = values_low[j][i];
          high.multiply(sums[i].value[0], u.x, u.y);
          high.multiply(sums[i].value[1], u.z, u.w);
          multiply<typename Config::ValueTile>(sums[i], low, values, 16 * (first_tile + i), 16 * (first + j));
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t address(int offset) const { return ptx::shared_address(shared + offset); }

  // The 16 channels of the warp and the tokens of a tile, of q or k.
  __device__ __forceinline__ ChannelOperand load_channels(int offset, int tt) const {
    ChannelOperand operand;
    Config::KeyTile::load_a_trans(operand.pair, address(offset), 16 * tt, 16 * group(), lane);
    return operand;
  }

  // acc (16 channels, 16 n) += operand (16 channels, 16 k) * B of a tile, whose rows row .. row + 15 are n and columns column .. column + 15 are k.
  template <typename Tile>
  __device__ __forceinline__ void multiply(ChannelTile& acc, const ChannelOperand& operand, int offset, int row,
                                           int column) const {
    uint32_t b[4];
    Tile::load_b(b, address(offset), row, column, lane);
    operand.multiply(acc.value[0], b[0], b[1]);
    operand.multiply(acc.value[1], b[2], b[3]);
  }

  // A tile into 16-byte units that only this lane sees, 32 units apart, and back.
  static __device__ __forceinline__ void keep(float4* units, const ChannelTile& values) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float(&v)[4] = values.value[block];
      units[32 * block] = {v[0], v[1], v[2], v[3]};
    }
  }
  static __device__ __forceinline__ ChannelTile kept(const float4* units) {
    ChannelTile values;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float4 v = units[32 * block];
      values.value[block][0] = v.x, values.value[block][1] = v.y;
      values.value[block][2] = v.z, values.value[block][3] = v.w;
    }
    return values;
  }

  // Calls f with a value of the type of g.
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

  // g of the lane's elements of a tile, or of N from it on, all in flight at once. Rows past the end are those of the last token.
  __device__ __forceinline__ ChannelTile load_gate(int tt) const {
    ChannelTile g[1];
    load_gates(g, tt);
    return g[0];
  }
  template <int N>
  __device__ __forceinline__ void load_gates(ChannelTile (&g)[N], int first_tile) const {
    const ChunkFwdParams& c = call();
    with_gate_type([&](auto element) {
      using Gate = decltype(element);
      const Gate* const first =
          static_cast<const Gate*>(c.g) + (location.batch * c.g_stride.batch + location.first_token * c.g_stride.token +
                                           value_head * c.g_stride.head + channel(0));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Gate* rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = min(token(first_tile + n, i >> 1, i & 1), max(location.tokens - 1, 0));
          rows[i] = first + static_cast<uint32_t>(t) * static_cast<uint64_t>(c.g_stride.token);
        }
        g[n].for_each(
            [&](float& x, int block, int row, int parity) { x = to_float(rows[token_index(block, parity)][8 * row]); });
      }
    });
  }
};

}  // namespace kda
