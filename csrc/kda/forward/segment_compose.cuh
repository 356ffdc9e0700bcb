// The states at the ends of the segments of a cut sequence, from the affine map of each segment (segment_summary.cuh,
// state_recurrence.cuh):
//   S_end[0] as it is,      S_end[s] = M_s S_end[s - 1] + B_s,
// at fp32-like accuracy; M_s of a segment that forgets all is taken as 0, and not read. The states hold B and are replaced by S_end, which is
// the entry of the next segment. The end of the last segment is the final state and is left to the scan. The gradients of the states are composed
// alike, from the last segment to the first, by the transposed maps.
//
// Grid: one CTA for each (direction, sequence, value head, 16 columns of V); K / 16 warps. A CTA keeps 16 rows of S^T and goes
// through the segments:
//   S_end^T [16, K] = S^T [16, K] M^T [K, K] + B^T
// Each warp computes 16 of the K columns; the rows meet in shared memory. The products run on tensor cores in tf32,
// each fp32 operand split in two (three products). M^T goes from global memory to registers, a segment ahead.
//
// Bound by the chain over segments: its products, and 4 K^2 bytes of M^T a CTA from the second-level cache.
#pragma once

#include "../device/chunk_location.cuh"
#include "../device/triangular_inverse.cuh"
#include "forgetting.cuh"

namespace kda {

template <int K_>
struct SegmentComposeConfig {
  static constexpr int K = K_;
  static constexpr int kRows = 16;
  static constexpr int kWarps = K / 16, kThreads = 32 * kWarps;
  // S^T in shared memory as operands: its high parts, then its low parts (SplitTf32), rows r and r + 8 element by
  // element beside each other. With the padding, eight lanes that load 16 bytes each touch all banks once.
  static constexpr int kPairStride = 2 * K + 4;
  static constexpr int kPartWords = kRows / 2 * kPairStride;
  static constexpr int kStateWords = 2 * kPartWords;
  static constexpr int kSharedBytes = 2 * kStateWords * 4;  // the state before and after a segment
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    segment_compose_kernel(const __grid_constant__ SegmentComposeParams params) {
  constexpr int K = Config::K, kPartWords = Config::kPartWords;
  extern __shared__ __align__(16) uint32_t states[];
  const ChunkFwdParams& call = params.call;
  if (!find_left(params.left, 0, threadIdx.x & 31).anything) return;
  ptx::launch_dependents();
  ptx::wait_for_kernel_before();  // before any return: who waits for this kernel relies on those before it, too
  const int value_heads = call.problem.value_heads, row_tiles = call.problem.value_dim / Config::kRows;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = lane >> 2, member = lane & 3;
  const int64_t ctas = call.problem.sequences * value_heads * row_tiles;
  const int direction = blockIdx.x >= ctas;
  const SegmentMaps& maps = params.maps[direction];
  const int64_t cta = blockIdx.x - direction * ctas, sequence = cta / row_tiles / value_heads;
  const int row_tile = static_cast<int>(cta % row_tiles), value_head = static_cast<int>(cta / row_tiles % value_heads);

  const SegmentRange range = segment_range(call, sequence, params.segment_chunks);
  const int64_t ends = range.segments - 1;  // states that are wanted; the first is there
  if (ends < 2) return;

  // Index of (segment slot, value head) of the s-th segment in the order in which they are composed.
  const int64_t first_tile =
      (range.first_slot + (maps.is_reversed ? range.segments - 1 : 0)) * value_heads + value_head;
  const int64_t tile_step = maps.is_reversed ? -value_heads : value_heads;
  const auto tile_of = [&](int64_t s) { return first_tile + s * tile_step; };
  const auto has_faded = [&](int64_t s) { return maps.faded != nullptr && maps.faded[tile_of(s)] != 0; };
  bool any_map = false;
  for (int64_t s = 1 + lane; s < ends; s += 32) any_map |= !has_faded(s);
  if (!__any_sync(0xffffffffu, any_map)) return;

  // This warp's part of the state at the end of segment s: columns 16 * warp .. + 15 as two accumulator fragments.
  const auto state_at = [&](int64_t s) {
    return maps.state + ((tile_of(s) * row_tiles + row_tile) * (K / 8) + 2 * warp) * 32 + lane;
  };
  // Lane (group, member) of fragment (kt, n): M^T[16 kt + 4 member .. + 3][8 n + group].
  struct Inputs {
    float4 map[K / 16][2], offset[2];
    bool has_map;
  };
  const auto load = [&](Inputs& inputs, int64_t s) {
    const float4* const map = reinterpret_cast<const float4*>(maps.map + tile_of(s) * K * K) + 2 * warp * 32 + lane;
    inputs.has_map = !has_faded(s);
    if (inputs.has_map) {
#pragma unroll
      for (int kt = 0; kt < K / 16; ++kt) {
#pragma unroll
        for (int n = 0; n < 2; ++n) inputs.map[kt][n] = map[(kt * (K / 8) + n) * 32];
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) inputs.offset[n] = state_at(s)[n * 32];
  };
  const auto share = [&](uint32_t* state, int n, const float4& fragment) {
    const SplitTf32 x(fragment.x), y(fragment.y), z(fragment.z), w(fragment.w);
    uint32_t* const place = state + group * Config::kPairStride + 2 * (16 * warp + 8 * n + 2 * member);
    *reinterpret_cast<uint4*>(place) = {x.high, z.high, y.high, w.high};
    *reinterpret_cast<uint4*>(place + kPartWords) = {x.low, z.low, y.low, w.low};
  };

  // The state at the end of segment s, from that before it in shared memory.
  const auto advance = [&](int64_t s, const Inputs& inputs, const uint32_t* before, uint32_t* after) {
    __syncthreads();
    if (!inputs.has_map) {  // the end is there
#pragma unroll
      for (int n = 0; n < 2; ++n) share(after, n, inputs.offset[n]);
      return;
    }
    // Two sums for each fragment, and of the three products of a sum none right after another: they would wait for each
    // other. Inside 16 channels the contraction takes them in the order of the lanes' float4: `half` takes 4 member + 2
    // half and the next.
    float acc[2][2][4] = {};
#pragma unroll
    for (int kt = 0; kt < K / 16; ++kt) {
      uint32_t a[2][2][4];  // [high, low][half]
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 operand = *reinterpret_cast<const uint4*>(
              before + part * kPartWords + group * Config::kPairStride + 2 * (16 * kt + 4 * member + 2 * half));
          a[part][half][0] = operand.x, a[part][half][1] = operand.y;
          a[part][half][2] = operand.z, a[part][half][3] = operand.w;
        }
      }
      uint32_t b[2][2][2][2];  // [high, low][n][half]
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4& map = inputs.map[kt][n];
        const SplitTf32 x(map.x), y(map.y), z(map.z), w(map.w);
        b[0][n][0][0] = x.high, b[0][n][0][1] = y.high, b[0][n][1][0] = z.high, b[0][n][1][1] = w.high;
        b[1][n][0][0] = x.low, b[1][n][0][1] = y.low, b[1][n][1][0] = z.low, b[1][n][1][1] = w.low;
      }
      const auto multiply = [&](int part_of_a, int part_of_b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < 2; ++n) ptx::mma_m16n8k8_tf32(acc[n][half], a[part_of_a][half], b[part_of_b][n][half]);
        }
      };
      multiply(1, 0);
      multiply(0, 1);
      multiply(0, 0);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float4& offset = inputs.offset[n];
      const float4 end = {acc[n][0][0] + acc[n][1][0] + offset.x, acc[n][0][1] + acc[n][1][1] + offset.y,
                          acc[n][0][2] + acc[n][1][2] + offset.z, acc[n][0][3] + acc[n][1][3] + offset.w};
      state_at(s)[n * 32] = end;
      share(after, n, end);
    }
  };

  // States and inputs change places after every segment: two at a time, so that registers are not copied.
  uint32_t* const even = states;
  uint32_t* const odd = states + Config::kStateWords;
#pragma unroll
  for (int n = 0; n < 2; ++n) share(even, n, state_at(0)[n * 32]);
  Inputs inputs, next;
  load(inputs, 1);
  for (int64_t s = 1; s < ends; s += 2) {
    if (s + 1 < ends) load(next, s + 1);
    advance(s, inputs, even, odd);
    if (s + 1 == ends) break;
    if (s + 2 < ends) load(inputs, s + 2);
    advance(s + 1, next, odd, even);
  }
}

}  // namespace kda
