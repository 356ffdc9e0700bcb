"""Kimi Delta Attention by chunks in PyTorch operators: the CPU path, and whatever no CUDA kernel covers on any device.

Chunks of C = 64 tokens, batched over heads and over the sequences that are equally far. For a chunk entered with state
S (G_i: sum of the log-gates of the chunk up to token i; products of vectors element by element):

    Akk[i,j] = beta_i sum_d k_i k_j exp(G_i - G_j)  (i > j)        Aqk[i,j] = sum_d q_i k_j exp(G_i - G_j)  (i >= j)
    Tinv = (I + Akk)^{-1} Diag(beta)                                W = Tinv (K * e^G)
    U  = Tinv V - W S                                               O = scale ((Q * e^G) S + Aqk U)
    S' = Diag(e^{G_C}) S + (K * e^{G_C - G})^T U

Numerics: no exponential but alpha = exp(g) <= 1 and e^{G_C} <= 1 is ever formed. exp(G_i - G_j) is a product of alphas,
cut where the halves of the smallest aligned block of 2h tokens (h = 1, 2, .., 32) that holds i and j meet: prefix
product up to i in the upper half, times suffix product behind j in the lower half. Both are <= 1, g = -inf is alpha =
0, and nothing overflows.

Work is cut into segments of chunks, so that temporaries have a bounded size, and the backward pass recomputes one
segment at a time from the state at its entry: memory beyond inputs and outputs is bounded for the forward, and for the
backward it is one state per segment.

The functions here are bodies of custom operators. With ``cu_seqlens`` they read it on the host: on a CUDA device this
synchronises and cannot be captured in a CUDA graph (the kernels of ``kda::chunk_fwd`` have neither limitation).
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_TOKENS = 64  # C in the formulas
L2NORM_EPS = 1e-6

# Chunks x value heads of one segment. On a CPU the temporaries of a segment then stay in the caches (32 tiles of 64 x
# 128 fp32 are 1 MiB a tensor); on a GPU it takes many tiles to fill the device.
SEGMENT_TILES_CPU = 64
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


@dataclass(frozen=True)
class _Segment:
    """Consecutive chunks of a group of sequences, step-major: all chunks c of the sequences, then all chunks c + 1, ..

    The sequences of a group are sorted by length, longest first: those with a chunk c are the first ``active[c]`` of
    the group.
    """

    sequences: list[int]  # of the group, longest first
    active: list[int]  # for each step: how many of them have a chunk there
    slots: list[int]  # [rows] slot of the chunk in chunk_states
    token_range: tuple[int, int] | None  # flat tokens, if the rows are adjacent full chunks (no index needed then)
    index: Tensor | None  # [rows * C] flat token of each row; behind the end of a sequence its last token
    valid: Tensor | None  # [rows * C] bool: not behind the end; None if all are valid


# --- planning ---------------------------------------------------------------------------------------------------------


def _sequence_spans(
    batch: int, tokens: int, cu_seqlens: Tensor | None
) -> tuple[list[tuple[int, int]], list[int], tuple[int, int]]:
    """(first flat token, length) of each sequence, its first slot in chunk_states, and that tensor's leading shape."""
    if cu_seqlens is None:
        chunks = -(-tokens // CHUNK_TOKENS)
        return [(b * tokens, tokens) for b in range(batch)], [b * chunks for b in range(batch)], (batch, chunks)
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or any(a > b for a, b in zip(offsets[:-1], offsets[1:], strict=True)) or offsets[-1] > tokens:
        raise ValueError(
            f"kda::chunk_fwd: argument `cu_seqlens`: expected offsets from 0, never decreasing, up to T = {tokens}, "
            f"got {offsets if len(offsets) <= 16 else [*offsets[:8], '..', *offsets[-8:]]}"
        )
    spans = [(begin, end - begin) for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]
    slots = [begin // CHUNK_TOKENS + n for n, (begin, _) in enumerate(spans)]
    return spans, slots, (1, tokens // CHUNK_TOKENS + len(spans))


def _segments(
    spans: Sequence[tuple[int, int]], first_slots: Sequence[int], heads: int, device: torch.device
) -> Iterator[list[_Segment]]:
    """For each group of sequences its segments, in the order in which they run. Empty sequences are in no group."""
    max_rows = max(1, (SEGMENT_TILES_CPU if device.type == "cpu" else SEGMENT_TILES_CUDA) // max(heads, 1))
    order = sorted((n for n, (_, length) in enumerate(spans) if length > 0), key=lambda n: -spans[n][1])
    for first in range(0, len(order), max_rows):
        group = order[first : first + max_rows]
        chunks = [-(-spans[n][1] // CHUNK_TOKENS) for n in group]
        segments, active, rows = [], [], []
        for step in range(chunks[0]):
            count = sum(c > step for c in chunks)
            if active and len(rows) + count > max_rows:
                segments.append(_segment(group, active, rows, spans, first_slots, device))
                active, rows = [], []
            active.append(count)
            rows += [(n, step) for n in group[:count]]
        segments.append(_segment(group, active, rows, spans, first_slots, device))
        yield segments


def _segment(
    group: list[int],
    active: list[int],
    rows: list[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    first_slots: Sequence[int],
    device: torch.device,
) -> _Segment:
    """The segment of ``rows`` (sequence, chunk)."""
    begins = [spans[n][0] + step * CHUNK_TOKENS for n, step in rows]
    counts = [min(CHUNK_TOKENS, spans[n][1] - step * CHUNK_TOKENS) for n, step in rows]
    slots = [first_slots[n] + step for n, step in rows]
    full = all(count == CHUNK_TOKENS for count in counts)
    if full and all(begin == begins[0] + i * CHUNK_TOKENS for i, begin in enumerate(begins)):
        return _Segment(group, active, slots, (begins[0], begins[-1] + CHUNK_TOKENS), None, None)
    offsets = torch.arange(CHUNK_TOKENS).expand(len(rows), -1)
    last = torch.tensor(counts).unsqueeze(1) - 1
    index = (torch.tensor(begins).unsqueeze(1) + offsets.minimum(last)).flatten()
    valid = None if full else (offsets <= last).flatten().to(device)
    return _Segment(group, active, slots, None, index.to(device), valid)


def _take(x: Tensor, segment: _Segment) -> Tensor:
    """Rows of the segment [rows * C, ...] of a flat tensor [B * T, ...]; those behind the end of a sequence repeat its
    last token.
    """
    if segment.token_range is not None:
        return x[segment.token_range[0] : segment.token_range[1]]
    return x.index_select(0, segment.index)


def _put(destination: Tensor, rows: Tensor, segment: _Segment) -> None:
    """Writes the rows of the segment to a flat tensor [B * T, ...], but for those behind the end of a sequence."""
    if segment.token_range is not None:
        destination[segment.token_range[0] : segment.token_range[1]].copy_(rows)
        return
    index = segment.index
    if segment.valid is not None:
        index, rows = index[segment.valid], rows[segment.valid]
    destination.index_copy_(0, index, rows.to(destination.dtype))


# --- input transforms -------------------------------------------------------------------------------------------------


def _l2_normalised(x: Tensor, scale: float) -> Tensor:
    """scale * x * rsqrt(sum x^2 + 1e-6) over the last dimension."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (torch.rsqrt(norm.square() + L2NORM_EPS) * scale)


def _log_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, options: _Options) -> Tensor:
    """Log-gate [tokens, HV, K], in [-inf, 0], of ``g`` in the same shape."""
    if not options.use_gate:
        return g
    if dt_bias is not None:
        g = g + dt_bias.to(g.dtype).reshape(g.shape[1:])
    rate = None if A_log is None else A_log.to(g.dtype).reshape(-1, 1).exp()  # [HV, 1]
    if options.lower_bound is not None:
        return torch.sigmoid(g if rate is None else rate * g) * options.lower_bound
    if rate is None:
        raise ValueError("kda::chunk_fwd: argument `A_log`: the softplus gate (no lower_bound) needs it, got None")
    return functional.softplus(g) * -rate


# --- one segment ------------------------------------------------------------------------------------------------------


def _scaled_half(x: Tensor, half: int, factor: Tensor, in_place: bool) -> Tensor:
    """``x`` [N, 2, rows, K] with half ``half`` of each block multiplied by ``factor`` [N, 1, K]."""
    if in_place:
        x[:, half].mul_(factor)
        return x
    halves = [x[:, 0], x[:, 1]]
    halves[half] = halves[half] * factor
    return torch.stack(halves, dim=1)


def _block_lower(diagonal: Tensor, corner: Tensor) -> Tensor:
    """[[D0, 0], [corner, D1]]: [N, 2h, 2h] of ``diagonal`` (D0, D1) [N, 2, h, h] and ``corner`` [N, h, h]."""
    N, _, h, _ = diagonal.shape
    result = diagonal.new_zeros(N, 2, h, 2, h)
    result[:, 0, :, 0] = diagonal[:, 0]
    result[:, 1, :, 1] = diagonal[:, 1]
    result[:, 1, :, 0] = corner
    return result.view(N, 2 * h, 2 * h)


def _intra_chunk(qk: Tensor, alpha: Tensor, beta: Tensor, in_place: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything of a chunk that does not depend on the state, level by level (see the head of this file).

    (I + Akk)^{-1} grows with the levels by block substitution, never by powers of Akk, which exceed any precision
    when keys repeat: [[L0, 0], [B, L1]]^{-1} = [[X0, 0], [-X1 B X0, X1]] with X = L^{-1}.

    Args:
        qk: [X, C, 2, K] q and k of each token; overwritten if ``in_place``.
        alpha: [X, C, K].
        beta: [X, C, 1].

    Returns:
        Aqk [X, C, C]; Tinv [X, C, C]; qk_gated [X, C, 2, K]: Q * e^G and K * e^G of each token; k_decayed [X, C, K]: K
        * e^{G_C - G}.
    """
    X, C, _, K = qk.shape
    Aqk = qk.new_zeros(X, C, C)
    Aqk.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(qk[:, :, 0], qk[:, :, 1]))
    inverse = qk.new_ones(X * C, 1, 1)
    k_decayed = qk[:, :, 1].contiguous()  # k times the suffix product R_h; R_1 = 1
    alpha_qk = alpha.unsqueeze(2)
    qk_gated = qk.mul_(alpha_qk) if in_place else qk * alpha_qk  # q, k times the prefix product P_h; P_1 = alpha
    total = alpha  # [X, C / h, K] product of alpha over each block of h tokens
    h = 1
    while h < C:
        N = X * C // (2 * h)  # blocks of 2h tokens: a lower and an upper half
        qk_gated = qk_gated.view(N, 2, 2 * h, K)  # rows: (token, q or k)
        k_decayed = k_decayed.view(N, 2, h, K)
        left, right = qk_gated[:, 1], k_decayed[:, 0]
        if h == 1:  # a dot product each, for which bmm is slow
            pairs = torch.linalg.vecdot(left, right)
        else:
            pairs = torch.bmm(left, right.transpose(1, 2))
        pairs = pairs.view(N, h, 2, h)
        inverse = inverse.view(N, 2, h, h)
        corner = pairs[:, :, 1] * (-beta.view(N, 2, h, 1)[:, 1])
        if h > 1:
            corner = torch.bmm(inverse[:, 1], torch.bmm(corner, inverse[:, 0]))
        inverse = _block_lower(inverse, corner)
        corners = Aqk.view(X, -1, 2, h, C // (2 * h), 2, h)[:, :, 1, :, :, 0]
        corners = corners.diagonal(dim1=1, dim2=3)  # [X, h, h, N / X]
        corners.copy_(pairs[:, :, 0].view(X, -1, h, h).permute(0, 2, 3, 1))
        lower, upper = total.view(N, 2, 1, K).unbind(1)
        qk_gated = _scaled_half(qk_gated, 1, lower, in_place)
        k_decayed = _scaled_half(k_decayed, 0, upper, in_place)
        total = lower * upper
        h *= 2
    return Aqk, inverse * beta.transpose(1, 2), qk_gated.view(X, C, 2, K), k_decayed.view(X, C, K)


def _run_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    S: Tensor,
    segment: _Segment,
    options: _Options,
    in_place: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The chunks of a segment.

    Args:
        q, k [tokens, H, K], v [tokens, HV, V], g [tokens, HV, K], beta [tokens, HV]: rows of the segment, as given.
        S: [sequences, HV, K, V] states of the group's sequences at entry of the segment.
        in_place: reuse memory; not for autograd.

    Returns:
        o [tokens, HV, V]; the states at exit, shaped as ``S``; for each step the states [active, HV, K, V] at its
        entry.
    """
    compute = S.dtype
    C, K, (HV, V) = CHUNK_TOKENS, q.shape[2], v.shape[1:]
    rows = q.shape[0] // C
    q, k, v, g, beta = (x.to(compute) for x in (q, k, v, g, beta))
    if options.use_qk_l2norm:
        q, k = _l2_normalised(q, options.scale), _l2_normalised(k, 1.0)
    else:
        q = q * options.scale
    g = _log_gate(g, A_log, dt_bias, options)
    if options.use_beta_sigmoid:
        beta = torch.sigmoid(beta) * (2.0 if options.allow_neg_eigval else 1.0)
    if segment.valid is not None:  # after the transforms: sigmoid(0) is 0.5
        behind = ~segment.valid.view(-1, 1)
        g, beta = g.masked_fill(behind.unsqueeze(-1), 0.0), beta.masked_fill(behind, 0.0)

    X = rows * HV  # tiles

    def head_major(x: Tensor) -> Tensor:  # [tokens, H or HV, D] -> [rows, HV, C, D], a view
        x = x.unflatten(0, (rows, C)).transpose(1, 2)
        return x.unsqueeze(2).expand(-1, -1, HV // x.shape[1], -1, -1).flatten(1, 2)

    qk = torch.stack((head_major(q), head_major(k)), dim=3).view(X, C, 2, K)
    v, g, beta = (head_major(x).reshape(X, C, -1).contiguous() for x in (v, g, beta.unsqueeze(-1)))
    decay = g.sum(1).exp().unsqueeze(-1)  # e^{G_C} [X, K, 1]
    Aqk, Tinv, qk_gated, k_decayed = _intra_chunk(qk, g.exp(), beta, in_place)

    S, finished = S.flatten(0, 1), []  # [sequences * HV, K, V]
    entries, outputs = [], []
    step_tiles = [count * HV for count in segment.active]
    factors = (x.split(step_tiles) for x in (qk_gated.flatten(1, 2), Tinv, v, Aqk, decay, k_decayed.transpose(1, 2)))
    for qk_gated_c, Tinv_c, v_c, Aqk_c, decay_c, k_decayed_c in zip(*factors, strict=True):
        if len(Tinv_c) < len(S):  # the shortest sequences have ended
            finished.append(S[len(Tinv_c) :])
            S = S[: len(Tinv_c)]
        entries.append(S)
        q_S, k_S = torch.bmm(qk_gated_c, S).view(-1, C, 2, V).unbind(2)
        U = torch.bmm(Tinv_c, v_c - k_S)
        outputs.append(torch.baddbmm(q_S, Aqk_c, U))
        S = (decay_c * S).baddbmm_(k_decayed_c, U)
    S = torch.cat([S, *reversed(finished)]) if finished else S

    o = torch.cat(outputs).view(rows, HV, C, V).transpose(1, 2).flatten(0, 1)
    return o, S.unflatten(0, (-1, HV)), [entry.unflatten(0, (-1, HV)) for entry in entries]


# --- forward ----------------------------------------------------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B * T, ...]."""
    return x.flatten(0, 1)


def _entry_states(
    initial_state: Tensor | None, sequences: int, v: Tensor, key_dim: int, state_v_first: bool, compute: torch.dtype
) -> Tensor:
    """A new tensor [N, HV, K, V] in the dtype of the computation."""
    heads, value_dim = v.shape[-2:]
    states = torch.zeros(sequences, heads, key_dim, value_dim, dtype=compute, device=v.device)
    if initial_state is not None:
        states.copy_(initial_state.transpose(-1, -2) if state_v_first else initial_state)
    return states


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


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

    Not itself differentiable: the operator's gradient is :func:`chunk_bwd`. Arguments are expected to have passed
    ``kda::check_chunk_fwd``.

    Returns:
        o [B, T, HV, V] in the dtype of ``v``; final_state [N, HV, K, V] ([N, HV, V, K] with ``state_v_first``) and
        chunk_states [B, ceil(T / 64), HV, K, V] (with ``cu_seqlens`` [1, T // 64 + N, ...]), fp32 (fp64 for fp64
        inputs), or [0] if not requested.
    """
    (B, T, _, K), (HV, V) = q.shape, v.shape[-2:]
    options = _Options(
        K**-0.5 if scale is None else scale, lower_bound, use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval
    )
    spans, first_slots, slot_shape = _sequence_spans(B, T, cu_seqlens)
    compute = _compute_dtype(q)
    with torch.no_grad():
        states = _entry_states(initial_state, len(spans), v, K, state_v_first, compute)
        covered = sum(length for _, length in spans) == B * T
        o = (torch.empty if covered else torch.zeros)(B, T, HV, V, dtype=v.dtype, device=v.device)
        chunk_states = torch.zeros(
            slot_shape[0] * slot_shape[1] if output_chunk_states else 0, HV, K, V, dtype=compute, device=v.device
        )
        q, k, v, g, beta = (_flat(x) for x in (q, k, v, g, beta))
        for group in _segments(spans, first_slots, HV, q.device):
            sequences = torch.tensor(group[0].sequences, device=q.device)
            S = states[sequences]
            for segment in group:
                rows = [_take(x, segment) for x in (q, k, v, g, beta)]
                o_rows, S, entries = _run_segment(*rows, A_log, dt_bias, S, segment, options, in_place=True)
                _put(_flat(o), o_rows, segment)
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
    spans, first_slots, _ = _sequence_spans(B, T, cu_seqlens)
    compute = _compute_dtype(q)
    activations = (q, k, v, g, beta)
    gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in activations]
    parameters = [None if x is None else x.detach().to(compute, copy=True) for x in (A_log, dt_bias)]
    parameter_gradients = [None if x is None else torch.zeros_like(x) for x in parameters]
    states = _entry_states(initial_state, len(spans), v, K, state_v_first, compute)
    dstates = _entry_states(dfinal_state, len(spans), v, K, state_v_first, compute)
    flat = [_flat(x.detach()) for x in activations]
    flat_gradients = [_flat(x) for x in gradients]
    flat_do = _flat(do)
    for group in _segments(spans, first_slots, HV, q.device):
        sequences = torch.tensor(group[0].sequences, device=q.device)
        entries = [states[sequences]]
        with torch.no_grad():
            for segment in group[:-1]:
                rows = [_take(x, segment) for x in flat]
                entries.append(_run_segment(*rows, *parameters, entries[-1], segment, options, in_place=True)[1])
        dS = dstates[sequences]
        while group:
            segment, S = group.pop(), entries.pop()
            with _autograd_enabled():
                rows = [_leaf(_take(x, segment)) for x in flat]
                leaves = [_leaf(x) for x in parameters]
                S = _leaf(S)
                o, S_exit, _ = _run_segment(*rows, *leaves, S, segment, options, in_place=False)
                do_rows = _take(flat_do, segment).to(compute)
                if segment.valid is not None:
                    do_rows = do_rows.masked_fill(~segment.valid.view(-1, 1, 1), 0.0)
                wanted = [*rows, *(x for x in leaves if x is not None), S]
                results = list(torch.autograd.grad((o, S_exit), wanted, (do_rows, dS), allow_unused=True))
            dS = results.pop()
            for destination, gradient in zip(flat_gradients, results, strict=False):
                _put(destination, gradient, segment)
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
