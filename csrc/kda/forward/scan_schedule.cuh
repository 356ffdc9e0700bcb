// Who scans what in the fused forward. A chain is the recurrence of one sequence and value head, in steps of 32 tokens. The chains are laid end to
// end, heads of a sequence next to each other, and the line is cut into one stretch for each cluster, as long as the longest chain or as
// makes them equal (McNaughton's wrap-around rule): all clusters end at the same time, however many chains there are. A chain is as long as
// its steps and what it takes to begin one.
//
// A chain that crosses a cut goes to two clusters (ChainCut::kHandOver). The one after the cut begins with it: it takes the chain's first steps, and
// leaves the state for the one before the cut, which ends with its last steps. No stretch is shorter than a chain, so the state is there before it is
// needed if both began together. The one that waits is the later of the two in the grid: it never keeps the other from starting.
//
// Where there are too few chains for that, stretches are equal whatever a chain's length is (ChainCut::kForget), and a chain is taken in its order. A
// stretch that begins inside a chain looks first at what the steps before the cut leave of a state: it takes them from the identity, without V. Then it
// takes them again from nothing, as nothing is left of what was before (fused_cut.cuh).
#pragma once

#include "../device/chunk_location.cuh"
#include "forgetting.cuh"

namespace kda {

// What becomes of a chain that crosses a cut between stretches.
enum class ChainCut {
  kHandOver,  // its state goes from one cluster to the other
  kForget,    // nothing of it is left after few steps
};

// The steps of one chain that a cluster takes.
struct ScanPiece {
  int64_t sequence;
  int batch, begin, end;  // its tokens, as coordinates of the tensor maps
  int value_head;
  int steps;                 // of the chain
  int first_step, end_step;  // of the piece
  int first_result;          // steps before this one only lead to its state; kForget
  int map_rows;              // the piece is the map of its steps, from this row of the identity on; else -1; kForget

  __host__ __device__ __forceinline__ int token_of(int step) const { return begin + step * kStepTokens; }
  // Tokens of a step: kStepTokens but for the last of the chain.
  __host__ __device__ __forceinline__ int tokens(int step) const { return min(end - token_of(step), kStepTokens); }
  __host__ __device__ __forceinline__ bool is_begin() const { return first_step == 0; }
  __host__ __device__ __forceinline__ bool is_end() const { return end_step == steps; }
};

__host__ __device__ __forceinline__ int steps_of(const SequenceRange& range) {
  return static_cast<int>((range.end - range.begin + kStepTokens - 1) / kStepTokens);
}

// A cluster's stretch of the line, and the first chain in it.
struct ScanStretch {
  int64_t begin, end;   // on the line
  int64_t chain_begin;  // where that chain begins, at most `begin`
  int64_t sequence;     // of that chain; the number of sequences: there is none
  int steps;            // in the stretch, and before its first one if a cluster takes these as well
  int value_head;       // of that chain
};

// How stretches are cut. kMaps: pieces that it takes until all rows of a map have been in a cluster; kMapRows: those of one.
template <ChainCut kCut_, int kMaps_ = 0, int kMapRows_ = 0>
struct StretchCut {
  static constexpr bool kForgets = kCut_ == ChainCut::kForget;
  static constexpr int kMaps = kMaps_, kMapRows = kMapRows_;
  // What a chain takes beside its steps, as a number of steps: loads and stores of its state, an empty pipeline.
  static constexpr int kStepsToBegin = kForgets ? 2 : 4;
  // What a stretch takes before its own steps if it begins inside a chain.
  static constexpr int kStepsBefore = kForgets ? (kMaps + 1) * kTailSteps : 0;

  // A cut that would leave no more than that of a chain is moved to its begin.
  static __host__ __device__ __forceinline__ int moved(int offset) { return offset <= kStepsBefore ? 0 : offset; }
  // Whether nothing of the state has to be left at a cut.
  static __host__ __device__ __forceinline__ bool has_to_forget(int offset, int steps) {
    return kForgets && offset > 0 && offset < steps;
  }
};

// Goes through the pieces of a stretch, those of chains without steps included.
template <typename Cut>
struct PieceWalk {
  const ChunkFwdParams& call;
  const ScanStretch& stretch;
  int64_t chain_begin;
  ScanPiece piece;

  __host__ __device__ __forceinline__ PieceWalk(const ChunkFwdParams& call, const ScanStretch& stretch)
      : call(call), stretch(stretch), chain_begin(stretch.chain_begin) {
    piece.sequence = stretch.sequence;
    piece.value_head = stretch.value_head;
    enter_sequence();
    enter();
    // The stretch before has all of it.
    if (!Cut::kForgets && chain_begin < stretch.begin && piece.end_step == 0 && !done()) next();
  }

  __host__ __device__ __forceinline__ bool done() const {
    return piece.sequence >= call.problem.sequences || chain_begin >= stretch.end;
  }

  __host__ __device__ __forceinline__ void next() {
    if constexpr (Cut::kForgets) {
      if (piece.map_rows >= 0) {
        piece.map_rows += Cut::kMapRows;
        if (piece.map_rows == Cut::kMaps * Cut::kMapRows)
          enter_after_cut(static_cast<int>(stretch.begin - chain_begin));
        return;
      }
    }
    chain_begin += piece.steps + Cut::kStepsToBegin;
    if (++piece.value_head == call.problem.value_heads) {
      piece.value_head = 0;
      ++piece.sequence;
      enter_sequence();
    }
    enter();
  }

 private:
  __host__ __device__ __forceinline__ void enter_sequence() {
    if (piece.sequence >= call.problem.sequences) return;
    const SequenceRange range = sequence_range(call, piece.sequence);
    piece.batch = static_cast<int>(range.batch);
    piece.begin = static_cast<int>(range.begin);
    piece.end = static_cast<int>(range.end);
    piece.steps = steps_of(range);
  }

  // The chain's own steps in the stretch, after what has to be done because it begins before.
  __host__ __device__ __forceinline__ void enter_after_cut(int step) {
    piece.map_rows = -1;
    piece.first_result = step;
    piece.first_step = step > 0 ? step - kTailSteps : 0;
    piece.end_step = static_cast<int>(min(stretch.end - chain_begin, int64_t{piece.steps}));
  }

  __host__ __device__ __forceinline__ void enter() {
    if constexpr (Cut::kForgets) {
      if (chain_begin < stretch.begin) {
        const int step = static_cast<int>(stretch.begin - chain_begin);
        piece.map_rows = 0;
        piece.first_step = step - kTailSteps;
        piece.first_result = piece.end_step = step;
      } else {
        enter_after_cut(0);
      }
      return;
    }
    // Before a cut lie the last steps.
    const auto steps_after = [&](int64_t cut) {
      return piece.steps - static_cast<int>(min(cut - chain_begin, int64_t{piece.steps}));
    };
    piece.first_step = 0, piece.end_step = piece.steps;
    if (chain_begin < stretch.begin) {
      piece.end_step = steps_after(stretch.begin);
    } else if (chain_begin + piece.steps > stretch.end) {
      piece.first_step = steps_after(stretch.end);
    }
  }
};

// Goes through the steps of a stretch. Within a piece that takes a few instructions.
template <typename Cut>
struct StepWalk {
  PieceWalk<Cut> pieces;
  const int steps;  // of the stretch
  int index;        // of the step, in the stretch
  int token;        // its first, as a coordinate
  int left;         // steps of the piece from this one on

  __host__ __device__ __forceinline__ StepWalk(const ChunkFwdParams& call, const ScanStretch& stretch)
      : pieces(call, stretch), steps(stretch.steps), index(0) {
    if (!done()) enter(0);
  }

  __host__ __device__ __forceinline__ bool done() const { return index >= steps; }
  // kStepTokens but for the last step of the chain.
  __host__ __device__ __forceinline__ int tokens() const { return min(pieces.piece.end - token, kStepTokens); }

  // Whether that led to another piece.
  __host__ __device__ __forceinline__ bool skip(int count) {
    index += count;
    token += count * kStepTokens;
    left -= count;
    if (left > 0 || done()) return false;
    const int beyond = -left;
    pieces.next();
    enter(beyond);
    return true;
  }

 private:
  __host__ __device__ __forceinline__ void enter(int beyond) {
    while (beyond >= pieces.piece.end_step - pieces.piece.first_step) {
      beyond -= pieces.piece.end_step - pieces.piece.first_step;
      pieces.next();
    }
    const int step = pieces.piece.first_step + beyond;
    token = pieces.piece.token_of(step);
    left = pieces.piece.end_step - step;
  }
};

// A place on the line: how far into which chain.
struct LinePlace {
  int64_t place, chain_begin;    // on the line
  int64_t steps_before;          // on the line, those of the chain included
  int64_t sequence;              // the number of sequences: the line has ended
  int value_head, batch, token;  // the token of `offset`
  int offset;                    // from the chain's begin; beyond its steps lies what it takes to begin another
  int steps;                     // of the chain

  __host__ __device__ __forceinline__ int step() const { return min(offset, steps); }
};

// Where stretch `index` of `count` begins on the line of a call whose chains all have the same length, so that their number is known, and below
// 2^32 with all that their steps and begins take.
template <typename Cut>
__host__ __device__ __forceinline__ LinePlace place_among_equal_chains(const ChunkFwdParams& call, uint32_t index,
                                                                       uint32_t count) {
  const int64_t sequences = call.problem.sequences;
  const int heads = call.problem.value_heads;
  const SequenceRange range = sequences == 0 ? SequenceRange{0, 0, 0} : sequence_range(call, 0);
  const uint32_t steps = steps_of(range), length = steps + Cut::kStepsToBegin;
  const uint32_t chains = static_cast<uint32_t>(sequences) * heads, line = chains * length;
  const uint32_t equal = (line + count - 1) / count, share = Cut::kForgets ? equal : max(equal, length);
  const uint64_t begin = uint64_t{index} * share;  // clusters may be more than chains
  const uint32_t place = begin < line ? static_cast<uint32_t>(begin) : line;
  const uint32_t chain = place / length, sequence = chain / heads, offset = Cut::moved(place - chain * length);
  return {chain * length + offset,
          chain * length,
          int64_t{chain} * steps + min(offset, steps),
          sequence,
          static_cast<int>(chain - sequence * heads),
          call.cu_seqlens == nullptr ? static_cast<int>(sequence) : 0,
          static_cast<int>(range.begin + offset * kStepTokens),
          static_cast<int>(offset),
          static_cast<int>(steps)};
}

// What the threads of a CTA exchange to find their stretch.
struct StretchSearch {
  static constexpr int kMostWarps = 32;
  int64_t lengths[kMostWarps];
  int longest[kMostWarps];
  LinePlace ends[2];  // of the stretch
};

// The places between which stretch `index` of `count` lies, in search.ends. Called by all threads of the CTA; `search` is in shared memory.
template <typename Cut>
__device__ __forceinline__ void find_stretch(const ChunkFwdParams& call, uint32_t index, uint32_t count,
                                             StretchSearch& search) {
  const int64_t sequences = call.problem.sequences;
  const int heads = call.problem.value_heads, thread = threadIdx.x;
  if (call.cu_seqlens == nullptr || sequences == 1) {
    if (thread < 2) search.ends[thread] = place_among_equal_chains<Cut>(call, index + thread, count);
    __syncthreads();
    return;
  }

  if (!Cut::kForgets &&
      sequences * heads <= count) {  // a chain for each: nothing is to be shared, whatever the lengths are
    if (thread == 0) {
      const int64_t sequence = index / heads;
      const SequenceRange range = sequence < sequences ? sequence_range(call, sequence) : SequenceRange{0, 0, 0};
      const int steps = steps_of(range), head = static_cast<int>(index % heads);
      search.ends[0] = {0, 0, 0, sequence, head, 0, static_cast<int>(range.begin), 0, steps};
      search.ends[1] = {steps + Cut::kStepsToBegin,  0,     steps, sequence, head, 0,
                        static_cast<int>(range.end), steps, steps};
    }
    __syncthreads();
    return;
  }

  // Each thread counts the steps of its share of the sequences.
  const int threads = blockDim.x, warp = thread >> 5, lane = thread & 31;
  const int64_t share_of_sequences = (sequences + threads - 1) / threads;
  const int64_t first = min(thread * share_of_sequences, sequences), end = min(first + share_of_sequences, sequences);
  const auto length_of = [&](int steps) { return int64_t{heads} * (steps + Cut::kStepsToBegin); };
  int64_t length = 0;
  int longest = 0;
  for (int64_t i = first; i < end; ++i) {
    const int steps = steps_of(sequence_range(call, i));
    length += length_of(steps);
    longest = max(longest, steps);
  }
  int64_t up_to = length;  // in the warp
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t before = __shfl_up_sync(0xffffffffu, up_to, distance);
    if (lane >= distance) up_to += before;
  }
  longest = __reduce_max_sync(0xffffffffu, longest);
  if (lane == 31) search.lengths[warp] = up_to, search.longest[warp] = longest;
  __syncthreads();
  int64_t total = 0, before = up_to - length;
  for (int w = 0; w < threads / 32; ++w) {
    if (w < warp) before += search.lengths[w];
    total += search.lengths[w];
    longest = max(longest, search.longest[w]);
  }
  const int64_t equal = (total + count - 1) / count;
  const int64_t share = Cut::kForgets ? equal : max(equal, int64_t{longest} + Cut::kStepsToBegin);
  // The places are found by those in whose share they are.
  for (int which = 0; which < 2; ++which) {
    const int64_t place = (index + which) * share;
    if (place >= total) {
      if (thread == 0) search.ends[which] = {total, total, total - sequences * heads * Cut::kStepsToBegin, sequences};
      continue;
    }
    if (!(before <= place && place < before + length)) continue;
    int64_t at = before;
    for (int64_t i = first; i < end; ++i) {
      const SequenceRange range = sequence_range(call, i);
      const int steps = steps_of(range);
      if (place < at + length_of(steps)) {
        const int64_t chain = (place - at) / (steps + Cut::kStepsToBegin);
        const int64_t chain_begin = at + chain * (steps + Cut::kStepsToBegin);
        const int offset = Cut::moved(static_cast<int>(place - chain_begin));
        // Before the chain there are as many as that.
        const int64_t chains_before = i * heads + chain;
        search.ends[which] = {chain_begin + offset,
                              chain_begin,
                              chain_begin - chains_before * Cut::kStepsToBegin + min(offset, steps),
                              i,
                              static_cast<int>(chain),
                              0,
                              static_cast<int>(range.begin) + offset * kStepTokens,
                              offset,
                              steps};
        break;
      }
      at += length_of(steps);
    }
  }
  __syncthreads();
}

// The stretch between two places.
__host__ __device__ __forceinline__ ScanStretch stretch_between(const LinePlace& begin, const LinePlace& end) {
  return {begin.place,
          end.place,
          begin.chain_begin,
          begin.sequence,
          static_cast<int>(end.steps_before - begin.steps_before),
          begin.value_head};
}

// The same of kForget, with the steps before its first one; without what lies in a chain that is left, at its begin or at its end.
template <typename Cut>
__host__ __device__ __forceinline__ ScanStretch stretch_between(LinePlace begin, LinePlace end, bool begin_is_left,
                                                                bool end_is_left, const ChunkFwdProblem& problem) {
  static_assert(Cut::kForgets);
  int steps_before = Cut::has_to_forget(begin.offset, begin.steps) ? Cut::kStepsBefore : 0;
  if (end_is_left) {
    end.place = end.chain_begin;
    end.steps_before -= end.step();
  }
  if (begin_is_left || (begin.offset > 0 && begin.offset >= begin.steps)) {  // on to the next chain
    begin.place = begin.chain_begin += begin.steps + Cut::kStepsToBegin;
    begin.steps_before += begin.steps - begin.step();
    if (++begin.value_head == problem.value_heads) begin.value_head = 0, ++begin.sequence;
    steps_before = 0;
  }
  if (begin.place >= end.place) {  // there is nothing
    begin.sequence = problem.sequences;
    end = begin;
    steps_before = 0;
  }
  ScanStretch stretch = stretch_between(begin, end);
  stretch.steps += steps_before;
  return stretch;
}

}  // namespace kda
