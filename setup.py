"""Builds `kda_cuda._C`: the operators, and the CUDA kernels if nvcc is there.

One library serves every torch from 2.10 on and every CPython from 3.10 on: it uses the stable ABI of LibTorch alone,
has no Python symbol in it, and carries its CUDA runtime with it.

Environment:
    KDA_CUDA_ARCHS            architectures to compile for, separated by ';' (default "90a")
    KDA_CUDA_WITHOUT_KERNELS  1: build the operators without CUDA kernels even if nvcc is there
    KDA_CUDA_VERBOSE          1: print registers, shared memory and spills of each kernel
    CUDA_HOME                 the CUDA toolkit (default: that of the nvcc on PATH, then /usr/local/cuda)
    MAX_JOBS                  compilers that run at the same time
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "90a"
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the library runs on
PYTHON_TAG = "cp310"  # the oldest CPython


def env_flag(name: str) -> bool:
    """Whether the environment variable is set to something other than 0."""
    return os.environ.get(name, "0") not in ("", "0")


def toolkit_of(nvcc: str) -> str | None:
    """The toolkit that an nvcc belongs to, as it says itself: the nvcc on PATH may be a link or a script."""
    # nvcc prints the commands that it would run, and before them its settings, one of which is "TOP=<folder>".
    report = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    match = re.search(r"TOP=(\S+)", report.stderr)
    return match.group(1) if match else None


def find_cuda_home() -> Path | None:
    """The CUDA toolkit whose nvcc builds the kernels, or None."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(toolkit_of(nvcc))
    candidates.append("/usr/local/cuda")
    for candidate in candidates:
        home = Path(candidate).resolve() if candidate else None
        if home and (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime_api.h").is_file():
            return home
    return None


def find_static_runtime(cuda_home: Path) -> Path:
    """The folder that holds the static CUDA runtime."""
    for folder in (cuda_home / "lib64", cuda_home / "lib", *sorted(cuda_home.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise SystemExit(f"kda-cuda: libcudart_static.a is missing in the CUDA toolkit {cuda_home}")


def find_cutlass_include() -> Path:
    """The CUTLASS and CuTe headers of the PyPI package nvidia-cutlass, found without importing it."""
    spec = importlib.util.find_spec("cutlass_library")
    for location in (spec.submodule_search_locations or []) if spec else []:
        include = Path(location) / "source" / "include"
        if (include / "cutlass" / "cutlass.h").is_file():
            return include
    raise SystemExit("kda-cuda: the CUTLASS headers are missing: pip install nvidia-cutlass==4.2.0.0")


def cuda_archs() -> list[str]:
    """The architectures to compile for, such as ["90a"]."""
    archs = [arch for arch in re.split(r"[;, ]+", os.environ.get("KDA_CUDA_ARCHS", DEFAULT_ARCHS)) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"kda-cuda: KDA_CUDA_ARCHS: expected names such as 90a, separated by ';', got {arch!r}")
    return archs or [DEFAULT_ARCHS]


def put_ninja_on_path() -> None:
    """Lets a Python that runs outside of its activated environment find the ninja of that environment."""
    if shutil.which("ninja") is None and (spec := importlib.util.find_spec("ninja")) and spec.origin:
        scripts = [Path(sys.executable).parent, Path(spec.origin).parent / "data" / "bin"]
        os.environ["PATH"] = os.pathsep.join([*map(str, scripts), os.environ.get("PATH", "")])


def read_version() -> str:
    """The version that kda_cuda/_version.py states."""
    text = (ROOT / "kda_cuda" / "_version.py").read_text()
    match = re.search(r'__version__ = "([^"]+)"', text)
    assert match, "kda_cuda/_version.py must state __version__"
    return match.group(1)


def sources(pattern: str) -> list[str]:
    """The files that match, relative to the project as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def make_extension(cuda_home: Path | None) -> Extension:
    """`kda_cuda._C`; without CUDA kernels if `cuda_home` is None."""
    import torch
    from torch.utils import cpp_extension

    archs = cuda_archs() if cuda_home else []
    files = sources("csrc/kda/**/*.cpp") + sources("csrc/torch/*.cpp")
    torch_root = Path(torch.__file__).parent
    include_dirs = [str(ROOT / "csrc"), str(torch_root / "include")]
    library_dirs = [str(torch_root / "lib")]
    libraries = ["torch_cpu"]
    macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("KDA_CUDA_VERSION", f'"{read_version()}"'),
        ("KDA_CUDA_TORCH_VERSION", f'"{torch.__version__}"'),
        ("KDA_CUDA_ARCHITECTURES", f'"{";".join(archs)}"'),
    ]
    # Messages of the stable ABI carry __FILE__: let them name files of the project, not folders of the build machine.
    prefix_map = f"-ffile-prefix-map={ROOT}/="
    cxx_flags = [prefix_map, "-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    nvcc_flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo"]
    nvcc_flags += ["-Xcompiler", f"-fvisibility=hidden,{prefix_map}"]
    # torch takes these operators away; the kernel library is also built without torch and shall not differ.
    nvcc_flags += [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
    nvcc_flags += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    # The CUDA runtime stays private to the library. No rpath: torch is always loaded before it.
    link_flags = ["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]

    if env_flag("KDA_TIMELINE"):  # marks for tools/timeline.py, in kernels that are slower for it
        macros.append(("KDA_TIMELINE", "1"))

    if cuda_home:
        # torch sets CUDA_HOME only if it was built with CUDA itself, and compares its CUDA version with that of nvcc.
        # Neither matters here: the library has its own CUDA runtime.
        cpp_extension.CUDA_HOME = str(cuda_home)
        cpp_extension._check_cuda_version = lambda *_: None
        files += sources("csrc/kda/**/*.cu")
        include_dirs += [str(cuda_home / "include"), str(find_cutlass_include())]
        library_dirs.append(str(find_static_runtime(cuda_home)))
        libraries += ["cudart_static", "dl", "rt", "pthread"]
        macros.append(("KDA_CUDA_WITH_KERNELS", "1"))
        for arch in archs:
            nvcc_flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if env_flag("KDA_CUDA_VERBOSE"):
            nvcc_flags += ["-Xptxas", "-v"]
    else:
        files = [name for name in files if not name.endswith("_cuda.cpp")]

    return Extension(
        "kda_cuda._C",
        files,
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        libraries=libraries,
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        extra_link_args=link_flags,
        language="c++",
        py_limited_api=True,
    )


def remove_stale_objects(build_temp: Path) -> None:
    """Deletes objects older than the newest header: with a CPU-only torch, ninja does not learn what nvcc includes."""
    headers = [path for pattern in ("*.h", "*.cuh") for path in (ROOT / "csrc").rglob(pattern)]
    newest = max(path.stat().st_mtime for path in headers)
    for path in build_temp.rglob("*.o"):
        if path.stat().st_mtime < newest:
            path.unlink()


def main() -> None:
    """Declares the extension to setuptools; everything else about the package is in pyproject.toml."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        raise SystemExit(f"kda-cuda: building needs torch 2.10 or later in the environment: {error}") from error

    class BuildKernels(BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            remove_stale_objects(Path(self.build_temp))
            super().build_extension(ext)

    put_ninja_on_path()
    cuda_home = None if env_flag("KDA_CUDA_WITHOUT_KERNELS") else find_cuda_home()
    if cuda_home is None:
        print("kda-cuda: no nvcc (or KDA_CUDA_WITHOUT_KERNELS=1): building without CUDA kernels", file=sys.stderr)
    setup(
        ext_modules=[make_extension(cuda_home)],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    )


main()
