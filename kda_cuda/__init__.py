"""Kimi Delta Attention in CUDA C++ for PyTorch.

from kda_cuda import chunk_kda            # the arguments of fla.ops.kda.chunk_kda
from kda_cuda import KimiDeltaAttention   # the layer
torch.ops.kda.chunk_fwd(...)              # the operator; kda_cuda.chunk_fwd documents it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import reference
from ._extension import build_info
from ._version import __version__
from .ops import CHUNK_TOKENS, chunk_fwd, chunk_kda

if TYPE_CHECKING:
    from .layer import KimiDeltaAttention

__all__ = [
    "CHUNK_TOKENS",
    "KimiDeltaAttention",
    "__version__",
    "build_info",
    "chunk_fwd",
    "chunk_kda",
    "reference",
]


def __getattr__(name: str) -> Any:
    """The layer is imported on first use: serving needs the operators alone."""
    if name == "KimiDeltaAttention":
        from .layer import KimiDeltaAttention

        return KimiDeltaAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
