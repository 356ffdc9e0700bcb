"""How a time is taken. Every number comes with its samples and with the clocks before and after.

GPU time is that of CUDA-graph replays: no host in it. Each replay calls every set of inputs once or more in turn;
together the sets exceed the L2 cache (bench.inputs), so no call finds its inputs there. Calls and replays for warming
up come first and are in no sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.devices import Device

__all__ = ["Budget", "Statistics", "Timing", "copy_bandwidth", "host_time", "peak_memory", "time_events", "time_graph"]

Call = Callable[[], Any]

WARMUP_ROUNDS = 2  # over all sets of inputs: loads and tunes kernels, fills the allocator
WARMUP_REPLAYS = 2
WARMUP_US = 30e3  # replays before the first sample also last at least so long: the clocks rise under load
SHORTEST_SAMPLE_US = 1000.0  # a sample is long against the resolution of events and the start of a replay

HOST_CALLS = 20  # a queue this short never makes the host wait for the device
HOST_REPEATS = 7

COPY_BYTES = 1 << 31
COPY_REPEATS = 21


@dataclass(frozen=True)
class Budget:
    """How long the samples of one measurement may take, and how many there are."""

    total_us: float = 250e3
    fewest: int = 11
    most: int = 60


@dataclass(frozen=True)
class Statistics:
    """Of the samples of one quantity; the 10th and 90th percentile are what is called the spread."""

    median: float
    p10: float
    p90: float
    min: float
    samples: list[float]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Statistics:
        ordered = sorted(samples)

        def percentile(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = math.floor(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        return cls(percentile(0.5), percentile(0.1), percentile(0.9), ordered[0], list(samples))

    def as_json(self) -> dict[str, Any]:
        return _rounded(asdict(self))


@dataclass
class Timing:
    """Microseconds of one call, and how they were taken."""

    us: Statistics
    method: str  # "graph" or "events"
    calls_per_sample: int
    warmup_calls: int
    clocks: dict[str, Any] = field(default_factory=dict)  # before, after: see bench.devices.CLOCK_FIELDS

    def as_json(self) -> dict[str, Any]:
        return _rounded(asdict(self))


def time_graph(device: Device, calls: Sequence[Call], budget: Budget = Budget()) -> Timing:  # noqa: B008 (frozen)
    """Time of one of the calls, from replays of a graph of all of them."""
    estimate = _warm_up(device, calls)
    rounds = _rounds(estimate * len(calls))
    replay = device.capture([call for _ in range(rounds) for call in calls])
    in_replay = rounds * len(calls)
    replay_us = max(estimate * in_replay, 1.0)
    replays = max(WARMUP_REPLAYS, math.ceil(WARMUP_US / replay_us))
    for _ in range(replays):
        replay()
    device.synchronize()
    samples, clocks = _sample(device, replay, _count(replay_us, budget))
    warmup = WARMUP_ROUNDS * len(calls) + replays * in_replay
    return Timing(Statistics.of([x / in_replay for x in samples]), "graph", in_replay, warmup, clocks)


def time_events(device: Device, calls: Sequence[Call], budget: Budget = Budget()) -> Timing:  # noqa: B008 (frozen)
    """Time of one of the calls from events around calls back to back: GPU or host time, whichever is longer."""
    estimate = _warm_up(device, calls)
    rounds = _rounds(estimate * len(calls))

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    in_sample = rounds * len(calls)
    run()
    device.synchronize()
    samples, clocks = _sample(device, run, _count(max(estimate * in_sample, 1.0), budget))
    warmup = WARMUP_ROUNDS * len(calls) + in_sample
    return Timing(Statistics.of([x / in_sample for x in samples]), "events", in_sample, warmup, clocks)


def host_time(
    device: Device, calls: Sequence[Call], count: int = HOST_CALLS, repeats: int = HOST_REPEATS
) -> Statistics:
    """Microseconds of the host for one call that returns before the device is done, from ``count`` calls a sample."""
    for call in calls:
        call()
    samples = []
    for _ in range(repeats):
        device.synchronize()
        start = device.now()
        for i in range(count):
            calls[i % len(calls)]()
        samples.append((device.now() - start) * 1e6 / count)
    device.synchronize()
    return Statistics.of(samples)


def peak_memory(device: Device, call: Call) -> int | None:
    """Most bytes allocated during a call beyond its inputs: outputs, workspace and temporaries."""
    call()
    device.start_peak()
    result = call()
    peak = device.peak_bytes()
    del result
    return peak


def copy_bandwidth(device: Device, copied: int = COPY_BYTES) -> list[float]:
    """Samples of GB/s of a large copy inside the device's memory, bytes read and bytes written counted."""
    source = torch.empty(copied // 2, dtype=torch.bfloat16, device=device.torch_device)
    source.normal_()  # not zeros
    target = torch.empty_like(source)
    target.copy_(source)
    samples, _ = _sample(device, lambda: target.copy_(source), COPY_REPEATS)
    return [2 * source.numel() * source.element_size() / (us * 1e3) for us in samples]


def _warm_up(device: Device, calls: Sequence[Call]) -> float:
    """Runs every call WARMUP_ROUNDS times. Returns the microseconds of one call in the last round."""
    start, stop = device.event(), device.event()
    for _ in range(WARMUP_ROUNDS):
        device.synchronize()
        start.record()
        for call in calls:
            call()
        stop.record()
    device.synchronize()
    return stop.us_since(start) / len(calls)


def _rounds(round_us: float) -> int:
    return max(1, math.ceil(SHORTEST_SAMPLE_US / max(round_us, 1.0)))


def _count(sample_us: float, budget: Budget) -> int:
    return int(min(max(budget.total_us / sample_us, budget.fewest), budget.most))


def _sample(device: Device, run: Call, count: int) -> tuple[list[float], dict[str, Any]]:
    """Microseconds of each of ``count`` runs, all queued before the first is read; and the clocks before and after."""
    before = device.clocks()
    events = [(device.event(), device.event()) for _ in range(count)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    device.synchronize()
    after = device.clocks()
    return [stop.us_since(start) for start, stop in events], {"before": before, "after": after}


def _rounded(value: Any, digits: int = 3) -> Any:
    """Floats to nanoseconds and the like: files stay small and readable."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {name: _rounded(x, digits) for name, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x, digits) for x in value]
    return value
