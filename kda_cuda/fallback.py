"""The operators' Python implementations, for every call that no kernel covers, on any device.

They are registered for ``CompositeExplicitAutograd``: below autograd, and for all backends that have no kernel of their
own. The CUDA implementations, and that of ``kda::chunk_fwd`` for the CPU, come here with what their kernels do not
cover, through ``kda::chunk_fwd_composite`` and ``kda::chunk_bwd_composite``.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import _extension, composite  # noqa: F401  (_extension defines the operators)
from .conventions import AUTOCAST_DEVICES, intermediate_bytes

# Arguments of kda::chunk_bwd behind the gradients and before state_v_first. kda::chunk_fwd has them too, in the same
# order, and then output_final_state. Behind state_v_first are the intermediates, which only kernels have a use for.
_BEFORE_STATE_V_FIRST = 15
_CU_SEQLENS = 8  # its place among the arguments of kda::chunk_fwd

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


def _chunk_fwd_saving(q: Tensor, k: Tensor, v: Tensor, *args: object) -> tuple[Tensor, ...]:
    """``kda::chunk_fwd_saving`` without kernels for the backward: the forward, and bytes that nobody reads."""
    cu_seqlens = args[_CU_SEQLENS - 3] if len(args) > _CU_SEQLENS - 3 else None
    outputs = torch.ops.kda.inference_chunk_fwd.default(q, k, v, *args)
    return (*outputs, q.new_empty((intermediate_bytes(q, v, cu_seqlens),), dtype=torch.uint8))


def _chunk_bwd(do: Tensor, dfinal_state: Tensor | None, *args: object) -> tuple[Tensor, ...]:
    """``kda::chunk_bwd`` and ``kda::chunk_bwd_composite`` without kernels; arguments in the order of the schema."""
    torch.ops.kda.check_chunk_bwd(do, dfinal_state, *args)
    if do.device.type != "cpu" and (reason := torch.ops.kda.composite_reason(*_forward_arguments(*args))):
        composite.warn_fallback(reason)
    with _no_autocast(do.device):
        return composite.chunk_bwd(do, dfinal_state, *args[: _BEFORE_STATE_V_FIRST + 1])


def _forward_arguments(*args: object) -> tuple[object, ...]:
    """The arguments of ``kda::chunk_fwd`` from those of ``kda::chunk_bwd`` behind the gradients, which may lack the
    last ones.
    """
    end = _BEFORE_STATE_V_FIRST + 1
    tensors_and_options, state_v_first = args[:_BEFORE_STATE_V_FIRST], args[_BEFORE_STATE_V_FIRST:end]
    return (*tensors_and_options, False, *state_v_first) if state_v_first else tensors_and_options


_library.impl("chunk_fwd", _chunk_fwd)
_library.impl("inference_chunk_fwd", _chunk_fwd)
_library.impl("chunk_fwd_composite", _chunk_fwd)
_library.impl("chunk_fwd_saving", _chunk_fwd_saving)
_library.impl("chunk_bwd", _chunk_bwd)
_library.impl("chunk_bwd_composite", _chunk_bwd)
