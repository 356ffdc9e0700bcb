#!/usr/bin/env python3
"""Builds the PyTorch extension kda_cuda/_C.abi3.so in place, if a source changed since it was built.

    python tools/build_extension.py [--force]

A library that was built elsewhere and copied here is kept as long as it is no older than the sources, so a machine
without nvcc or without the CUTLASS headers can use it. KDA_PREBUILT=1 takes the library that is there whatever its age.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "kda_cuda/_C.abi3.so"
STAMP = ROOT / "build/extension.json"
SOURCE_FOLDERS = ("csrc/kda", "csrc/torch")
SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}
BUILD_FILES = ("setup.py", "pyproject.toml")


def say(text: str) -> None:
    print(f"[build] {text}", flush=True)


def sources() -> list[Path]:
    """Every file whose change makes the library stale."""
    found = [p for folder in SOURCE_FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in SOURCE_SUFFIXES]
    return sorted(found) + [ROOT / name for name in BUILD_FILES]


def fingerprint(files: list[Path]) -> str:
    """Hash of the names and contents of the sources and of the chosen architectures."""
    digest = hashlib.sha256(f"{os.environ.get('KDA_CUDA_ARCHS', '')} {os.environ.get('KDA_TIMELINE', '')}".encode())
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def has_nvcc() -> bool:
    """Whether a CUDA compiler is on the path or under CUDA_HOME / the usual folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") is not None or (Path(home) / "bin/nvcc").exists()


def why_stale(files: list[Path]) -> str | None:
    """The reason to build, or None if the library is current."""
    if not LIBRARY.exists():
        return "it is not built yet"
    if os.environ.get("KDA_PREBUILT") == "1":
        return None
    if STAMP.exists():
        stamp = json.loads(STAMP.read_text())
        if stamp["library_bytes"] == LIBRARY.stat().st_size and stamp["fingerprint"] == fingerprint(files):
            return "nvcc has appeared since it was built" if has_nvcc() and not stamp["nvcc"] else None
    newer = [path for path in files if path.stat().st_mtime > LIBRARY.stat().st_mtime]
    if newer:
        return f"{newer[0].relative_to(ROOT)} is newer"
    return "sources or KDA_CUDA_ARCHS changed" if STAMP.exists() else None


def shortened(line: str) -> str:
    """A line of ninja's progress with the file in place of the long command; other lines as they are."""
    match = re.match(r"(\[\d+/\d+\]) .* -c (\S+) ", line)
    if match is None:
        return line
    source = Path(match.group(2))
    return f"{match.group(1)} {source.relative_to(ROOT) if source.is_relative_to(ROOT) else source}"


def run_showing_progress(command: list[str]) -> int:
    """Runs a command in the repository and prints its output, shortened, as it comes. Returns its exit status."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    whole_lines = os.environ.get("KDA_CUDA_VERBOSE", "0") not in ("", "0")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        for line in process.stdout:
            print(line.rstrip("\n") if whole_lines else shortened(line.rstrip("\n")), flush=True)
    return process.returncode


def build(force: bool) -> None:
    """Runs setup.py, showing the compiler's progress."""
    files = sources()
    reason = "asked for" if force else why_stale(files)
    if reason is None:
        say(f"{LIBRARY.relative_to(ROOT)} is current")
        return
    kernels = sum(path.suffix == ".cu" for path in files)
    with_nvcc = has_nvcc()
    what = f"{kernels} CUDA files: a few minutes" if with_nvcc else "no nvcc found: operators without CUDA kernels"
    say(f"building {LIBRARY.relative_to(ROOT)} ({reason}; {what})")
    started = time.monotonic()
    status = run_showing_progress([sys.executable, "setup.py", "build_ext", "--inplace"])
    if status != 0 or not LIBRARY.exists():
        say("FAILED: see the compiler's output above. To use a library that is already built, set KDA_PREBUILT=1.")
        sys.exit(status or 1)
    STAMP.parent.mkdir(exist_ok=True)
    record = {"fingerprint": fingerprint(files), "library_bytes": LIBRARY.stat().st_size, "nvcc": with_nvcc}
    STAMP.write_text(json.dumps(record))
    say(f"built in {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="build even if the library is current")
    build(parser.parse_args().force)


if __name__ == "__main__":
    main()
