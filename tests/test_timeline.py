"""The timeline inside kernels, as far as no GPU is needed: how its buffer is read, and what is made of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "tools").is_dir():
    pytest.skip("the tools are in the source tree only", allow_module_level=True)
sys.path.append(str(ROOT / "tools"))

import timeline  # noqa: E402

BEGIN, SOLVED, CHUNK, END = 10, 11, 43, 44


def buffer_of(marks: list[tuple[int, int, int, int, int]], counted: int | None = None, places: int = 64) -> bytes:
    """As mark() leaves it: nanoseconds, event, index, CTA, multiprocessor of each."""
    buffer = bytearray(places * timeline.PLACE.size)
    timeline.PLACE.pack_into(buffer, 0, len(marks) if counted is None else counted, 0, 0, 0, 0)
    for at, mark in enumerate(marks, start=1):
        timeline.PLACE.pack_into(buffer, at * timeline.PLACE.size, *mark)
    return bytes(buffer)


def three_calls() -> list[tuple[int, int, int, int, int]]:
    """Two CTAs of stage 1; two of stage 4, of which one has two chunks; 100 us a call, the last marks first."""
    of_call = (
        (0, BEGIN, 0, 0),
        (500, BEGIN, 0, 1),
        (1_000, SOLVED, 5, 0),
        (30_000, CHUNK, 5, 0),
        (70_000, CHUNK, 6, 0),
        (90_000, END, 0, 0),
        (40_000, CHUNK, 4, 1),
        (60_000, END, 0, 1),
    )
    begins = (1_000_000 + call * 100_000 for call in range(3))
    marks = [(begin + ns, event, index, cta, 7) for begin in begins for ns, event, index, cta in of_call]
    return marks[::-1]


def test_marks_are_read_in_order_of_time() -> None:
    marks = timeline.read_marks(buffer_of(three_calls()))
    assert len(marks) == 24 and [mark.us for mark in marks] == sorted(mark.us for mark in marks)
    assert marks[0] == timeline.Mark(us=0.0, event=BEGIN, index=0, cta=0, multiprocessor=7)


def test_marks_that_found_no_place_are_left_out() -> None:
    """The count goes on when the buffer is full."""
    assert len(timeline.read_marks(buffer_of(three_calls()[:5], counted=900, places=6))) == 5


def test_call_in_the_middle() -> None:
    chosen, length_us = timeline.call_in_the_middle(timeline.read_marks(buffer_of(three_calls())))
    assert length_us == pytest.approx(100.0) and len(chosen) == 8
    assert chosen[0].us == 0.0 and chosen[-1].us == pytest.approx(90.0)


def test_durations_and_report() -> None:
    chosen, length_us = timeline.call_in_the_middle(timeline.read_marks(buffer_of(three_calls())))
    durations = timeline.chunk_durations(chosen)
    assert [ctas for ctas, _ in durations] == [2, 1]
    assert [us for _, us in durations] == pytest.approx([30.0, 20.0])  # the median of 40 and 20; 20
    lines = timeline.report(chosen, length_us)
    assert lines[0].startswith("100.0 us") and lines[-1].endswith("1: 30.0 (2)  2: 20.0 (1)")
    assert any(line.startswith("stage 1 begins") and " 2 " in line for line in lines)


def test_fewer_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="expected marks of 3 calls, got 2"):
        timeline.call_in_the_middle(timeline.read_marks(buffer_of([(1, BEGIN, 0, 0, 0), (2, BEGIN, 0, 0, 0)])))


def test_events_are_those_of_the_kernels() -> None:
    """By number."""
    header = (ROOT / "csrc/kda/device/timeline.cuh").read_text()
    marks = re.search(r"enum class Mark : uint32_t {(.*?)};", header, re.DOTALL)
    assert marks is not None
    assert {int(number) for number in re.findall(r"= (\d+),", marks[1])} == set(timeline.EVENTS)
