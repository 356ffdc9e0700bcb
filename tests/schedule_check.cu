// Checks on the host which steps the clusters of the fused forward take (csrc/kda/forward/scan_schedule.cuh), for calls drawn at random: all steps of each chain
// once, in the same order for those that make them and those that use them, and a chain that is left at one cut by nobody twice. Prints what is wrong first;
// exit status 1.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kda/forward/scan_schedule.cuh"

namespace {

using namespace kda;

struct Call {
  ChunkFwdParams params;
  std::vector<int64_t> offsets;  // cu_seqlens, or of rows of a batch

  [[nodiscard]] int64_t sequences() const { return params.problem.sequences; }
  [[nodiscard]] int heads() const { return params.problem.value_heads; }
  [[nodiscard]] int steps(int64_t sequence) const { return steps_of(sequence_range(params, sequence)); }
};

[[noreturn]] void fail(const Call& call, uint32_t count, const char* what, long a = 0, long b = 0) {
  std::printf("%s (%ld, %ld): %ld sequences, %d heads, %u clusters, cu_seqlens %s, lengths", what, a, b,
              static_cast<long>(call.sequences()), call.heads(), count,
              call.params.cu_seqlens != nullptr ? "yes" : "no");
  for (int64_t n = 0; n < call.sequences(); ++n) {
    const SequenceRange range = sequence_range(call.params, n);
    std::printf(" %ld", static_cast<long>(range.end - range.begin));
  }
  std::printf("\n");
  std::exit(1);
}

// Where stretch `index` begins, step by step along the line; for lengths of any kind.
template <typename Cut>
LinePlace place_of(const Call& call, uint32_t index, uint32_t count) {
  int64_t line = 0, longest = 0, steps_before = 0;
  for (int64_t n = 0; n < call.sequences(); ++n) {
    line += int64_t{call.heads()} * (call.steps(n) + Cut::kStepsToBegin);
    longest = std::max<int64_t>(longest, call.steps(n));
  }
  const int64_t equal = (line + count - 1) / count;
  const int64_t share = Cut::kForgets ? equal : std::max(equal, longest + Cut::kStepsToBegin);
  const int64_t place = index * share;
  int64_t at = 0;
  for (int64_t n = 0; n < call.sequences(); ++n) {
    const int steps = call.steps(n);
    for (int head = 0; head < call.heads(); ++head) {
      const int64_t length = steps + Cut::kStepsToBegin;
      if (place < at + length) {
        const int offset = Cut::moved(static_cast<int>(place - at));
        const SequenceRange range = sequence_range(call.params, n);
        return {at + offset,
                at,
                steps_before + std::min(offset, steps),
                n,
                head,
                static_cast<int>(range.batch),
                static_cast<int>(range.begin) + offset * kStepTokens,
                offset,
                steps};
      }
      at += length;
      steps_before += steps;
    }
  }
  return {at, at, steps_before, call.sequences()};
}

struct Taken {
  int64_t sequence;
  int value_head, token;
  bool operator==(const Taken& other) const {
    return sequence == other.sequence && value_head == other.value_head && token == other.token;
  }
};

// The steps of a stretch as a producer finds them, from `first` on, each stride-th.
template <typename Cut>
std::vector<Taken> steps_by_walk(const Call& call, const ScanStretch& stretch, int first, int stride) {
  std::vector<Taken> found;
  StepWalk<Cut> walk(call.params, stretch);
  for (walk.skip(first); !walk.done(); walk.skip(stride)) {
    found.push_back({walk.pieces.piece.sequence, walk.pieces.piece.value_head, walk.token});
  }
  return found;
}

template <typename Cut>
void check(const Call& call, uint32_t count, bool has_equal_chains, std::mt19937& random) {
  const int64_t chains = call.sequences() * call.heads();
  std::vector<LinePlace> places;
  for (uint32_t i = 0; i <= count; ++i) {
    places.push_back(place_of<Cut>(call, i, count));
    if (!has_equal_chains) continue;
    const LinePlace &expected = places.back(), found = place_among_equal_chains<Cut>(call.params, i, count);
    const bool is_end = expected.sequence == call.sequences();
    if (found.place != expected.place || found.steps_before != expected.steps_before ||
        found.sequence != expected.sequence || found.value_head != expected.value_head ||
        found.offset != expected.offset || (!is_end && found.steps != expected.steps) ||
        (!is_end && (found.token != expected.token || found.batch != expected.batch))) {
      fail(call, count, "another place than step by step", i);
    }
  }
  // Whether the chain at a cut is left, as both clusters there find.
  std::vector<bool> is_left(count + 1), has_left_cut(chains);
  for (uint32_t i = 1; i < count; ++i) {
    if (!Cut::has_to_forget(places[i].offset, places[i].steps)) continue;
    is_left[i] = random() % 3 == 0;
    if (is_left[i]) has_left_cut[places[i].sequence * call.heads() + places[i].value_head] = true;
  }

  std::vector<std::vector<int>> taken(chains);
  std::vector<int> begun(chains), ended(chains);
  for (int64_t chain = 0; chain < chains; ++chain) taken[chain].resize(call.steps(chain / call.heads()));
  for (uint32_t i = 0; i < count; ++i) {
    ScanStretch stretch;
    if constexpr (Cut::kForgets) {
      stretch = stretch_between<Cut>(places[i], places[i + 1], is_left[i], is_left[i + 1], call.params.problem);
    } else {
      stretch = stretch_between(places[i], places[i + 1]);
    }
    std::vector<Taken> all;
    int map_pieces = 0;
    for (PieceWalk<Cut> walk(call.params, stretch); !walk.done(); walk.next()) {
      const ScanPiece& piece = walk.piece;
      if (piece.first_step < 0 || piece.end_step > piece.steps || piece.first_step > piece.end_step) {
        fail(call, count, "a piece outside of its chain", piece.first_step, piece.end_step);
      }
      for (int step = piece.first_step; step < piece.end_step; ++step) {
        all.push_back({piece.sequence, piece.value_head, piece.token_of(step)});
      }
      const int64_t chain = piece.sequence * call.heads() + piece.value_head;
      int first = piece.first_step;
      if constexpr (Cut::kForgets) {
        if (piece.map_rows >= 0) {
          if (piece.map_rows != map_pieces++ * Cut::kMapRows || piece.end_step - piece.first_step != kTailSteps ||
              !all.empty() && map_pieces == 1 && all.size() != kTailSteps) {
            fail(call, count, "a map of other steps or rows", piece.map_rows, piece.first_step);
          }
          continue;
        }
        if (map_pieces > 0 && map_pieces != Cut::kMaps) fail(call, count, "not all rows of a map", map_pieces);
        // From the initial state, or from nothing after maps of the same steps.
        if (piece.first_step > 0 && (map_pieces == 0 || piece.first_result != piece.first_step + kTailSteps)) {
          fail(call, count, "a piece from nothing without a map", piece.first_step, piece.first_result);
        }
        map_pieces = 0;
        first = piece.first_result;
      }
      if (piece.is_begin()) ++begun[chain];
      if (piece.is_end()) ++ended[chain];
      for (int step = first; step < piece.end_step; ++step) ++taken[chain][step];
    }
    if (static_cast<int>(all.size()) != stretch.steps) {
      fail(call, count, "a stretch says another number of steps", static_cast<long>(all.size()), stretch.steps);
    }
    for (const int stride : {1, 2, 4}) {
      for (int first = 0; first < stride; ++first) {
        const std::vector<Taken> found = steps_by_walk<Cut>(call, stretch, first, stride);
        size_t n = 0;
        for (size_t at = first; at < all.size(); at += stride, ++n) {
          if (n >= found.size() || !(found[n] == all[at]))
            fail(call, count, "makers go through other steps", i, stride);
        }
        if (n != found.size()) fail(call, count, "makers go through more steps", i, stride);
      }
    }
  }
  for (int64_t chain = 0; chain < chains; ++chain) {
    for (size_t step = 0; step < taken[chain].size(); ++step) {
      const int times = taken[chain][step];
      if (times > 1 || (times == 0 && !has_left_cut[chain])) {
        fail(call, count, times > 1 ? "a step twice" : "a step by nobody", static_cast<long>(chain),
             static_cast<long>(step));
      }
    }
    if (!has_left_cut[chain] && (begun[chain] != 1 || ended[chain] != 1)) {
      fail(call, count, "a chain not begun or ended once", begun[chain], ended[chain]);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto up_to = [&](int most) { return static_cast<int>(random() % (most + 1)); };
  for (int i = 0; i < 20000; ++i) {
    Call call;
    ChunkFwdProblem& problem = call.params.problem;
    const bool packed = up_to(1) == 1, tiny = up_to(1) == 1;
    const int most = tiny ? 40 : 1500;
    problem.sequences = packed ? up_to(8) : 1 + up_to(4);
    problem.heads = problem.value_heads = 1 + up_to(4);
    call.offsets = {0};
    if (packed) {
      for (int64_t n = 0; n < problem.sequences; ++n) {
        call.offsets.push_back(call.offsets.back() + (up_to(3) == 0 ? 0 : up_to(most)));
      }
      problem.varlen = true;
      problem.batch = 1;
      problem.tokens = call.offsets.back() + up_to(30);
      call.params.cu_seqlens = call.offsets.data();
      call.params.cu_seqlens_int64 = true;
    } else {
      problem.batch = problem.sequences;
      problem.tokens = up_to(most);
    }
    const bool equal = !packed || problem.sequences == 1;
    constexpr uint32_t kCounts[] = {1, 2, 3, 4, 5, 7, 13, 66, 132};
    const uint32_t count = kCounts[up_to(8)];
    check<StretchCut<ChainCut::kHandOver>>(call, count, equal, random);
    check<StretchCut<ChainCut::kForget, 1, 128>>(call, count, equal, random);
    check<StretchCut<ChainCut::kForget, 2, 64>>(call, count, equal, random);
  }
  return 0;
}
