// The part of a step of the recurrence that does not depend on the state (see chunk_fwd_cpu.h): the transforms of the
// inputs, the pair matrices Aqk and Akk, and the operands of the products with the state.
//
// Every factor exp(G_i - G_j) is a product of alphas, each <= 1, and no other exponential is formed:
// - inside a tile of 16 tokens row j of k is multiplied by alpha_i before it meets row i, so that it carries
//   alpha_(j+1) .. alpha_i, and at the tile's end k * R, R the product behind j;
// - between the two tiles of a step k * R of the earlier meets q * P and k * P of the later, P the product up to i.
// See simd.h for how this file is compiled.
#pragma once

#include "rows.h"

namespace kda::cpu {

namespace {

// Pair products of a row of queries: one row of q and of -beta k against rows of k.
constexpr int kPairColumns = 4;

// --- Transforms ------------------------------------------------------------------------------------------------------

// x[i] for the lanes i of kTileTokens / kLanes vectors.
struct TileScalars {
  float x[kTileTokens];
};

// factor / sqrt(sum of squares + epsilon) of each row, or factor without normalisation.
KDA_INLINE TileScalars row_factors(const Floats* squares, bool normalise, float factor) {
  TileScalars result;
  for (int i = 0; i < kTileTokens; i += kLanes) store(result.x + i, sum_each(squares + i));
  for (float& x : result.x) x = normalise ? factor / __builtin_sqrtf(x + kL2NormEpsilon) : factor;
  return result;
}

// beta of a tile; 0 behind its last row.
KDA_INLINE TileScalars read_beta(const Rows& beta, int first, int rows, const HeadOptions& options) {
  TileScalars result;
  with_type(beta.type, [&](auto type) {
    using Type = decltype(type);
    for (int i = 0; i < kTileTokens; i += kLanes) {
      const auto* from = reinterpret_cast<const typename Type::Element*>(row_address(beta, first + i));
      store(result.x + i, rows > i ? read_lanes<Type>(from, beta.token_stride, rows - i) : Floats{});
    }
  });
  if (options.beta_sigmoid) {
    for (int i = 0; i < kTileTokens; i += kLanes) store(result.x + i, options.beta_scale * sigmoid(load(result.x + i)));
  }
  for (int i = 0; i < kTileTokens; ++i) result.x[i] = i < rows ? result.x[i] : 0.0f;
  return result;
}

// Reads rows of q or k, returns their sums of squares lane by lane.
KDA_INLINE void read_rows(const Rows& from, int first, int rows, const HeadOptions& options, float* to,
                          Floats (&squares)[kTileTokens]) {
  const int Kp = options.padded_key_dim;
  with_type(from.type, [&](auto type) {
    for (int i = 0; i < kTileTokens; ++i) {
      Floats sum = {};
      if (i < rows) {
        for_each_lanes<decltype(type)>(from, first + i, options.key_dim, Kp, [&](int d, Floats x) {
          store(to + i * Kp + d, x);
          sum += x * x;
        });
      } else {
        for (int d = 0; d < Kp; d += kLanes) store(to + i * Kp + d, Floats{});
      }
      squares[i] = sum;
    }
  });
}

template <GateKind kGate>
KDA_INLINE Floats log_gate(Floats g, const HeadOptions& options) {
  if constexpr (kGate == GateKind::kSoftplus) return -options.gate_rate * softplus(g);
  if constexpr (kGate == GateKind::kSigmoid) return options.lower_bound * sigmoid(options.gate_rate * g);
  return g;
}

// alpha [16, Kp] of a tile, and its log-gates added to log_decay [Kp]. Behind the last row, and the key dimension, 1
// and 0.
template <GateKind kGate, typename Type>
void read_gates(const Rows& g, int first, int rows, const HeadOptions& options, float* alpha, float* log_decay) {
  const int Kp = options.padded_key_dim, K = options.key_dim;
  for (int i = 0; i < kTileTokens; ++i) {
    float* row = alpha + i * Kp;
    if (i >= rows) {
      for (int d = 0; d < Kp; d += kLanes) store(row + d, broadcast(1.0f));
      continue;
    }
    for_each_lanes<Type>(g, first + i, K, Kp, [&](int d, Floats x) {
      if (options.dt_bias) x += read_lanes<Float32>(options.dt_bias + d, 1, K - d);
      const Floats gate = log_gate<kGate>(x, options);
      store(row + d, exp(gate));
      store(log_decay + d, load(log_decay + d) + gate);
    });
    for (int d = K; d < Kp; ++d) row[d] = 1.0f, log_decay[d] = 0.0f;
  }
}

KDA_INLINE void read_gates(const Rows& g, int first, int rows, const HeadOptions& options, float* alpha,
                           float* log_decay) {
  with_type(g.type, [&](auto type) {
    using Type = decltype(type);
    switch (options.gate) {
      case GateKind::kLog:
        return read_gates<GateKind::kLog, Type>(g, first, rows, options, alpha, log_decay);
      case GateKind::kSoftplus:
        return read_gates<GateKind::kSoftplus, Type>(g, first, rows, options, alpha, log_decay);
      case GateKind::kSigmoid:
        return read_gates<GateKind::kSigmoid, Type>(g, first, rows, options, alpha, log_decay);
    }
  });
}

// beta v of a tile, into column panels.
KDA_INLINE void read_values(const Rows& v, int first, int rows, const HeadOptions& options, const TileScalars& beta,
                            float* to) {
  const int padded = (options.value_dim + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  const auto address = [&](int i, int column) {
    const int panel = column / kPanelColumns;
    return to + (static_cast<int64_t>(panel) * kStepTokens + i) * kPanelColumns + column % kPanelColumns;
  };
  with_type(v.type, [&](auto type) {
    for (int i = 0; i < kTileTokens; ++i) {
      if (i < rows) {
        for_each_lanes<decltype(type)>(v, first + i, options.value_dim, padded,
                                       [&](int column, Floats x) { store(address(i, column), x * beta.x[i]); });
      } else {
        for (int column = 0; column < padded; column += kLanes) store(address(i, column), Floats{});
      }
    }
  });
}

// --- Pairs -----------------------------------------------------------------------------------------------------------

// Multiplies kCount rows of k by alpha and adds up, lane by lane, their products with one row of q and of -beta k.
template <int kCount>
KDA_INLINE void decay_and_multiply(const float* q, const float* k_in, const float* alpha, float* k, int Kp,
                                   Floats* q_products, Floats* k_products) {
  Floats q_sum[kCount] = {}, k_sum[kCount] = {};
  for (int d = 0; d < Kp; d += kLanes) {
    const Floats a = load(alpha + d), q_row = load(q + d), k_row = load(k_in + d);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const Floats decayed = load(k + j * Kp + d) * a;
      store(k + j * Kp + d, decayed);
      q_sum[j] += q_row * decayed;
      k_sum[j] += k_row * decayed;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) q_products[j] = q_sum[j], k_products[j] = k_sum[j];
}

// The pairs inside one tile. On return k holds k * R, q and k_in their products with P, and prefix [Kp] the product of
// the tile's alphas.
void multiply_tile(float* q, float* k_in, float* k, const float* alpha, int Kp, int rows, float* Aqk, float* Akk,
                   float* prefix) {
  for (int d = 0; d < Kp; d += kLanes) store(prefix + d, broadcast(1.0f));
  for (int i = 0; i < rows; ++i) {
    Floats q_products[kTileTokens] = {}, k_products[kTileTokens] = {};
    float *q_row = q + i * Kp, *k_in_row = k_in + i * Kp;
    const float *alpha_row = alpha + i * Kp, *k_row = k + i * Kp;
    int j = 0;
    for (; j + kPairColumns <= i; j += kPairColumns) {
      decay_and_multiply<kPairColumns>(q_row, k_in_row, alpha_row, k + j * Kp, Kp, q_products + j, k_products + j);
    }
    static_assert(kPairColumns == 4, "the rest is less than 4");
    if (i - j == 1) decay_and_multiply<1>(q_row, k_in_row, alpha_row, k + j * Kp, Kp, q_products + j, k_products + j);
    if (i - j == 2) decay_and_multiply<2>(q_row, k_in_row, alpha_row, k + j * Kp, Kp, q_products + j, k_products + j);
    if (i - j == 3) decay_and_multiply<3>(q_row, k_in_row, alpha_row, k + j * Kp, Kp, q_products + j, k_products + j);
    Floats diagonal = {};
    for (int d = 0; d < Kp; d += kLanes) {
      const Floats q_i = load(q_row + d), P = load(prefix + d) * load(alpha_row + d);
      diagonal += q_i * load(k_row + d);
      store(prefix + d, P);
      store(q_row + d, q_i * P);
      store(k_in_row + d, load(k_in_row + d) * P);
    }
    q_products[i] = diagonal;
    for (int column = 0; column < kTileTokens; column += kLanes) {
      store(Aqk + i * kStepTokens + column, sum_each(q_products + column));
      store(Akk + i * kStepTokens + column, sum_each(k_products + column));
    }
  }
}

// Products of `rows` rows of a with 16 rows of b, all of length Kp.
void multiply_between(const float* a, const float* b, int Kp, int rows, float* products) {
  constexpr int kRows = kLanes / kPairColumns;  // kLanes sums at a time
  for (int i = 0; i < rows; i += kRows) {
    for (int j = 0; j < kTileTokens; j += kPairColumns) {
      Floats sums[kLanes] = {};
      for (int d = 0; d < Kp; d += kLanes) {
        Floats columns[kPairColumns];
#pragma GCC unroll 4
        for (int n = 0; n < kPairColumns; ++n) columns[n] = load(b + (j + n) * Kp + d);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const Floats row = load(a + (i + m) * Kp + d);
#pragma GCC unroll 4
          for (int n = 0; n < kPairColumns; ++n) sums[m * kPairColumns + n] += row * columns[n];
        }
      }
      float lanes[kLanes];
      store(lanes, sum_each(sums));
      for (int m = 0; m < kRows; ++m) {
        std::memcpy(products + (i + m) * kStepTokens + j, lanes + m * kPairColumns, sizeof(float) * kPairColumns);
      }
    }
  }
}

KDA_INLINE void scale_rows(float* rows, const float* by, int Kp) {
  for (int d = 0; d < Kp; d += kLanes) {
    const Floats factor = load(by + d);
#pragma GCC unroll 4
    for (int i = 0; i < kTileTokens; ++i) store(rows + i * Kp + d, load(rows + i * Kp + d) * factor);
  }
}

// --- All of it -------------------------------------------------------------------------------------------------------

void prepare_step(const StepInputs& in, const HeadOptions& options, const StepFactors& factors, float* scratch) {
  static_assert(kStepTokens == 2 * kTileTokens, "a step is two tiles");
  const int Kp = options.padded_key_dim;
  float* alpha = scratch;                      // [16, Kp]
  float* totals = scratch + kTileTokens * Kp;  // [2, Kp], product of alpha over each tile
  for (int d = 0; d < Kp; d += kLanes) store(factors.decay + d, Floats{});
  std::memset(factors.Aqk, 0, sizeof(float) * kStepTokens * kStepTokens);
  std::memset(factors.Akk, 0, sizeof(float) * kStepTokens * kStepTokens);
  for (int tile = 0; tile < 2; ++tile) {
    const int first = tile * kTileTokens;
    const int left = in.rows - first;
    const int rows = left < 0 ? 0 : left < kTileTokens ? left : kTileTokens;
    float *q = factors.q + first * Kp, *k_in = factors.k + first * Kp, *k = factors.k_out + first * Kp;
    Floats squares[kTileTokens];
    read_rows(in.q, first, rows, options, q, squares);
    const TileScalars q_factors = row_factors(squares, options.qk_l2norm, options.scale);
    read_rows(in.k, first, rows, options, k, squares);
    const TileScalars k_factors = row_factors(squares, options.qk_l2norm, 1.0f);
    const TileScalars beta = read_beta(in.beta, first, rows, options);
    for (int i = 0; i < rows; ++i) {
      for (int d = i * Kp; d < (i + 1) * Kp; d += kLanes) {
        const Floats k_row = load(k + d) * k_factors.x[i];
        store(q + d, load(q + d) * q_factors.x[i]);
        store(k + d, k_row);
        store(k_in + d, k_row * -beta.x[i]);
      }
    }
    for (int d = rows * Kp; d < kTileTokens * Kp; d += kLanes) store(k_in + d, Floats{});
    read_values(in.v, first, rows, options, beta, factors.v + first * kPanelColumns);
    read_gates(in.g, first, rows, options, alpha, factors.decay);
    const int64_t diagonal = first * kStepTokens + first;
    multiply_tile(q, k_in, k, alpha, Kp, rows, factors.Aqk + diagonal, factors.Akk + diagonal, totals + tile * Kp);
  }
  // A number near 1 has lost its distance from 1, by the same amount at every step: it is kept as 1 and the rest.
  for (int d = 0; d < Kp; d += kLanes) {
    constexpr float kNearZero = 0.3f;  // of G_C; less than ln(2) / 2
    const Floats G = load(factors.decay + d);
    const Floats whole = ((G > -kNearZero) & (G < kNearZero)) ? broadcast(1.0f) : Floats{};
    store(factors.decay + d, whole);
    store(factors.decay + Kp + d, whole > 0.0f ? exp<true>(G) : exp(G));
  }
  if (in.rows <= kTileTokens) return;

  const int64_t later = kTileTokens * Kp, corner = kTileTokens * kStepTokens;
  multiply_between(factors.q + later, factors.k_out, Kp, kTileTokens, factors.Aqk + corner);
  multiply_between(factors.k + later, factors.k_out, Kp, kTileTokens, factors.Akk + corner);
  scale_rows(factors.q + later, totals, Kp);
  scale_rows(factors.k + later, totals, Kp);
  scale_rows(factors.k_out, totals + Kp, Kp);
}

}  // namespace

}  // namespace kda::cpu
