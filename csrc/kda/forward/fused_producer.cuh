// A maker of the fused forward: four warps that make the images of every so manieth step of a scan's stretch (step_factors.cuh), into the
// scan's ring in device memory.
#pragma once

#include "fused_config.cuh"

namespace kda {

template <typename Config>
struct FusedProducer {
  using Factors = typename Config::Factors;
  using Producer = StepProducer<Factors>;
  using Image = StepImage<Config::K>;
  static constexpr int C = Config::C;

  const StepKernelParams& params;
  const ScanStretch& stretch;
  const FusedRing ring;
  uint8_t* const shared;  // of the group
  const int first, stride;  // of its steps in the stretch
  const int barrier;
  const int thread, lane;

  // A step as the tensor maps and the producer need it.
  struct Step {
    int index;  // in the stretch
    int token, batch, tokens, value_head, key_head;
    bool exists;
  };

  __device__ __forceinline__ Step describe(const StepWalk& walk) const {
    const ScanPiece& piece = walk.pieces.piece;
    const int heads_of_key = params.call.problem.value_heads / params.call.problem.heads;
    return {walk.index,       walk.token,                       piece.batch, walk.tokens(),
            piece.value_head, piece.value_head / heads_of_key, !walk.done()};
  }

  __device__ __forceinline__ uint32_t loaded() const { return ptx::shared_address(shared) + Factors::kBarrier; }

  // q, k and g of a step, by one thread. Rows past the end are of any content.
  __device__ __forceinline__ void load_inputs(const Step& step) const {
    if (step.exists && thread == 0) {
      load_step_rows<Factors>(params, ptx::shared_address(shared), loaded(), step.token, step.batch, step.key_head,
                              step.value_head);
    }
  }

  __device__ __forceinline__ void run() const {
    const ChunkFwdParams& call = params.call;
    StepWalk walk(call, stretch);
    walk.skip(first);
    if (walk.done()) return;
    const auto betas_of = [&] {
      const ScanPiece& piece = walk.pieces.piece;
      return BetaReader(call, piece.batch, walk.token, piece.end, piece.value_head, thread);
    };
    BetaReader betas = betas_of();
    Step next = describe(walk);
    load_inputs(next);
    uint32_t beta_next = betas.next(call, stride * C);
    int value_head = next.value_head;
    GateConstants constants(call, value_head, Producer::channel_of(thread));
    for (int turn = 0; next.exists; ++turn) {
      const Step step = next;
      const uint32_t beta = beta_next;
      if (walk.skip(stride)) betas = betas_of();
      next = describe(walk);
      beta_next = betas.next(call, stride * C);
      if (step.value_head != value_head) {
        value_head = step.value_head;
        constants = GateConstants(call, value_head, Producer::channel_of(thread));
      }
      ptx::mbarrier_wait_parity(loaded(), turn & 1);
      const int here = ptx::opaque(thread);
      const Producer make{call, shared, shared, shared + Factors::kScratch, step.tokens, barrier, here, here & 31};
      make_step_image(make, constants, beta, ring.images + step.index % kFusedRingSlots * int64_t{Image::kImageBytes},
                      [&] { ring.wait_until_free(step.index); });
      if (thread == 0) {
        ptx::cp_async_bulk_wait_read_all();  // the shared memory is free
        load_inputs(next);
        ptx::cp_async_bulk_wait_all();  // the image is there
        ptx::fence_proxy_async();
        ring.tell_made(step.index);
      }
    }
  }
};

}  // namespace kda
