// The part of a step of the recurrence that depends on the state (see chunk_fwd_cpu.h), for one panel of columns of V,
// in blocks of kBlockRows rows held in registers:
//
//   U  = beta V - beta (K * e^G) S - Akk U      row by row, each from those above it: substitution, no inverse
//   O  = (Q * e^G) S + Aqk U                    Q includes the scale
//   S' = Diag(e^{G_C}) S + (K * e^{G_C - G})^T U
//
// The panel of S, 16 KB at K = 128 with the widest vectors, stays in the first-level cache. Each sum is taken in the
// order of its index, so a column's bits do not depend on the panel that it is in. See simd.h for how this file is
// compiled.
#pragma once

#include "rows.h"

namespace kda::cpu {

namespace {

constexpr int kPanelVectors = kPanelColumns / kLanes;

// A block of the result: kBlockRows x kPanelColumns, in registers.
struct Block {
  Floats x[kBlockRows][kPanelVectors];
};

KDA_INLINE void load_block(Block& block, const float* from) {
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kPanelVectors; ++n) block.x[m][n] = load(from + m * kPanelColumns + n * kLanes);
  }
}

KDA_INLINE void store_block(const Block& block, float* to) {
#pragma GCC unroll 8
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kPanelVectors; ++n) store(to + m * kPanelColumns + n * kLanes, block.x[m][n]);
  }
}

// block += A B for `depth` columns of A and rows of B [depth, kPanelColumns]. Element (m, k) of A is at
// a[m * row_stride + k * column_stride].
KDA_INLINE void multiply_add(Block& block, const float* a, int64_t row_stride, int64_t column_stride, const float* b,
                             int depth) {
  for (int k = 0; k < depth; ++k) {
    Floats row[kPanelVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kPanelVectors; ++n) row[n] = load(b + k * kPanelColumns + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; ++m) {
      const float factor = a[m * row_stride + k * column_stride];
#pragma GCC unroll 8
      for (int n = 0; n < kPanelVectors; ++n) block.x[m][n] += row[n] * factor;
    }
  }
}

// Rows of the block become those of U: row i gains factors[i, j] times row j < i. factors has a row stride of
// kStepTokens.
KDA_INLINE void substitute(Block& block, const float* factors) {
#pragma GCC unroll 8
  for (int j = 0; j < kBlockRows - 1; ++j) {
#pragma GCC unroll 8
    for (int i = j + 1; i < kBlockRows; ++i) {
#pragma GCC unroll 8
      for (int n = 0; n < kPanelVectors; ++n) block.x[i][n] += block.x[j][n] * factors[i * kStepTokens + j];
    }
  }
}

// block += A B for the lower triangle of A, kBlockRows x kBlockRows, diagonal included. What lies above is left out,
// not multiplied by 0: an infinity or NaN of a token must not reach those before it.
KDA_INLINE void multiply_add_triangle(Block& block, const float* a, const float* b) {
#pragma GCC unroll 8
  for (int j = 0; j < kBlockRows; ++j) {
#pragma GCC unroll 8
    for (int n = 0; n < kPanelVectors; ++n) {
      const Floats row = load(b + j * kPanelColumns + n * kLanes);
#pragma GCC unroll 8
      for (int i = j; i < kBlockRows; ++i) block.x[i][n] += row * a[i * kStepTokens + j];
    }
  }
}

KDA_INLINE void prefetch_output(const OutputTile& output, int row) {
  const int64_t bytes = element_bytes(output.type);
  prefetch<true>(static_cast<const char*>(output.data) + row * output.token_stride * bytes, output.columns * bytes);
}

void advance_panel(const StepFactors& factors, int Kp, int panel, float* state, const OutputTile& output,
                   const Upcoming& upcoming, float* scratch) {
  static_assert(kStepTokens % kBlockRows == 0 && kKeyPadding % kBlockRows == 0, "whole blocks");
  const int rows = (factors.rows + kBlockRows - 1) / kBlockRows * kBlockRows;
  const float* v = factors.v + static_cast<int64_t>(panel) * kStepTokens * kPanelColumns;
  float* U = scratch;  // [C, P]
  for (int i = 0; i < rows; i += kBlockRows) {
    prefetch(upcoming, i / kBlockRows, 2 * rows / kBlockRows);
    for (int m = 0; m < kBlockRows && i + m < factors.rows; ++m) prefetch_output(output, i + m);
    Block block;
    load_block(block, v + i * kPanelColumns);
    multiply_add(block, factors.k + i * Kp, Kp, 1, state, Kp);
    multiply_add(block, factors.Akk + i * kStepTokens, kStepTokens, 1, U, i);
    substitute(block, factors.Akk + i * kStepTokens + i);
    store_block(block, U + i * kPanelColumns);
  }
  for (int i = 0; i < rows; i += kBlockRows) {
    prefetch(upcoming, (rows + i) / kBlockRows, 2 * rows / kBlockRows);
    Block block = {};
    multiply_add(block, factors.q + i * Kp, Kp, 1, state, Kp);
    multiply_add(block, factors.Aqk + i * kStepTokens, kStepTokens, 1, U, i);
    multiply_add_triangle(block, factors.Aqk + i * kStepTokens + i, U + i * kPanelColumns);
    float o[kBlockRows * kPanelColumns];
    store_block(block, o);
    with_type(output.type, [&](auto type) {
      using Type = decltype(type);
      auto* to = static_cast<typename Type::Element*>(output.data) + i * output.token_stride;
      for (int m = 0; m < kBlockRows && i + m < factors.rows; ++m) {
        write_row<Type>(to + m * output.token_stride, o + m * kPanelColumns, output.columns);
      }
    });
  }
  for (int d = 0; d < Kp; d += kBlockRows) {
    // The step's own sum first, then what S loses, and one addition to S itself: each rounds at the size of S.
    Block block = {};
    multiply_add(block, factors.k_out + d, 1, Kp, U, rows);
    Block S;
    load_block(S, state + d * kPanelColumns);
#pragma GCC unroll 8
    for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kPanelVectors; ++n) {
        block.x[m][n] += S.x[m][n] * factors.decay[Kp + d + m];
        block.x[m][n] += S.x[m][n] * factors.decay[d + m];
      }
    }
    store_block(block, state + d * kPanelColumns);
  }
}

}  // namespace

}  // namespace kda::cpu
