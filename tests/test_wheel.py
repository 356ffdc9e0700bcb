"""One library for many torch and Python versions: what it may depend on, and the wheel that carries it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kda_cuda
from kda_cuda._extension import LIBRARY_PATH

ROOT = Path(__file__).resolve().parents[1]

# Libraries of every Linux that torch runs on, and the one part of torch that holds the stable ABI.
ALLOWED_LIBRARIES = {
    "libtorch_cpu.so",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
STABLE_ABI = re.compile(r"(aoti_)?torch_\w+")  # the C functions of torch/csrc/stable and its shims


def binutils(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_library_depends_on_nothing_of_a_version() -> None:
    dynamic = binutils("readelf", "--wide", "--dynamic", str(LIBRARY_PATH))
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert needed <= ALLOWED_LIBRARIES  # above all no libcudart.so, libcuda.so, libc10, libtorch_python or libpython
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_library_uses_the_stable_abi_of_torch_alone() -> None:
    table = binutils("nm", "--dynamic", "--undefined-only", str(LIBRARY_PATH))
    symbols = [line.split()[-1] for line in table.splitlines()]
    # Names with a version (name@GLIBC_2.17) belong to the system; weak ones are optional.
    unversioned = [line.split()[-1] for line in table.splitlines() if "@" not in line and line.split()[-2] == "U"]
    assert unversioned
    assert [name for name in unversioned if not STABLE_ABI.fullmatch(name)] == []
    assert not [name for name in symbols if name.startswith("Py")]
    mangled = " ".join(name for name in symbols if name.startswith("_Z"))
    assert not re.search(r"(?<=\d)(c10|at|torch)\d", mangled), "a C++ symbol of torch: not in its stable ABI"


def test_library_keeps_the_cuda_runtime_to_itself() -> None:
    exported = binutils("nm", "--dynamic", "--defined-only", str(LIBRARY_PATH))
    assert not re.search(r"\bcu(da|[A-Z])\w+", exported)


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
def test_build_asks_only_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    backend = importlib.import_module("build_backend")
    monkeypatch.delenv("KDA_CUDA_WITHOUT_KERNELS", raising=False)
    monkeypatch.setattr(backend.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    assert backend.get_requires_for_build_wheel() == []
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.get_requires_for_build_wheel() == [backend.TORCH, backend.CUTLASS]
    monkeypatch.setenv("KDA_CUDA_WITHOUT_KERNELS", "1")
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert backend.get_requires_for_build_wheel() == [backend.TORCH, backend.NINJA]


def test_library_is_named_for_the_stable_python_abi() -> None:
    assert LIBRARY_PATH.name == "_C.abi3.so"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
def test_wheel_without_nvcc(tmp_path: Path) -> None:
    """Without CUDA kernels the build says so in one line, and gives one abi3 wheel whose operators work."""
    for package in ("setuptools", "ninja"):
        pytest.importorskip(package)
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    for folder in ("csrc", "kda_cuda", "tools"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = dict(os.environ, KDA_CUDA_WITHOUT_KERNELS="1", MAX_JOBS=os.environ.get("MAX_JOBS", "2"))
    environment.pop("PYTHONPATH", None)

    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-v",
        "-w",
        str(tmp_path),
        ".",
    ]
    built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    notes = {line.strip() for line in (built.stdout + built.stderr).splitlines() if "without CUDA kernels" in line}
    assert len(notes) == 1

    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"kda_cuda-{re.escape(kda_cuda.__version__)}-cp310-abi3-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["kda_cuda/_C.abi3.so"]
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "bench/"))]
    modules = {f"kda_cuda/{path.name}" for path in (ROOT / "kda_cuda").iterdir() if path.suffix in (".py", ".txt")}
    assert modules <= set(names)

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import torch, kda_cuda; assert kda_cuda.__file__.startswith(SITE), kda_cuda.__file__;"
        "info = kda_cuda.build_info();"
        "assert info['cuda_kernels'] is False and info['architectures'] == [] and info['cuda_version'] == 0, info;"
        "x = torch.ones(1, 3, 1, 8); print(kda_cuda.chunk_fwd(x, x, x, -x, x[..., 0])[0].shape)"
    ).replace("SITE", repr(str(site)))
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=dict(environment, PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "torch.Size([1, 3, 1, 8])"
