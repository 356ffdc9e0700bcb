"""Times what the planner chooses between over a grid of (N, H, T): the planner's constants come from here.

    python -m bench.sweep                      builds on `make cmake`: build/cmake/bench_chunk_fwd does the timing
    python -m bench.sweep --check [FILE]       how good the plan's choices are on the newest (or this) sweep
    python -m bench.sweep --full               a finer grid

Writes bench/results/sweep-*.json. A choice is a set of flags of the binary that override the plan; without any, the
plan's own choice is measured. It is good where it is within 5 % of the best one measured; --check asks for that on 95 %
of the grid. A sweep judges only between the paths that it measured: points for which the plan now takes another do not
count, and are listed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bench import results
from bench.devices import CudaDevice
from bench.environment import ROOT, commit_state, describe
from bench.implementations import forward_plan
from bench.shapes import Shape

__all__ = ["CHOICES", "Choice", "PLANNED", "Quality", "main", "quality"]

EXIT_GOOD, EXIT_POOR, EXIT_USAGE = 0, 1, 2
BINARY = ROOT / "build" / "cmake" / "bench_chunk_fwd"

TOLERANCE = 0.05  # of the best time: as far as a good choice may be off
GOOD_SHARE = 0.95  # of the grid

Json = dict[str, Any]


# Entries of the plan's JSON that say what runs, and what a plan without them means.
DECISIVE = {"path": None, "value_tile": 0, "clusters": 0, "segment_chunks": 0}


def decisive(plan: Json) -> Json:
    """The entries of a plan that tell it from other plans of the same call."""
    return {name: plan.get(name, default) for name, default in DECISIVE.items()}


def kind_of(plan: Json) -> tuple[Any, bool, bool]:
    """The kernels that a plan runs: its path, whether sequences are cut, and whether chains are dealt out to clusters;
    the fused kernel of past sweeps had none.
    """
    return plan["path"], plan.get("segment_chunks", 0) > 0, plan.get("clusters", 0) > 0


@dataclass(frozen=True)
class Choice:
    """One way to run a call."""

    name: str
    flags: tuple[str, ...]  # of the binary, to force it
    plan: tuple[tuple[str, Any], ...]  # decisive entries of the plan that the flags fix

    def is_choice_of(self, plan: Json) -> bool:
        found = decisive(plan)
        return all(found[name] == value for name, value in self.plan)


def _forced(name: str, **plan: Any) -> Choice:
    flags = [part for entry, value in plan.items() for part in (f"--{entry.replace('_', '-')}", str(value))]
    return Choice(name, tuple(flags), tuple(plan.items()))


PLANNED = Choice("the plan's", (), ())

# The fused kernel has as many clusters as run side by side: fewer are never better. Segments are of the stepwise path,
# 0: no cut; the shorter, the more CTAs, and the more maps to compose. The fused kernel that cuts chains leaves those
# whose gates do not forget to the segments of the stepwise path. The staged path is none to choose: it is for
# inputs that the others cannot read. The plan's own choice comes last: its cut may have any length.
SEGMENT_CHUNKS = (4, 8, 16, 32, 64, 128)
CHOICES = (
    _forced("fused", path="fused"),
    _forced("fused, cut", path="fused_cut"),
    _forced("stepwise, no cut", path="stepwise", segment_chunks=0),
    *(_forced(f"stepwise, segments of {n} chunks", path="stepwise", segment_chunks=n) for n in SEGMENT_CHUNKS),
    PLANNED,
)

# Of sweeps from before there was a stepwise path, which wrote down the names alone.
PAST_CHOICES = tuple(
    _forced(f"staged, value tile {n}", path="staged", value_tile=n, segment_chunks=0) for n in (32, 64, 128)
)

GRID = ((1, 4), (2, 4, 8, 16, 32, 64, 96), (1024, 8192))  # N, H, T of one sequence
FULL_GRID = ((1, 2, 4, 8, 16), (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96), (256, 1024, 4096, 16384))
MOST_TOKEN_HEADS = 1 << 21  # of a point, so that the inputs fit and a run takes seconds

FAMILY = "long"  # bounded, as the fused path needs to be chosen; a cut is dearest where the memory is long
ITERATIONS = 20
TIMEOUT_S = 120


def grid_points(grid: Sequence[Sequence[int]]) -> list[Shape]:
    """The grid as shapes, without points that are too large."""
    points = [
        Shape(f"{N}x{T}_h{H}", (T,) * N, H, group="sweep")
        for N, H, T in product(*grid)
        if N * H * T <= MOST_TOKEN_HEADS
    ]
    return sorted(points, key=lambda p: (p.sequences, p.heads, p.tokens))


def lacking_flags(binary: Path, choices: Iterable[Choice] = CHOICES) -> list[str]:
    """Flags that the choices need and the binary does not know.

    Raises:
        ValueError: the binary is not there or does not run.
    """
    try:
        text = subprocess.run([binary, "--help"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"cannot run {binary} ({error}): build it with make cmake") from error
    known = set(text.split())
    return sorted({flag for c in choices for flag in c.flags if flag.startswith("--") and flag not in known})


def time_point(binary: Path, point: Shape, choice: Choice, folder: Path) -> Json:
    """What the binary says of one choice at one point."""
    output = folder / "result.json"
    output.unlink(missing_ok=True)
    lengths = f"{point.sequences}x{point.lengths[0]}"
    command = [binary, "--lengths", lengths, "--heads", str(point.heads), "--gate", FAMILY, "--json", output]
    command += ["--iterations", str(ITERATIONS), *choice.flags]
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {TIMEOUT_S} s"}
    if done.returncode != 0 or not output.exists():
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    measured = json.loads(output.read_text())
    if not choice.is_choice_of(measured["plan"]):
        return {"error": f"the binary ran another plan: {measured['plan']}"}
    times = {name: measured[name] for name in ("median_us", "min_us", "p90_us", "error_o")}
    return {"plan": decisive(measured["plan"]), **times}


@dataclass(frozen=True)
class Quality:
    """How the plan's choices compare with the best ones measured."""

    points: int  # that count
    poor: dict[str, float]  # by point: time of the plan's choice over the best, where that is beyond the tolerance
    unknown: list[str]  # points whose plan is none of the measured choices
    not_swept: list[str]  # points whose plan takes kernels that this sweep measured nowhere; they do not count

    @property
    def good_share(self) -> float:
        return 1 - (len(self.poor) + len(self.unknown)) / self.points if self.points else 0.0


def quality(sweep: Json) -> Quality:
    """Judges the planner as it is now by a sweep's times. Points at which nothing could be measured do not count."""
    poor, unknown, not_swept, points = {}, [], [], 0
    kinds = {kind_of(plan) for case in sweep["cases"] for plan, _ in _measured(case)}
    environment = sweep["environment"]
    major, minor = map(int, environment["compute_capability"].split("."))
    for case in sweep["cases"]:
        if not (measured := _measured(case)):
            continue
        plan = _plan(case, major * 10 + minor, environment["sm_count"])
        if kind_of(plan) not in kinds:
            not_swept.append(case["shape"])
            continue
        points += 1
        chosen = [us for ran, us in measured if all(decisive(plan)[name] == value for name, value in ran.items())]
        if not chosen:
            unknown.append(case["shape"])
        elif (ratio := chosen[0] / min(us for _, us in measured)) > 1 + TOLERANCE:
            poor[case["shape"]] = ratio
    return Quality(points, poor, unknown, not_swept)


def _measured(case: Json) -> list[tuple[Json, float]]:
    """What ran at a point, as decisive entries of its plan, and its time in microseconds; the plan's own choice last.

    Sweeps of a time with fewer choices did not write down what ran: there the name of the choice says it.
    """
    forced = {choice.name: dict(choice.plan) for choice in (*PAST_CHOICES, *CHOICES)}
    found = [
        (m.get("plan", forced.get(name)), m["median_us"])
        for name, m in sorted(case["measurements"].items(), key=lambda item: item[0] == PLANNED.name)
        if "median_us" in m
    ]
    return [(ran, us) for ran, us in found if ran]


def _plan(case: Json, capability: int, sm_count: int) -> Json:
    lengths, heads = case["lengths"], case["heads"]
    sizes = (heads, heads, case["key_dim"], case["value_dim"])
    varlen = len(lengths) > 1
    plan = torch.ops.kda.plan_chunk_fwd(lengths, 1, *sizes, "bfloat16", varlen, capability, sm_count)
    return json.loads(plan)


def run_sweep(binary: Path, points: Sequence[Shape], console: Console, commit: str | None) -> Json:
    """Times every choice at every point. Returns the content of the sweep's file."""
    created = datetime.now(timezone.utc)
    device = CudaDevice()
    clocks = {"before": device.clocks()}
    cases = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("sweep", total=len(points) * len(CHOICES))
        for number, point in enumerate(points, start=1):
            measurements = {}
            for choice in CHOICES:
                bar.update(task, description=f"{point.name}: {choice.name}")
                measurements[choice.name] = time_point(binary, point, choice, Path(folder))
                bar.advance(task)
            case = {
                "operator": "chunk_fwd",
                "shape": point.name,
                "group": point.group,
                "family": FAMILY,
                "lengths": list(point.lengths),
                "heads": point.heads,
                "key_dim": point.key_dim,
                "value_dim": point.value_dim,
                "plan": forward_plan(point, device.torch_device),
                "measurements": measurements,
            }
            cases.append(case)
            if not console.is_terminal:
                times = {name: m.get("median_us", m.get("error")) for name, m in measurements.items()}
                console.print(f"[{number}/{len(points)}] {point.name}: {times}", markup=False, soft_wrap=True)
    return {
        "format": results.FORMAT,
        "kind": "sweep",
        "created": created.isoformat(timespec="seconds"),
        **commit_state(commit),
        "complete": all("median_us" in m for case in cases for m in case["measurements"].values()),
        "environment": describe(device.torch_device),
        "clocks": clocks | {"after": device.clocks()},
        "cases": cases,
    }


def print_quality(found: Quality, console: Console) -> None:
    console.print(
        f"the plan's choice is within {TOLERANCE:.0%} of the best measured at {found.good_share:.1%} of {found.points} "
        f"points (asked for: {GOOD_SHARE:.0%})"
    )
    for name, ratio in sorted(found.poor.items(), key=lambda item: -item[1]):
        console.print(f"  {name}: {ratio:.2f} times the best", markup=False)
    for name in found.unknown:
        console.print(f"  {name}: the plan is none of the measured choices", markup=False)
    if found.not_swept:
        console.print(
            f"not counted: {len(found.not_swept)} points whose plan takes kernels that were not swept: "
            f"{', '.join(found.not_swept)}",
            markup=False,
            soft_wrap=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Makes or judges a sweep. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", nargs="?", type=Path, help="of a sweep, for --check (default: the newest)")
    add("--check", action="store_true", help="judge the planner by a sweep; exit status 1 if it is poor")
    add("--full", action="store_true", help="the finer grid")
    add("--binary", type=Path, default=BINARY, help="default: %(default)s")
    add("--results", type=Path, default=results.RESULTS, metavar="FOLDER", help="where the JSON goes")
    add("--commit", help="of this tree, where it is a copy without git: COMMIT or COMMIT-dirty")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    try:
        if args.check:
            path = args.file or results.newest("sweep", args.results, complete=False)
            if path is None:
                print(f"bench.sweep: no sweep in {args.results} yet")
                return EXIT_GOOD
            sweep = results.load(path)
        else:
            if not torch.cuda.is_available():
                raise ValueError("no CUDA device")
            if lacking := lacking_flags(args.binary):
                raise ValueError(f"{args.binary} does not know {', '.join(lacking)}")
            sweep = run_sweep(args.binary, grid_points(FULL_GRID if args.full else GRID), console, args.commit)
            path = results.save(sweep, args.results)
            console.print(f"written: {path}", soft_wrap=True)
    except ValueError as error:
        print(f"bench.sweep: {error}", file=sys.stderr)
        return EXIT_USAGE
    found = quality(sweep)
    print_quality(found, console)
    nothing_to_judge = found.not_swept and not found.points
    return EXIT_GOOD if nothing_to_judge or found.good_share >= GOOD_SHARE else EXIT_POOR


if __name__ == "__main__":
    sys.exit(main())
