"""The build backend: setuptools, with requirements that depend on what is already there.

The binding can be compiled against any torch from 2.10 on and gives the same library, so a torch that is installed is
used as it is. An isolated build (plain `pip install .`) starts from nothing and asks for the newest torch that the
index offers, which can be gigabytes: `pip install --no-build-isolation .` downloads nothing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from typing import Any

from setuptools.build_meta import *  # noqa: F403

TORCH = "torch>=2.10"
NINJA = "ninja"
CUTLASS = (
    "nvidia-cutlass==4.2.0.0"  # its headers; tools/requirements-headers.txt installs them without its dependencies
)


def missing_requirements() -> list[str]:
    """What the build needs and this Python does not have."""
    requirements = []
    if importlib.util.find_spec("torch") is None:
        requirements.append(TORCH)
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        requirements.append(NINJA)
    without_kernels = os.environ.get("KDA_CUDA_WITHOUT_KERNELS", "0") not in ("", "0")
    if not without_kernels and importlib.util.find_spec("cutlass_library") is None:
        requirements.append(CUTLASS)
    return requirements


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Hook of PEP 517."""
    return missing_requirements()


def get_requires_for_build_sdist(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Hook of PEP 517."""
    return missing_requirements()


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Hook of PEP 660."""
    return missing_requirements()
