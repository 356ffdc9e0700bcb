#include "schedule.h"

#include <algorithm>
#include <functional>
#include <queue>

namespace kda::cpu {

namespace {

// Part of the time of perfect balance that may be lost at the end before items are shared: to share costs barriers, and
// the steps prepared leave the cache.
constexpr double kTolerance = 0.1;

// Steps of the busiest thread if each takes the next item when it is free.
int64_t longest(const std::vector<Item>& items, int64_t first, int threads) {
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> busy;
  for (int i = 0; i < threads; ++i) busy.push(0);
  int64_t result = 0;
  for (size_t i = first; i < items.size(); ++i) {
    const int64_t end = busy.top() + items[i].steps;
    busy.pop();
    busy.push(end);
    result = std::max(result, end);
  }
  return result;
}

}  // namespace

int64_t shared_items(const std::vector<Item>& items, int threads) {
  if (threads == 1) return 0;
  const auto count = static_cast<int64_t>(items.size());
  int64_t rest = 0;
  for (const Item& item : items) rest += item.steps;
  const double tolerated = kTolerance * static_cast<double>(rest) / threads;
  // Fewer items than threads cannot keep them busy alone, and of more than that at most a round is left over.
  for (int64_t shared = 0; shared < std::min<int64_t>(count, threads); ++shared) {
    const double lost = static_cast<double>(longest(items, shared, threads)) - static_cast<double>(rest) / threads;
    if (lost <= tolerated) return shared;
    rest -= items[shared].steps;
  }
  return std::min<int64_t>(count, threads);
}

}  // namespace kda::cpu
