"""FLA's kernels made ready: compiled by many processes at once, and tuned once for a kind of GPU.

FLA tunes each of its kernels for each number of heads: about 65 configurations to compile and time for one forward,
some ten minutes for the forward's board on a machine that has never run it, and the backward's come to that. The result
does not depend on who tuned, so

- ``compile_ahead`` fills Triton's cache from several processes before the first call, without launching anything;
- ``collect`` reads FLA's choices off its autotuners after a run, ``store`` writes them to a file, and ``use_stored``
  hands them to FLA by its own mechanism for that (FLA_CONFIG_DIR, FLA_CACHE_MODE=strict: exact keys only, anything
  else is tuned as usual). A file serves the GPU, FLA and Triton that it was written with and no others.

Nothing here changes what FLA computes or how it is called. Every failure leaves FLA to do it all by itself.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.shapes import Shape

__all__ = ["collect", "compile_ahead", "store", "use_stored"]

STORED = Path(__file__).with_name("fla_tuned.json")
COMPILE_TIMEOUT_S = 300
SPARE_CORES = 2


def _identity() -> dict[str, str]:
    """What tuned configurations belong to."""
    from importlib import metadata

    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "fla": metadata.version("fla-core"),
        "triton": triton.__version__,
    }


@functools.cache
def use_stored(file: Path = STORED) -> str:
    """Points FLA to the stored configurations if they belong to this machine. Must come before FLA is imported.

    Returns: what was done, as a clause.
    """
    try:
        content = json.loads(file.read_text())
        if "fla.ops.utils.cache" in sys.modules:
            return "FLA was imported before; it tunes by itself"
        if (identity := _identity()) != content["identity"]:
            return f"stored configurations are of {content['identity']}, this is {identity}; FLA tunes by itself"
        folder = Path(tempfile.mkdtemp(prefix="fla-configs-"))
        for kernel, entries in content["kernels"].items():
            (folder / f"{kernel}.json").write_text(json.dumps({"kernel_name": kernel, "autotune_entries": entries}))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        return f"no stored configurations ({type(error).__name__}); FLA tunes by itself"
    os.environ.update(FLA_CONFIG_DIR=str(folder), FLA_CACHE_MODE="strict")
    return f"stored configurations of {file.name}"


def collect() -> dict[str, dict[str, Any]]:
    """The configurations that FLA's autotuners chose or loaded in this process, by kernel, in FLA's own format."""
    try:
        from fla.ops.utils.cache import AutotuneKey, CachedAutotuner
    except ImportError:
        return {}
    tuners = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("fla.")
        for value in _unwrapped(vars(module).values())
        if isinstance(value, CachedAutotuner)
    }
    kernels: dict[str, dict[str, Any]] = {}
    for tuner in tuners.values():
        for key, config in tuner.cache.items():
            chosen = {
                "kwargs": config.kwargs,
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "num_ctas": config.num_ctas,
                "maxnreg": config.maxnreg,
                "ir_override": config.ir_override,
            }
            entry = {"autotune_key": list(key), "config": chosen}
            kernels.setdefault(tuner.kernel_name, {})[AutotuneKey.key_hash(key)] = entry
    return kernels


def _unwrapped(values: Iterable[Any]) -> Iterable[Any]:
    """Objects and what they wrap: Triton's heuristics stand around an autotuner, as its ``fn``."""
    for value in values:
        while value is not None:
            yield value
            value = getattr(value, "fn", None) if type(value).__module__.startswith("triton.") else None


def store(file: Path) -> int:
    """Writes what ``collect`` finds, if FLA tuned anything itself. Returns the number of configurations written."""
    kernels = collect()
    if not kernels:
        return 0
    identity = _identity()
    content = json.loads(STORED.read_text()) if STORED.exists() else {}
    known = content.get("kernels", {}) if content.get("identity") == identity else {}
    merged = {name: known.get(name, {}) | kernels.get(name, {}) for name in sorted({*known, *kernels})}
    if merged == known:
        return 0
    file.write_text(json.dumps({"identity": identity, "kernels": merged}, indent=1, sort_keys=True) + "\n")
    return sum(map(len, merged.values()))


Work = tuple[str, Shape]  # name of an operator of the board, and a shape


def compile_ahead(work: Sequence[Work], advance: Callable[[], None] = lambda: None) -> str:
    """Compiles FLA's kernels, a process for each number of heads and kind of call.

    Args:
        advance: called when a process is done; as many times as ``len(distinct(work))``.

    Returns: what was done, as a clause.
    """
    slots = max(1, (os.cpu_count() or 1) - SPARE_CORES)
    with ThreadPoolExecutor(slots) as threads:
        failures = []
        for failure in threads.map(_compile, distinct(work)):
            failures += [failure] if failure else []
            advance()
    if failures:
        return f"compiled ahead, but {len(failures)} of {len(distinct(work))} processes failed: {failures[0]}"
    return f"compiled ahead in {len(distinct(work))} processes"


def distinct(work: Sequence[Work]) -> list[Work]:
    """One shape for each (operator, heads, cu_seqlens given or not): those have kernels of their own."""
    return list({(name, s.heads, s.varlen): (name, s) for name, s in reversed(work)}.values())[::-1]


def _compile(work: Work) -> str | None:
    """Runs one process. Returns the end of its complaint, None if it has none."""
    operator, shape = work
    command = [sys.executable, "-m", "bench.fla_compile", "--lengths", ",".join(map(str, shape.lengths))]
    command += ["--heads", str(shape.heads), "--operator", operator]
    # One thread for each process: there are as many processes as cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{operator} {shape.name}: {type(error).__name__}"
    if done.returncode == 0:
        return None
    return f"{operator} {shape.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
