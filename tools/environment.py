#!/usr/bin/env python3
"""Makes the virtual environment `.venv` that the Makefile's targets run in.

    python3 tools/environment.py [--group dev] [--group ci] [--group cmake]

Standard library only: it runs before anything is installed. Running it again does nothing unless the pinned
requirements or the interpreter changed.

- Usual machine: an environment of its own with the pinned packages of tools/requirements-<group>.txt.
- Machine whose Python already has a CUDA build of torch (2.10 or later): that torch is used. The environment then sees
  the system's packages and only what is missing is installed; without a network it goes on with what is there.
  KDA_SYSTEM_TORCH=0 switches this off, KDA_SYSTEM_TORCH=1 takes any torch 2.10 or later that is there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin/python"
MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 10)
MINIMUM_CMAKE = (3, 24)

# Requirement files of a group, each with pip's options.
GROUPS: dict[str, list[tuple[str, list[str]]]] = {
    "dev": [("requirements-dev.txt", []), ("requirements-headers.txt", ["--no-deps"])],
    "ci": [("requirements-ci.txt", [])],
    "cmake": [("requirements-cmake.txt", [])],
}

# Distributions whose module has another name.
MODULES = {"nvidia-cutlass": "cutlass_library", "clang-format": "clang_format", "pytest-timeout": "pytest_timeout"}

# Without these, nothing can run; without another, only the step that needs it fails.
ESSENTIAL = {"torch", "numpy"}


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


def requirements(file: str) -> list[tuple[str, str]]:
    """(name, requirement line) of every line of a requirement file."""
    lines = (ROOT / "tools" / file).read_text().splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [(re.match(r"[A-Za-z0-9_.-]+", line).group(), line) for line in lines]  # type: ignore[union-attr]


def output_of(command: list[str]) -> str | None:
    """Standard output of a command, or None if it fails or does not exist."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def system_torch() -> str | None:
    """Describes the torch of this interpreter if the environment should reuse it."""
    choice = os.environ.get("KDA_SYSTEM_TORCH", "")
    if choice == "0":
        return None
    if choice not in ("", "1"):
        sys.exit(f"KDA_SYSTEM_TORCH: expected 0 or 1, got {choice!r}")
    probe = (
        "import importlib.util as u, sys\n"
        "if u.find_spec('torch') is None: sys.exit(1)\n"
        "import torch\n"
        "print(torch.__version__, torch.version.cuda or 'none')"
    )
    answer = output_of([sys.executable, "-c", probe])
    if not answer:
        return None
    version, cuda = answer.splitlines()[-1].split()
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_TORCH:
        return None
    return f"torch {version}" if cuda != "none" or choice == "1" else None


def create(reuse: bool) -> None:
    """Creates an empty environment in place of the one that is there."""
    if VENV.exists():
        shutil.rmtree(VENV)
    command = [sys.executable, "-m", "venv", str(VENV)]
    if reuse:
        command.append("--system-site-packages")
    has_ensurepip = output_of([sys.executable, "-c", "import ensurepip"]) is not None
    if not has_ensurepip:
        if output_of([sys.executable, "-c", "import pip"]) is None:
            sys.exit(f"{sys.executable} has neither ensurepip nor pip: install the venv package of your Python")
        command += ["--without-pip", "--system-site-packages"]
    subprocess.run(command, check=True)
    if reuse and sys.prefix != sys.base_prefix:
        # This interpreter is itself that of an environment, whose packages --system-site-packages does not show.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        lines = "".join(f"{folder}\n" for folder in site.getsitepackages())
        (VENV / "lib" / version / "site-packages/kda_parent.pth").write_text(lines)


def importable(names: list[str]) -> set[str]:
    """Those distributions of `names` whose module the environment can import."""
    modules = {name: MODULES.get(name, name) for name in names}
    script = (
        "import importlib.util as u, sys\n"
        "print('\\n'.join(a for a in sys.argv[1:] if u.find_spec(a.split('=')[1]) is not None))"
    )
    found = output_of([str(PYTHON), "-c", script, *(f"{name}={module}" for name, module in modules.items())])
    return {line.split("=")[0] for line in (found or "").splitlines()}


def pip_install(arguments: list[str]) -> bool:
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    say("pip install " + " ".join(arguments))
    return subprocess.run(command, cwd=ROOT).returncode == 0


def install_pinned(group: str) -> None:
    """Installs the pinned packages of a group, with pip's progress in view."""
    for file, options in GROUPS[group]:
        if not pip_install([*options, "-r", f"tools/{file}"]):
            sys.exit(f"[environment] installing tools/{file} failed: see pip's message above")


def install_missing(group: str) -> bool:
    """Installs only what cannot be imported yet. Returns whether nothing is missing now."""
    complete = True
    for file, options in GROUPS[group]:
        wanted = requirements(file)
        names = list(dict.fromkeys(name for name, _ in wanted))
        found = importable(names)
        missing = [line for name, line in wanted if name not in found]
        if not missing or pip_install([*options, "--retries", "1", "--timeout", "15", *missing]):
            continue
        complete = False
        lost = sorted(set(names) - importable(names))
        say(f"could not install {', '.join(lost)}; going on without")
        if ESSENTIAL & set(lost):
            sys.exit(f"[environment] cannot go on without {', '.join(sorted(ESSENTIAL & set(lost)))}")
    return complete


def cmake_is_there() -> bool:
    version = re.search(r"version (\d+)\.(\d+)", output_of(["cmake", "--version"]) or "")
    return version is not None and tuple(map(int, version.groups())) >= MINIMUM_CMAKE


def prepare(groups: list[str]) -> None:
    """Brings the environment to where every group is installed."""
    if sys.version_info < MINIMUM_PYTHON:
        sys.exit(f"Python {'.'.join(map(str, MINIMUM_PYTHON))} or later is needed, this is {sys.version.split()[0]}")
    key_file = VENV / "kda-environment"
    base = f"{os.path.realpath(sys.executable)} {sys.version} KDA_SYSTEM_TORCH={os.environ.get('KDA_SYSTEM_TORCH', '')}"
    digest = {
        group: hashlib.sha256("".join((ROOT / "tools" / f).read_text() for f, _ in GROUPS[group]).encode()).hexdigest()
        for group in groups
    }
    stamps = {group: VENV / f"kda-group-{group}" for group in groups}

    reuse_file = VENV / "kda-system-torch"
    if not (PYTHON.exists() and key_file.exists() and key_file.read_text() == base):
        found = system_torch()
        if found:
            say(f"creating .venv on top of the system's {found} (Python {sys.version.split()[0]})")
        else:
            say(f"creating .venv (Python {sys.version.split()[0]})")
        create(reuse=found is not None)
        if found:
            reuse_file.write_text(found)
        key_file.write_text(base)

    for group in groups:
        stamp = stamps[group]
        if stamp.exists() and stamp.read_text() == digest[group]:
            continue
        if group == "cmake" and cmake_is_there():
            continue
        if not reuse_file.exists():
            install_pinned(group)
        elif not install_missing(group):
            continue  # No stamp: try again next time.
        stamp.write_text(digest[group])
    say("ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", choices=sorted(GROUPS), help="packages to install (default: dev)")
    prepare(parser.parse_args().group or ["dev"])


if __name__ == "__main__":
    main()
