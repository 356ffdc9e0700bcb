// Tiles of 16-bit elements in shared memory and in the workspace. SwizzledTile: [rows][Columns], row-major, 16-byte units of a row
// permuted by the row (unit ^ (row & 7)) so that ldmatrix on 8 consecutive rows touches all banks once. A tile is one
// contiguous block, so a bulk copy moves it between workspace and shared memory as it is.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace kda {

// Loads of MMA operands from a tile in shared memory. Layout::unit_offset(row, unit) is the byte offset of the 16-byte unit that holds
// elements 8 * unit .. 8 * unit + 7 of a row; Layout::unit_address(tile, row, lane_row, half, column) is the address of unit
// column / 8 + half of row row + lane_row, where row is a multiple of 8, column of 16, and half 0 or 1.
template <typename Layout>
struct TileOperands {
  // Byte offset of the pair of elements (column, column + 1); column is even.
  static __device__ __forceinline__ uint32_t pair_offset(int row, int column) {
    return Layout::unit_offset(row, column >> 3) + (column & 7) * 2;
  }

  // A operand (16 x 16): rows row..row+15, columns column..column+15.
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row, int column, int lane) {
    ptx::ldmatrix_x4(a, Layout::unit_address(tile, row, lane & 15, lane >> 4, column));
  }

  // A operand (16 x 16) of the transposed tile: columns column..column+15 become rows of A, tile rows row..row+15 the
  // contraction.
  static __device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], uint32_t tile, int row, int column, int lane) {
    const int matrix = lane >> 3;
    ptx::ldmatrix_x4_trans(a, Layout::unit_address(tile, row, (lane & 7) + (matrix >> 1) * 8, matrix & 1, column));
  }

  // The inverse of load_a.
  static __device__ __forceinline__ void store_a(const uint32_t (&a)[4], uint32_t tile, int row, int column, int lane) {
    ptx::stmatrix_x4(Layout::unit_address(tile, row, lane & 15, lane >> 4, column), a[0], a[1], a[2], a[3]);
  }

  // The inverse of load_a_trans.
  static __device__ __forceinline__ void store_a_trans(const uint32_t (&a)[4], uint32_t tile, int row, int column,
                                                       int lane) {
    const int matrix = lane >> 3;
    const uint32_t address = Layout::unit_address(tile, row, (lane & 7) + (matrix >> 1) * 8, matrix & 1, column);
    ptx::stmatrix_x4_trans(address, a[0], a[1], a[2], a[3]);
  }

  // Two B operands (16 x 8) whose n index runs along tile rows: n = row..row+7 in b[0], b[1], n = row+8..row+15 in
  // b[2], b[3]; the contraction runs along columns column..column+15.
  static __device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int row, int column, int lane) {
    const int matrix = lane >> 3;
    ptx::ldmatrix_x4(b, Layout::unit_address(tile, row, (lane & 7) + (matrix >> 1) * 8, matrix & 1, column));
  }

  // Two B operands (16 x 8) whose n index runs along tile columns: n = column..column+7 in b[0], b[1], n =
  // column+8..column+15 in b[2], b[3]; the contraction runs along rows row..row+15.
  static __device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], uint32_t tile, int row, int column, int lane) {
    ptx::ldmatrix_x4_trans(b, Layout::unit_address(tile, row, lane & 15, lane >> 4, column));
  }
};

// The A operand of X^T (16 x 16) from that of X.
__device__ __forceinline__ uint4 transposed_fragment(const uint4& x) {
  return {ptx::movmatrix_trans(x.x), ptx::movmatrix_trans(x.z), ptx::movmatrix_trans(x.y), ptx::movmatrix_trans(x.w)};
}

template <int Columns>
struct SwizzledTile : TileOperands<SwizzledTile<Columns>> {
  static constexpr int kRowBytes = Columns * 2;
  static_assert(Columns % 64 == 0, "a row must span all 32 banks");

  static __device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
    return row * kRowBytes + ((unit ^ (row & 7)) << 4);
  }

  // The column goes in by one exclusive or: what the lane contributes is computed once for all columns, what a column does to it
  // once for all rows and tiles, and those are offsets in the instruction.
  static __device__ __forceinline__ uint32_t unit_address(uint32_t tile, int row, int lane_row, int half, int column) {
    return (unit_offset(lane_row, half) ^ (column * 2)) + tile + row * kRowBytes;
  }
};

// Rows of 128 bytes whose 16-byte units are permuted (unit ^ (row & 7)), one block of Rows rows for every 64 columns of 16 bits: what
// tensor copies with 128-byte swizzle write, and what ldmatrix and wgmma read without bank conflicts.
template <int Rows>
struct BlockedTile : TileOperands<BlockedTile<Rows>> {
  static constexpr int kRowBytes = 128, kBlockBytes = Rows * kRowBytes;
  static __device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
    return (unit >> 3) * kBlockBytes + row * 128 + (((unit & 7) ^ (row & 7)) << 4);
  }

  static __device__ __forceinline__ uint32_t unit_address(uint32_t tile, int row, int lane_row, int half, int column) {
    return (unit_offset(lane_row, half) ^ (column % 64 * 2)) + tile + (row * kRowBytes + column / 64 * kBlockBytes);
  }
};

}  // namespace kda
