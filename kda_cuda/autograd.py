"""Gradients of the operators: ``kda::chunk_fwd`` is differentiated by ``kda::chunk_bwd``, which recomputes what it
needs.

``chunk_states`` are not differentiable, and neither is the gradient itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _extension  # noqa: F401  (defines the operators)

# Arguments of kda::chunk_fwd in the order of its schema: tensors first, then options.
_TENSORS = 9  # q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens
_OUTPUT_FINAL_STATE, _STATE_V_FIRST = 15, 16
_ARGUMENTS = 19


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, final_state, chunk_states = output
    absent = () if inputs[_OUTPUT_FINAL_STATE] else (final_state,)
    ctx.mark_non_differentiable(chunk_states, *absent)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = (*inputs[_TENSORS:_OUTPUT_FINAL_STATE], inputs[_STATE_V_FIRST])


def _backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    v = tensors[2]
    if do is None:  # only the final state is used
        do = torch.zeros_like(v, memory_format=torch.contiguous_format)
    gradients = torch.ops.kda.chunk_bwd(do, dfinal_state, *tensors, *ctx.options)
    wanted = ctx.needs_input_grad  # ends with the last argument that the caller gave
    needed = (gradient if i < len(wanted) and wanted[i] else None for i, gradient in enumerate(gradients))
    return (*needed, *(None for _ in range(_ARGUMENTS - len(gradients))))


def _no_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "kda::chunk_fwd: double backward is not supported (its gradient was computed with create_graph=True and then "
        "differentiated again)"
    )


torch.library.register_autograd("kda::chunk_fwd", _backward, setup_context=_save_inputs)
torch.library.register_autograd("kda::chunk_fwd_composite", _backward, setup_context=_save_inputs)
torch.library.register_autograd("kda::chunk_bwd", _no_double_backward)
torch.library.register_autograd("kda::chunk_bwd_composite", _no_double_backward)
