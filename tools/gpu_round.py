#!/usr/bin/env python3
"""Everything that only a GPU can tell, in one go and within minutes: the GPU tests, compute-sanitizer's four tools on
small calls of all kernels, and the board of times.

    python tools/gpu_round.py [--output build/gpu-round] [--only PART,PART] [--skip PART,PART] [--quick-board]
                              [--pytest="-k graph"] [--workers N] [--cases NAME,NAME] [--budget SECONDS] [--one-by-one]

Parts: tests, memcheck, racecheck, initcheck, synccheck (together: sanitizer), board. Tests and sanitizers run side by
side, the board alone. Works with any Python that has torch and pytest, from the source tree with the extension built in
place. The output folder gets tests.log, tests.xml (JUnit), sanitizer.log, board.log, the board's JSON and summary.json.

Exit status 0: all is well. 1: something is wrong. 2: wrong arguments, or a part cannot run at all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = ("tests", *SANITIZERS, "board")

DEFAULT_BUDGET_S = 465  # the round ends within eight minutes
TIMEOUT_S = {"tests": 420, "board": 455} | dict.fromkeys(SANITIZERS, 150) | {"racecheck": 240}
FULL_BOARD_S = 400  # with less time left the board is a quick one; alone (--only board) it is a full one
QUICK_BOARD_S = 50
PROGRESS_EVERY_S = 15
TAIL_LINES = 40
SANITIZER_FOUND = 86  # exit status of compute-sanitizer for its own findings

# All kernels are looked at: tools/sanitizer_cases.py launches none but this project's. Errors of the CUDA API are left
# to torch and to the library, which raise them: torch probes for features and is answered with errors. The padding
# behind each allocation tells an access beyond its end from one to its neighbour.
SANITIZER_OPTIONS: dict[str, list[str]] = {
    "memcheck": ["--padding", "1024", "--report-api-errors", "no"],
    "racecheck": [],
    "initcheck": [],
    "synccheck": [],
}


def say(text: str) -> None:
    print(f"[gpu-round] {text}", flush=True)


@dataclass
class Outcome:
    """What a part gave."""

    ok: bool
    said: str  # one line


@dataclass
class Part:
    """One command with its log, and how its outcome is read from what it left."""

    name: str
    command: list[str]
    log: Path
    timeout: float
    judge: Callable[[int, str], Outcome]  # of exit status and log
    outcome: Outcome | None = None
    seconds: float = 0.0
    _process: subprocess.Popen | None = None
    _begin: float = 0.0

    def start(self) -> None:
        say(f"{self.name}: {shlex.join(self.command)}")
        self._begin = time.monotonic()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a timeout ends its children too
            )

    def poll(self) -> bool:
        """Whether it has ended; ends it when its time is over."""
        if self.outcome is not None:
            return True
        assert self._process is not None
        self.seconds = time.monotonic() - self._begin
        status = self._process.poll()
        if status is None:
            if self.seconds < self.timeout:
                return False
            self.stop()
            self.outcome = Outcome(False, f"ended after {self.timeout:.0f} s; last: {self.last_line()}")
        else:
            self.outcome = self.judge(status, self.log.read_text(errors="replace"))
        say(f"{self.name}: {'ok' if self.outcome.ok else 'FAILED'} after {self.seconds:.0f} s: {self.outcome.said}")
        return True

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[-100:] if lines else "nothing"

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


# --- What the parts left ----------------------------------------------------------------------------------------------


def judge_tests(junit: Path) -> Callable[[int, str], Outcome]:
    def judge(status: int, log: str) -> Outcome:
        try:
            suites = ElementTree.parse(junit).getroot().iter("testsuite")
        except (OSError, ElementTree.ParseError) as error:
            return Outcome(False, f"exit status {status}, and no results in {junit.name}: {error}")
        total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        for suite in suites:
            for name in total:
                total[name] += int(suite.get(name, 0))
        passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
        said = f"{passed} passed, {total['failures'] + total['errors']} failed, {total['skipped']} skipped"
        if status == 0 and passed == 0:
            return Outcome(False, f"{said}: there is nothing that ran")
        return Outcome(status == 0, said if status in (0, 1) else f"{said}, exit status {status}")

    return judge


def judge_sanitizer(status: int, log: str) -> Outcome:
    """compute-sanitizer ends with its own status if it found something, else with that of the program."""
    cases = re.findall(r"^(\d+) of (\d+) cases right$", log, re.MULTILINE)
    found = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", log, re.MULTILINE)
    if not cases or not found:
        complaint = re.findall(r"^=+ (?:Error|Warning|Internal).*$", log, re.MULTILINE)
        said = f"did not run to its end, exit status {status}"
        return Outcome(False, said + (f": {complaint[-1].strip('= ')}" if complaint else ""))
    right, all_cases = cases[-1]
    clean = all(int(number) == 0 for summary in found for number in re.findall(r"\d+", summary.split(" (")[0]))
    ok = status == 0 and clean and right == all_cases
    return Outcome(ok, f"{found[-1]}; {right} of {all_cases} results right")


def judge_status(status: int, log: str) -> Outcome:
    failed = re.findall(r"^.*FAILED.*$", log, re.MULTILINE)
    return Outcome(status == 0, failed[0].strip() if failed else f"exit status {status}")


# --- The parts --------------------------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """compute-sanitizer on the path or in the CUDA toolkit."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + ["/usr/local/cuda"]
    places = [f"{folder}/{below}" for folder in folders for below in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def tests_part(args: argparse.Namespace) -> Part:
    junit = args.output / "tests.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "--durations=15"]
    command += ["-n", str(args.workers)] if args.workers > 1 else ["-p", "no:xdist"]
    command += ["-o", "faulthandler_timeout=120", f"--junitxml={junit}", *shlex.split(args.pytest)]
    return Part("tests", command, args.output / "tests.log", TIMEOUT_S["tests"], judge_tests(junit))


def sanitizer_part(tool: str, sanitizer: str, args: argparse.Namespace) -> Part:
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)]
    command += ["--print-limit", "20", *SANITIZER_OPTIONS[tool]]
    command += [sys.executable, str(ROOT / "tools/sanitizer_cases.py")]
    if tool == "initcheck":
        command.append("--skip-wrong-contents")
    if args.cases:
        command += ["--only", args.cases]
    return Part(tool, command, args.output / f"{tool}.log", TIMEOUT_S[tool], judge_sanitizer)


def board_part(args: argparse.Namespace, quick: bool) -> Part:
    command = [sys.executable, "-m", "bench.board", "--results", str(args.output), *(["--quick"] if quick else [])]
    return Part("board", command, args.output / "board.log", TIMEOUT_S["board"], judge_status)


class Round:
    """Runs the parts within the budget, and keeps them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begin = time.monotonic()
        self.parts: list[Part] = []

    def time_left(self) -> float:
        return self.args.budget - (time.monotonic() - self.begin)

    def run(self, parts: list[Part]) -> None:
        """Runs parts side by side."""
        self.parts += parts
        for part in parts:
            part.timeout = min(part.timeout, max(self.time_left(), 1.0))
            part.start()
        said = time.monotonic()
        try:
            while not all([part.poll() for part in parts]):  # a list: each is looked at
                if time.monotonic() - said > PROGRESS_EVERY_S:
                    said = time.monotonic()
                    running = [part for part in parts if part.outcome is None]
                    say("; ".join(f"{part.name} {part.seconds:.0f} s: {part.last_line()}" for part in running))
                time.sleep(0.2)
        finally:
            for part in parts:
                part.stop()

    def cannot_run(self, name: str, reason: str) -> None:
        say(f"{name}: FAILED: {reason}")
        part = Part(name, [], self.args.output / f"{name}.log", 0, judge_status, outcome=Outcome(False, reason))
        part.log.write_text(reason + "\n")
        self.parts.append(part)


def choose_parts(text: str) -> list[str]:
    """Names of parts from a comma-separated list; `sanitizer` stands for its four tools.

    Raises:
        argparse.ArgumentTypeError: a name is unknown.
    """
    chosen: list[str] = []
    for name in filter(None, text.split(",")):
        if name != "sanitizer" and name not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {name!r}; there are {', '.join(PARTS)}, and sanitizer")
        chosen += SANITIZERS if name == "sanitizer" else [name]
    return chosen


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "build/gpu-round", metavar="FOLDER", help="for logs and results")
    add("--only", type=choose_parts, default=list(PARTS), metavar="PART[,PART...]", help="these parts")
    add("--skip", type=choose_parts, default=[], metavar="PART[,PART...]", help="not these parts")
    add("--quick-board", action="store_true", help="a few shapes")
    add("--pytest", default="", metavar="ARGUMENTS", help='more arguments of pytest, as in --pytest="-k graph"')
    add("--workers", type=int, default=1, metavar="N", help="processes of pytest, which then needs pytest-xdist")
    add("--cases", default="", metavar="NAME[,NAME...]", help="of tools/sanitizer_cases.py")
    add("--budget", type=float, default=DEFAULT_BUDGET_S, metavar="SECONDS", help="for all of it")
    add("--one-by-one", action="store_true", help="nothing side by side")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    args.parts = [part for part in PARTS if part in args.only and part not in args.skip]
    if not args.parts:
        parser.error("no part is left to run")
    return args


def join_logs(parts: list[Part], joined: Path) -> None:
    """One file for the logs of all parts, in place of their own."""
    if not parts:
        return
    with joined.open("w") as output:
        for part in parts:
            output.write(f"=== {part.name}: {shlex.join(part.command)}\n{part.log.read_text(errors='replace')}\n")
            part.log.unlink()


def print_summary(parts: list[Part], seconds: float) -> None:
    width = max(len(part.name) for part in parts)
    print(f"\n{'part':<{width}}  {'result':<6}  {'time':>6}  what")
    for part in parts:
        assert part.outcome is not None
        result = "ok" if part.outcome.ok else "FAILED"
        print(f"{part.name:<{width}}  {result:<6}  {part.seconds:>4.0f} s  {part.outcome.said}")
    failed = sum(not part.outcome.ok for part in parts if part.outcome)
    print(
        f"{'all':<{width}}  {'FAILED' if failed else 'ok':<6}  {seconds:>4.0f} s  logs: {parts[0].log.parent}\n",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    this = Round(args)

    side_by_side = [tests_part(args)] if "tests" in args.parts else []
    if tools := [part for part in args.parts if part in SANITIZERS]:
        if sanitizer := find_sanitizer():
            side_by_side += [sanitizer_part(tool, sanitizer, args) for tool in tools]
        else:
            for tool in tools:
                this.cannot_run(tool, "compute-sanitizer was not found on the path, nor in the CUDA toolkit")
    for group in [[part] for part in side_by_side] if args.one_by_one else [side_by_side]:
        this.run(group)

    if "board" in args.parts and (ROOT / "bench/board.py").is_file():
        if this.time_left() < QUICK_BOARD_S:
            this.cannot_run("board", f"{this.time_left():.0f} s are left of the budget")
        else:
            this.run([board_part(args, quick=args.quick_board or this.time_left() < FULL_BOARD_S)])

    this.parts.sort(key=lambda part: PARTS.index(part.name))
    for part in this.parts:
        if not part.outcome.ok and part.command:  # type: ignore[union-attr]
            print(f"\n--- the end of {part.log.name} ---\n{part.tail()}")
    seconds = time.monotonic() - this.begin
    print_summary(this.parts, seconds)
    summary = {
        "ok": all(part.outcome.ok for part in this.parts),  # type: ignore[union-attr]
        "seconds": round(seconds, 1),
        "parts": {
            part.name: {
                "ok": part.outcome.ok,  # type: ignore[union-attr]
                "said": part.outcome.said,  # type: ignore[union-attr]
                "seconds": round(part.seconds, 1),
                "command": part.command,
            }
            for part in this.parts
        },
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    join_logs([part for part in this.parts if part.name in SANITIZERS], args.output / "sanitizer.log")
    if any(not part.command for part in this.parts):
        return 2
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
