"""The operators' Python implementations, for every call that no kernel covers, on any device.

They are registered for ``CompositeExplicitAutograd``: below autograd, and for all backends that have no kernel of their
own. The implementations of ``kda::chunk_fwd`` for CUDA and for the CPU come here, through ``kda::chunk_fwd_composite``,
with what their kernels do not cover.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import _extension, composite  # noqa: F401  (_extension defines the operators)
from .conventions import AUTOCAST_DEVICES

_library = torch.library.Library("kda", "IMPL", "CompositeExplicitAutograd")


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast off: the composite implementation chooses its precision itself."""
    if device.type not in AUTOCAST_DEVICES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _chunk_fwd(q: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    """The forward operators without kernels; arguments in the order of the schema."""
    torch.ops.kda.check_chunk_fwd(q, *args)
    if q.device.type != "cpu" and (reason := torch.ops.kda.composite_reason(q, *args)):
        composite.warn_fallback(reason)
    # Nothing in here is recorded; without the Autograd keys it runs a twentieth faster.
    with _no_autocast(q.device), torch._C._AutoDispatchBelowAutograd():
        return composite.chunk_fwd(q, *args)


def _check_gradient(name: str, gradient: Tensor, shape: list[int], dims: str, q: Tensor) -> None:
    """Refuses an incoming gradient that does not belong to the forward's output.

    Raises:
        ValueError: wrong shape, device, or not floating point.
    """
    argument = f"kda::chunk_bwd: argument `{name}`: expected"
    if list(gradient.shape) != shape:
        raise ValueError(f"{argument} shape {dims} = {shape}, got {list(gradient.shape)}")
    if gradient.device != q.device:
        raise ValueError(f"{argument} device {q.device} as `q` is, got {gradient.device}")
    if not gradient.dtype.is_floating_point:
        raise ValueError(f"{argument} a floating-point dtype, got {gradient.dtype}")


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
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    lower_bound: float | None = None,
    use_qk_l2norm: bool = False,
    use_gate: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, ...]:
    """``kda::chunk_bwd`` without kernels: (dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial_state)."""
    tensors = (q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens)
    options = (scale, lower_bound, use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval)
    torch.ops.kda.check_chunk_fwd(*tensors, *options, False, state_v_first)
    _check_gradient("do", do, list(v.shape), "[B, T, HV, V]", q)
    if dfinal_state is not None:
        (K, V), dims = (q.shape[3], v.shape[3]), "[N, HV, K, V]"
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state_v_first:
            K, V, dims = V, K, "[N, HV, V, K] (state_v_first)"
        _check_gradient("dfinal_state", dfinal_state, [sequences, v.shape[2], K, V], dims, q)
    if q.device.type != "cpu":
        composite.warn_fallback("kda::chunk_bwd has no kernel yet")
    with _no_autocast(q.device):
        return composite.chunk_bwd(do, dfinal_state, *tensors, *options, state_v_first)


_library.impl("chunk_fwd", _chunk_fwd)
_library.impl("inference_chunk_fwd", _chunk_fwd)
_library.impl("chunk_fwd_composite", _chunk_fwd)
_library.impl("chunk_bwd", _chunk_bwd)
