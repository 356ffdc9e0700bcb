"""The torch-free library as an outside project gets it: configure, build, install, find_package, link, run. And the
scripts that build and check."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONSUMER = ROOT / "tests/cmake_consumer"
MINIMUM_CMAKE = (3, 24)


def cmake_version() -> tuple[int, ...]:
    if shutil.which("cmake") is None:
        return (0,)
    text = subprocess.run(["cmake", "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"(\d+)\.(\d+)", text).groups()))


def script(name: str) -> ModuleType:
    """A module of tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def has_cutlass() -> bool:
    return "KDA_CUTLASS_INCLUDE" in os.environ or importlib.util.find_spec("cutlass_library") is not None


needs_toolchain = pytest.mark.skipif(
    shutil.which("nvcc") is None or cmake_version() < MINIMUM_CMAKE or not has_cutlass(),
    reason="needs nvcc, cmake 3.24 or later and the CUTLASS headers",
)


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed; its output is in the failure message."""
    result = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result


@pytest.fixture(scope="module")
def built() -> Path:
    """The CMake build of the repository. It is kept, so that later runs compile only what changed."""
    build = ROOT / "build/cmake"
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (build / "CMakeCache.txt").exists() else []
    # Without CUDA_VISIBLE_DEVICES: the build must not need a GPU.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run("cmake", "-S", ROOT, "-B", build, *generator, f"-DPython3_EXECUTABLE={sys.executable}", env=environment)
    run("cmake", "--build", build, env=environment)
    return build


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_toolchain
class TestCMake:
    def test_outside_project_finds_links_and_runs(self, built, tmp_path):
        run("cmake", "--install", built, "--prefix", tmp_path / "prefix")
        headers = {path.name for path in (tmp_path / "prefix/include/kda").iterdir()}
        assert headers == {"kda.h", "plan.h"}
        run("cmake", "-S", CONSUMER, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
        run("cmake", "--build", tmp_path / "build")
        plan = json.loads(run(tmp_path / "build/consumer").stdout)
        assert plan["path"] == "staged" and plan["chunk_slots"] == 128

    def test_benchmark_explains_itself(self, built):
        text = run(built / "bench_chunk_fwd", "--help").stdout
        for flag in ("--lengths", "--heads", "--gate", "--dtype", "--no-final-state", "--json"):
            assert flag in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--lengths", "12,x"], "--lengths: expected an integer"),
            (["--heads", "3", "--value-heads", "4"], "--value-heads: expected a multiple of --heads = 3, got 4"),
            (["--gate", "steep"], "--gate: expected random, long or unbounded, got 'steep'"),
            (["--speed"], "unknown flag '--speed'"),
            (["--json"], "--json: expected a value"),
        ],
    )
    def test_benchmark_refuses_wrong_flags(self, built, arguments, message):
        result = subprocess.run([built / "bench_chunk_fwd", *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr

    def test_benchmark_without_gpu_says_so(self, built):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run([built / "bench_chunk_fwd"], capture_output=True, text=True, env=environment)
        assert result.returncode == 2 and "no usable CUDA device" in result.stderr


class TestExtensionIsRebuiltWhenNeeded:
    @pytest.fixture
    def builder(self, tmp_path, monkeypatch):
        """build_extension.py on a small tree with a library that is newer than its sources."""
        module = script("build_extension")
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "LIBRARY", tmp_path / "kda_cuda/_C.abi3.so")
        monkeypatch.setattr(module, "STAMP", tmp_path / "build/extension.json")
        monkeypatch.setattr(module, "has_nvcc", lambda: True)
        monkeypatch.delenv("KDA_PREBUILT", raising=False)
        monkeypatch.delenv("KDA_CUDA_ARCHS", raising=False)
        for name in ("csrc/kda/a.cu", "csrc/torch/b.cpp", "setup.py", "pyproject.toml"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
            os.utime(tmp_path / name, (1000, 1000))
        (tmp_path / "kda_cuda").mkdir()
        (tmp_path / "build").mkdir()
        module.LIBRARY.write_text("library")
        os.utime(module.LIBRARY, (2000, 2000))
        return module

    def stamp(self, builder, nvcc: bool = True) -> None:
        record = {"fingerprint": builder.fingerprint(builder.sources()), "library_bytes": 7, "nvcc": nvcc}
        builder.STAMP.write_text(json.dumps(record))

    def test_missing(self, builder):
        builder.LIBRARY.unlink()
        assert "not built" in builder.why_stale(builder.sources())

    def test_copied_library_that_is_newer_is_kept(self, builder):
        assert builder.why_stale(builder.sources()) is None

    def test_newer_source(self, builder, tmp_path):
        os.utime(tmp_path / "csrc/kda/a.cu", (3000, 3000))
        assert "csrc/kda/a.cu" in builder.why_stale(builder.sources())

    def test_touched_source_with_the_same_content_is_current(self, builder, tmp_path):
        self.stamp(builder)
        os.utime(tmp_path / "csrc/kda/a.cu", (3000, 3000))
        assert builder.why_stale(builder.sources()) is None

    def test_changed_source_with_an_old_date(self, builder, tmp_path):
        self.stamp(builder)
        (tmp_path / "csrc/kda/a.cu").write_text("changed")
        os.utime(tmp_path / "csrc/kda/a.cu", (1000, 1000))
        assert builder.why_stale(builder.sources()) is not None

    def test_other_architectures(self, builder, monkeypatch):
        self.stamp(builder)
        monkeypatch.setenv("KDA_CUDA_ARCHS", "100a")
        assert builder.why_stale(builder.sources()) is not None

    def test_nvcc_appeared(self, builder):
        self.stamp(builder, nvcc=False)
        assert "nvcc" in builder.why_stale(builder.sources())

    def test_prebuilt_library_on_request(self, builder, tmp_path, monkeypatch):
        os.utime(tmp_path / "csrc/kda/a.cu", (3000, 3000))
        monkeypatch.setenv("KDA_PREBUILT", "1")
        assert builder.why_stale(builder.sources()) is None
