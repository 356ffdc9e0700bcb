#!/usr/bin/env python3
"""Checks the compiled kernels against tools/kernel_budget.json: registers, stack, spills, shared memory, instructions,
and that no products of warpgroups wait for each other one by one.

    python tools/kernel_report.py kda_cuda/_C.abi3.so [--json FILE]

Works on any file with CUDA code in it: the extension, the static library, an object. Needs cuobjdump, and nvdisasm for
the instructions: from the path, from the CUDA toolkit, or from the PyPI packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm. Without nvdisasm the instructions are not checked, and the report says so.

Exit status: 0; 1 if a kernel exceeds its budget or has none, or a budget has no kernel; 2 if no check can be made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BUDGET_FILE = Path(__file__).with_name("kernel_budget.json")
EXIT_GOOD, EXIT_EXCEEDED, EXIT_CANNOT_CHECK = 0, 1, 2

# Limits of a budget that does not state them.
DEFAULT_LIMITS = {"stack_bytes": 0, "spill_instructions": 0, "static_shared_bytes": 1024, "serialized_products": 0}
SPILL_INSTRUCTIONS = ("LDL", "STL")


@dataclass
class Kernel:
    """What the compiler made of one kernel instantiation for one architecture."""

    symbol: str  # mangled
    architecture: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def spill_instructions(self) -> int:
        return sum(self.instructions[name] for name in SPILL_INSTRUCTIONS)

    @property
    def serialized_products(self) -> int:
        """Products of warpgroups if ptxas put a fence before and a wait behind each of them, which it does to all of a
        kernel or to none (its messages C7510 to C7520: "wgmma.mma_async instructions are serialized"); else 0.
        """
        products = self.instructions["HGMMA"]
        return products if self.instructions["WARPGROUP"] >= 2 * products else 0


def find_tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm: on the path, in the CUDA toolkit, or from its PyPI package."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    packages = {Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")}
    candidates = [Path(found)] if (found := shutil.which(name)) else []
    candidates.append(Path(home) / "bin" / name)
    candidates += [path for folder in packages for path in sorted(folder.glob(f"nvidia/*/bin/{name}"))]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def parse_resources(text: str) -> list[Kernel]:
    """The kernels in the output of ``cuobjdump --dump-resource-usage``."""
    kernels, architecture, symbol = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match.group(1)
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            kernels.append(Kernel(symbol, architecture, registers, max(stack, local), shared))
    return kernels


def add_instructions(kernels: list[Kernel], text: str) -> None:
    """Counts the instructions of each kernel in the output of ``cuobjdump -sass``, by the first part of their names."""
    by_key = {(kernel.architecture, kernel.symbol): kernel for kernel in kernels}
    architecture, kernel = "", None
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    for line in text.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = by_key.get((architecture, match.group(1)))
        elif kernel is not None and (match := instruction.match(line)):
            kernel.instructions[match.group(1)] += 1


def budget_of(symbol: str, budgets: dict[str, Any]) -> str | None:
    """The name of the budget for a mangled symbol, in which a name stands after its length."""
    return next((name for name in budgets if re.search(rf"(?<!\d){len(name)}{name}(?=[IEv])", symbol)), None)


def limits_of(symbol: str, budget: dict[str, Any]) -> dict[str, Any]:
    """What a kernel may use: its budget, with what the budget states for this instantiation alone."""
    own = [limits for part, limits in budget.get("instantiations", {}).items() if part in symbol]
    return {**DEFAULT_LIMITS, **budget, **{name: limit for limits in own for name, limit in limits.items()}}


def check(kernels: list[Kernel], budgets: dict[str, Any], with_instructions: bool) -> list[str]:
    """One line for each violation."""
    problems, used = [], set()
    for kernel in kernels:
        name = budget_of(kernel.symbol, budgets)
        if name is None:
            problems.append(f"{kernel.symbol}: no budget in {BUDGET_FILE.name}")
            continue
        used.add(name)
        limits = limits_of(kernel.symbol, budgets[name])
        for what in ("registers", *DEFAULT_LIMITS):
            if (value := getattr(kernel, what)) > limits[what]:
                problems.append(f"{kernel.symbol} ({kernel.architecture}): {what} {value}, allowed {limits[what]}")
        if with_instructions:
            missing = [i for i in limits.get("instructions", []) if kernel.instructions[i] == 0]
            problems += [f"{kernel.symbol} ({kernel.architecture}): no {i} instruction" for i in missing]
    problems += [f"{BUDGET_FILE.name}: {name}: no such kernel" for name in budgets if name not in used]
    for name, budget in budgets.items():
        for part in budget.get("instantiations", {}):
            if not any(part in kernel.symbol and budget_of(kernel.symbol, budgets) == name for kernel in kernels):
                problems.append(f"{BUDGET_FILE.name}: {name}: no such instantiation: {part}")
    return problems


def readable(symbols: list[str]) -> list[str]:
    """Demangled names without namespace and parameters, if c++filt is there."""
    if shutil.which("c++filt") is None:
        return symbols
    result = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    text = re.sub(r"(?m)^void |\(anonymous namespace\)::|kda::", "", result.stdout)
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), (" >", ">")):
        text = text.replace(long, short)
    return [line.rsplit("(", 1)[0] for line in text.splitlines()]


def print_table(kernels: list[Kernel], budgets: dict[str, Any], with_instructions: bool) -> None:
    header = ("kernel", "arch", "registers", "limit", "stack B", "spills", "smem B", "serialized", "instructions")
    rows: list[tuple[str, ...]] = [header]
    for kernel, name in zip(kernels, readable([kernel.symbol for kernel in kernels]), strict=True):
        budget = limits_of(kernel.symbol, budgets.get(budget_of(kernel.symbol, budgets) or "", {}))
        counts = [f"{i} {kernel.instructions[i]}" for i in budget.get("instructions", [])]
        figures = [kernel.registers, budget.get("registers", "-"), kernel.stack_bytes]
        figures += [kernel.spill_instructions if with_instructions else "-", kernel.static_shared_bytes]
        figures.append(kernel.serialized_products if with_instructions else "-")
        rows.append((name, kernel.architecture, *map(str, figures), ", ".join(counts) if with_instructions else "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def dump(tool: Path, flag: str, file: Path, path: str) -> str:
    """cuobjdump's output; `path` is the search path on which it finds nvdisasm."""
    environment = {**os.environ, "PATH": path}
    result = subprocess.run([str(tool), flag, str(file)], capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"{tool.name} {flag} {file} failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="extension, library or object with CUDA code")
    parser.add_argument("--budget", type=Path, default=BUDGET_FILE, help="limits (default: tools/kernel_budget.json)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args()

    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None:
        print("kernel report: cuobjdump not found: pip install nvidia-cuda-cuobjdump", file=sys.stderr)
        return EXIT_CANNOT_CHECK
    if not args.file.is_file():
        print(f"kernel report: {args.file} does not exist; `make build` builds the extension", file=sys.stderr)
        return EXIT_CANNOT_CHECK
    budgets = json.loads(args.budget.read_text())["kernels"]
    path = os.environ.get("PATH", "") + (f"{os.pathsep}{nvdisasm.parent}" if nvdisasm else "")
    try:
        kernels = parse_resources(dump(cuobjdump, "--dump-resource-usage", args.file, path))
        if nvdisasm is not None:
            add_instructions(kernels, dump(cuobjdump, "-sass", args.file, path))
    except RuntimeError as error:
        print(f"kernel report: {error}", file=sys.stderr)
        return EXIT_CANNOT_CHECK
    if nvdisasm is not None and any(not kernel.instructions for kernel in kernels):
        print("kernel report: the disassembly lacks a kernel of the resource table", file=sys.stderr)
        return EXIT_CANNOT_CHECK

    if not kernels:
        print(f"kernel report: {args.file} has no CUDA kernels", file=sys.stderr)
        return EXIT_CANNOT_CHECK
    kernels.sort(key=lambda kernel: kernel.symbol)
    print_table(kernels, budgets, nvdisasm is not None)
    if nvdisasm is None:
        print("nvdisasm not found: instructions and spills were not checked, registers and stack were")
    if args.json:
        counted = ("spill_instructions", "serialized_products")
        figures = [{**asdict(kernel), **{name: getattr(kernel, name) for name in counted}} for kernel in kernels]
        args.json.write_text(json.dumps(figures, indent=1))
    problems = check(kernels, budgets, nvdisasm is not None)
    for problem in problems:
        print(f"EXCEEDED  {problem}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(problems)} violations")
    return EXIT_EXCEEDED if problems else EXIT_GOOD


if __name__ == "__main__":
    sys.exit(main())
