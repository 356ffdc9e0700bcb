// A producer group of the fused forward: of all steps of the stretch those that fall to it (step_producer.cuh), for all CTAs of the cluster.
#pragma once

#include "fused_config.cuh"
#include "step_producer.cuh"

namespace kda {

template <typename Config>
struct FusedProducer : FusedRole {
  static constexpr int C = Config::C;
  using Walk = StepWalk<typename Config::Cut>;
  static constexpr int kStride = Config::kCtas * Config::kProducerGroups;  // steps from one of the group to the next

  // A step as the tensor maps and the producer need it.
  struct Step {
    int index;  // in the stretch
    int token, batch, tokens, value_head, key_head;
    int value_token;  // past the end for a map, which has no V: the copy engine brings zeros
    bool exists;
  };

  __device__ __forceinline__ Step describe(const Walk& walk, int key_head) const {
    const ScanPiece& piece = walk.pieces.piece;
    const bool is_map = Config::Cut::kForgets && piece.map_rows >= 0;
    const int value_token = is_map ? static_cast<int>(params.call.problem.tokens) : walk.token;
    return {walk.index, walk.token, piece.batch, walk.tokens(), piece.value_head, key_head, value_token, !walk.done()};
  }

  // Threads of different warps that start copies, so that none keeps its warp for long.
  static constexpr int kLoader = 0, kValuesLoader = 32, kSender = 64;

  static constexpr int kBarrier = 1;  // + group
  __device__ __forceinline__ uint8_t* scratch() const {
    return shared + Config::kProducerOffset + group * Config::kProducerBytes;
  }
  __device__ __forceinline__ uint8_t* raw() const { return shared + Config::kRawOffset + group * Config::kRawBytes; }

  // q, k and g of a step, by one thread. Rows past the end are of any content.
  __device__ __forceinline__ void load_inputs(const Step& step) const {
    if (!step.exists || thread != kLoader) return;
    const uint32_t barrier = Config::raw_full(ptx::shared_address(shared), group);
    const uint32_t rows = ptx::shared_address(raw());
    const bool gate_is_fp32 = params.call.gate_type == DataType::kFloat32;
    ptx::mbarrier_arrive_expect_tx(barrier, (gate_is_fp32 ? 4 : 3) * Config::kKeyTileBytes);
    ptx::cp_async_bulk_tensor_load(rows + Config::kRawQ, &maps.q, 0, step.token, 0, step.key_head, step.batch, barrier);
    ptx::cp_async_bulk_tensor_load(rows + Config::kRawK, &maps.k, 0, step.token, 0, step.key_head, step.batch, barrier);
    ptx::cp_async_bulk_tensor_load(rows + Config::kRawG, &maps.g, 0, step.token, 0, step.value_head, step.batch,
                                   barrier);
  }

  // V of a step to all CTAs, and how many bytes come there for its stage: by one thread.
  __device__ __forceinline__ void load_values(const Step& step, int stage_index) const {
    if (thread != kValuesLoader) return;
    const uint32_t shared_base = ptx::shared_address(shared);
    const uint32_t full = Config::full(shared_base, stage_index);
    const uint32_t to = shared_base + stage_index * Config::kStageBytes + Config::kValues;
    ptx::mbarrier_wait_parity(Config::values_empty(shared_base, stage_index), Config::parity_of(step.index) ^ 1);
#pragma unroll
    for (uint32_t cta = 0; cta < Config::kCtas; ++cta) {
      const int block = static_cast<int>(cta);  // of 64 columns
      if (cta == rank) {
        ptx::mbarrier_arrive_expect_tx(full, Config::kValueTileBytes);
        ptx::cp_async_bulk_tensor_load(to, &maps.v, 0, step.value_token, block, step.value_head, step.batch, full);
      } else {
        ptx::mbarrier_arrive_expect_tx_at_cta(ptx::map_to_cta(full, cta),
                                              Config::kValueTileBytes + Config::kImageBytes);
        ptx::cp_async_bulk_tensor_load_multicast(to, &maps.v, 0, step.value_token, block, step.value_head, step.batch,
                                                 full, 1u << cta);
      }
    }
  }

  // Bytes begin .. end of the stage to the same place in the other CTAs, by one thread, after a barrier of the group that the fences of all
  // writers precede.
  __device__ __forceinline__ void send(int stage_index, int begin, int end) const {
    if (thread != kSender) return;
    const uint32_t shared_base = ptx::shared_address(shared);
    const uint32_t from = shared_base + stage_index * Config::kStageBytes + begin;
#pragma unroll
    for (uint32_t cta = 0; cta < Config::kCtas; ++cta) {
      if (cta == rank) continue;
      ptx::cp_async_bulk_to_cta(ptx::map_to_cta(from, cta), from, end - begin,
                                ptx::map_to_cta(Config::full(shared_base, stage_index), cta));
    }
  }

  __device__ __forceinline__ void make_step(const Step& step, const Step& next, int turn,
                                            const GateConstants& constants, uint32_t beta_bits) const {
    const uint32_t shared_base = ptx::shared_address(shared);
    const int stage_index = Config::stage_of(step.index);
    uint8_t* const stage = shared + stage_index * Config::kStageBytes;
    const StepProducer<Config> make{params.call,      raw(),  stage, scratch(), step.tokens, step.tokens,
                                    kBarrier + group, thread, lane};
    // In turn, though the barrier at the end of a step would allow one place for both.
    const RowValues rows(scratch() + Config::kRowValues + turn % 2 * Config::kRowValuesBytes);
    const StepOperands<Config> operands = make.operands(constants);

    ptx::mbarrier_wait_parity(Config::raw_full(shared_base, group), turn & 1);
    const bool far_apart = make.prepare(operands, constants, rows, beta_bits);
    ptx::mbarrier_wait_parity(Config::empty(shared_base, stage_index), Config::parity_of(step.index) ^ 1);
    typename StepProducer<Config>::Products products;
    make.multiply_pairs(products, operands, rows, far_apart);
    make.store_akk(products, rows, far_apart);
    make.store_aqk(products, rows, far_apart);
    ptx::fence_proxy_async_shared();  // for the copies to the other CTAs and of the next rows, and for the products
    make.sync();
    load_inputs(next);
    load_values(step, stage_index);
    send(stage_index, 0, Config::kInverseTile);
    invert_unit_lower_32x32(make.solve_matrix(), warp, lane, [&] { make.sync(); });
    make.sync();
    make.store_inverse(rows);
    ptx::fence_proxy_async_shared();
    make.sync();
    send(stage_index, Config::kInverseTile, Config::kImageBytes);
    ptx::mbarrier_arrive(Config::full(shared_base, stage_index));
  }

  __device__ __forceinline__ void run() const {
    const ChunkFwdParams& call = params.call;
    const int heads_of_key = call.problem.value_heads / call.problem.heads;
    Walk walk(call, stretch);
    walk.skip(static_cast<int>(rank) + Config::kCtas * group);
    if (walk.done()) return;
    // Of the step to come: what it takes of its chain.
    const auto betas_of = [&] {
      const ScanPiece& piece = walk.pieces.piece;
      return BetaReader(call, piece.batch, walk.token, piece.end, piece.value_head, thread);
    };
    int key_head = walk.pieces.piece.value_head / heads_of_key;
    BetaReader betas = betas_of();
    Step next = describe(walk, key_head);
    load_inputs(next);
    uint32_t beta_next = betas.next(call, kStride * C);
    int value_head = next.value_head;
    GateConstants constants(call, value_head, StepProducer<Config>::channel_of(thread));
    for (int turn = 0; next.exists; ++turn) {
      const Step step = next;
      const uint32_t beta = beta_next;
      if (walk.skip(kStride)) {
        key_head = walk.pieces.piece.value_head / heads_of_key;
        betas = betas_of();
      }
      next = describe(walk, key_head);
      beta_next = betas.next(call, kStride * C);
      if (step.value_head != value_head) {
        value_head = step.value_head;
        constants = GateConstants(call, value_head, StepProducer<Config>::channel_of(thread));
      }
      const int here = ptx::opaque(thread);
      FusedProducer{{params, maps, stretch, shared, stretch_index, rank, group, here, here >> 5, here & 31}}.make_step(
          step, next, turn, constants, beta);
    }
  }
};

}  // namespace kda
