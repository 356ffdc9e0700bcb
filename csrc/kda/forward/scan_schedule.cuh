// Who scans what in the fused forward. A chain is the recurrence of one sequence and value head, in steps of 32 tokens. The chains are laid end to
// end, heads of a sequence next to each other, and the line is cut into one stretch for each scan, as long as the longest chain or as
// makes them equal (McNaughton's wrap-around rule): all scans end at the same time, however many chains there are. A chain is as long as
// its steps and what it takes to begin one.
//
// A chain that crosses a cut goes to two scans. The one after the cut begins with it: it takes the chain's first steps, and leaves the
// state for the one before the cut, which ends with its last steps. No stretch is shorter than a chain, so the state is there before it is needed
// if both began together. The one that waits is the later of the two in the grid: it never keeps the other from starting.
#pragma once

#include "../device/chunk_location.cuh"
#include "step_params.h"

namespace kda {

// The steps of one chain that a scan takes.
struct ScanPiece {
  int64_t sequence;
  int batch, begin, end;  // its tokens, as coordinates of the tensor maps
  int value_head;
  int steps;                 // of the chain
  int first_step, end_step;  // of the piece

  __device__ __forceinline__ int token_of(int step) const { return begin + step * kStepTokens; }
  // Tokens of a step: kStepTokens but for the last of the chain.
  __device__ __forceinline__ int tokens(int step) const { return min(end - token_of(step), kStepTokens); }
  __device__ __forceinline__ bool is_begin() const { return first_step == 0; }
  __device__ __forceinline__ bool is_end() const { return end_step == steps; }
};

__device__ __forceinline__ int steps_of(const SequenceRange& range) {
  return static_cast<int>((range.end - range.begin + kStepTokens - 1) / kStepTokens);
}

// What a chain takes beside its steps, as a number of steps: loads and stores of its state, an empty pipeline.
inline constexpr int kStepsToBegin = 4;

// A scan's stretch of the line, and the first chain in it.
struct ScanStretch {
  int64_t begin, end;   // on the line
  int64_t chain_begin;  // where that chain begins, at most `begin`
  int64_t sequence;     // of that chain; the number of sequences: there is none
  int steps;            // in the stretch
  int value_head;       // of that chain
};

// Goes through the pieces of a stretch, those of chains without steps included.
struct PieceWalk {
  const ChunkFwdParams& call;
  const ScanStretch& stretch;
  int64_t chain_begin;
  ScanPiece piece;

  __device__ __forceinline__ PieceWalk(const ChunkFwdParams& call, const ScanStretch& stretch)
      : call(call), stretch(stretch), chain_begin(stretch.chain_begin) {
    piece.sequence = stretch.sequence;
    piece.value_head = stretch.value_head;
    enter_sequence();
    enter();
    if (chain_begin < stretch.begin && piece.end_step == 0 && !done()) next();  // the stretch before has all of it
  }

  __device__ __forceinline__ bool done() const {
    return piece.sequence >= call.problem.sequences || chain_begin >= stretch.end;
  }

  __device__ __forceinline__ void next() {
    chain_begin += piece.steps + kStepsToBegin;
    if (++piece.value_head == call.problem.value_heads) {
      piece.value_head = 0;
      ++piece.sequence;
      enter_sequence();
    }
    enter();
  }

 private:
  __device__ __forceinline__ void enter_sequence() {
    if (piece.sequence >= call.problem.sequences) return;
    const SequenceRange range = sequence_range(call, piece.sequence);
    piece.batch = static_cast<int>(range.batch);
    piece.begin = static_cast<int>(range.begin);
    piece.end = static_cast<int>(range.end);
    piece.steps = steps_of(range);
  }

  __device__ __forceinline__ void enter() {
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
struct StepWalk {
  PieceWalk pieces;
  const int steps;  // of the stretch
  int index;        // of the step, in the stretch
  int token;        // its first, as a coordinate
  int left;         // steps of the piece from this one on

  __device__ __forceinline__ StepWalk(const ChunkFwdParams& call, const ScanStretch& stretch)
      : pieces(call, stretch), steps(stretch.steps), index(0) {
    if (!done()) enter(0);
  }

  __device__ __forceinline__ bool done() const { return index >= steps; }
  // kStepTokens but for the last step of the chain.
  __device__ __forceinline__ int tokens() const { return min(pieces.piece.end - token, kStepTokens); }

  // Whether that led to another piece.
  __device__ __forceinline__ bool skip(int count) {
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
  __device__ __forceinline__ void enter(int beyond) {
    while (beyond >= pieces.piece.end_step - pieces.piece.first_step) {
      beyond -= pieces.piece.end_step - pieces.piece.first_step;
      pieces.next();
    }
    const int step = pieces.piece.first_step + beyond;
    token = pieces.piece.token_of(step);
    left = pieces.piece.end_step - step;
  }
};

// What the threads of a CTA exchange to find stretches.
struct StretchSearch {
  static constexpr int kMostWarps = 32, kMostStretches = 4;
  int64_t lengths[kMostWarps];
  int longest[kMostWarps];
  int64_t steps_before[kMostStretches][2];  // on the line, before the begin and before the end of a stretch
};

// The stretches first, first + 1, .. (modulo `count`) of `count`, kStretches of them, into `found`, in shared memory. Called by all threads of the
// CTA; ends with a barrier. `search` is in shared memory.
template <int kStretches>
__device__ __forceinline__ void find_stretches(const ChunkFwdParams& call, int64_t first_index, int64_t count,
                                               ScanStretch* found, StretchSearch& search) {
  static_assert(kStretches <= StretchSearch::kMostStretches);
  const int64_t sequences = call.problem.sequences, heads = call.problem.value_heads;
  const int thread = threadIdx.x;
  const auto index_of = [&](int which) { return (first_index + which) % count; };
  // By the length of the line and the steps of the longest chain.
  const auto stretch_of = [&](int64_t index, int64_t length, int longest) {
    const int64_t share = max((length + count - 1) / count, int64_t{longest} + kStepsToBegin);
    return ScanStretch{index * share, (index + 1) * share, 0, sequences, 0, 0};
  };
  // Among chains of the same number of steps: how many chains, and how many steps, before a place.
  struct Place {
    int64_t chain, steps;
  };
  const auto place_of = [&](int64_t offset, int steps) {
    const int64_t chain = offset / (steps + kStepsToBegin);
    return Place{chain, chain * steps + min(offset - chain * (steps + kStepsToBegin), int64_t{steps})};
  };
  if (call.cu_seqlens == nullptr) {
    if (thread < kStretches) {
      const int steps = steps_of(sequence_range(call, 0));
      const int64_t chains = sequences * heads;
      ScanStretch stretch = stretch_of(index_of(thread), chains * (steps + kStepsToBegin), steps);
      const Place first = place_of(stretch.begin, steps), end = place_of(stretch.end, steps);
      const int64_t all = chains * steps;
      stretch.steps = static_cast<int>(min(end.steps, all) - min(first.steps, all));
      if (first.chain < chains) {
        stretch.chain_begin = first.chain * (steps + kStepsToBegin);
        stretch.sequence = first.chain / heads;
        stretch.value_head = static_cast<int>(first.chain % heads);
      }
      found[thread] = stretch;
    }
    __syncthreads();
    return;
  }

  if (sequences * heads <= count) {  // a chain for each: nothing is to be shared, whatever the lengths are
    if (thread < kStretches) {
      const int64_t index = index_of(thread), sequence = index / heads;
      const int steps = sequence < sequences ? steps_of(sequence_range(call, sequence)) : 0;
      found[thread] = {0, steps + kStepsToBegin, 0, sequence, steps, static_cast<int>(index % heads)};
    }
    __syncthreads();
    return;
  }

  // Each thread counts the steps of its share of the sequences.
  const int threads = blockDim.x, warp = thread >> 5, lane = thread & 31;
  const int64_t share = (sequences + threads - 1) / threads;
  const int64_t first = min(thread * share, sequences), end = min(first + share, sequences);
  const auto length_of = [&](int steps) { return heads * (steps + kStepsToBegin); };
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
  if (thread < kStretches) {
    found[thread] = stretch_of(index_of(thread), total, longest);
    // If the line ends first.
    const int64_t all = total - sequences * heads * kStepsToBegin;
    search.steps_before[thread][0] = search.steps_before[thread][1] = all;
  }
  __syncthreads();
  // The places of begin and end are found by those whose share they are in.
#pragma unroll 1
  for (int n = 0; n < 2 * kStretches; ++n) {
    const int which = n / 2, is_end = n % 2;
    const ScanStretch stretch = stretch_of(index_of(which), total, longest);
    const int64_t place = is_end ? stretch.end : stretch.begin;
    if (!(before <= place && place < before + length)) continue;
    int64_t at = before;
    for (int64_t i = first; i < end; ++i) {
      const int steps = steps_of(sequence_range(call, i));
      if (place < at + length_of(steps)) {
        const Place here = place_of(place - at, steps);
        // Before the sequence there are i times heads chains.
        search.steps_before[which][is_end] = at - i * heads * kStepsToBegin + here.steps;
        if (!is_end) {
          found[which].chain_begin = at + here.chain * (steps + kStepsToBegin);
          found[which].sequence = i;
          found[which].value_head = static_cast<int>(here.chain);
        }
        break;
      }
      at += length_of(steps);
    }
  }
  __syncthreads();
  if (thread < kStretches) {
    found[thread].steps = static_cast<int>(search.steps_before[thread][1] - search.steps_before[thread][0]);
  }
  __syncthreads();
}

}  // namespace kda
