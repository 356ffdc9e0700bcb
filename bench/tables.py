"""A run as text: rows that the terminal and the documents share, and the tables of the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.results import Comparison, cases, comparisons, median_us, recorded_peers, recorded_us
from bench.shapes import Shape

__all__ = ["WIDTH_OF_LOGS", "comparison_text", "label_of", "one_line", "print_board", "time_text"]

WIDTH_OF_LOGS = 200  # columns where output does not go to a terminal
WIDTH_OF_ALL = 150  # columns of a terminal from which on the tables show everything
NOTHING = "–"
RECORDED_MARK = "†"  # of times that were recorded earlier, not measured in the run

Json = dict[str, Any]


def time_text(us: float | None) -> str:
    """Microseconds with three significant digits or all before the point."""
    if us is None:
        return NOTHING
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def bytes_text(count: float | None) -> str:
    """Mebibytes."""
    return NOTHING if count is None else f"{count / 2**20:.1f}"


def host_text(measurement: Json) -> str:
    """Median host time of a call; behind it, if measured, that of the same call by other names: ``"15.1 / 17.0"``."""
    found = [measurement["host_us"], *measurement.get("same_host_us", {}).values()]
    return " / ".join(time_text(host and host["median"]) for host in found)


def shape_of(case: Json) -> Shape:
    sizes = (case["heads"], case["key_dim"], case["value_dim"])
    return Shape(case["shape"], tuple(case["lengths"]), *sizes, case["group"])


def label_of(result: Json, operator: str, implementation: str) -> str:
    return result["implementations"][operator][implementation]["label"]


def one_line(case: Json) -> str:
    """A case in a line, for logs."""
    parts = []
    for name, measurement in case["measurements"].items():
        us = median_us(case, name)
        parts.append(f"{name} {time_text(us)}" if us is not None else f"{name} ({measurement['error']})")
    return f"{case['operator']} {case['shape']} {case['family']}, us: {', '.join(parts)}"


def comparison_text(comparison: Comparison) -> str:
    """``"2.31× (worst 1.20× at h8_65536)"``."""
    shape, ratio = comparison.worst
    return f"{comparison.mean:.2f}× (worst {ratio:.2f}× at {shape})"


def headline(result: Json) -> str:
    """One line on where the numbers come from."""
    environment = result["environment"]
    commit = result["commit"][:8] + (" with changes" if result["dirty"] else "")
    versions = f"torch {environment['torch']}, driver {environment['driver']}"
    device = environment["gpu"] or "CPU (a trial of the board, not a measurement)"
    return (
        f"{device}, {versions}, commit {commit}, {result['created'][:10]}; "
        f"memory bandwidth {result['bandwidth_gbps']['median']:.0f} GB/s (copy, in this run)"
    )


def clock_warnings(result: Json) -> Iterator[str]:
    """Cases in whose course the multiprocessors' clock moved by more than a few percent."""
    tolerated = 0.03
    for case in result["cases"]:
        for name, measurement in case["measurements"].items():
            clocks = measurement.get("gpu", {}).get("clocks", {})
            before, after = (clocks.get(when, {}).get("sm_mhz") for when in ("before", "after"))
            if before and after and abs(after - before) > tolerated * before:
                moved = f"SM clock {before:.0f} -> {after:.0f} MHz"
                yield f"{case['operator']} {case['shape']} {case['family']} {name}: {moved}"


def print_board(result: Json, console: Console) -> None:
    """Tables of all operators and families, the means, and what could not be measured."""
    console.print(headline(result), markup=False, soft_wrap=True)
    for operator in result["implementations"]:
        for family in dict.fromkeys(case["family"] for case in cases(result, operator)):
            console.print(_family_table(result, operator, family, everything=console.width >= WIDTH_OF_ALL))
        found = comparisons(result, operator)
        if found:
            console.print(_comparison_table(operator, found))
        for peer, reason in result["unavailable"][operator].items():
            console.print(f"{operator}: {peer} not measured: {reason}", markup=False)
        if recorded_peers(result, operator):
            console.print(f"{RECORDED_MARK} recorded earlier on such a GPU, not measured in this run", markup=False)
    for case in result["cases"]:
        for name, measurement in case["measurements"].items():
            if "error" in measurement:
                text = f"{case['operator']} {case['shape']} {case['family']} {name}: {measurement['error']}"
                console.print(text, markup=False, soft_wrap=True)
    warnings = list(clock_warnings(result))
    for warning in warnings:
        console.print(f"clock moved: {warning}", markup=False, soft_wrap=True)


def _family_table(result: Json, operator: str, family: str, everything: bool) -> Table:
    about = result["implementations"][operator]
    others = [name for name in about if name != "ours"]
    recorded = recorded_peers(result, operator)
    table = Table(title=f"{operator}, gates {family}: microseconds", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("shape", no_wrap=True)
    if everything:
        table.add_column("lengths", max_width=18)
        table.add_column("H", justify="right")
    columns = ["roofline", "ours", *(["p10 to p90"] if everything else []), "of it"]
    columns += ["TFLOP/s", "host", "MiB"] if everything else ["host"]
    columns += [about[name]["label"] for name in others]
    columns += [f"{peer['label']} {RECORDED_MARK}" for peer in recorded.values()]
    for column in columns:
        table.add_column(column, justify="right")
    group = None
    for case in cases(result, operator, family):
        if group not in (None, case["group"]):
            table.add_section()
        group = case["group"]
        ours, us = case["measurements"].get("ours", {}), median_us(case, "ours")
        row = [case["shape"], *([shape_of(case).lengths_text, str(case["heads"])] if everything else [])]
        row.append(time_text(case["roofline_us"]))
        if us is None:
            row += ["failed", *[NOTHING] * (5 if everything else 2)]
        else:
            spread = ours["gpu"]["us"]
            row.append(f"[bold]{time_text(us)}[/bold]")
            if everything:
                row.append(f"{time_text(spread['p10'])} to {time_text(spread['p90'])}")
            row.append(f"{case['roofline_us'] / us:.1%}")
            if everything:
                row.append(f"{case['flop'] / us / 1e6:.0f}")
            row.append(host_text(ours))
            if everything:
                row.append(bytes_text(ours["peak_bytes"]))
        row += [_against(median_us(case, name), us) for name in others]
        row += [_against(recorded_us(operator, case["shape"], name, family), us) for name in recorded]
        table.add_row(*row)
    return table


def _against(theirs: float | None, ours: float | None) -> str:
    if theirs is None:
        return NOTHING
    if not ours:
        return time_text(theirs)
    ratio = theirs / ours
    return f"{time_text(theirs)} [{'green' if ratio >= 1 else 'red'}]{ratio:.2f}×[/]"


def _comparison_table(operator: str, found: list[Comparison]) -> Table:
    title = f"{operator}: time of the peer over ours, geometric mean over the board's shapes"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column, justify in (("peer", "left"), ("gates", "left"), ("mean", "right"), ("worst", "right"), ("at", "left")):
        table.add_column(column, justify=justify)
    for comparison in found:
        label = comparison.label + (f" {RECORDED_MARK}" if comparison.recorded else "")
        shape, ratio = comparison.worst
        color = "green" if ratio >= 1 else "red"
        table.add_row(label, comparison.family, f"{comparison.mean:.2f}×", f"[{color}]{ratio:.2f}×[/]", shape)
    return table
