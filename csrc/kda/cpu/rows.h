// Rows of tensors: read as fp32 from any type and stride, written as any type. See simd.h.
#pragma once

#include "simd.h"

namespace kda::cpu {

namespace {

// How elements of a type become lanes, and back.
struct Float32 {
  using Element = float;
  KDA_INLINE Floats widen(const void* from) { return load_vector<Floats>(from); }
  KDA_INLINE void narrow(void* to, Floats x) { store(to, x); }
};
struct BFloat16 {
  using Element = uint16_t;
  KDA_INLINE Floats widen(const void* from) { return from_bfloat16(load_vector<Halves>(from)); }
  KDA_INLINE void narrow(void* to, Floats x) { store(to, to_bfloat16(x)); }
};
struct Float16 {
  using Element = uint16_t;
  KDA_INLINE Floats widen(const void* from) { return from_float16(load_vector<Halves>(from)); }
  KDA_INLINE void narrow(void* to, Floats x) { store(to, to_float16(x)); }
};

// Calls function(Type{}) with the type above that `type` names.
template <typename Function>
KDA_INLINE void with_type(DataType type, Function function) {
  switch (type) {
    case DataType::kBFloat16:
      return function(BFloat16{});
    case DataType::kFloat16:
      return function(Float16{});
    case DataType::kFloat32:
      return function(Float32{});
  }
}

KDA_INLINE int64_t element_bytes(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

KDA_INLINE const char* row_address(const Rows& rows, int token) {
  return static_cast<const char*>(rows.data) + token * rows.token_stride * element_bytes(rows.type);
}

// kLanes elements, zeros behind the first `count` of them.
template <typename Type>
KDA_INLINE Floats read_lanes(const typename Type::Element* from, int64_t stride, int count) {
  if (stride == 1 && count >= kLanes) return Type::widen(from);
  typename Type::Element lanes[kLanes] = {};
  for (int i = 0; i < count && i < kLanes; ++i) lanes[i] = from[i * stride];
  return Type::widen(lanes);
}

// Calls use(column, lanes) for the `dim` elements of a row, and zeros up to `padded_dim`.
template <typename Type, typename Use>
KDA_INLINE void for_each_lanes(const Rows& rows, int token, int dim, int padded_dim, Use use) {
  const auto* from = reinterpret_cast<const typename Type::Element*>(row_address(rows, token));
  int column = 0;
  if (rows.stride == 1) {
    for (; column + kLanes <= dim; column += kLanes) use(column, Type::widen(from + column));
  }
  for (; column < padded_dim; column += kLanes) {
    use(column, column < dim ? read_lanes<Type>(from + column * rows.stride, rows.stride, dim - column) : Floats{});
  }
}

// Writes the first `columns` of a row.
template <typename Type>
KDA_INLINE void write_row(void* to, const float* from, int columns) {
  auto* out = static_cast<typename Type::Element*>(to);
  int column = 0;
  for (; column + kLanes <= columns; column += kLanes) Type::narrow(out + column, load(from + column));
  if (column < columns) {
    typename Type::Element lanes[kLanes];
    Type::narrow(lanes, load(from + column));
    for (int i = 0; column + i < columns; ++i) out[column + i] = lanes[i];
  }
}

// Asks for the cache lines of memory that will be read, or written. They need not exist.
template <bool kWrite>
KDA_INLINE void prefetch(const char* from, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  constexpr int kSecondLevelCache = 2;
  for (int64_t byte = 0; byte < bytes; byte += kLineBytes) __builtin_prefetch(from + byte, kWrite, kSecondLevelCache);
}

// Part `part` of `parts` of the upcoming tokens. Rows that are not contiguous are asked for in part.
KDA_INLINE void prefetch(const Upcoming& upcoming, int part, int parts) {
  const int end = upcoming.first + upcoming.count * (part + 1) / parts;
  for (int token = upcoming.first + upcoming.count * part / parts; token < end; ++token) {
    const StepInputs& in = *upcoming.inputs;
    prefetch<false>(row_address(in.q, token), upcoming.key_dim * element_bytes(in.q.type));
    prefetch<false>(row_address(in.k, token), upcoming.key_dim * element_bytes(in.k.type));
    prefetch<false>(row_address(in.g, token), upcoming.key_dim * element_bytes(in.g.type));
    prefetch<false>(row_address(in.v, token), upcoming.value_dim * element_bytes(in.v.type));
  }
}

}  // namespace

}  // namespace kda::cpu
