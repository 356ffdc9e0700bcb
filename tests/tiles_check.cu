// Checks on the host which tiles the CTAs of a grid take turn by turn (TileOfTurn in csrc/kda/forward/chunk_divisors.cuh): each tile once, whatever the numbers
// are, and the same tile of every sequence not always by the same CTA. Prints what is wrong first; exit status 1.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "kda/forward/chunk_divisors.cuh"

namespace {

// Who takes each of `tiles` tiles; empty if one is taken twice, or not at all.
std::vector<int64_t> takers(uint32_t tiles, uint32_t ctas) {
  std::vector<int64_t> by(tiles, -1);
  for (uint32_t cta = 0; cta < ctas; ++cta) {
    for (kda::TileOfTurn at = kda::TileOfTurn::begin(cta); at.index < tiles; at = at.next(ctas)) {
      if (by[at.index] >= 0) return {};
      by[at.index] = cta;
    }
  }
  for (const int64_t cta : by) {
    if (cta < 0) return {};
  }
  return by;
}

}  // namespace

int main() {
  for (uint32_t ctas = 1; ctas <= 300; ++ctas) {
    for (const uint32_t tiles : {ctas, ctas + 1, 2 * ctas, 5 * ctas - 1, 7 * ctas + 3, 2048u}) {
      // A grid of fewer CTAs than tiles has all that are resident; else it has one for each tile.
      if (tiles >= ctas && takers(tiles, ctas).empty()) {
        std::printf("%u tiles of %u CTAs are not taken once each\n", tiles, ctas);
        return 1;
      }
    }
  }
  // Eight sequences of 33 slots of 16 heads on 132 multiprocessors: 528 = 4 * 132.
  constexpr uint32_t kSequences = 8, kOfSequence = 528, kHeads = 16;
  for (const uint32_t ctas : {132u, 264u}) {
    const std::vector<int64_t> by = takers(kSequences * kOfSequence, ctas);
    std::vector<int> last(ctas, 0);
    for (uint32_t n = 1; n <= kSequences; ++n) {
      for (uint32_t head = 0; head < kHeads; ++head) {
        if (++last[by[n * kOfSequence - kHeads + head]] > 2) {
          std::printf("a CTA of %u takes the last tiles of more than two sequences\n", ctas);
          return 1;
        }
      }
    }
  }
  return 0;
}
