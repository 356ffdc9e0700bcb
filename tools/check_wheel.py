#!/usr/bin/env python3
"""Shows that one wheel serves several torch versions: builds it, installs it beside each, and runs its tests there.

    python tools/check_wheel.py --torch 2.14.1 --torch 2.13.0 [--wheel FILE] [--environments FOLDER] [-- PYTEST...]

Each torch gets an environment FOLDER/torch-VERSION, which is kept: a second run only installs the wheel again. Nothing
is compiled there. The tests of the package run in a copy of tests/ away from the source tree, so that `import kda_cuda`
can only find the wheel; on a machine with a GPU those in tests/gpu as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST_PACKAGES = ["pytest>=8", "pytest-timeout", "hypothesis", "numpy", "rich", "matplotlib"]
# The tests of what the wheel carries; the others test the source tree, its build and its tools.
PACKAGE_TESTS = ["operators", "errors", "compile", "drop_in", "wheel", "reference", "composite", "properties"]
PACKAGE_TESTS += ["field_failures", "layer", "layer_sequences", "demo"]


def say(text: str) -> None:
    print(f"[wheel] {text}", flush=True)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """Runs a command; its failure ends the program with its status."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    status = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=settings | environment, check=False
    ).returncode
    if status != 0:
        say(f"failed with status {status}: {' '.join(map(str, command))}")
        sys.exit(status)


def build_wheel(folder: Path) -> Path:
    """The wheel of the source tree, built with the torch of the running Python."""
    say("building the wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("kda_cuda-*.whl")
    return wheel


def environment_python(folder: Path, torch_version: str) -> Path:
    """The Python of an environment that has this torch and what the tests need."""
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making {folder}")
        venv.create(folder, with_pip=True)
        run(python, "-m", "pip", "install", "-q", f"torch=={torch_version}", *TEST_PACKAGES)
    return python


def check(wheel: Path, python: Path, pytest_arguments: list[str]) -> None:
    """Installs the wheel and runs the tests away from the source tree."""
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
        # The configuration (markers) without the package beside it.
        shutil.copy(ROOT / "pyproject.toml", folder)
        program = (
            "import kda_cuda, platform, torch; from pathlib import Path;"
            f"assert Path({str(ROOT)!r}) not in Path(kda_cuda.__file__).resolve().parents, kda_cuda.__file__;"
            "print('[wheel] torch', torch.__version__, 'Python', platform.python_version(), kda_cuda.build_info())"
        )
        run(python, "-c", program, cwd=Path(folder))
        files = [f"tests/test_{name}.py" for name in PACKAGE_TESTS]
        if (tests / "gpu").is_dir():
            files.append("tests/gpu")
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *pytest_arguments, cwd=Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", required=True, help="a torch version; may be given several times")
    parser.add_argument("--wheel", type=Path, help="an existing wheel; default: build one")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "environments")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel.resolve() if arguments.wheel else build_wheel(Path(folder))
        say(f"{wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB")
        for version in arguments.torch:
            say(f"torch {version}")
            python = environment_python(arguments.environments.resolve() / f"torch-{version}", version)
            check(wheel, python, arguments.pytest)
    say("done")


if __name__ == "__main__":
    main()
