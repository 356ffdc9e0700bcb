"""Which steps the clusters of the fused forward take: csrc/kda/forward/scan_schedule.cuh, compiled for the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_all_steps_are_taken_once(tmp_path: Path) -> None:
    """Of 20 000 calls drawn at random, packed and not, with chains handed over and with cuts of which some are left."""
    program = tmp_path / "check"
    command = ["nvcc", "-std=c++17", "-O1", "-arch=sm_90a", "--expt-relaxed-constexpr", "-I", ROOT / "csrc"]
    subprocess.run([*command, ROOT / "tests/schedule_check.cu", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
