"""What changed between two runs of the board, shape by shape, beyond the spread of the samples.

    python -m bench.compare OLD.json NEW.json [--all] [--threshold 0.02]

A time changed if the spreads (10th to 90th percentile) do not overlap and the medians differ by more than the
threshold. Only our kernels are judged; --all lists the peers as well, whose changes say how far the machine itself
has changed.

Exit status: 0; 1 if ours became slower anywhere, or fails where it did not; 2 for files that cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.results import load, median_us
from bench.tables import WIDTH_OF_LOGS, time_text

__all__ = ["Change", "changes", "main"]

EXIT_GOOD, EXIT_SLOWER, EXIT_USAGE = 0, 1, 2
THRESHOLD = 0.02  # of the median: below it lies what another placement in memory changes
MEMORY_THRESHOLD = 0.01
BANDWIDTH_TOLERANCE = 0.03

FASTER, SLOWER, SAME, BROKEN, REPAIRED, NEW, GONE = "faster", "slower", "same", "broken", "repaired", "new", "gone"
REGRESSIONS = (SLOWER, BROKEN)

Json = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One implementation in one case."""

    operator: str
    shape: str
    family: str
    implementation: str
    judged: bool  # it is ours, on kernels
    verdict: str
    old_us: float | None
    new_us: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """New time over old."""
        return self.new_us / self.old_us if self.old_us and self.new_us else None


def _verdict(old: Json | None, new: Json | None, threshold: float) -> str:
    if old is None or new is None:
        return NEW if old is None else GONE
    if "gpu" not in new:
        return BROKEN if "gpu" in old else SAME
    if "gpu" not in old:
        return REPAIRED
    a, b = old["gpu"]["us"], new["gpu"]["us"]
    if abs(b["median"] - a["median"]) <= threshold * a["median"]:
        return SAME
    if b["p10"] > a["p90"]:
        return SLOWER
    return FASTER if b["p90"] < a["p10"] else SAME


def _note(old: Json | None, new: Json | None) -> str:
    """Memory and error, where they changed."""
    notes = []
    if new is not None and "error" in new:
        notes.append(new["error"])
    before, after = ((x or {}).get("peak_bytes") for x in (old, new))
    if before and after and abs(after - before) > MEMORY_THRESHOLD * before:
        notes.append(f"memory {before / 2**20:.1f} -> {after / 2**20:.1f} MiB")
    return "; ".join(notes)


def changes(old: Json, new: Json, threshold: float = THRESHOLD) -> list[Change]:
    """Every implementation of every case of either run."""

    def by_key(result: Json) -> dict[tuple[str, str, str], Json]:
        return {(case["operator"], case["shape"], case["family"]): case for case in result["cases"]}

    # Not the composite either: it is there for checks, with few samples and with the host in its times.
    judged = {
        (operator, name): what["kind"] != "peer" and what["method"] == "graph"
        for result in (old, new)
        for operator, found in result["implementations"].items()
        for name, what in found.items()
    }
    before, after = by_key(old), by_key(new)
    found = []
    for key in {**before, **after}:
        a, b = before.get(key), after.get(key)
        names = {**(a["measurements"] if a else {}), **(b["measurements"] if b else {})}
        for name in names:
            x, y = (case["measurements"].get(name) if case else None for case in (a, b))
            found.append(
                Change(
                    *key,
                    name,
                    judged[key[0], name],
                    _verdict(x, y, threshold),
                    median_us(a, name) if a else None,
                    median_us(b, name) if b else None,
                    _note(x, y),
                )
            )
    return found


def _differences(old: Json, new: Json) -> list[str]:
    """What makes the runs hard to compare."""
    found = []
    for name in ("gpu", "driver", "torch", "triton", "fla"):
        a, b = (result["environment"].get(name) for result in (old, new))
        if a != b:
            found.append(f"{name}: {a} -> {b}")
    a, b = (result["bandwidth_gbps"]["median"] for result in (old, new))
    if abs(b - a) > BANDWIDTH_TOLERANCE * a:
        found.append(f"memory bandwidth: {a:.0f} -> {b:.0f} GB/s")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD.json")
    parser.add_argument("new", metavar="NEW.json")
    parser.add_argument("--all", action="store_true", help="list the peers and what did not change as well")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="share of the median (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        old, new = load(args.old), load(args.new)
        for path, result in ((args.old, old), (args.new, new)):
            if result["kind"] != "board":
                raise ValueError(f"{path} is a {result['kind']}, not a run of the board")
    except ValueError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return EXIT_USAGE

    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_LOGS, highlight=False)
    for text in _differences(old, new):
        console.print(f"not the same: {text}", markup=False)
    found = changes(old, new, args.threshold)
    shown = [c for c in found if args.all or (c.judged and (c.verdict != SAME or c.note))]
    table = Table(title=f"{old['commit'][:8]} -> {new['commit'][:8]}, µs", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("operator", "shape", "gates", "implementation"):
        table.add_column(column)
    for column in ("old", "new", "change"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    table.add_column("", overflow="fold")
    colors = {FASTER: "green", REPAIRED: "green", SLOWER: "red", BROKEN: "red"}
    for c in shown:
        change = f"{c.ratio - 1:+.1%}" if c.ratio else ""
        verdict = f"[{colors[c.verdict]}]{c.verdict}[/]" if c.verdict in colors else c.verdict
        times = (time_text(c.old_us), time_text(c.new_us))
        table.add_row(c.operator, c.shape, c.family, c.implementation, *times, change, verdict, c.note)
    if shown:
        console.print(table)
    judged = [c for c in found if c.judged]
    counts = {v: sum(c.verdict == v for c in judged) for v in (FASTER, SLOWER, SAME, BROKEN, REPAIRED, NEW, GONE)}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(f"ours: {summary}", markup=False)
    ratios = [c.ratio for c in judged if c.ratio and c.implementation == "ours"]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        console.print(f"ours, new over old, geometric mean of {len(ratios)}: {mean:.3f}", markup=False)
    return EXIT_SLOWER if any(c.verdict in REGRESSIONS for c in judged) else EXIT_GOOD


if __name__ == "__main__":
    sys.exit(main())
