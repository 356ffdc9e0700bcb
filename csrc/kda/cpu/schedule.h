// How the CPU forward shares its work among threads: pure functions over plain structs.
#pragma once

#include <cstdint>
#include <vector>

namespace kda::cpu {

// One sequence and value head.
struct Item {
  int64_t sequence = 0;
  int64_t head = 0;   // value head
  int64_t steps = 0;  // of kStepTokens tokens
};

// How many of the items, longest first, all threads should take together so that the rest, one item a thread at a time,
// keeps the threads busy to the end. `items` are sorted by steps, descending.
[[nodiscard]] int64_t shared_items(const std::vector<Item>& items, int threads);

}  // namespace kda::cpu
