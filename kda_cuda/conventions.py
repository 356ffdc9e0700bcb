"""What the operators' Python implementations, fakes and reference agree on."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_TOKENS = 64  # of a chunk, and so the distance of the states in chunk_states; C in the formulas
L2NORM_EPS = 1e-6  # q and k become x * rsqrt(sum x^2 + L2NORM_EPS)

# Asked once: torch.compile does not trace the question on torch 2.11.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)
)


def compute_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype of states, and of the composite's arithmetic, for q, k and v in ``activations``."""
    return torch.float64 if activations == torch.float64 else torch.float32


def chunk_slots(B: int, T: int, cu_seqlens: Tensor | None) -> int:
    """Places of chunks in arrays over the chunks of all sequences; see ``kda::chunk_slots`` in csrc/kda/plan.h."""
    if cu_seqlens is None:
        return B * ((T + CHUNK_TOKENS - 1) // CHUNK_TOKENS)
    return T // CHUNK_TOKENS + cu_seqlens.shape[0] - 1


def intermediate_bytes(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Bytes that ``kda::chunk_fwd_saving`` returns; see ``kda::intermediate_bytes`` in csrc/kda/plan.h.

    None where kernels cannot be, as far as that is known without looking at a size: graphs shall serve all of them.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return 0
    (B, T, _, K), (HV, V), C = q.shape, v.shape[2:], CHUNK_TOKENS
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    of_chunk = 2 * C * (3 * K + 2 * C + V) + 2 * V * K + 4 * K
    return HV * (chunk_slots(B, T, cu_seqlens) * of_chunk + sequences * 2 * C * (K + V))
