"""Kimi Delta Attention by chunks in PyTorch operators: whatever no kernel covers, on any device, and the backward pass.

The forward on a CPU is in C++ (``csrc/kda/cpu``) for all but fp64; :func:`chunk_fwd` hands such calls on to it.

Chunks of C = 64 tokens, batched over heads and over the sequences that are equally far. For a chunk entered with state
S (G_i: sum of the log-gates of the chunk up to token i; products of vectors element by element):

    Akk[i,j] = beta_i sum_d k_i k_j exp(G_i - G_j)  (i > j)        Aqk[i,j] = sum_d q_i k_j exp(G_i - G_j)  (i >= j)
    U  = (I + Akk)^{-1} (Diag(beta) V - Diag(beta) (K * e^G) S)     O = (Q * e^G) S + Aqk U    (Q includes the scale)
    S' = Diag(e^{G_C}) S + (K * e^{G_C - G})^T U

Numerics: no exponential but alpha = exp(g) <= 1 and e^{G_C} <= 1 is ever formed. exp(G_i - G_j) is a product of alphas,
cut where the halves of the smallest aligned block of 2h tokens (h = 1, 2, .., 32) that holds i and j meet: prefix
product up to i in the upper half, times suffix product behind j in the lower half. Both are <= 1, g = -inf is alpha =
0, and nothing overflows.

Work is cut into segments of chunks (:mod:`.composite_segments`), so that temporaries have a bounded size, and the
backward pass recomputes one segment at a time from the state at its entry: memory beyond inputs and outputs is bounded
for the forward, and for the backward it is one state per segment.

The functions here are bodies of custom operators. With ``cu_seqlens`` they read it on the host: on a CUDA device this
synchronises and cannot be captured in a CUDA graph (the kernels of ``kda::chunk_fwd`` have neither limitation).
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from . import _extension  # noqa: F401  (defines the operators)
from .composite_segments import Segment, plan_segments, put, sequence_spans, take
from .conventions import CHUNK_TOKENS, L2NORM_EPS, compute_dtype

LOG2_E = math.log2(math.e)  # exp2 is several times faster than exp on a CPU

# Chunks x value heads of one segment. On a CPU its temporaries then stay in the caches (32 tiles of 64 x 128 fp32 are 1
# MiB a tensor); on a GPU it takes many tiles to fill the device.
SEGMENT_TILES_CPU = 32
SEGMENT_TILES_CUDA = 1024


@dataclass(frozen=True)
class _Options:
    """Arguments of the operator that are not tensors."""

    scale: float
    lower_bound: float | None
    use_qk_l2norm: bool
    use_gate: bool
    use_beta_sigmoid: bool
    allow_neg_eigval: bool


# --- input transforms -------------------------------------------------------------------------------------------------


def _l2norm_factor(x: Tensor) -> Tensor:
    """rsqrt(sum x^2 + 1e-6) over the last dimension, which stays with size 1."""
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + L2NORM_EPS)


def _log2_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, options: _Options) -> Tensor:
    """Logarithm to base 2 of the gate, in [-inf, 0], of ``g`` [rows, HV, C, K].

    Args:
        A_log: HV elements.
        dt_bias: HV * K elements.
    """
    heads, key_dim = g.shape[1], g.shape[3]
    if not options.use_gate:
        return g * LOG2_E
    if dt_bias is not None:
        g = g + dt_bias.to(g.dtype).reshape(heads, 1, key_dim)
    rate = None if A_log is None else A_log.to(g.dtype).reshape(heads, 1, 1).exp()
    if options.lower_bound is not None:
        return torch.sigmoid(g if rate is None else g * rate) * (options.lower_bound * LOG2_E)
    if rate is None:
        raise ValueError("kda::chunk_fwd: argument `A_log`: the softplus gate (no lower_bound) needs it, got None")
    return functional.softplus(g) * (rate * -LOG2_E)


# --- one segment ------------------------------------------------------------------------------------------------------


def _diagonal_blocks(matrices: Tensor, size: int) -> Tensor:
    """The blocks [X * C / size, size, size] on the diagonals of ``matrices`` [X, C + 1, C], a view.

    The row behind each matrix is not used: it makes the distance in memory from a matrix's last block to the next
    matrix's first that of any two neighbours.
    """
    C = matrices.shape[2]
    return matrices.view(-1, size * (C + 1))[:, : size * C].unflatten(1, (size, C))[:, :, :size]


def _intra_chunk(qk: Tensor, k: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything of a chunk that does not depend on the state, level by level (see the head of this file).

    (I + Akk)^{-1} grows with the levels by block substitution, never by powers of Akk, which exceed any precision
    when keys repeat: [[L0, 0], [B, L1]]^{-1} = [[X0, 0], [-X1 B X0, X1]] with X = L^{-1}.

    Args:
        qk: [X, C, 2, K] q and -beta k of each token.
        k, alpha: [X, C, K].

    Returns:
        Aqk [X, C, C]; (I + Akk)^{-1} [X, C, C]; qk * e^G [X, C, 2, K]; k * e^{G_C - G} [X, C, K].
    """
    X, C, _, K = qk.shape
    Aqk, inverse = (k.new_zeros(X, C + 1, C) for _ in range(2))
    _diagonal_blocks(Aqk, 1).copy_(torch.linalg.vecdot(qk[:, :, 0], k).view(-1, 1, 1))
    _diagonal_blocks(inverse, 1).fill_(1.0)

    # Level h joins blocks of h tokens to blocks of 2h. There qk has the prefix product P_h, which starts with the first
    # alpha of i's block, k the suffix product R_h behind j, and total [X * C / h, 1, K] the product over each block:
    # exp(G_i - G_j) is P_h[i] R_h[j] for i in the upper half of a block of 2h, j in the lower.
    qk, total = qk * alpha.unsqueeze(2), alpha.reshape(-1, 1, K)
    h = 1
    while h < C:
        blocks = X * C // (2 * h)
        qk_lower, qk_upper = qk.reshape(blocks, 2, 2 * h, K).unbind(1)  # rows: (token, q or k)
        k_lower, k_upper = k.reshape(blocks, 2, h, K).unbind(1)
        total_lower, total_upper = total.view(blocks, 2, 1, K).unbind(1)
        Aqk_corner, Akk_corner = torch.bmm(qk_upper, k_lower.transpose(1, 2)).view(blocks, h, 2, h).unbind(2)
        inverse_blocks = _diagonal_blocks(inverse, 2 * h)
        # Cloned: autograd keeps them, and the matrix around them is written to.
        X0, X1 = inverse_blocks[:, :h, :h].clone(), inverse_blocks[:, h:, h:].clone()
        _diagonal_blocks(Aqk, 2 * h)[:, h:, :h].copy_(Aqk_corner)
        inverse_blocks[:, h:, :h].copy_(torch.bmm(X1, torch.bmm(Akk_corner, X0)))  # the sign is in -beta k
        qk = torch.stack((qk_lower, qk_upper * total_lower), dim=1)
        k = torch.stack((k_lower * total_upper, k_upper), dim=1)
        total = total_lower * total_upper
        h *= 2
    return _diagonal_blocks(Aqk, C), _diagonal_blocks(inverse, C), qk.view(X, C, 2, K), k.view(X, C, K)


def _transformed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    segment: Segment,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the formulas take of a segment's inputs, X = rows * HV tiles, contiguous.

    Returns:
        scale q and -beta k, both normalised if that is asked for [X, C, 2, K]; k [X, C, K]; beta v [X, C, V]; log-gate
        [X, C, K].
    """
    (rows, C, H, K), HV = q.shape, v.shape[2]
    X = rows * HV

    def head_major(x: Tensor) -> Tensor:  # [rows, C, H or HV, D] -> [rows, H, HV / H, C, D], a view
        return x.unflatten(2, (H, x.shape[2] // H)).permute(0, 2, 3, 1, 4).expand(rows, H, HV // H, C, -1)

    g = _log2_gate(g.transpose(1, 2), A_log, dt_bias, options)
    if options.use_beta_sigmoid:
        beta = torch.sigmoid(beta)
    if options.allow_neg_eigval:
        beta = beta * 2.0
    if segment.valid is not None:  # after the transforms: sigmoid(0) is 0.5
        behind = ~segment.valid
        g = g.masked_fill(behind.view(rows, 1, C, 1), 0.0)
        beta = beta.masked_fill(behind.unsqueeze(-1), 0.0)
    if options.use_qk_l2norm:
        q, k = (x * _l2norm_factor(x) for x in (q, k))
    q, k, v, beta = (head_major(x) for x in (q * options.scale, k, v, beta.unsqueeze(-1)))
    qk = torch.stack((q, k * -beta), dim=-2).view(X, C, 2, K)
    return qk, *(x.reshape(X, C, -1).contiguous() for x in (k, v * beta, g))


def _run_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    S: Tensor,
    segment: Segment,
    options: _Options,
    entries: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunks of a segment.

    Args:
        q, k [rows, C, H, K], v [rows, C, HV, V], g [rows, C, HV, K], beta [rows, C, HV]: of the segment, as given.
        S: [sequences, HV, K, V] states of the group's sequences at entry of the segment.
        entries: gets the states [active, HV, K, V] at entry of each step.

    Returns:
        o [rows, C, HV, V], and the states at exit, shaped as ``S``.
    """
    (rows, C), (HV, V) = q.shape[:2], v.shape[2:]
    q, k, v, g, beta = (x.to(S.dtype) for x in (q, k, v, g, beta))
    qk, k, v, g = _transformed(q, k, v, g, beta, A_log, dt_bias, segment, options)
    decay = torch.exp2(g.sum(1)).unsqueeze(-1)  # e^{G_C} [X, K, 1]
    Aqk, inverse, qk, k = _intra_chunk(qk, k, torch.exp2(g))

    S, results = S.flatten(0, 1), []  # [sequences * HV, K, V]
    tiles = [count * HV for count in segment.active]
    factors = (*qk.unbind(2), k.transpose(1, 2), v, inverse, decay)
    by_step = zip(tiles, *(x.split(tiles) for x in factors), strict=True)
    for count, q_c, beta_k_c, k_c, v_c, inverse_c, decay_c in by_step:
        S_c = S[:count]  # the shortest sequences have ended
        if entries is not None:
            entries.append(S_c.unflatten(0, (-1, HV)))
        U = torch.bmm(inverse_c, torch.baddbmm(v_c, beta_k_c, S_c))
        results.append((torch.bmm(q_c, S_c), U))
        S_c = torch.baddbmm(S_c * decay_c, k_c, U)
        S = S_c if count == len(S) else torch.cat((S_c, S[count:]))
    q_S, U = (torch.cat(x) for x in zip(*results, strict=True))
    o = torch.baddbmm(q_S, Aqk, U)
    return o.view(rows, HV, C, V).transpose(1, 2), S.unflatten(0, (-1, HV))


# --- forward ----------------------------------------------------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B * T, ...]."""
    return x.flatten(0, 1)


def _max_rows(spans: list[tuple[int, int]], value_heads: int, device: torch.device) -> int:
    """Chunks of one segment, at most; never more than there are."""
    tiles = SEGMENT_TILES_CPU if device.type == "cpu" else SEGMENT_TILES_CUDA
    return max(1, min(tiles // max(value_heads, 1), sum(-(-length // CHUNK_TOKENS) for _, length in spans)))


def _entry_states(
    initial_state: Tensor | None, sequences: int, v: Tensor, key_dim: int, state_v_first: bool, compute: torch.dtype
) -> Tensor:
    """A new tensor [N, HV, K, V] in the dtype of the computation."""
    heads, value_dim = v.shape[-2:]
    states = torch.zeros(sequences, heads, key_dim, value_dim, dtype=compute, device=v.device)
    if initial_state is not None:
        states.copy_(initial_state.transpose(-1, -2) if state_v_first else initial_state)
    return states


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
    """Body of ``kda::chunk_fwd`` without kernels: same arguments and results, in fp32 inside (fp64 for fp64 inputs).

    On a CPU this is ``kda::chunk_fwd_cpu`` for all but fp64. Not itself differentiable: the operator's gradient is
    :func:`chunk_bwd`. Arguments are expected to have passed ``kda::check_chunk_fwd``, but ``cu_seqlens`` may end before
    T: tokens behind it get o = 0.

    Returns:
        o [B, T, HV, V] in the dtype of ``v``; final_state [N, HV, K, V] ([N, HV, V, K] with ``state_v_first``) and
        chunk_states [B, ceil(T / 64), HV, K, V] (with ``cu_seqlens`` [1, T // 64 + N, ...]), fp32 (fp64 for fp64
        inputs), or [0] if not requested.
    """
    (B, T, _, K), (HV, V) = q.shape, v.shape[-2:]
    options = _Options(
        K**-0.5 if scale is None else scale, lower_bound, use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval
    )
    spans, first_slots, slot_shape = sequence_spans(B, T, cu_seqlens)
    compute = compute_dtype(q.dtype)
    if q.device.type == "cpu" and compute == torch.float32:
        with torch.no_grad():
            return torch.ops.kda.chunk_fwd_cpu(
                *(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, lower_bound),
                *(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval),
                *(output_final_state, state_v_first, output_chunk_states, check_cu_seqlens),
            )
    max_rows = _max_rows(spans, HV, q.device)
    with torch.no_grad():
        states = _entry_states(initial_state, len(spans), v, K, state_v_first, compute)
        covered = sum(length for _, length in spans) == B * T
        o = (torch.empty if covered else torch.zeros)(B, T, HV, V, dtype=v.dtype, device=v.device)
        chunk_states = torch.zeros(
            slot_shape[0] * slot_shape[1] if output_chunk_states else 0, HV, K, V, dtype=compute, device=v.device
        )
        q, k, v, g, beta = (_flat(x) for x in (q, k, v, g, beta))
        for group in plan_segments(spans, first_slots, max_rows, q.device):
            sequences = torch.tensor(group[0].sequences, device=q.device)
            S = states[sequences]
            for segment in group:
                chunks = [take(x, segment) for x in (q, k, v, g, beta)]
                entries = [] if output_chunk_states else None
                o_chunks, S = _run_segment(*chunks, A_log, dt_bias, S, segment, options, entries)
                put(_flat(o), o_chunks, segment)
                if output_chunk_states:
                    chunk_states[torch.tensor(segment.slots, device=q.device)] = torch.cat(entries)
            states[sequences] = S
    if state_v_first:
        states, chunk_states = states.transpose(-1, -2).contiguous(), chunk_states.transpose(-1, -2).contiguous()
    final_state = states if output_final_state else states.new_empty(0)
    chunk_states = chunk_states.unflatten(0, slot_shape) if output_chunk_states else states.new_empty(0)
    return o, final_state, chunk_states


# --- backward ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _autograd_enabled() -> Iterator[None]:
    """Autograd inside the body of an operator, also in inference mode (the leaves must then be new tensors).

    The dispatcher calls a body below autograd: the autograd keys are excluded for this thread, and operators called
    there record no graph even with grad mode on. Removing them (AutogradCPU and AutogradCUDA share one functionality
    bit) and ADInplaceOrView, which tracks views and versions, from the excluded set makes a body differentiable like
    any other code.
    """
    keys = (
        torch._C.DispatchKey.AutogradFunctionality,
        torch._C.DispatchKey.AutogradOther,
        torch._C.DispatchKey.ADInplaceOrView,
    )
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in keys:
        excluded = excluded.remove(key)
    guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with guard, torch.inference_mode(False), torch.enable_grad():
        yield


def _leaf(x: Tensor | None) -> Tensor | None:
    """A copy of ``x`` that requires a gradient."""
    return None if x is None else x.detach().clone().requires_grad_()


def chunk_bwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Body of ``kda::chunk_bwd``: gradients by autograd through the segments of :func:`chunk_fwd`, recomputed one at a
    time.

    Args:
        do: [B, T, HV, V] gradient of ``o``.
        dfinal_state: gradient of ``final_state`` in its layout, or None.
        others: as in :func:`chunk_fwd`.

    Returns:
        dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial_state: each contiguous, in shape and dtype of its input, or
        [0] where the input is None. Tokens past cu_seqlens[-1] get zero.
    """
    (B, T, _, K), HV = q.shape, v.shape[2]
    options = _Options(
        K**-0.5 if scale is None else scale, lower_bound, use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval
    )
    spans, first_slots, _ = sequence_spans(B, T, cu_seqlens)
    compute = compute_dtype(q.dtype)
    activations = (q, k, v, g, beta)
    gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in activations]
    parameters = [None if x is None else x.detach().to(compute, copy=True) for x in (A_log, dt_bias)]
    parameter_gradients = [None if x is None else torch.zeros_like(x) for x in parameters]
    states = _entry_states(initial_state, len(spans), v, K, state_v_first, compute)
    dstates = _entry_states(dfinal_state, len(spans), v, K, state_v_first, compute)
    flat = [_flat(x.detach()) for x in activations]
    flat_gradients = [_flat(x) for x in gradients]
    flat_do = _flat(do)
    max_rows = _max_rows(spans, HV, q.device)
    for group in plan_segments(spans, first_slots, max_rows, q.device):
        sequences = torch.tensor(group[0].sequences, device=q.device)
        entries = [states[sequences]]
        with torch.no_grad():
            for segment in group[:-1]:
                chunks = [take(x, segment) for x in flat]
                entries.append(_run_segment(*chunks, *parameters, entries[-1], segment, options)[1])
        dS = dstates[sequences]
        while group:
            segment, S = group.pop(), entries.pop()
            with _autograd_enabled():
                chunks = [_leaf(take(x, segment)) for x in flat]
                leaves = [_leaf(x) for x in parameters]
                S = _leaf(S)
                o, S_exit = _run_segment(*chunks, *leaves, S, segment, options)
                do_chunks = take(flat_do, segment).to(compute)
                if segment.valid is not None:
                    do_chunks = do_chunks.masked_fill(~segment.valid[:, :, None, None], 0.0)
                wanted = [*chunks, *(x for x in leaves if x is not None), S]
                results = list(torch.autograd.grad((o, S_exit), wanted, (do_chunks, dS), allow_unused=True))
            dS = results.pop()
            for destination, gradient in zip(flat_gradients, results, strict=False):
                put(destination, gradient, segment)
            for total, gradient in zip((x for x in parameter_gradients if x is not None), results[5:], strict=True):
                if gradient is not None:  # None: the gate is precomputed, and does not depend on it
                    total += gradient
        dstates[sequences] = dS

    empty = q.new_empty(0)
    dA_log, ddt_bias = (
        q.new_empty(0) if x is None else total.to(x.dtype)
        for x, total in zip((A_log, dt_bias), parameter_gradients, strict=True)
    )
    dinitial_state = empty
    if initial_state is not None:
        dinitial_state = (dstates.transpose(-1, -2) if state_v_first else dstates).to(initial_state.dtype).contiguous()
    dq, dk, dv, dg, dbeta = gradients
    return dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial_state


# --- warnings ---------------------------------------------------------------------------------------------------------

_warned: set[str] = set()


def warn_fallback(reason: str) -> None:
    """Warns (UserWarning), once for each reason, that a call on a CUDA device runs without kernels."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"kda: running in PyTorch operators, much slower than a kernel: {reason}", UserWarning, stacklevel=3
        )
