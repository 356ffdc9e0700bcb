"""How the composite implementation cuts its work: chunks of 64 tokens, in segments that one call of its body takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .conventions import CHUNK_TOKENS


@dataclass(frozen=True)
class Segment:
    """Consecutive chunks of a group of sequences, step-major: all chunks c of the sequences, then all chunks c + 1, ..

    The sequences of a group are sorted by length, longest first: those with a chunk c are the first ``active[c]`` of
    the group.
    """

    sequences: list[int]  # of the group, longest first
    active: list[int]  # for each step: how many of them have a chunk there
    slots: list[int]  # [rows] slot of the chunk in chunk_states
    token_range: tuple[int, int] | None  # flat tokens, if the rows are adjacent full chunks (no index needed then)
    index: Tensor | None  # [rows * C] flat token of each row; behind the end of a sequence its last token
    valid: Tensor | None  # [rows, C] bool: not behind the end; None if all are valid


def sequence_spans(
    batch: int, tokens: int, cu_seqlens: Tensor | None
) -> tuple[list[tuple[int, int]], list[int], tuple[int, int]]:
    """(first flat token, length) of each sequence, its first slot in chunk_states, and that tensor's leading shape."""
    if cu_seqlens is None:
        chunks = -(-tokens // CHUNK_TOKENS)
        return [(b * tokens, tokens) for b in range(batch)], [b * chunks for b in range(batch)], (batch, chunks)
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or any(a > b for a, b in zip(offsets[:-1], offsets[1:], strict=True)) or offsets[-1] > tokens:
        raise ValueError(
            f"kda::chunk_fwd: argument `cu_seqlens`: expected offsets from 0, never decreasing, up to T = {tokens}, "
            f"got {offsets if len(offsets) <= 16 else [*offsets[:8], '..', *offsets[-8:]]}"
        )
    spans = [(begin, end - begin) for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]
    slots = [begin // CHUNK_TOKENS + n for n, (begin, _) in enumerate(spans)]
    return spans, slots, (1, tokens // CHUNK_TOKENS + len(spans))


def plan_segments(
    spans: Sequence[tuple[int, int]], first_slots: Sequence[int], max_rows: int, device: torch.device
) -> Iterator[list[Segment]]:
    """For each group of sequences its segments, in the order in which they run. Empty sequences are in no group.

    Args:
        spans, first_slots: as :func:`sequence_spans` gives them.
        max_rows: chunks of a segment, and sequences of a group, at most.
        device: of the tensors of the segments.
    """
    order = sorted((n for n, (_, length) in enumerate(spans) if length > 0), key=lambda n: -spans[n][1])
    for first in range(0, len(order), max_rows):
        group = order[first : first + max_rows]
        chunks = [-(-spans[n][1] // CHUNK_TOKENS) for n in group]
        segments, active, rows = [], [], []
        for step in range(chunks[0]):
            count = sum(c > step for c in chunks)
            if active and len(rows) + count > max_rows:
                segments.append(_segment(group, active, rows, spans, first_slots, device))
                active, rows = [], []
            active.append(count)
            rows += [(n, step) for n in group[:count]]
        segments.append(_segment(group, active, rows, spans, first_slots, device))
        yield segments


def _segment(
    group: list[int],
    active: list[int],
    rows: list[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    first_slots: Sequence[int],
    device: torch.device,
) -> Segment:
    """The segment of ``rows`` (sequence, chunk)."""
    begins = [spans[n][0] + step * CHUNK_TOKENS for n, step in rows]
    counts = [min(CHUNK_TOKENS, spans[n][1] - step * CHUNK_TOKENS) for n, step in rows]
    slots = [first_slots[n] + step for n, step in rows]
    full = all(count == CHUNK_TOKENS for count in counts)
    if full and all(begin == begins[0] + i * CHUNK_TOKENS for i, begin in enumerate(begins)):
        return Segment(group, active, slots, (begins[0], begins[-1] + CHUNK_TOKENS), None, None)
    offsets = torch.arange(CHUNK_TOKENS).expand(len(rows), -1)
    last = torch.tensor(counts).unsqueeze(1) - 1
    index = (torch.tensor(begins).unsqueeze(1) + offsets.minimum(last)).flatten()
    valid = None if full else (offsets <= last).to(device)
    return Segment(group, active, slots, None, index.to(device), valid)


def take(x: Tensor, segment: Segment) -> Tensor:
    """The chunks of the segment [rows, C, ...] of a flat tensor [B * T, ...]; behind the end of a sequence its last
    token is repeated.
    """
    if segment.token_range is not None:
        tokens = x[segment.token_range[0] : segment.token_range[1]]
    else:
        tokens = x.index_select(0, segment.index)
    return tokens.unflatten(0, (-1, CHUNK_TOKENS))


def put(destination: Tensor, chunks: Tensor, segment: Segment) -> None:
    """Writes chunks of the segment [rows, C, ...] to a flat tensor [B * T, ...], without what is behind the end of a
    sequence.
    """
    if segment.token_range is not None:
        tokens = destination[segment.token_range[0] : segment.token_range[1]]
        tokens.unflatten(0, (-1, CHUNK_TOKENS)).copy_(chunks)
    elif segment.valid is not None:
        index = segment.index[segment.valid.flatten()]
        destination.index_copy_(0, index, chunks[segment.valid].to(destination.dtype))
    else:
        destination.index_copy_(0, segment.index, chunks.flatten(0, 1).to(destination.dtype))
