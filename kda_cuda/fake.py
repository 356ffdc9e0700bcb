"""Shapes and types of what the operators return, without data: for ``torch.compile``, ``torch.export`` and the meta
device.

Nothing here depends on a value or compares a size, so that a compiled graph serves every length. The operators check
their arguments when they run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _extension  # noqa: F401  (defines the operators)
from .conventions import CHUNK_TOKENS, compute_dtype, intermediate_bytes

_CU_SEQLENS = 8  # its place among the arguments of kda::chunk_fwd
_TENSORS = ("k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")  # beside q, in the schema's order


def _check_devices(q: Tensor, *tensors: object) -> None:
    """Refuses a mix of devices, as the operators do when they run; no other check is free of sizes and values.

    Raises:
        RuntimeError: a tensor is not where ``q`` is.
    """
    for name, x in zip(_TENSORS, tensors, strict=False):
        if isinstance(x, Tensor) and x.device != q.device:
            raise RuntimeError(
                f"kda::chunk_fwd: argument `{name}`: expected device {q.device} as `q` is, got {x.device}"
            )


def _chunk_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    lower_bound: float | None = None,
    use_qk_l2norm: bool = False,
    use_gate: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    output_final_state: bool = False,
    state_v_first: bool = False,
    output_chunk_states: bool = False,
    check_cu_seqlens: bool = False,
    instruction_set: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, HV, V]; final_state [N, HV, K, V] or [0]; chunk_states [B, slots, HV, K, V] or [0]."""
    _check_devices(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    matrix = (V, K) if state_v_first else (K, V)
    dtype = compute_dtype(q.dtype)
    if cu_seqlens is None:
        sequences, slots = B, (T + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    else:
        sequences = cu_seqlens.shape[0] - 1
        slots = T // CHUNK_TOKENS + sequences
    o = v.new_empty((B, T, HV, V))
    final_state = v.new_empty((sequences, HV, *matrix) if output_final_state else (0,), dtype=dtype)
    chunk_states = v.new_empty((B, slots, HV, *matrix) if output_chunk_states else (0,), dtype=dtype)
    return o, final_state, chunk_states


def _chunk_fwd_saving(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
    """As the forward; and bytes for the backward."""
    cu_seqlens = kwargs.get("cu_seqlens", args[_CU_SEQLENS - 3] if len(args) > _CU_SEQLENS - 3 else None)
    intermediates = q.new_empty((intermediate_bytes(q, v, cu_seqlens),), dtype=torch.uint8)
    return (*_chunk_fwd(q, k, v, *args, **kwargs), intermediates)


def _chunk_bwd(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> tuple[Tensor, ...]:
    """Contiguous gradients, each like its input; [0] where there is none."""
    inputs = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    return tuple(q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in inputs)


def _check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """Values are all that this operator looks at, and there are none."""


torch.library.register_fake("kda::chunk_fwd", _chunk_fwd)
torch.library.register_fake("kda::inference_chunk_fwd", _chunk_fwd)
torch.library.register_fake("kda::chunk_fwd_saving", _chunk_fwd_saving)
torch.library.register_fake("kda::chunk_fwd_composite", _chunk_fwd)
torch.library.register_fake("kda::chunk_fwd_cpu", _chunk_fwd)
torch.library.register_fake("kda::chunk_bwd", _chunk_bwd)
torch.library.register_fake("kda::chunk_bwd_composite", _chunk_bwd)
torch.library.register_fake("kda::check_chunk_fwd", _check_devices)
torch.library.register_fake("kda::check_cu_seqlens", _check_cu_seqlens)
