"""Parts of the Kimi Delta Attention layer: cache, short convolution, gated norm, padding.

Names in shapes: B batch, T tokens, N sequences, HV value heads, K and V head dimensions, W taps and D channels of a
convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ConvStates", "KDACache", "Padding", "RMSNormGated", "ShortConvolution", "require"]

ConvStates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of q, k, v: [N, D, W] each


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raises a ValueError of the layer that names the argument."""
    if not condition:
        raise ValueError(f"KimiDeltaAttention: argument `{argument}`: expected {expected}, got {got}")


class KDACache:
    """What the layers of a model carry from one piece of the sequences to the next.

    ``cache[layer_idx]`` is None for a layer that has not run, else a dict with

    - ``recurrent_state``: fp32 ``[N, HV, V, K]``, value dimension first;
    - ``conv_state``: the last W inputs of the three convolutions, ``(q, k, v)``, each ``[N, D, W]``, oldest first; None
      without convolutions.

    The interface (``len``, indexing, ``update``, ``get_seq_length``) is the part of flash-linear-attention's cache that
    the layer uses, so either can be passed to it. Tensors are replaced, never written in place: a shallow ``copy()`` is
    a checkpoint to go back to.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any] | None] = []
        self._seen_tokens: list[int] = []

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, layer_idx: int) -> dict[str, Any] | None:
        if not 0 <= layer_idx < len(self._states):
            raise IndexError(f"KDACache: argument `layer_idx`: expected 0 to {len(self._states) - 1}, got {layer_idx}")
        return self._states[layer_idx]

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        return iter(self._states)

    def update(
        self,
        layer_idx: int,
        recurrent_state: torch.Tensor | None = None,
        conv_state: ConvStates | None = None,
        offset: int = 1,
    ) -> dict[str, Any]:
        """Stores the states of one layer after `offset` more tokens; None keeps the old value. Returns the entry."""
        while len(self._states) <= layer_idx:
            self._states.append(None)
            self._seen_tokens.append(0)
        entry = dict(self._states[layer_idx] or {"recurrent_state": None, "conv_state": None})
        if recurrent_state is not None:
            entry["recurrent_state"] = recurrent_state
        if conv_state is not None:
            entry["conv_state"] = conv_state
        self._states[layer_idx] = entry
        self._seen_tokens[layer_idx] += offset
        return entry

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the layer has seen (columns of the padded batch, padding included)."""
        return self._seen_tokens[layer_idx] if layer_idx < len(self._seen_tokens) else 0

    def copy(self) -> KDACache:
        """A cache with the same tensors, which later updates of this one do not change."""
        other = KDACache()
        other._states = list(self._states)
        other._seen_tokens = list(self._seen_tokens)
        return other

    def reset(self) -> None:
        """Forgets everything."""
        self._states.clear()
        self._seen_tokens.clear()


class ShortConvolution(nn.Conv1d):
    """Causal depthwise convolution over time followed by SiLU, with a carried state.

    ``weight`` is ``[D, 1, W]``; tap ``W - 1`` multiplies the current token. Initialised as ``nn.Conv1d``.
    """

    def __init__(self, hidden_size: int, kernel_size: int, bias: bool = False) -> None:
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias, padding=kernel_size - 1)
        self.hidden_size = hidden_size

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        cache: torch.Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            x: inputs ``[B, T, D]``; B is 1 with `cu_seqlens`.
            cache: the last W inputs of each sequence before x, oldest first, ``[N, D, W]``; None: zeros.
            output_final_state: return the last W inputs of each sequence as well.
            cu_seqlens: borders ``[N + 1]`` of the sequences, which nothing crosses; None: N = B sequences of T tokens.

        Returns:
            silu(conv(x)) ``[B, T, D]`` and the new cache ``[N, D, W]`` or None.
        """
        width = self.kernel_size[0]
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if cache is None:
            cache = x.new_zeros(sequences, self.hidden_size, width)
        elif cache.shape != (sequences, self.hidden_size, width):
            raise ValueError(
                f"ShortConvolution: argument `cache`: expected shape [N, D, W] = "
                f"{[sequences, self.hidden_size, width]}, got {list(cache.shape)}"
            )
        cache = cache.to(x.dtype)
        if cu_seqlens is None:
            rows = torch.cat([cache.transpose(1, 2), x], dim=1)  # [B, W + T, D]
            state = rows[:, -width:].transpose(1, 2).contiguous() if output_final_state else None
            return self._convolve(rows[:, 1:]), state

        # All sequences lie in one row, each behind the W inputs that came before it: one convolution serves them all,
        # no tap reaches across a border, and the host reads no lengths. Rows past the last border have their own gap.
        tokens = x.shape[1]
        order = torch.arange(sequences + 1, device=x.device)
        borders = cu_seqlens.to(torch.int64)
        row_length = tokens + (sequences + 1) * width
        taps = torch.arange(width, device=x.device)
        # first row of the gap before each sequence; the clamp keeps wrong borders from writing outside the row
        gap_start = (borders + order * width).clamp(0, row_length - width)  # [N + 1]
        gap_rows = (gap_start[:-1, None] + taps).flatten()  # [N * W]
        token = torch.arange(tokens, device=x.device)
        # [T]; N for rows past the last border
        sequence = torch.searchsorted(borders[1:].contiguous(), token, right=True)
        token_rows = token + (sequence + 1) * width

        row = x.new_zeros(row_length, self.hidden_size)
        row = row.index_copy(0, gap_rows, cache.transpose(1, 2).reshape(-1, self.hidden_size))
        row = row.index_copy(0, token_rows, x[0])
        y = self._convolve(row)[token_rows - (width - 1)][None]
        if not output_final_state:
            return y, None
        last_rows = (gap_start[1:, None] - width + taps).clamp(min=0)  # [N, W]
        return y, row[last_rows].transpose(1, 2).contiguous()

    def _convolve(self, rows: torch.Tensor) -> torch.Tensor:
        """silu(conv) of ``[.., L, D]`` without padding: ``[.., L - W + 1, D]``, in fp32 inside.

        A few shifted products keep the layout of the activations, which ``conv1d`` would have to transpose twice, and
        fuse into one kernel under ``torch.compile``.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        wide_rows = rows.to(wide)
        taps = self.weight[:, 0].t().to(wide)  # [W, D]
        length = rows.shape[-2] - len(taps) + 1
        y = wide_rows[..., :length, :] * taps[0]
        for shift in range(1, len(taps)):
            y = torch.addcmul(y, wide_rows[..., shift : shift + length, :], taps[shift])
        if self.bias is not None:
            y = y + self.bias.to(wide)
        return F.silu(y).to(rows.dtype)


class RMSNormGated(nn.Module):
    """``x / rms(x) * weight * sigmoid(gate)`` over the last dimension, computed in fp32 (fp64 for fp64 inputs)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x and gate ``[..., hidden_size]``; the result has the type of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.to(wide) * torch.sigmoid(gate.to(wide))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class Padding:
    """A padded batch as sequences packed into one row.

    The tokens of sequence n are packed in order; all padding goes behind them as one more sequence, whose state is
    thrown away. So the row always has B * T tokens: no length is read on the host, and a compiled or captured graph
    fits any mask.
    """

    def __init__(self, mask: torch.Tensor, batch: int, tokens: int, device: torch.device) -> None:
        require(
            mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= tokens,
            "attention_mask",
            f"a 0-1 matrix of shape [B, T] = {[batch, tokens]}",
            list(mask.shape),
        )
        integral = not mask.is_floating_point() and not mask.is_complex()
        require(integral, "attention_mask", "bool or integers (1: token, 0: padding)", mask.dtype)
        require(mask.device == device, "attention_mask", f"a tensor on {device}", mask.device)
        valid = (mask[:, mask.shape[1] - tokens :] != 0).contiguous()  # [B, T]
        self.batch, self.tokens = batch, tokens
        self.valid = valid.flatten()  # [B * T]
        total = self.valid.sum()
        ends = valid.sum(1).cumsum(0)
        row_end = torch.full_like(total, batch * tokens)
        self.cu_seqlens = torch.cat([torch.zeros_like(total)[None], ends, row_end[None]])  # [B + 2]
        rank_token = self.valid.cumsum(0) - 1
        rank_padding = total + (~self.valid).cumsum(0) - 1
        self.destination = torch.where(self.valid, rank_token, rank_padding)  # [B * T], a permutation

    def pack(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[B, T, D]`` to ``[1, B * T, D]``; padding becomes zero."""
        rows = torch.where(self.valid[:, None], hidden_states.flatten(0, 1), 0)
        return torch.zeros_like(rows).index_copy(0, self.destination, rows)[None]

    def unpack(self, o: torch.Tensor) -> torch.Tensor:
        """``[1, B * T, D]`` to ``[B, T, D]`` with zeros at the padding."""
        rows = torch.where(self.valid[:, None], o[0][self.destination], 0)
        return rows.unflatten(0, (self.batch, self.tokens))

    def add_sequence(self, state: torch.Tensor | None) -> torch.Tensor | None:
        """The states of N sequences with zeros for the sequence of padding: ``[N + 1, ...]``."""
        return None if state is None else torch.cat([state, state.new_zeros(1, *state.shape[1:])])
