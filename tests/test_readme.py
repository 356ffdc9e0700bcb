"""Every code block of the README runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
COMMANDS = [line.partition("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


def blocks_of(kind: str) -> list[str]:
    return [block for found, block in BLOCKS if found == kind]


def title_of(block: str) -> str:
    """The bold words before a block."""
    return re.findall(r"^\*\*(.+?)\*\*", README[: README.index(block)], flags=re.M)[-1]


def test_all_blocks_are_of_a_kind_that_is_tested() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh", "python", "cpp"}
    assert len(blocks_of("python")) == 4 and len(blocks_of("cpp")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks_of("python"), ids=title_of)
def test_python_blocks_run(block: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning:kda_cuda", "-c", block]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m kda_cuda")])
def test_commands_run(command: str) -> None:
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join([*COMMANDS, *re.findall(r"`([^`\n]+)`", README)])))
    assert {"demo", "test", "wheel", "cmake"} <= named
    assert named <= targets


def test_links_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next((Path(h) / "include" for h in homes if h and (Path(h) / "include/cuda_runtime_api.h").exists()), None)


@pytest.mark.skipif(cuda_include() is None or shutil.which("g++") is None, reason="needs the CUDA headers and g++")
@pytest.mark.parametrize("block", blocks_of("cpp"))
def test_cpp_block_compiles(block: str, tmp_path: Path) -> None:
    source = tmp_path / "block.cpp"
    source.write_text(block)
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, "-isystem", str(cuda_include()), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_support_table_agrees_with_the_operator() -> None:
    """The kernels' column, against the planner."""
    import json

    import torch

    import kda_cuda  # noqa: F401

    def path(key_dim: int, value_dim: int, dtype: str, capability: int, heads: int = 2, bounded: bool = True) -> str:
        sizes = (heads, heads, key_dim, value_dim)
        plan = torch.ops.kda.plan_chunk_fwd([1024], 8, *sizes, dtype, False, capability, 132, bounded)
        return json.loads(plan)["path"]

    for key_dim in (64, 128):
        for value_dim in (64, 128):
            for dtype in ("bfloat16", "float16"):
                assert path(key_dim, value_dim, dtype, 90) == "stepwise"  # few heads
                assert path(key_dim, value_dim, dtype, 90, heads=96) == "fused"
                assert path(key_dim, value_dim, dtype, 90, heads=96, bounded=False) == "stepwise"
    assert path(128, 128, "float32", 90) == "composite"
    assert path(96, 128, "bfloat16", 90) == "composite" and path(128, 256, "bfloat16", 90) == "composite"
    for capability in (0, 80, 89, 100, 120):
        assert path(128, 128, "bfloat16", capability) == "composite"


def test_accuracy_table_is_the_contract() -> None:
    from kda_cuda import accuracy

    assert f"| `o` | {accuracy.O_RELATIVE_RMSE:.1e}".replace("e-0", "e-") in README
    assert f"| final state | {accuracy.STATE_RELATIVE_RMSE:.1e}".replace("e-0", "e-") in README
