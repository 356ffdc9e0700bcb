// Inputs of kda::chunk_bwd: those of the forward, gradients of its outputs, and room for the gradients.
#pragma once

#include <memory>

#include "host_gradients.h"
#include "inputs.h"

namespace bench {

class GradientSet {
 public:
  GradientSet(const Shape& shape, const kda::ChunkBwdPlan& plan, uint64_t seed)
      : shape_(shape), inputs_(shape, plan.chunk_slots, seed) {
    constexpr uint64_t kOtherSeed = 1 << 20;  // apart from the seeds of inputs
    const Options& o = shape.options;
    Generator random(seed + kOtherSeed);
    dO_bits = random.normal(shape.v_elements(), 1.0, o.fp16);
    dfinal_state = random.normal_fp32(shape.state_elements(), 1.0);
    dO_ = DeviceBuffer(dO_bits);
    dfinal_state_ = DeviceBuffer(dfinal_state);
    dq_ = DeviceBuffer(shape.qk_elements() * kActivationBytes);
    dk_ = DeviceBuffer(shape.qk_elements() * kActivationBytes);
    dv_ = DeviceBuffer(shape.v_elements() * kActivationBytes);
    dg_ = DeviceBuffer(shape.g_elements() * (o.log_gate ? sizeof(float) : kActivationBytes));
    dbeta_ = DeviceBuffer(shape.beta_elements() * (o.beta_sigmoid ? kActivationBytes : sizeof(float)));
    if (!o.log_gate) {
      dA_log_ = DeviceBuffer(o.value_heads * sizeof(float));
      ddt_bias_ = DeviceBuffer(size_t(o.value_heads) * o.key_dim * sizeof(float));
    }
    if (o.initial_state) dinitial_state_ = DeviceBuffer(shape.state_elements() * sizeof(float));
    if (plan.saved) intermediates_ = DeviceBuffer(plan.intermediates.total_bytes);
  }

  void drop_host_copies() {
    inputs_.drop_host_copies();
    std::vector<uint16_t>().swap(dO_bits);
    std::vector<float>().swap(dfinal_state);
  }

  // With a plan that says so, runs the forward that leaves the intermediates.
  void save_intermediates(const kda::ChunkFwdProblem& problem, const kda::ChunkBwdPlan& plan, cudaStream_t stream) {
    if (!plan.saved) return;
    const DeviceBuffer workspace(plan.saving_workspace.total_bytes);
    BENCH_CUDA(kda::chunk_fwd_saving(inputs_.params(problem, workspace.get()), intermediates_.get(), plan, stream));
    BENCH_CUDA(cudaStreamSynchronize(stream));
  }

  [[nodiscard]] kda::ChunkBwdParams params(const kda::ChunkFwdProblem& problem, void* workspace) const {
    kda::ChunkBwdParams p;
    p.inputs = inputs_.params(problem, nullptr);
    p.dO = dO_.get();
    p.dfinal_state = static_cast<const float*>(dfinal_state_.get());
    p.intermediates = intermediates_.get();
    p.dq = dq_.get();
    p.dk = dk_.get();
    p.dv = dv_.get();
    p.dg = dg_.get();
    p.dbeta = dbeta_.get();
    p.dA_log = static_cast<float*>(dA_log_.get());
    p.ddt_bias = static_cast<float*>(ddt_bias_.get());
    p.dinitial_state = dinitial_state_.get();
    p.workspace = workspace;
    return p;
  }

  [[nodiscard]] const InputSet& inputs() const { return inputs_; }
  [[nodiscard]] HostOutputGradients host_output_gradients() const {
    return {widen(dO_bits, shape_.options.fp16), inputs_.key_first({dfinal_state.begin(), dfinal_state.end()})};
  }

  // What the kernels wrote, in the form of HostGradients; empty where an input is absent.
  [[nodiscard]] HostGradients gradients() const {
    const Options& o = shape_.options;
    const auto halves = [&](const DeviceBuffer& x) { return widen(x.to_host<uint16_t>(), o.fp16); };
    const auto floats = [](const DeviceBuffer& x) {
      const std::vector<float> host = x.to_host<float>();
      return std::vector<double>(host.begin(), host.end());
    };
    HostGradients to;
    to.q = halves(dq_);
    to.k = halves(dk_);
    to.v = halves(dv_);
    to.g = o.log_gate ? floats(dg_) : halves(dg_);
    to.beta = o.beta_sigmoid ? halves(dbeta_) : floats(dbeta_);
    to.A_log = floats(dA_log_);
    to.dt_bias = floats(ddt_bias_);
    to.initial_state = inputs_.key_first(floats(dinitial_state_));
    return to;
  }

 private:
  Shape shape_;
  InputSet inputs_;
  std::vector<uint16_t> dO_bits;
  std::vector<float> dfinal_state;
  DeviceBuffer dO_, dfinal_state_, dq_, dk_, dv_, dg_, dbeta_, dA_log_, ddt_bias_, dinitial_state_, intermediates_;
};

}  // namespace bench
