"""The board: every shape under every family of gates, by ours, ours with each path forced, and every peer that can be
imported.

    python -m bench.board                      everything: some minutes on a GPU
    python -m bench.board --operator chunk_bwd
    python -m bench.board --quick              a few shapes
    python -m bench.board --shapes h16_8192,h4_1024 --families long --no-peers
    python -m bench.board --lengths 8x1000 --heads 24

Writes one JSON into bench/results/ and prints tables. Exit status: 0; 1 if an implementation of ours fails or gives a
wrong result; 2 for wrong arguments or no usable device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import fla_tuning, results, tables
from bench.devices import CudaDevice, Device, HostDevice
from bench.environment import commit_state, describe
from bench.measure import measure_case
from bench.operators import OPERATORS, Operator
from bench.shapes import Shape, parse_lengths, select
from bench.timing import COPY_BYTES, Budget, Statistics, copy_bandwidth

__all__ = ["main", "run_board"]

EXIT_GOOD, EXIT_WRONG, EXIT_USAGE = 0, 1, 2
QUICK_BUDGET = Budget(total_us=100e3, fewest=7, most=30)
HOST_COPY_BYTES = 1 << 24

Json = dict[str, Any]
Job = tuple[Operator, list[Shape], list[str]]  # what to measure: the operator, its shapes and families of gates


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.board", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--operator", choices=list(OPERATORS), action="append", help="may be repeated (default: all)")
    add("--quick", action="store_true", help="a few shapes, fewer samples")
    add("--shapes", "--only", metavar="NAME[,NAME...]", help="of the board and the curves")
    add("--families", metavar="NAME[,NAME...]", help="of gates (default: all of the operator)")
    add("--lengths", metavar="L[,L...]", help="one shape of your own instead: 8192, or 1300,547, or 8x1024")
    add("--heads", type=int, default=16, help="of the shape of your own (default 16)")
    add("--no-peers", action="store_true", help="ours only")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries out the board; its times say nothing")
    add("--results", type=Path, default=results.RESULTS, metavar="FOLDER", help="where the JSON goes")
    add("--commit", help="of this tree, where it is a copy without git: COMMIT or COMMIT-dirty")
    add("--note", default="", help="stands in the JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the board. Returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.board: no CUDA device (--device cpu tries out the board itself)", file=sys.stderr)
        return EXIT_USAGE
    try:
        jobs = _jobs(args)
    except ValueError as error:
        parser.error(str(error))
    device = CudaDevice() if args.device == "cuda" else HostDevice()
    console = Console(width=None if sys.stdout.isatty() else tables.WIDTH_OF_LOGS, highlight=False)
    with torch.no_grad():
        result = run_board(device, jobs, args, console)
    path = results.save(result, args.results)
    if any("FLA" in text for text in result["preparation"]):
        _store_fla_tuning(args.results, console)
    tables.print_board(result, console)
    console.print(f"written: {path}", soft_wrap=True)
    failures = [*_failures_of_ours(result), *([result["aborted"]] if result["aborted"] else [])]
    for failure in failures:
        console.print(f"[red]FAILED[/red] {failure}", soft_wrap=True)
    return EXIT_WRONG if failures else EXIT_GOOD


def _jobs(args: argparse.Namespace) -> list[Job]:
    """What the arguments ask for. Without --operator, shapes by name belong to the operators that have them.

    Raises:
        ValueError: a name is unknown.
    """
    chosen = [OPERATORS[name] for name in args.operator or OPERATORS]
    if args.shapes and not args.operator:
        names = args.shapes.split(",")
        every = {shape.name: shape for operator in chosen for shape in operator.shapes}
        select(every.values(), names)  # refuses names that no operator has
        jobs = []
        for operator in chosen:
            own = [name for name in names if name in {shape.name for shape in operator.shapes}]
            if own:
                jobs.append(_job(operator, argparse.Namespace(**{**vars(args), "shapes": ",".join(own)})))
        return jobs
    return [_job(operator, args) for operator in chosen]


def _job(operator: Operator, args: argparse.Namespace) -> Job:
    """The operator with the shapes and families that the arguments ask for.

    Raises:
        ValueError: a name is unknown.
    """
    families = args.families.split(",") if args.families else list(operator.families)
    if unknown := [family for family in families if family not in operator.families]:
        raise ValueError(f"unknown family {', '.join(unknown)}; known: {', '.join(operator.families)}")
    if args.lengths:
        if args.heads < 1:
            raise ValueError(f"argument --heads: expected a positive integer, got {args.heads}")
        return operator, [Shape(f"h{args.heads}_{args.lengths}", parse_lengths(args.lengths), args.heads)], families
    if args.shapes:
        return operator, select(operator.shapes, args.shapes.split(",")), families
    return operator, select(operator.shapes, operator.quick) if args.quick else list(operator.shapes), families


def run_board(device: Device, jobs: list[Job], args: argparse.Namespace, console: Console) -> Json:
    """Measures everything. Returns the content of the run's file."""
    created = datetime.now(timezone.utc)
    on_gpu = device.torch_device.type == "cuda"
    columns, about, unavailable = _columns(jobs, peers=not args.no_peers, on_gpu=on_gpu)
    copied = COPY_BYTES if on_gpu else HOST_COPY_BYTES
    clocks = {"before": device.clocks()}
    bandwidth = copy_bandwidth(device, copied)
    device.release()
    preparation = _prepare_fla(jobs, columns, console)
    measured, aborted = _measure_all(device, jobs, columns, QUICK_BUDGET if args.quick else Budget(), console)
    if not aborted:
        bandwidth += copy_bandwidth(device, copied)
    clocks["after"] = device.clocks()

    speed = Statistics.of(bandwidth)
    for case in measured:
        case["roofline_us"] = round(case["least_bytes"] / (speed.median * 1e3), 3)
    everything = {operator.name for operator, _, _ in jobs} == set(OPERATORS) and all(
        set(shapes) == set(operator.shapes) and set(families) == set(operator.families)
        for operator, shapes, families in jobs
    )
    return {
        "format": results.FORMAT,
        "kind": "board",
        "created": created.isoformat(timespec="seconds"),
        **commit_state(args.commit),
        "note": args.note,
        "complete": everything and on_gpu and not (args.no_peers or args.quick or aborted),
        "aborted": aborted,
        "seconds": round((datetime.now(timezone.utc) - created).total_seconds(), 1),
        "environment": describe(device.torch_device),
        "clocks": clocks,
        "bandwidth_gbps": speed.as_json(),
        "implementations": about,
        "unavailable": unavailable,
        "preparation": preparation,
        "cases": measured,
    }


def _columns(jobs: list[Job], peers: bool, on_gpu: bool) -> tuple[dict[str, list[Any]], Json, Json]:
    """For each operator: the implementations to measure, what is to be said of them, and why others are missing."""
    columns, about, unavailable = {}, {}, {}
    for operator, _, _ in jobs:
        found, reasons = [], {}
        for implementation in operator.implementations(peers):
            no_cpu = "it has no CPU implementation" if implementation.kind == "peer" and not on_gpu else None
            if reason := implementation.unavailable() or no_cpu:
                reasons[implementation.name] = reason
            else:
                found.append(implementation)
        columns[operator.name], unavailable[operator.name] = found, reasons
        about[operator.name] = {
            i.name: {"label": i.label, "kind": i.kind, "method": i.method, "version": i.version(), "note": i.note}
            for i in found
        }
    return columns, about, unavailable


def _prepare_fla(jobs: list[Job], columns: dict[str, list[Any]], console: Console) -> list[str]:
    """Compiles FLA's kernels ahead, where it is measured. Returns what was done, line by line."""
    work = [
        (operator.name, shape)
        for operator, found, _ in jobs
        if any(i.name == "fla" for i in columns[operator.name])
        for shape in found
    ]
    if not work:
        return []
    done = [f"FLA: {fla_tuning.use_stored()}"]
    with _progress(console) as progress:
        task = progress.add_task("FLA: compiling", total=len(fla_tuning.distinct(work)))
        done.append(f"FLA: {fla_tuning.compile_ahead(work, lambda: progress.advance(task))}")
    for text in done:
        console.print(text, markup=False, soft_wrap=True)
    return done


def _measure_all(
    device: Device, jobs: list[Job], columns: dict[str, list[Any]], budget: Budget, console: Console
) -> tuple[list[Json], str]:
    """All cases; and what ended it early, empty if nothing did."""
    cases = [(operator, shape, family) for operator, found, families in jobs for shape in found for family in families]
    measured: list[Json] = []
    with _progress(console) as progress:
        task = progress.add_task("measuring", total=sum(len(columns[operator.name]) for operator, _, _ in cases))
        done = 0
        for number, (operator, shape, family) in enumerate(cases, start=1):
            names = [i.name for i in columns[operator.name]]

            title = f"{operator.name} {shape.name} {family}"

            def show(name: str, before: int = done, names: Any = names, title: str = title) -> None:
                progress.update(task, description=f"{title}: {name}", completed=before + names.index(name))

            try:
                case = measure_case(device, operator, shape, family, columns[operator.name], budget, show)
            except Exception as error:  # the device itself no longer answers: keep what there is
                return measured, f"{title}: {type(error).__name__}: {error}"
            done += len(names)
            progress.update(task, completed=done)
            measured.append(case)
            if not console.is_terminal:
                console.print(f"[{number}/{len(cases)}] {tables.one_line(case)}", markup=False, soft_wrap=True)
    return measured, ""


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _failures_of_ours(result: Json) -> list[str]:
    """What failed of ours. A forced path may run out of memory: that may be why it is not the path chosen."""
    failures = []
    for case in result["cases"]:
        kinds = result["implementations"][case["operator"]]
        for name, measurement in case["measurements"].items():
            error, kind = measurement.get("error", ""), kinds[name]["kind"]
            if error and (kind == "ours" or (kind == "forced" and not error.startswith("OutOfMemoryError"))):
                failures.append(f"{case['operator']} {case['shape']} {case['family']} {name}: {error}")
    return failures


def _store_fla_tuning(folder: Path, console: Console) -> None:
    """Keeps what FLA tuned in this run beside the results, if it is more than bench/fla_tuned.json has."""
    file = folder / fla_tuning.STORED.name
    try:
        written = fla_tuning.store(file)
    except Exception as error:  # the run stands without it
        console.print(f"FLA's tuned configurations were not stored: {error}", markup=False)
        return
    if written:
        console.print(f"FLA tuned its kernels: {written} configurations in {file}; copy it to {fla_tuning.STORED}")


if __name__ == "__main__":
    sys.exit(main())
