// From a chunk slot to its sequence and tokens, and from a segment slot to its sequence and chunks (see chunk_slots and
// segment_slots in plan.h), on the device, so that the host never reads cu_seqlens.
#pragma once

#include "../kda.h"

namespace kda {

// Token range of one sequence, in rows of its batch row. Entries of cu_seqlens are clamped into [0, T] and made
// non-decreasing pairwise, so that no contents of cu_seqlens can lead to an access outside of a tensor.
struct SequenceRange {
  int64_t batch;
  int64_t begin;
  int64_t end;
};

struct ChunkLocation {
  int64_t batch;        // row of the batch dimension
  int64_t first_token;  // first token of the slot in that row
  int tokens;           // valid tokens, 1 .. those of a slot; 0: the slot is unused
};

__host__ __device__ __forceinline__ int64_t cu_seqlens_at(const ChunkFwdParams& p, int64_t index) {
  const int64_t value = p.cu_seqlens_int64 ? static_cast<const int64_t*>(p.cu_seqlens)[index]
                                           : static_cast<const int32_t*>(p.cu_seqlens)[index];
  return min(max(value, int64_t{0}), p.problem.tokens);
}

__host__ __device__ __forceinline__ SequenceRange sequence_range(const ChunkFwdParams& p, int64_t sequence) {
  if (p.cu_seqlens == nullptr) return {sequence, 0, p.problem.tokens};
  const int64_t begin = cu_seqlens_at(p, sequence);
  return {0, begin, max(begin, cu_seqlens_at(p, sequence + 1))};
}

// The first of a sequence's slots of slot_tokens tokens.
__device__ __forceinline__ int64_t first_slot_of(const ChunkFwdParams& p, int64_t sequence, const SequenceRange& range,
                                                 int slot_tokens) {
  if (p.cu_seqlens == nullptr) return sequence * ((p.problem.tokens + slot_tokens - 1) / slot_tokens);
  return range.begin / slot_tokens + sequence;
}

__device__ __forceinline__ int64_t first_chunk_slot(const ChunkFwdParams& p, int64_t sequence,
                                                    const SequenceRange& range) {
  return first_slot_of(p, sequence, range, kChunkTokens);
}

// The last sequence whose first slot is <= slot, found by the whole warp: 32 probes a round. A slot holds slot_tokens
// tokens.
__device__ __forceinline__ int64_t find_sequence(const ChunkFwdParams& p, int64_t slot, int64_t slot_tokens, int lane) {
  int64_t low = 0, high = p.problem.sequences;
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32;
    const int64_t probe = low + lane * step;
    const bool at_or_before = probe < high && cu_seqlens_at(p, probe) / slot_tokens + probe <= slot;
    const unsigned hits = __ballot_sync(0xffffffffu, at_or_before);
    low += (hits == 0 ? 0 : 31 - __clz(hits)) * step;
    high = min(high, low + step);
  }
  return low;
}

struct SlotOfSequence {
  int64_t sequence;
  ChunkLocation location;
  bool is_first, is_last;  // whether it has the first tokens of the sequence, or the last ones
};

// Of a slot of slot_tokens tokens. Called by whole warps; every warp gets the same answer.
__device__ __forceinline__ SlotOfSequence find_slot(const ChunkFwdParams& p, int64_t slot, int slot_tokens, int lane) {
  if (p.problem.sequences == 0) return {0, {0, 0, 0}, false, false};
  int64_t sequence;
  if (p.cu_seqlens == nullptr) {
    // A grid has fewer than 2^31 slots; divisions of 64 bits take a hundred instructions.
    const int64_t slots = (p.problem.tokens + slot_tokens - 1) / slot_tokens;
    sequence = static_cast<uint32_t>(slot) / static_cast<uint32_t>(slots);
  } else {
    sequence = find_sequence(p, slot, slot_tokens, lane);
  }
  const SequenceRange range = sequence_range(p, sequence);
  const int64_t first_token = range.begin + (slot - first_slot_of(p, sequence, range, slot_tokens)) * slot_tokens;
  const int64_t tokens = min(range.end - first_token, int64_t{slot_tokens});
  return {sequence,
          {range.batch, first_token, static_cast<int>(max(tokens, int64_t{0}))},
          tokens > 0 && first_token == range.begin,
          tokens > 0 && first_token + tokens == range.end};
}

__device__ __forceinline__ ChunkLocation locate_slot(const ChunkFwdParams& p, int64_t slot, int slot_tokens, int lane) {
  return find_slot(p, slot, slot_tokens, lane).location;
}

// Of a chunk of one of sequences of equal lengths, which are rows of the batch.
__device__ __forceinline__ ChunkLocation locate_chunk_of_row(const ChunkFwdParams& p, uint32_t row, uint32_t chunk) {
  const int64_t first_token = int64_t{chunk} * kChunkTokens;
  return {row, first_token, static_cast<int>(min(p.problem.tokens - first_token, int64_t{kChunkTokens}))};
}

__device__ __forceinline__ ChunkLocation locate_chunk(const ChunkFwdParams& p, int64_t slot, int lane) {
  return locate_slot(p, slot, kChunkTokens, lane);
}

// The segments of one sequence: slots first_slot .. first_slot + segments - 1. Every sequence has one, also if it is
// empty.
struct SegmentRange {
  int64_t first_slot;
  int64_t segments;
};

// Segments have segment_chunks chunks, the last one of a sequence the rest; 0: a sequence is one segment, and a slot a
// sequence.
__device__ __forceinline__ SegmentRange segment_range(const ChunkFwdParams& p, int64_t sequence,
                                                      int64_t segment_chunks) {
  if (segment_chunks == 0) return {sequence, 1};
  const SequenceRange range = sequence_range(p, sequence);
  const int64_t slot_tokens = segment_chunks * kChunkTokens;
  const int64_t segments = max((range.end - range.begin + slot_tokens - 1) / slot_tokens, int64_t{1});
  return {p.cu_seqlens == nullptr ? sequence * segments : range.begin / slot_tokens + sequence, segments};
}

// A run of chunks of one sequence that a scan takes in one go.
struct SegmentLocation {
  int64_t sequence;
  int64_t first_chunk;  // of the sequence
  int64_t first_chunk_slot;
  int64_t chunks;  // 0 only in a sequence without tokens
  bool is_used;    // whether the slot holds a segment
  bool is_first;   // of its sequence
  bool is_last;
};

// Called by whole warps; every warp gets the same answer.
__device__ __forceinline__ SegmentLocation locate_segment(const ChunkFwdParams& p, int64_t slot, int64_t segment_chunks,
                                                          int lane) {
  int64_t sequence = slot;
  if (segment_chunks != 0) {
    sequence = p.cu_seqlens == nullptr ? slot / segment_range(p, 0, segment_chunks).segments
                                       : find_sequence(p, slot, segment_chunks * kChunkTokens, lane);
  }
  const SegmentRange segments = segment_range(p, sequence, segment_chunks);
  const int64_t index = slot - segments.first_slot;
  const SequenceRange range = sequence_range(p, sequence);
  const int64_t chunks = (range.end - range.begin + kChunkTokens - 1) / kChunkTokens - index * segment_chunks;
  return {sequence,
          index * segment_chunks,
          first_chunk_slot(p, sequence, range) + index * segment_chunks,
          segment_chunks == 0 ? chunks : min(chunks, segment_chunks),
          index >= 0 && index < segments.segments,
          index == 0,
          index == segments.segments - 1};
}

}  // namespace kda
