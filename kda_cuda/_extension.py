"""Loads the compiled operators: importing this module makes ``torch.ops.kda`` exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent
LIBRARY_NAME = "_C.abi3.so"


def _load() -> Path:
    """Loads the library beside this file and returns its path.

    Raises:
        ImportError: it is missing, or this torch cannot load it.
    """
    path = _FOLDER / LIBRARY_NAME
    if not path.is_file():
        raise ImportError(
            f"kda_cuda: the compiled operators ({LIBRARY_NAME}) are missing in {_FOLDER}. From the source tree: "
            "`pip install --no-build-isolation .`, or `python setup.py build_ext --inplace` to use the tree as it is."
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"kda_cuda: torch {torch.__version__} cannot load {path} (torch 2.10 or later is needed): {error}"
        ) from error
    return path


LIBRARY_PATH = _load()


def build_info() -> dict[str, Any]:
    """How the library was built.

    Returns:
        version; cuda_version of the CUDA runtime inside it (major * 1000 + minor * 10, 0 without kernels);
        architectures of the kernels, such as ``["90a"]``; torch_built_with; cuda_kernels, whether it has kernels.
    """
    return json.loads(torch.ops.kda.build_info())
