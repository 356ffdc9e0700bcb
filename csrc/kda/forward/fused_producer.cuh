// A producer group of the fused forward: it makes every second step (step_producer.cuh), and keeps its rows coming.
#pragma once

#include "fused_config.cuh"
#include "step_producer.cuh"

namespace kda {

template <typename Config>
struct FusedProducer {
  static constexpr int C = Config::C;

  const StepKernelParams& params;
  const ChunkFwdParams& call;
  const ScanItem& item;
  uint8_t* const shared;
  const int producer;  // which group
  const int thread, warp, lane;

  static constexpr int kBarrier = 1;  // + producer
  __device__ __forceinline__ uint8_t* scratch() const {
    return shared + Config::kProducerOffset + producer * Config::kProducerBytes;
  }
  __device__ __forceinline__ uint8_t* raw() const { return shared + Config::kRawOffset + producer * Config::kRawBytes; }
  __device__ __forceinline__ bool gate_is_fp32() const { return call.gate_type == DataType::kFloat32; }

  // First token and batch row of a step, as coordinates of the tensor maps.
  struct Box {
    int token, batch;
  };
  __device__ __forceinline__ Box box(int step) const {
    return {static_cast<int>(item.range.begin) + step * C, static_cast<int>(item.range.batch)};
  }

  // q, k and g of a step, by one thread. Rows past the end are of any content.
  __device__ __forceinline__ void load_inputs(int step) const {
    if (step >= item.steps || thread != 0) return;
    const uint32_t barrier = Config::raw_full(ptx::shared_address(shared), producer);
    const uint32_t rows = ptx::shared_address(raw());
    const Box b = box(step);
    ptx::mbarrier_arrive_expect_tx(barrier, (gate_is_fp32() ? 4 : 3) * Config::kKeyTileBytes);
    ptx::cp_async_bulk_tensor_load(rows + Config::kRawQ, &params.q, 0, b.token, 0, item.key_head, b.batch, barrier);
    ptx::cp_async_bulk_tensor_load(rows + Config::kRawK, &params.k, 0, b.token, 0, item.key_head, b.batch, barrier);
    ptx::cp_async_bulk_tensor_load(rows + Config::kRawG, &params.g, 0, b.token, 0, item.value_head, b.batch, barrier);
  }

  __device__ __forceinline__ void load_values(uint8_t* stage, uint32_t full, int step) const {
    if (thread != 0) return;
    const Box b = box(step);
    ptx::mbarrier_arrive_expect_tx(full, Config::kValueTileBytes);
    ptx::cp_async_bulk_tensor_load(ptx::shared_address(stage) + Config::kValues, &params.v, 0, b.token,
                                   item.first_row / 64, item.value_head, b.batch, full);
  }

  // Into L2, ahead of the loads.
  __device__ __forceinline__ void prefetch_inputs(int step) const {
    if (step >= item.steps || thread != 0) return;
    const Box b = box(step);
    ptx::cp_async_bulk_tensor_prefetch(&params.g, 0, b.token, 0, item.value_head, b.batch);
    ptx::cp_async_bulk_tensor_prefetch(&params.q, 0, b.token, 0, item.key_head, b.batch);
    ptx::cp_async_bulk_tensor_prefetch(&params.k, 0, b.token, 0, item.key_head, b.batch);
    ptx::cp_async_bulk_tensor_prefetch(&params.v, 0, b.token, item.first_row / 64, item.value_head, b.batch);
  }

  __device__ __forceinline__ void make_step(int step, int turn, const GateConstants& constants,
                                            uint32_t beta_bits) const {
    const uint32_t shared_base = ptx::shared_address(shared);
    const int stage_index = step % Config::kStages;
    uint8_t* const stage = shared + stage_index * Config::kStageBytes;
    const uint32_t full = Config::full(shared_base, stage_index), empty = Config::empty(shared_base, stage_index);
    const StepProducer<Config> make{call,   raw(), stage, scratch(), item.tokens(step), kBarrier + producer,
                                    thread, lane};
    // Those of the step before are read until its inverse is stored, by warps that may be behind.
    const RowValues rows(scratch() + Config::kRowValues + turn % 2 * Config::kRowValuesBytes);
    const StepOperands<Config> operands = make.operands(constants);

    ptx::mbarrier_wait_parity(Config::raw_full(shared_base, producer), turn & 1);
    const bool far_apart = make.prepare(operands, constants, rows, beta_bits);
    ptx::mbarrier_wait_parity(empty, (step / Config::kStages & 1) ^ 1);
    load_values(stage, full, step);
    typename StepProducer<Config>::Products products;
    make.multiply_pairs(products, operands, rows, far_apart);
    make.store_akk(products, rows, far_apart);
    make.store_aqk(products, rows, far_apart);
    ptx::fence_proxy_async_shared();  // the rows make room for others, which come through the copy engine
    make.sync();
    load_inputs(step + Config::kProducerGroups);
    prefetch_inputs(step + 2 * Config::kProducerGroups);
    make.invert();
    make.sync();
    make.store_inverse(rows);
    ptx::fence_proxy_async_shared();  // the stage's tiles are read by wgmma
    ptx::mbarrier_arrive(full);
  }

  __device__ __forceinline__ void run() const {
    const GateConstants constants(call, item.value_head, StepProducer<Config>::channel_of(thread));
    load_inputs(producer);
    prefetch_inputs(producer + Config::kProducerGroups);
    BetaReader betas(call, item.range.batch, item.range.begin + int64_t{producer} * C, item.range.end, item.value_head,
                     thread);
    uint32_t beta_next = betas.next(call, Config::kProducerGroups * C);
    int turn = 0;
    for (int step = producer; step < item.steps; step += Config::kProducerGroups, ++turn) {
      const uint32_t beta = beta_next;
      beta_next = betas.next(call, Config::kProducerGroups * C);
      const int here = ptx::opaque(thread);
      FusedProducer{params, call, item, shared, producer, here, here >> 5, here & 31}.make_step(step, turn, constants,
                                                                                                beta);
    }
  }
};

}  // namespace kda
