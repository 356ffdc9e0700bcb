"""Which steps the clusters of the fused forward take, and which tiles the CTAs of a grid: headers of kernels, compiled
for the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def run_check(source: str, folder: Path) -> None:
    program = folder / "check"
    command = ["nvcc", "-std=c++17", "-O1", "-arch=sm_90a", "--expt-relaxed-constexpr", "-I", ROOT / "csrc"]
    subprocess.run([*command, ROOT / "tests" / source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_all_steps_are_taken_once(tmp_path: Path) -> None:
    """Of 20 000 calls drawn at random, packed and not, with chains handed over and with cuts of which some are left."""
    run_check("schedule_check.cu", tmp_path)


def test_all_tiles_are_taken_once(tmp_path: Path) -> None:
    """By grids of 1 to 300 CTAs; and ends of sequences by different ones, where they would meet the same."""
    run_check("tiles_check.cu", tmp_path)
