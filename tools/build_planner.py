#!/usr/bin/env python3
"""Builds the planner's Python module `kda_plan` (csrc/python) into build/planner with the host compiler alone.

The module is for tests and tools; it is not part of the wheel. Needs a C++17 compiler and the headers of pybind11 (the
PyPI package, or the copy that torch carries). Compiles only when a source is newer than the module.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    ROOT / "csrc" / name
    for name in ("python/kda_plan.cpp", "kda/plan.cpp", "kda/plan_models.cpp", "kda/cpu/schedule.cpp")
]
HEADERS = [ROOT / "csrc/kda" / name for name in ("plan.h", "plan_models.h", "types.h", "cpu/schedule.h")]
MODULE = ROOT / "build/planner" / f"kda_plan{sysconfig.get_config_var('EXT_SUFFIX')}"


def pybind11_include() -> Path:
    """The folder that holds `pybind11/pybind11.h`.

    Raises:
        RuntimeError: neither pybind11 nor torch is installed.
    """
    spec = importlib.util.find_spec("pybind11")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / "include"
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        include = Path(spec.submodule_search_locations[0]) / "include"
        if (include / "pybind11/pybind11.h").exists():
            return include
    raise RuntimeError("pybind11 headers not found: install the PyPI package pybind11")


def host_compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the path.

    Raises:
        RuntimeError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise RuntimeError("no C++ compiler found: install g++ or set CXX")


def build() -> Path:
    """Builds the module unless it is newer than its sources, and returns its path."""
    newest = max(path.stat().st_mtime for path in SOURCES + HEADERS)
    if MODULE.exists() and MODULE.stat().st_mtime >= newest:
        return MODULE
    MODULE.parent.mkdir(parents=True, exist_ok=True)
    unfinished = MODULE.with_name(f"{MODULE.name}.{os.getpid()}")
    command = [*host_compiler().split(), "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += [f"-I{pybind11_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command += [*map(str, SOURCES), "-o", str(unfinished)]
    subprocess.run(command, check=True)
    unfinished.replace(MODULE)
    return MODULE


def load() -> ModuleType:
    """Builds the module if needed and imports it."""
    spec = importlib.util.spec_from_file_location("kda_plan", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())
    sys.exit(0)
