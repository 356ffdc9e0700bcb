// Which of its steps a cluster of the fused forward takes where stretches are cut anywhere in a chain (ChainCut::kForget): all of a chain that its gates make
// forget what was before each cut, and nothing of one that remembers. Those are left to the stepwise stages.
//
// What proves that nothing is left is the map of the steps before a cut, which the consumers make (fused_consumer.cuh). What is looked at here, before there is
// any work, is a sign of it: the map's diagonal is about the decay of each channel over these tokens. Both clusters at a cut look at the same gates in the same
// way, so they agree. Where the sign is wrong, the work is done for nothing, and the stepwise stages do it again.
#pragma once

#include "fused_config.cuh"
#include "step_producer.cuh"

namespace kda {

// What the threads of a CTA exchange for that, beside the places of the stretch. One half of them looks at each cut: 16 bytes of gates a thread and token.
template <typename Config>
struct CutSearch {
  static constexpr int kChannels = 8, kLanes = Config::K / kChannels;  // of a thread; for a token
  static constexpr int kTokens = Config::kThreads / 2 / kLanes;        // that are looked at together
  static_assert(Config::kThreads % (2 * kLanes) == 0 && 2 * Config::K <= Config::kThreads);
  static constexpr int kStepBytes = 2 * Config::kKeyTileBytes;  // room for gates in fp32
  uint8_t gates[2][kTailSteps][kStepBytes];                     // as the copy engine brings them
  float log2_decay[2][kTokens][Config::K];
  StretchSearch places;
};

// The log2-decays of the thread's channels, added over its tokens of the tail before a cut. Loops that are not unrolled: this code is run once, and waits for
// its instructions.
template <typename Config>
__device__ __forceinline__ void add_tail_decays(float (&sums)[8], const ChunkFwdParams& call, const LinePlace& cut,
                                                const CutSearch<Config>& search, uint32_t loaded, int side, int lane,
                                                int first) {
  using Search = CutSearch<Config>;
  using KeyTile = typename Config::KeyTile;
  const int64_t channel = int64_t{cut.value_head} * Config::K + Search::kChannels * lane;
  float bias[8] = {};
  if (call.dt_bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 8; ++i) bias[i] = call.dt_bias[channel + i];
  }
  const GateConstants constants(call, call.A_log != nullptr ? expf(call.A_log[cut.value_head]) : 1.0f, {0.0f, 0.0f});
  ptx::mbarrier_wait_parity(loaded, 0);
  StepOperands<Config>::with_activation(call, constants.decay_rate, {0.0f, 0.0f}, [&](auto activation) {
#pragma unroll 1
    for (int token = first; token < kTailSteps * kStepTokens; token += Search::kTokens) {
      const uint8_t* const tile = search.gates[side][token / kStepTokens];
      const int row = token % kStepTokens;
      float g[8];
      if (call.gate_type == DataType::kFloat32) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 x = *reinterpret_cast<const float4*>(tile + KeyTile::unit_offset(row, 2 * lane + half));
          g[4 * half] = x.x, g[4 * half + 1] = x.y, g[4 * half + 2] = x.z, g[4 * half + 3] = x.w;
        }
      } else {
        const uint4 x = *reinterpret_cast<const uint4*>(tile + KeyTile::unit_offset(row, lane));
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = call.gate_type == DataType::kBFloat16 ? Packed2<BFloat16>::to_float2(words[i])
                                                                    : Packed2<Float16>::to_float2(words[i]);
          g[2 * i] = pair.x, g[2 * i + 1] = pair.y;
        }
      }
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float2 value = activation(float2{g[i] + bias[i], g[i + 1] + bias[i + 1]});
        sums[i] = fmaf(value.x, constants.unit, sums[i]), sums[i + 1] = fmaf(value.y, constants.unit, sums[i + 1]);
      }
    }
  });
}

// The cluster's stretch, without what has to be left, and with the steps before its first one. Called by all threads of the CTA, of which the first
// one gets it. left: of the cluster, in LeftChains. `loaded`: a barrier, to be used once. `search` is in shared memory.
template <typename Config>
__device__ __forceinline__ ScanStretch find_cut_stretch(const ChunkFwdParams& call, const TensorMaps& maps,
                                                        uint32_t index, uint32_t count, uint2& left, uint32_t rank,
                                                        uint32_t loaded, CutSearch<Config>& search) {
  using Cut = typename Config::Cut;
  using Search = CutSearch<Config>;
  const int thread = threadIdx.x;
  find_stretch<Cut>(call, index, count, search.places);
  LinePlace(&ends)[2] = search.places.ends;
  const auto has_to_forget = [&](const LinePlace& end) { return Cut::has_to_forget(end.offset, end.steps); };
  if (thread == 0) {
    const int step_bytes = Config::kKeyTileBytes * (call.gate_type == DataType::kFloat32 ? 2 : 1);
    const int cuts = (has_to_forget(ends[0]) ? 1 : 0) + (has_to_forget(ends[1]) ? 1 : 0);
    ptx::mbarrier_arrive_expect_tx(loaded, cuts * kTailSteps * step_bytes);
#pragma unroll 1
    for (int i = 0; i < 2 * kTailSteps; ++i) {
      const LinePlace& end = ends[i / kTailSteps];
      if (!has_to_forget(end)) continue;
      ptx::cp_async_bulk_tensor_load(ptx::shared_address(search.gates[0][i]), &maps.g, 0,
                                     end.token + (i % kTailSteps - kTailSteps) * kStepTokens, 0, end.value_head,
                                     end.batch, loaded);
    }
  }

  const int side = thread >= Config::kThreads / 2, in_side = thread % (Config::kThreads / 2);
  const int lane = in_side % Search::kLanes, first = in_side / Search::kLanes;
  float sums[8] = {};
  if (has_to_forget(ends[side])) add_tail_decays<Config>(sums, call, ends[side], search, loaded, side, lane, first);
  float4* const place = reinterpret_cast<float4*>(&search.log2_decay[side][first][8 * lane]);
  place[0] = {sums[0], sums[1], sums[2], sums[3]};
  place[1] = {sums[4], sums[5], sums[6], sums[7]};
  __syncthreads();
  bool is_slow = false;
  if (in_side < Config::K && has_to_forget(ends[side])) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < Search::kTokens; ++i) sum += search.log2_decay[side][i][in_side];
    is_slow = !(sum <= kNegligibleMapLog2);
  }
  const bool is_left = __syncthreads_or(is_slow && side == 0), next_is_left = __syncthreads_or(is_slow && side == 1);
  if (thread != 0) return {};

  // Whether the chain at the cut before is left, if the consumers do not say so.
  const ScanStretch stretch = stretch_between<Cut>(ends[0], ends[1], is_left, next_is_left, call.problem);
  const int64_t chain = ends[0].sequence * call.problem.value_heads + ends[0].value_head;
  if (is_left || stretch.steps == 0 || !has_to_forget(ends[0])) {
    (&left.x)[rank] = is_left ? static_cast<uint32_t>(chain) + 1 : 0;
  }
  if (Config::kCtas == 1) left.y = 0;
  return stretch;
}

}  // namespace kda
