"""Gradients of the operators: ``kda::chunk_fwd`` is differentiated by ``kda::chunk_bwd``, which recomputes what it
needs; so is ``kda::chunk_fwd_saving``, which has kept that.

``chunk_states`` are not differentiable, and neither is the gradient itself.

Host time decides how this is built. Python at the Autograd keys turns every argument of a call into a Python object and
back, whether or not a gradient is wanted; so a call of ``torch.ops.kda.chunk_fwd`` that wants none goes to
``kda::inference_chunk_fwd``, the same operator without Python at these keys. Where a gradient is wanted, the kernels
written out here take a fifth of the time of those that ``torch.library.register_autograd`` makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _extension  # noqa: F401  (defines the operators)

# Arguments of kda::chunk_fwd in the order of its schema: tensors first, then options.
_TENSORS = 9  # q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens
_OUTPUT_FINAL_STATE, _STATE_V_FIRST = 15, 16
_ARGUMENTS = 19

_library = torch.library.Library("kda", "IMPL")


def _register(
    name: str, save: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> None:
    """Makes an operator differentiable, as ``torch.library.register_autograd`` does.

    Args:
        name: of the operator.
        save: called with the context, all arguments in the order of the schema, and the outputs.
        backward: called with the context and the gradients of the outputs; returns those of the first arguments, others
            have none.
    """
    operator = getattr(torch.ops.kda, name).default
    arguments = operator._schema.arguments
    defaults = tuple(argument.default_value for argument in arguments)
    count = len(defaults)

    def redispatch(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        outputs = redispatch(keyset, args)
        save(ctx, args, outputs)
        return outputs

    def gradients(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        found = backward(ctx, *grad_outputs)
        return (None, *found, *(None for _ in range(count - len(found))))

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients), "__module__": __name__}
    function: Any = type(f"kda_{name}", (torch.autograd.Function,), members)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            # The dispatcher leaves out arguments at the end that have their default values.
            return function.apply(keyset, *args, *defaults[len(args) :])
        return redispatch(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raises NotImplementedError if forward-mode differentiation would have to go through the operator."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(f"kda::{name}: forward-mode differentiation (jvp) is not supported")


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The inputs, and the intermediates if there are any."""
    _, final_state, chunk_states, *intermediates = output
    absent = () if inputs[_OUTPUT_FINAL_STATE] else (final_state,)
    ctx.mark_non_differentiable(chunk_states, *intermediates, *absent)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *intermediates)
    ctx.options = (*inputs[_TENSORS:_OUTPUT_FINAL_STATE], inputs[_STATE_V_FIRST])


def _backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, intermediates = saved[:_TENSORS], saved[_TENSORS:]
    v = tensors[2]
    if do is None:  # only the final state is used
        do = torch.zeros_like(v, memory_format=torch.contiguous_format)
    gradients = torch.ops.kda.chunk_bwd(do, dfinal_state, *tensors, *ctx.options, *intermediates)
    wanted = ctx.needs_input_grad[1:]  # without the dispatch keys
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=False))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """There is no second derivative."""


def _no_double_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "kda::chunk_fwd: double backward is not supported (its gradient was computed with create_graph=True and then "
        "differentiated again)"
    )


class _ChunkFwd(torch._ops.OpOverloadPacket):
    """What ``torch.ops.kda.chunk_fwd`` is an instance of: a call that wants no gradient is led past autograd.

    The signature is that of the schema; Python binds keywords in a fraction of the time that torch takes for it.
    """

    def __call__(
        self,
        /,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = _may_want_gradients(q, k, v, g, beta, A_log, dt_bias, initial_state)
        operator = _differentiable if wanted else _inference
        return operator(
            q,
            k,
            v,
            g,
            beta,
            A_log,
            dt_bias,
            initial_state,
            cu_seqlens,
            scale,
            lower_bound,
            use_qk_l2norm,
            use_gate,
            use_beta_sigmoid,
            allow_neg_eigval,
            output_final_state,
            state_v_first,
            output_chunk_states,
            check_cu_seqlens,
        )


def _may_want_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> bool:
    """Whether a gradient may be asked of a call with these arguments; True where that is not certain."""
    if _functorch_is_active() or forward_ad._current_level >= 0:
        return True
    if not _grad_mode_is_on():
        return False
    try:
        # Compared with False: what stands for a tensor while a graph is traced answers with neither.
        return not (
            q.requires_grad is False
            and k.requires_grad is False
            and v.requires_grad is False
            and g.requires_grad is False
            and beta.requires_grad is False
            and (A_log is None or A_log.requires_grad is False)
            and (dt_bias is None or dt_bias.requires_grad is False)
            and (initial_state is None or initial_state.requires_grad is False)
        )
    except AttributeError:  # not a tensor: the operator says so
        return True


_functorch_is_active = torch._C._are_functorch_transforms_active
_grad_mode_is_on = torch.is_grad_enabled

_register("chunk_fwd", _save_inputs, _backward)
_register("chunk_fwd_saving", _save_inputs, _backward)
_register("chunk_fwd_composite", _save_inputs, _backward)
_register("chunk_bwd", _save_nothing, _no_double_backward)
_register("chunk_bwd_composite", _save_nothing, _no_double_backward)

_inference = torch.ops.kda.inference_chunk_fwd.default.op
_differentiable = torch.ops.kda.chunk_fwd.default.op
torch.ops.kda.chunk_fwd.__class__ = _ChunkFwd
