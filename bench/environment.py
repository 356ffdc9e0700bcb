"""Where and with what a run was made: commit, GPU, driver, and versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import kda_cuda

__all__ = ["ROOT", "commit_state", "describe"]

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN_COMMIT = "unknown"


def commit_state(given: str | None = None) -> dict[str, Any]:
    """Commit of the source tree and whether tracked files differ from it.

    Args:
        given: what to say instead, as ``<commit>`` or ``<commit>-dirty``: for a copy of the tree without its history.
    """
    if given:
        commit, dirty = given.removesuffix("-dirty"), given.endswith("-dirty")
        return {"commit": commit, "dirty": dirty}
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {"commit": UNKNOWN_COMMIT, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def describe(device: torch.device) -> dict[str, Any]:
    """Versions and the device, as JSON values."""
    build = json.loads(torch.ops.kda.build_info())
    content: dict[str, Any] = {
        "kda_cuda": kda_cuda.__version__,
        "build": build,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version_of("triton"),
        "fla": _version_of("fla-core", "flash-linear-attention"),
        "flash_kda": _version_of("flash_kda", "flash-kda"),
        "cudnn_frontend": _version_of("nvidia-cudnn-frontend"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        content |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "sm_count": properties.multi_processor_count,
            "l2_bytes": int(properties.L2_cache_size),
            "memory_bytes": int(properties.total_memory),
            **_nvidia_smi(device.index or 0),
        }
    else:
        content |= {"gpu": None, "driver": None}
    return content


def _nvidia_smi(index: int) -> dict[str, Any]:
    fields = {"driver_version": "driver", "clocks.max.sm": "max_sm_mhz", "power.limit": "power_limit_w"}
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        values = [part.strip() for part in answer.splitlines()[0].split(",")]
        return dict(zip(fields.values(), values, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return dict.fromkeys(fields.values())


def _version_of(*distributions: str) -> str | None:
    from importlib import metadata

    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
