// Compares token_gradients() of bench/host_gradients.h with finite differences of token_recurrence(), for every kind of
// gate and transform, on the host. Prints the largest deviation; exit status 1 if it is too large.
#include <cstdio>
#include <random>

#include "host_gradients.h"

namespace {

using bench::HostGate, bench::HostGradients, bench::HostInputs, bench::HostOutputGradients, bench::HostOutputs;

HostInputs make_inputs(HostGate gate, bool transforms, std::mt19937_64& engine) {
  std::normal_distribution<double> normal;
  const auto draw = [&](size_t count, double sigma) {
    std::vector<double> x(count);
    for (double& value : x) value = sigma * normal(engine);
    return x;
  };
  HostInputs in;
  in.lengths = {3, 0, 5};
  in.heads = 1, in.value_heads = 2, in.key_dim = 3, in.value_dim = 2;
  const size_t tokens = 8, N = 3;
  in.q = draw(tokens * 3, 0.7), in.k = draw(tokens * 3, 0.7);
  in.v = draw(tokens * 2 * 2, 1.0), in.g = draw(tokens * 2 * 3, 0.8), in.beta = draw(tokens * 2, 0.8);
  in.A_log = draw(2, 0.3), in.dt_bias = draw(2 * 3, 0.3), in.initial_state = draw(N * 2 * 3 * 2, 1.0);
  if (gate == HostGate::kLog) {
    for (double& g : in.g) g = -std::fabs(g);
  }
  in.scale = 0.6, in.gate = gate, in.lower_bound = -5.0;
  in.beta_sigmoid = transforms, in.beta_scale = 2.0, in.l2norm = transforms, in.chunk_states = false;
  return in;
}

double loss(const HostInputs& in, const HostOutputGradients& from) {
  const HostOutputs out = bench::token_recurrence(in);
  double sum = 0;
  for (size_t i = 0; i < out.o.size(); ++i) sum += out.o[i] * from.o[i];
  for (size_t i = 0; i < out.final_state.size(); ++i) sum += out.final_state[i] * from.final_state[i];
  return sum;
}

// The largest deviation of a gradient from the finite differences of its input.
double deviation(HostInputs in, const HostOutputGradients& from, std::vector<double> HostInputs::* input,
                 const std::vector<double>& gradient) {
  constexpr double kStep = 1e-5;
  double largest = gradient.size() == (in.*input).size() ? 0.0 : 1e9;
  for (size_t i = 0; i < gradient.size(); ++i) {
    double& x = (in.*input)[i];
    const double middle = x;
    x = middle + kStep;
    const double above = loss(in, from);
    x = middle - kStep;
    const double difference = (above - loss(in, from)) / (2 * kStep);
    x = middle;
    largest = std::fmax(largest, std::fabs(difference - gradient[i]));
  }
  return largest;
}

}  // namespace

int main() {
  constexpr double kLimit = 1e-7;
  double largest = 0;
  std::mt19937_64 engine(1);
  for (const HostGate gate : {HostGate::kLog, HostGate::kSoftplus, HostGate::kSigmoid}) {
    for (const bool transforms : {false, true}) {
      const HostInputs in = make_inputs(gate, transforms, engine);
      HostOutputGradients from = {in.v, in.initial_state};
      for (double& x : from.o) x = std::cos(7 * x);
      for (double& x : from.final_state) x = std::cos(5 * x);
      const HostGradients to = bench::token_gradients(in, from);
      const auto check = [&](std::vector<double> HostInputs::* input, const std::vector<double>& gradient) {
        largest = std::fmax(largest, deviation(in, from, input, gradient));
      };
      check(&HostInputs::q, to.q);
      check(&HostInputs::k, to.k);
      check(&HostInputs::v, to.v);
      check(&HostInputs::g, to.g);
      check(&HostInputs::beta, to.beta);
      check(&HostInputs::initial_state, to.initial_state);
      if (gate == HostGate::kLog) continue;
      check(&HostInputs::A_log, to.A_log);
      check(&HostInputs::dt_bias, to.dt_bias);
    }
  }
  std::printf("%.3e\n", largest);
  return largest < kLimit ? 0 : 1;
}
