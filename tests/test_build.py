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
        assert headers == {"kda.h", "plan.h", "types.h"}
        run("cmake", "-S", CONSUMER, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
        run("cmake", "--build", tmp_path / "build")
        plan = json.loads(run(tmp_path / "build/consumer").stdout)
        assert plan["path"] == "stepwise" and plan["chunk_slots"] == 128

    def test_benchmark_explains_itself(self, built):
        text = run(built / "bench_chunk_fwd", "--help").stdout
        shape = ("--lengths", "--batch", "--heads", "--value-heads", "--key-dim", "--value-dim", "--dtype")
        features = ("--gate", "--log-gate", "--no-l2norm", "--negative-eigenvalues", "--state-v-first")
        states = ("--no-initial-state", "--no-final-state", "--chunk-states")
        overrides = ("--path", "--value-tile", "--clusters", "--segment-chunks")
        assert {*shape, *features, *states, *overrides, "--iterations", "--json"} <= set(text.split())

    def test_benchmark_of_the_backward_explains_itself(self, built):
        text = run(built / "bench_chunk_bwd", "--help").stdout
        features = {"--lengths", "--gate", "--log-gate", "--no-l2norm", "--no-beta-sigmoid", "--saved", "--json"}
        assert features | {"--segment-chunks", "--value-tile"} <= set(text.split()) and "--clusters" not in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--path", "fused"], "--path: it is a flag of bench_chunk_fwd"),
            (["--clusters", "2"], "--clusters: it is a flag of bench_chunk_fwd"),
            (["--segment-chunks", "-2"], "--segment-chunks: expected an integer in [0, "),
            (["--segment-chunks", "2", "--value-tile", "128"], "--value-tile: expected 64 where sequences are cut"),
            (["--chunk-states"], "--chunk-states: it is a flag of bench_chunk_fwd"),
            (["--no-beta-sigmoid", "--negative-eigenvalues"], "--negative-eigenvalues: expected no --no-beta-sigmoid"),
            (["--speed"], "unknown flag '--speed'"),
        ],
    )
    def test_benchmark_of_the_backward_refuses_wrong_flags(self, built, arguments, message):
        result = subprocess.run([built / "bench_chunk_bwd", *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--saved"], "--saved: it is a flag of bench_chunk_bwd"),
            (["--lengths", "12,x"], "--lengths: expected an integer"),
            (["--heads", "3", "--value-heads", "4"], "--value-heads: expected a multiple of --heads = 3, got 4"),
            (["--gate", "steep"], "--gate: expected random, long or unbounded, got 'steep'"),
            (["--path", "composite"], "--path: expected auto, stepwise, fused_cut, fused or staged, got 'composite'"),
            (["--path", "fused", "--value-tile", "64"], "--value-tile: expected --path staged or auto"),
            (["--path", "stepwise", "--value-tile", "64"], "--value-tile: expected --path staged or auto"),
            (["--path", "staged", "--clusters", "4"], "--clusters: expected --path fused, fused_cut or auto"),
            (["--path", "stepwise", "--clusters", "4"], "--clusters: expected --path fused, fused_cut or auto"),
            (["--clusters", "0"], "--clusters: expected an integer in [1, "),
            (
                ["--path", "fused", "--segment-chunks", "4"],
                "--segment-chunks: expected --path stepwise, fused_cut or auto",
            ),
            (
                ["--path", "staged", "--segment-chunks", "4"],
                "--segment-chunks: expected --path stepwise, fused_cut or auto",
            ),
            (["--segment-chunks", "-1"], "--segment-chunks: expected an integer in [0, "),
            (["--value-tile", "96"], "--value-tile: expected a multiple of 64 that divides --value-dim = 128, got 96"),
            (["--value-tile", "80"], "--value-tile: expected a multiple of 64"),
            (["--value-tile", "256", "--value-dim", "256"], "--value-tile: expected an integer in [64, 128]"),
            (["--value-dim", "64", "--value-tile", "128"], "--value-tile: expected a multiple of 64 that divides"),
            (["--lengths", "3,4", "--batch", "2"], "--batch: expected one length, that of each row, got 2"),
            (["--speed"], "unknown flag '--speed'"),
            (["--json"], "--json: expected a value"),
        ],
    )
    def test_benchmark_refuses_wrong_flags(self, built, arguments, message):
        result = subprocess.run([built / "bench_chunk_fwd", *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr

    def test_benchmark_without_gpu_says_so(self, built):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        for binary in ("bench_chunk_fwd", "bench_chunk_bwd"):
            result = subprocess.run([built / binary], capture_output=True, text=True, env=environment)
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


class TestKernelReport:
    RESOURCES = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3kda12solve_kernelILi64EEEvPKf:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:944 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN3kda11gemm_kernelEPf:
  REG:40 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:944 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    SASS = """
arch = sm_90a
\t\tFunction : _ZN3kda12solve_kernelILi64EEEvPKf
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000ff00000000800 */
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R4, R4 ;  /* 0x00000a00ff017b82 */
        /*0020*/              @UP1 LDSM.16.M88.4 R4, [R4] ;      /* 0x00000a00ff017b82 */
\t\tFunction : _ZN3kda11gemm_kernelEPf
        /*0000*/                   STL.64 [R1], R2 ;             /* 0x00000a00ff017b82 */
        /*11b0*/                   HMMA.1688.F32 R4, R4 ;        /* 0x00000a00ff017b82 */
"""

    @pytest.fixture
    def report(self):
        return script("kernel_report")

    @pytest.fixture
    def kernels(self, report):
        kernels = report.parse_resources(self.RESOURCES)
        report.add_instructions(kernels, self.SASS)
        return kernels

    BUDGETS = {
        "solve_kernel": {"registers": 168, "instructions": ["HMMA", "LDSM"]},
        "gemm_kernel": {"registers": 40, "stack_bytes": 24, "spill_instructions": 1, "instructions": ["HMMA"]},
    }

    def changed(self, kernel: str, **limits) -> dict:
        return {**self.BUDGETS, kernel: {**self.BUDGETS[kernel], **limits}}

    def test_reads_resources_and_instructions(self, kernels):
        solve, gemm = kernels
        assert (solve.registers, solve.stack_bytes, solve.static_shared_bytes) == (168, 0, 1024)
        assert solve.instructions == {"LDC": 1, "HMMA": 1, "LDSM": 1} and solve.spill_instructions == 0
        assert (gemm.registers, gemm.stack_bytes, gemm.spill_instructions) == (40, 24, 1)

    def test_within_budget(self, report, kernels):
        assert report.check(kernels, self.BUDGETS, True) == []

    @pytest.mark.parametrize(
        ("kernel", "limits", "message"),
        [
            ("solve_kernel", {"registers": 160}, "registers 168, allowed 160"),
            ("gemm_kernel", {"stack_bytes": 0}, "stack_bytes 24, allowed 0"),
            ("gemm_kernel", {"spill_instructions": 0}, "spill_instructions 1, allowed 0"),
            ("solve_kernel", {"static_shared_bytes": 0}, "static_shared_bytes 1024, allowed 0"),
            ("gemm_kernel", {"instructions": ["HMMA", "LDSM"]}, "no LDSM instruction"),
        ],
    )
    def test_excess_is_named(self, report, kernels, kernel, limits, message):
        problems = report.check(kernels, self.changed(kernel, **limits), True)
        assert len(problems) == 1 and message in problems[0] and kernel in problems[0]

    def test_an_instantiation_may_have_limits_of_its_own(self, report, kernels):
        own = {"solve_kernelILi64E": {"registers": 160, "instructions": ["HGMMA"]}}
        problems = report.check(kernels, self.changed("solve_kernel", instantiations=own), True)
        assert len(problems) == 2 and "registers 168, allowed 160" in problems[0] and "no HGMMA" in problems[1]
        other = {"solve_kernelILi128E": {"registers": 160}}
        problems = report.check(kernels, self.changed("solve_kernel", instantiations=other), True)
        assert len(problems) == 1 and "no such instantiation: solve_kernelILi128E" in problems[0]

    @pytest.mark.parametrize(("waits", "serialized"), [(6, 0), (12, 0), (48, 24), (50, 24)])
    def test_products_of_warpgroups_that_wait_one_by_one(self, report, kernels, waits, serialized):
        """Each with a WARPGROUP.ARRIVE before and a WARPGROUP.DEPBAR behind it; else there is one of both for many."""
        solve, _ = kernels
        solve.instructions.update({"HGMMA": 24, "WARPGROUP": waits})
        assert solve.serialized_products == serialized
        problems = report.check(kernels, self.BUDGETS, True)
        named = ["serialized_products 24, allowed 0" in p and "solve_kernel" in p for p in problems]
        assert named == ([True] if serialized else [])
        assert report.check(kernels, self.changed("solve_kernel", serialized_products=24), True) == []

    def test_no_products_wait_in_the_paths_that_go_by_steps(self, report):
        budgets = json.loads(report.BUDGET_FILE.read_text())["kernels"]
        for name in ("fused_scan_kernel", "state_scan_kernel", "segment_summary_kernel"):
            limits = [budgets[name], *budgets[name]["instantiations"].values()]
            assert "HGMMA" in budgets[name]["instructions"]
            assert not any(limit.get("serialized_products", 0) for limit in limits)

    def test_instructions_are_not_checked_without_a_disassembler(self, report, kernels):
        assert report.check(kernels, self.changed("gemm_kernel", instructions=["LDSM"]), False) == []

    def test_kernel_without_budget_and_budget_without_kernel(self, report, kernels):
        budgets = {"solve_kernel": self.BUDGETS["solve_kernel"], "kernel": {"registers": 255}}
        problems = report.check(kernels, budgets, True)
        assert any("gemm_kernel" in p and "no budget" in p for p in problems)
        assert any("kernel: no such kernel" in p for p in problems)

    def test_checked_in_budget_allows_no_spill_by_default(self, report):
        budgets = json.loads(report.BUDGET_FILE.read_text())["kernels"]
        own = [limits for budget in budgets.values() for limits in budget.get("instantiations", {}).values()]
        assert budgets and all(limits["registers"] <= 255 and limits["why"] for limits in [*budgets.values(), *own])
        assert "HGMMA" in budgets["fused_scan_kernel"]["instructions"]
        assert report.DEFAULT_LIMITS["stack_bytes"] == report.DEFAULT_LIMITS["spill_instructions"] == 0
