"""Kimi Delta Attention token by token: the ground truth of the tests.

The recurrence is equation by equation that of the Kimi Linear paper (arXiv 2510.26692), per head with state S in R^{K x
V}:

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T        alpha_t = exp(g_t)
    o_t = scale * S_t^T q_t

Slow on purpose: nothing is fused, chunked or approximated, so that it can be checked by eye.
"""

import torch
from torch import Tensor

from .accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, relative_rmse
from .conventions import CHUNK_TOKENS, L2NORM_EPS

__all__ = ["O_RELATIVE_RMSE", "STATE_RELATIVE_RMSE", "log_gate", "recurrent_kda", "relative_rmse"]


def log_gate(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """Log-gate of raw gate logits ``g`` [B, T, HV, K], in the dtype of ``g``.

    Without ``lower_bound``: -exp(A_log) * softplus(g + dt_bias). With it: lower_bound * sigmoid(exp(A_log) * (g +
    dt_bias)), where ``A_log`` (HV elements) may be absent. ``dt_bias`` (HV * K elements) may always be absent.
    """
    heads, key_dim = g.shape[-2:]
    x = g if dt_bias is None else g + dt_bias.to(g.dtype).reshape(heads, key_dim)
    rate = None if A_log is None else A_log.to(g.dtype).reshape(heads, 1).exp()
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(x if rate is None else rate * x)
    if rate is None:
        raise ValueError("argument `A_log`: the softplus gate (no lower_bound) needs it, got None")
    return -rate * torch.logaddexp(x, torch.zeros_like(x))


def recurrent_kda(
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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """KDA by a loop over tokens, in ``dtype`` (fp64). Differentiable by autograd.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V]; value head h reads q and k of head h // (HV / H).
        g: [B, T, HV, K] log-gate in [-inf, 0], or with ``use_gate`` the logits that :func:`log_gate` takes.
        beta: [B, T, HV], or with ``use_beta_sigmoid`` its logits (``allow_neg_eigval``: 2 * sigmoid).
        initial_state: [N, HV, K, V] ([N, HV, V, K] with ``state_v_first``); None: zeros.
        cu_seqlens: [N + 1] token offsets of the sequences, B = 1; None: B sequences of T tokens.
        scale: factor of the output; None: K ** -0.5.

    Returns:
        o [B, T, HV, V] (zero past cu_seqlens[-1]); final_state, laid out as ``state_v_first`` says; chunk_states: the
        states at entry of every 64-token chunk, [B, ceil(T / 64), HV, K, V], or with ``cu_seqlens`` [1, T // 64 + N,
        HV, K, V] with chunk c of sequence n in slot cu_seqlens[n] // 64 + n + c and zeros in the other slots.
    """
    (B, T, H, K), (HV, V) = q.shape, v.shape[-2:]
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS) for x in (q, k))
    q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))
    if use_gate:
        g = log_gate(g, A_log, dt_bias, lower_bound)
    if use_beta_sigmoid:
        beta = torch.sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0)
    scale = K**-0.5 if scale is None else scale

    if cu_seqlens is None:
        slots = -(-T // CHUNK_TOKENS)
        spans = [(n, 0, T, n, 0) for n in range(B)]  # (batch row, first token, last token + 1, sequence, first slot)
        sequences = B
    else:
        offsets = cu_seqlens.tolist()
        sequences = len(offsets) - 1
        slots = T // CHUNK_TOKENS + sequences
        spans = [
            (0, a, b, n, a // CHUNK_TOKENS + n) for n, (a, b) in enumerate(zip(offsets, offsets[1:], strict=False))
        ]

    outputs: dict[tuple[int, int], Tensor] = {}
    finals: dict[int, Tensor] = {}
    entries: dict[tuple[int, int], Tensor] = {}
    for row, begin, end, n, first_slot in spans:
        S = v.new_zeros(HV, K, V)
        if initial_state is not None:
            S = initial_state[n].to(dtype).transpose(-1, -2) if state_v_first else initial_state[n].to(dtype)
        for t in range(begin, end):
            if (t - begin) % CHUNK_TOKENS == 0:
                entries[row, first_slot + (t - begin) // CHUNK_TOKENS] = S
            q_t, k_t, v_t, g_t = (x[row, t] for x in (q, k, v, g))  # [HV, K], [HV, K], [HV, V], [HV, K]
            beta_t = beta[row, t].unsqueeze(-1)  # [HV, 1]
            S = g_t.exp().unsqueeze(-1) * S  # Diag(alpha_t) S
            u_t = beta_t * (v_t - torch.einsum("hk,hkv->hv", k_t, S))  # beta_t (v_t - S^T k_t)
            S = S + torch.einsum("hk,hv->hkv", k_t, u_t)  # S + k_t u_t^T
            outputs[row, t] = scale * torch.einsum("hk,hkv->hv", q_t, S)  # scale S^T q_t
        finals[n] = S

    def gather(parts: dict, rows: int, columns: int, shape: tuple[int, ...]) -> Tensor:
        zero = v.new_zeros(shape)
        if rows * columns == 0:
            return v.new_zeros(rows, columns, *shape)
        flat = torch.stack([parts.get((r, c), zero) for r in range(rows) for c in range(columns)])
        return flat.reshape(rows, columns, *shape)

    o = gather(outputs, B, T, (HV, V))
    final_state = torch.stack([finals[n] for n in range(sequences)]) if sequences else v.new_zeros(0, HV, K, V)
    chunk_states = gather(entries, B, slots, (HV, K, V))
    if state_v_first:
        final_state, chunk_states = final_state.transpose(-1, -2), chunk_states.transpose(-1, -2)
    return o, final_state.contiguous(), chunk_states.contiguous()
