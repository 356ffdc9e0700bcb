// The arguments with which kda::chunk_fwd_planned and kda::chunk_bwd_planned fix parts of a plan.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace kda::binding {

[[noreturn]] inline void refuse_plan_argument(const char* operator_name, const char* argument,
                                              const std::string& what) {
  throw std::runtime_error(std::string(operator_name) + ": argument `" + argument + "`: " + what);
}

inline std::optional<int64_t> checked_segment_chunks(const char* operator_name, std::optional<int64_t> chunks) {
  if (chunks && *chunks < 0) {
    refuse_plan_argument(operator_name, "segment_chunks", "expected at least 0, got " + std::to_string(*chunks));
  }
  return chunks;
}

inline std::optional<int> checked_value_tile(const char* operator_name, std::optional<int64_t> tile,
                                             int64_t value_dim) {
  if (!tile) return std::nullopt;
  const bool known = *tile == 128 || *tile == 64;
  if (!known || *tile > value_dim) {
    refuse_plan_argument(
        operator_name, "value_tile",
        "expected 64 or 128, at most V = " + std::to_string(value_dim) + ", got " + std::to_string(*tile));
  }
  return static_cast<int>(*tile);
}

}  // namespace kda::binding
