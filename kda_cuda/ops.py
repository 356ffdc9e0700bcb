"""The public functions: the operator with its documentation, and the drop-in for flash-linear-attention (FLA).

Kimi Delta Attention (Kimi Linear, arXiv 2510.26692), per head with state S in R^{K x V}, alpha_t = exp(g_t), scalar
beta_t:

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import _extension, autograd, fake, fallback  # noqa: F401  (imported to define and register the operators)
from .conventions import AUTOCAST_DEVICES, CHUNK_TOKENS

__all__ = ["CHUNK_TOKENS", "chunk_fwd", "chunk_kda"]

_FLA_CHUNK_SIZES = (32, 64)


def chunk_fwd(
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
    """``torch.ops.kda.chunk_fwd``: Kimi Delta Attention over whole sequences, differentiable.

    Tensors may be strided views. On a Hopper GPU it runs on tensor-core kernels if q, k, v are bf16 or fp16, K and V
    are 64 or 128 and the last dimension of q, k, v, g is contiguous; otherwise in PyTorch operators, with one warning
    for each reason. On a CPU it runs in C++, in fp32 inside; fp64 in PyTorch operators.

    Args:
        q: [B, T, H, K] queries; bf16, fp16, fp32 or fp64.
        k: [B, T, H, K] keys, in the dtype of ``q``.
        v: [B, T, HV, V] values, in the dtype of ``q``; HV is a multiple of H, value head h belongs to head h // (HV /
            H).
        g: [B, T, HV, K] log-gate in [-inf, 0]; with ``use_gate`` its logits. bf16, fp16 or fp32.
        beta: [B, T, HV] in [0, 1] ([0, 2] for negative eigenvalues); with ``use_beta_sigmoid`` its logits. bf16, fp16
            or fp32.
        A_log: [HV] fp32 logarithm of the gate's rate. With ``use_gate``: needed unless ``lower_bound`` is given.
        dt_bias: [HV * K] or [HV, K] fp32, added to ``g``. With ``use_gate`` only.
        initial_state: [N, HV, K, V] ([N, HV, V, K] with ``state_v_first``), fp32 or bf16; None: zeros.
        cu_seqlens: [N + 1] int32 or int64, token at which each sequence starts, and T; B must be 1. Sequences may be
            empty. None: N = B sequences of T tokens.
        scale: of ``o``; None: K ** -0.5.
        lower_bound: in [-5, 0): with ``use_gate``, log-gate = lower_bound * sigmoid(exp(A_log) * (g + dt_bias)).
        use_qk_l2norm: q and k become x * rsqrt(sum x^2 + 1e-6) over K.
        use_gate: without ``lower_bound``, log-gate = -exp(A_log) * softplus(g + dt_bias).
        use_beta_sigmoid: beta becomes sigmoid(beta).
        allow_neg_eigval: with ``use_beta_sigmoid``: 2 * sigmoid(beta).
        output_final_state: return the state after the last token of each sequence.
        state_v_first: states are [V, K] matrices rather than [K, V], those taken and those returned.
        output_chunk_states: return the state at entry of every 64 tokens of each sequence.
        check_cu_seqlens: look at the values of ``cu_seqlens`` on a CUDA device too, which waits for the device. On the
            CPU they are always checked. Unchecked, tokens past the last value get o = 0.

    Returns:
        o: [B, T, HV, V] contiguous, in the dtype of ``v``.
        final_state: [N, HV, K, V] or [N, HV, V, K] fp32 (fp64 for fp64 inputs); [0] if not requested.
        chunk_states: fp32 (fp64 for fp64 inputs), not differentiable: [B, ceil(T / 64), HV, K, V], the state after 64 *
            c tokens in [:, c]; with ``cu_seqlens`` [1, T // 64 + N, HV, K, V], chunk c of sequence n in slot
            cu_seqlens[n] // 64 + n + c and zeros in slots without a chunk. [0] if not requested.

    Raises:
        RuntimeError: an argument is wrong; the message names it, what was expected and what came.
    """
    return torch.ops.kda.chunk_fwd(
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


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = CHUNK_TOKENS,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Kimi Delta Attention with the arguments and returns of ``fla.ops.kda.chunk_kda`` (FLA 0.6.0).

    :func:`chunk_fwd` says which shapes and types there are, and what runs on kernels. Under ``torch.autocast`` q, k and
    v are cast to its dtype, as matrix products are; g, beta and the parameters keep theirs.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV, K] log-gate, or its logits with ``use_gate_in_kernel``.
        beta: [B, T, HV], or its logits with ``use_beta_sigmoid_in_kernel``.
        scale: of ``o``; None: K ** -0.5.
        initial_state: [N, HV, K, V] ([N, HV, V, K] with ``state_v_first``), fp32 or bf16.
        output_final_state: return the final state rather than None.
        use_qk_l2norm_in_kernel: normalise q and k over K.
        use_gate_in_kernel: log-gate = -exp(A_log) * softplus(g + dt_bias); with ``lower_bound``
            lower_bound * sigmoid(exp(A_log) * (g + dt_bias)). Otherwise A_log, dt_bias and lower_bound are ignored, as
            in FLA.
        use_beta_sigmoid_in_kernel: beta = sigmoid(beta).
        allow_neg_eigval: beta = 2 * sigmoid(beta); needs ``use_beta_sigmoid_in_kernel``.
        safe_gate: with ``use_gate_in_kernel`` requires ``lower_bound``. No effect otherwise: every gate is safe here.
        lower_bound: in [-5, 0).
        disable_recompute: save what the backward pass would otherwise recompute from the inputs: a faster step for
            more memory (docs/design.md says how much). No effect where no gradient is wanted, and on a CPU.
        return_intermediate_states: return the states at entry of each chunk too; only with gradients off. With
            ``cu_seqlens`` on a CUDA device the number of chunks has to be read from it, which waits for the device,
            unless ``cu_seqlens_cpu`` or ``use_graph`` is given. (:func:`chunk_fwd` returns them in fp32 and never
            waits.)
        state_v_first: states are [V, K] matrices rather than [K, V].
        cu_seqlens: [N + 1] int32 or int64, with B = 1.
        cu_seqlens_cpu: the same on the CPU. Its values are checked, which costs no synchronisation.
        cp_context: not supported.
        use_graph: accepted; every call can be captured in a CUDA graph. With ``return_intermediate_states`` it makes
            the number of chunks NT independent of the values of ``cu_seqlens``: ceil(T / 64) + N - 1, zeros behind the
            last chunk.
        max_num_seqs: with ``use_graph``, the number of sequences N that ``cu_seqlens`` is padded to.
        A_log: [HV] logarithm of the gate's rate.
        dt_bias: [HV * K] or [HV, K] bias of the gate's logits.
        chunk_size: 64.
        transpose_state_layout: FLA's former name of ``state_v_first``.

    Returns:
        o: [B, T, HV, V] in the dtype of ``v``.
        final_state: [N, HV, K, V] or [N, HV, V, K] fp32, or None.
        h: only with ``return_intermediate_states``: [B, NT, HV, K, V] or [B, NT, HV, V, K] in the dtype of ``k``, NT
            chunks of 64 tokens; with ``cu_seqlens`` the chunks of all sequences one after the other.

    Raises:
        ValueError, RuntimeError: an argument is wrong; the message names it.
        NotImplementedError: ``cp_context``, or ``chunk_size=32``.
    """
    if cp_context is not None:
        raise NotImplementedError("chunk_kda: argument `cp_context`: context parallelism is not supported")
    if chunk_size not in _FLA_CHUNK_SIZES:
        raise _wrong("chunk_size", CHUNK_TOKENS, chunk_size)
    if chunk_size != CHUNK_TOKENS:
        raise NotImplementedError(
            f"chunk_kda: argument `chunk_size`: only {CHUNK_TOKENS} is supported, got {chunk_size}"
        )
    if transpose_state_layout is not None:
        if state_v_first:
            raise _wrong("transpose_state_layout", "None with `state_v_first`", transpose_state_layout)
        message = "chunk_kda: argument `transpose_state_layout` is deprecated, use `state_v_first`"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        state_v_first = transpose_state_layout
    if use_gate_in_kernel:
        if safe_gate and lower_bound is None:
            raise _wrong("lower_bound", "a value in [-5, 0) with `safe_gate`", None)
        if A_log is None and lower_bound is None:
            raise _wrong("A_log", "a tensor with `use_gate_in_kernel` and no `lower_bound`", None)
        A_log, dt_bias = _in_fp32(A_log), _in_fp32(dt_bias)
    else:
        A_log = dt_bias = lower_bound = None
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise _wrong("allow_neg_eigval", "False without `use_beta_sigmoid_in_kernel`", True)
    if return_intermediate_states and torch.is_grad_enabled():
        raise _wrong("return_intermediate_states", "False outside of torch.inference_mode()", True)
    if return_intermediate_states and disable_recompute:
        raise _wrong("disable_recompute", "False with `return_intermediate_states`", True)
    _check_host_cu_seqlens(q, cu_seqlens, cu_seqlens_cpu)
    if use_graph and max_num_seqs is not None and cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        if max_num_seqs != sequences:
            raise _wrong("max_num_seqs", f"the number of sequences in `cu_seqlens`, {sequences}", max_num_seqs)
    q, k, v = _autocast(q, k, v)

    saves = disable_recompute and _wants_gradients(q, k, v, g, beta, A_log, dt_bias, initial_state)
    operator = torch.ops.kda.chunk_fwd_saving if saves else torch.ops.kda.chunk_fwd
    o, final_state, chunk_states, *_ = operator(
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
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        output_final_state,
        state_v_first,
        return_intermediate_states,
        False,
    )
    returned_state = final_state if output_final_state else None
    if not return_intermediate_states:
        return o, returned_state
    if cu_seqlens is not None:
        chunk_states = _packed_chunk_states(chunk_states, cu_seqlens, cu_seqlens_cpu, q.shape[1], use_graph)
    return o, returned_state, chunk_states.to(k.dtype)


def _wrong(argument: str, expected: object, got: object) -> ValueError:
    """The error for an argument of :func:`chunk_kda` that its operator would not see."""
    return ValueError(f"chunk_kda: argument `{argument}`: expected {expected}, got {got}")


def _wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether the call is recorded for a backward pass."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _in_fp32(parameter: Tensor | None) -> Tensor | None:
    """bf16 and fp16 parameters, as FLA takes them, in fp32, which loses nothing; others as they are."""
    if parameter is None or parameter.dtype == torch.float32:
        return parameter
    return parameter.float() if parameter.dtype in (torch.bfloat16, torch.float16) else parameter


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast region around the call, if there is one; fp64 stays, as in autocast."""
    first = tensors[0]
    device_type = "cuda" if first.is_cuda else first.device.type  # the general way costs half a microsecond
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check_host_cu_seqlens(q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> None:
    """Checks the copy of ``cu_seqlens`` on the host; its values only in eager mode, as a compiled graph has none."""
    if cu_seqlens_cpu is None:
        return
    if cu_seqlens is None:
        raise _wrong("cu_seqlens_cpu", "None without `cu_seqlens`", "a tensor")
    if cu_seqlens_cpu.device.type != "cpu":
        raise _wrong("cu_seqlens_cpu", "a tensor on the CPU", f"one on {cu_seqlens_cpu.device}")
    if cu_seqlens_cpu.dtype not in (torch.int32, torch.int64):
        raise _wrong("cu_seqlens_cpu", "dtype int32 or int64", cu_seqlens_cpu.dtype)
    if cu_seqlens_cpu.shape != cu_seqlens.shape:
        shape = list(cu_seqlens.shape)
        raise _wrong("cu_seqlens_cpu", f"the shape of `cu_seqlens`, {shape}", list(cu_seqlens_cpu.shape))
    if cu_seqlens_cpu.ndim == 1 and q.ndim == 4 and cu_seqlens_cpu.shape[0] > 0 and not torch.compiler.is_compiling():
        torch.ops.kda.check_cu_seqlens(cu_seqlens_cpu, q.shape[1])


def _packed_chunk_states(
    chunk_states: Tensor, cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None, tokens: int, use_graph: bool
) -> Tensor:
    """States in slots [1, T // 64 + N, ...] -> the states of all chunks one after the other [1, NT, ...]."""
    sequences = cu_seqlens.shape[0] - 1
    if sequences == 0:
        return chunk_states[:, :0]
    source = cu_seqlens if use_graph or cu_seqlens_cpu is None else cu_seqlens_cpu
    starts = source[:-1].long()
    ends = ((source[1:].long() - starts + CHUNK_TOKENS - 1) // CHUNK_TOKENS).cumsum(
        0
    )  # chunks up to and with sequence n
    total = (tokens + CHUNK_TOKENS - 1) // CHUNK_TOKENS + sequences - 1 if use_graph else int(ends[-1])
    chunk = torch.arange(total, device=source.device)
    n = torch.searchsorted(ends, chunk, right=True).clamp(max=sequences - 1)
    chunk_of_sequence = chunk - torch.nn.functional.pad(ends, (1, -1))[n]
    slot = starts[n] // CHUNK_TOKENS + n + chunk_of_sequence
    packed = chunk_states[:, slot.clamp(max=chunk_states.shape[1] - 1).to(chunk_states.device)]
    if not use_graph:
        return packed
    beyond = (chunk >= ends[-1]).view(1, -1, 1, 1, 1)
    return packed.masked_fill(beyond, 0)
