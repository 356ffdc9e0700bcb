#!/usr/bin/env python3
"""What the CTAs of a backward do when: a timeline inside its kernels, where profilers show a kernel as one bar.

    KDA_TIMELINE=1 make build
    python tools/timeline.py [--shape b12_2048] [--family random] [--json FILE]

The call is captured three times in one graph, as it is timed, and the second of them is shown: for each mark of
csrc/kda/device/timeline.cuh how many there are and when, in microseconds from the beginning of stage 1 (quantiles); and
how long a CTA of stage 4 takes for its first chunk, its second one, and so on. Marks cost time themselves, up to a
microsecond where many CTAs make one at once. Build again without KDA_TIMELINE afterwards.

Exit status 0: shown. 1: the library was built without marks. 2: wrong arguments, or no device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EVENTS = {
    10: "stage 1 begins",
    11: "stage 1, chunk",
    12: "stage 1 ends",
    20: "state recurrence begins",
    21: "state recurrence, stored to chunk",
    30: "reverse recurrence begins",
    31: "reverse recurrence, stored to chunk",
    40: "stage 4 begins",
    41: "stage 4, waits for a chunk",
    42: "stage 4, it is there",
    43: "stage 4, chunk",
    44: "stage 4 ends",
}
SOLVE_BEGIN, GRADIENTS_CHUNK, GRADIENTS_END = 10, 43, 44
PLACE = struct.Struct("<QIIII8x")  # of a mark; the first place has the count
CALLS = 3
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
MOST_CHUNKS = 12  # of a CTA, that are shown
BUFFER_BYTES = 1 << 26


@dataclass(frozen=True)
class Mark:
    """One of timeline.cuh; ``us`` from the beginning of the call."""

    us: float
    event: int
    index: int
    cta: int
    multiprocessor: int


def read_marks(buffer: bytes) -> list[Mark]:
    """Marks ordered by time, which is in microseconds from the first of them."""
    (count,) = struct.unpack_from("<I", buffer)
    count = min(count, len(buffer) // PLACE.size - 1)
    found = sorted(PLACE.iter_unpack(buffer[PLACE.size : (count + 1) * PLACE.size]))
    return [Mark((ns - found[0][0]) / 1000, *rest) for ns, *rest in found]  # the clock has too many digits for a float


def call_in_the_middle(marks: Sequence[Mark]) -> tuple[list[Mark], float]:
    """The marks of the second of three calls, from its beginning on, and its length up to the beginning of the third.

    Stage 1 waits for all of the call before, so that no other call has marks in between.

    Raises:
        ValueError: there are no marks of three calls.
    """
    begins = [mark.us for mark in marks if mark.event == SOLVE_BEGIN]
    if len(begins) < CALLS or len(begins) % CALLS:
        raise ValueError(f"expected marks of {CALLS} calls, got {len(begins)} of the beginning of stage 1")
    ctas = len(begins) // CALLS
    first, following = begins[ctas], begins[2 * ctas]
    return [replace(mark, us=mark.us - first) for mark in marks if first <= mark.us < following], following - first


def quantiles(values: Iterable[float]) -> list[float]:
    """Those of QUANTILES, without interpolation; of at least one value."""
    ordered = sorted(values)
    return [ordered[round(q * (len(ordered) - 1))] for q in QUANTILES]


def chunk_durations(marks: Sequence[Mark]) -> list[tuple[int, float]]:
    """Of the first chunk of a CTA of stage 4, the second, and so on: how many CTAs have one, and the median time."""
    times: dict[int, list[float]] = {}
    for mark in marks:
        if mark.event in (GRADIENTS_CHUNK, GRADIENTS_END):
            times.setdefault(mark.cta, []).append(mark.us)
    by_order: list[list[float]] = []
    for of_cta in times.values():
        for order, (begin, end) in enumerate(zip(of_cta, of_cta[1:], strict=False)):
            if order == len(by_order):
                by_order.append([])
            by_order[order].append(end - begin)
    return [(len(durations), statistics.median(durations)) for durations in by_order]


def report(marks: Sequence[Mark], length_us: float) -> list[str]:
    """The lines of a table."""
    head = " ".join(f"{f'{q:.0%}':>8}" for q in QUANTILES)
    lines = [f"{length_us:.1f} us from call to call", f"{'':36}{'count':>7} {head}"]
    for event, name in EVENTS.items():
        times = [mark.us for mark in marks if mark.event == event]
        if times:
            lines.append(f"{name:36}{len(times):7} " + " ".join(f"{us:8.1f}" for us in quantiles(times)))
    durations = chunk_durations(marks)[:MOST_CHUNKS]
    if durations:
        shown = "  ".join(f"{order + 1}: {us:.1f} ({ctas})" for order, (ctas, us) in enumerate(durations))
        lines.append(f"chunks of a CTA of stage 4, us (CTAs): {shown}")
    return lines


def record(shape_name: str, family: str) -> bytes:
    """The buffer after a replay of the graph.

    Raises:
        ValueError: the shape or the family is unknown.
    """
    import torch

    from bench import inputs, shapes
    from bench.backward_implementations import OurBackward

    device = torch.device("cuda")
    (shape,) = shapes.select(shapes.BACKWARD_BOARD, [shape_name])
    buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8, device=device)
    os.environ["KDA_TIMELINE_BUFFER"] = f"{buffer.data_ptr()} {BUFFER_BYTES // PLACE.size}"
    call = OurBackward().call(inputs.make_processed_inputs(shape, family, 1, device))
    call.run()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call.run()
    graph.replay()
    torch.cuda.synchronize()
    buffer.zero_()
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    return bytes(buffer.cpu().numpy())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="b12_2048", help="of the board of the backward (default b12_2048)")
    parser.add_argument("--family", default="random", choices=("random", "long"), help="of gates (default random)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all marks of the call")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("timeline: there is no CUDA device", file=sys.stderr)
        return 2
    try:
        marks = read_marks(record(args.shape, args.family))
    except ValueError as error:
        print(f"timeline: {error}", file=sys.stderr)
        return 2
    if not marks:
        print("timeline: no marks; build with KDA_TIMELINE=1", file=sys.stderr)
        return 1
    chosen, length_us = call_in_the_middle(marks)
    print("\n".join(report(chosen, length_us)))
    if args.json:
        args.json.write_text(json.dumps([vars(mark) for mark in chosen]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
