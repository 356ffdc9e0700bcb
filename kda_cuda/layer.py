"""The Kimi Delta Attention layer: projections, short convolution, gate, beta, output norm and gate around ``chunk_kda``.

Source: Kimi Linear: An Expressive, Efficient Attention Architecture, https://arxiv.org/abs/2510.26692, section 4.
Parameter names, shapes and initial distributions are those of flash-linear-attention 0.6.0 (``fla.layers.KimiDeltaAttention``),
so that its state dicts load with ``strict=True``.

Names in shapes: B batch, T tokens, N sequences, H heads of q and k, HV heads of v, K = head_dim, V = head_dim * expand_v,
W = conv_size, D channels of one convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kda_cuda.ops import chunk_kda
from kda_cuda.reference import log_gate

__all__ = ["KDACache", "KDAInputs", "KimiDeltaAttention", "RMSNormGated", "ShortConvolution"]

MODES = ("chunk", "fused_recurrent")
LOWEST_GATE = -5.0  # the operator accepts lower_bound in [LOWEST_GATE, 0)
A_INIT_RANGE = (1.0, 16.0)  # A ~ U(range), A_log = ln A
DT_INIT_RANGE = (1e-3, 1e-1)  # dt = exp(U(ln range)), dt_bias = softplus^-1(dt)
DT_INIT_FLOOR = 1e-4

# Keywords that decoder stacks hand to every attention layer and that mean nothing here: KDA has no positions.
IGNORED_KEYWORDS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "num_items_in_batch", "output_hidden_states", "return_dict"}
)


class KDAInputs(NamedTuple):
    """What the layer hands to the operator for one run of tokens (all before normalisation and activation)."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    g: torch.Tensor  # [B, T, HV, K], input of the gate
    beta: torch.Tensor  # [B, T, HV], logits


ConvStates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of q, k, v: [N, D, W] each


class KDACache:
    """What the layers of a model carry from one piece of the sequences to the next.

    ``cache[layer_idx]`` is None for a layer that has not run, else a dict with

    - ``recurrent_state``: fp32 ``[N, HV, V, K]``, value dimension first;
    - ``conv_state``: the last W inputs of the three convolutions, ``(q, k, v)``, each ``[N, D, W]``, oldest first; or None.

    The interface (``len``, indexing, ``update``, ``get_seq_length``) is the part of flash-linear-attention's cache that
    the layer uses, so either can be passed to it. Tensors are replaced, never written in place: a shallow ``copy()`` is a
    checkpoint to go back to.
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
        """Stores the states of one layer after `offset` more tokens; what is None keeps its value. Returns the entry."""
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
            cu_seqlens: borders of the sequences ``[N + 1]``; None: N = B sequences of T tokens. Nothing crosses a border.

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
            padded = torch.cat([cache, x.transpose(1, 2)], dim=2)  # [B, D, W + T]
            y = self._convolve(padded)[:, :, 1:].transpose(1, 2)
            return y, padded[:, :, -width:].contiguous() if output_final_state else None

        # All sequences lie in one row, each behind the W inputs that came before it: one convolution serves them all, no tap
        # reaches across a border, and the host reads no lengths. Rows past the last border land behind a gap of their own.
        tokens = x.shape[1]
        order = torch.arange(sequences + 1, device=x.device)
        borders = cu_seqlens.to(torch.int64)
        row_length = tokens + (sequences + 1) * width
        taps = torch.arange(width, device=x.device)
        # first row of the gap before each sequence; the clamp keeps wrong borders from writing outside the row
        gap_start = (borders + order * width).clamp(0, row_length - width)  # [N + 1]
        gap_rows = (gap_start[:-1, None] + taps).flatten()  # [N * W]
        token = torch.arange(tokens, device=x.device)
        sequence = torch.searchsorted(borders[1:].contiguous(), token, right=True)  # [T], N for rows past the last border
        token_rows = token + (sequence + 1) * width

        row = x.new_zeros(row_length, self.hidden_size)
        row = row.index_copy(0, gap_rows, cache.transpose(1, 2).reshape(-1, self.hidden_size))
        row = row.index_copy(0, token_rows, x[0])
        y = self._convolve(row.t()[None])[0].t()[token_rows - (width - 1)][None]
        if not output_final_state:
            return y, None
        last_rows = (gap_start[1:, None] - width + taps).clamp(min=0)  # [N, W]
        return y, row[last_rows].transpose(1, 2).contiguous()

    def _convolve(self, padded: torch.Tensor) -> torch.Tensor:
        """silu(conv) of ``[B, D, L]`` without padding: ``[B, D, L - W + 1]``."""
        return F.silu(F.conv1d(padded, self.weight, self.bias, groups=self.hidden_size))


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


class KimiDeltaAttention(nn.Module):
    """Kimi Delta Attention. Arguments, parameter names and initialisation as in flash-linear-attention 0.6.0.

    Args:
        hidden_size: width of the model.
        expand_v: V / K; ``head_dim * expand_v`` must be an integer.
        head_dim: K.
        num_heads: H, heads of q and k.
        num_v_heads: HV, heads of v, gate, beta and state, a multiple of `num_heads`; None: the same number.
        mode: "chunk" or "fused_recurrent"; both give the same result and are computed by the chunk operator.
        use_short_conv: convolve q, k and v over the last `conv_size` tokens.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1), see https://arxiv.org/abs/2411.12537.
        safe_gate: initialise for a bounded gate; needs `lower_bound`. The kernels are exact with and without a bound.
        lower_bound: lb in [-5, 0): log-gate ``lb * sigmoid(exp(A_log) * (f + dt_bias))``. None: the unbounded
            ``-exp(A_log) * softplus(f + dt_bias)``.
        conv_size: W.
        conv_bias: give the convolutions a bias.
        layer_idx: index into the cache; needed only when one is used.
        norm_eps: of the output norm.

    `A_log` and `dt_bias` stay in fp32 when the module is converted to bf16 or fp16.

    Raises:
        ValueError: an argument has no meaning; the message names it.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        sizes = {"hidden_size": hidden_size, "head_dim": head_dim, "num_heads": num_heads, "num_v_heads": num_v_heads}
        for name, size in {**sizes, "conv_size": conv_size}.items():
            _require(size >= 1, name, "a positive integer", size)
        _require(num_v_heads % num_heads == 0, "num_v_heads", f"a multiple of num_heads = {num_heads}", num_v_heads)
        head_v_dim = round(head_dim * expand_v)
        _require(
            head_v_dim >= 1 and math.isclose(head_dim * expand_v, head_v_dim, rel_tol=1e-5),
            "expand_v",
            f"a number whose product with head_dim = {head_dim} is a positive integer",
            expand_v,
        )
        _require(mode in MODES, "mode", f"one of {MODES}", mode)
        _require(not safe_gate or lower_bound is not None, "lower_bound", "a number in [-5, 0) with safe_gate=True", None)
        in_range = lower_bound is None or LOWEST_GATE <= lower_bound < 0
        _require(in_range, "lower_bound", "None or a number in [-5, 0)", lower_bound)

        self.mode = mode
        self.allow_neg_eigval = allow_neg_eigval
        self.safe_gate = safe_gate
        self.lower_bound = lower_bound
        self.hidden_size = hidden_size
        self.expand_v = expand_v
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.conv_bias = conv_bias
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        self.head_k_dim = head_dim
        self.head_v_dim = head_v_dim
        self.key_dim = num_heads * head_dim
        self.value_dim = num_v_heads * head_v_dim
        self.gate_dim = num_v_heads * head_dim
        self.layer_idx = layer_idx

        # The order of creation is FLA's: the same seed gives the same weights.
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, bias=conv_bias)
            self.k_conv1d = ShortConvolution(self.key_dim, conv_size, bias=conv_bias)
            self.v_conv1d = ShortConvolution(self.value_dim, conv_size, bias=conv_bias)
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, head_v_dim, bias=False), nn.Linear(head_v_dim, self.gate_dim, bias=False)
        )
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        if safe_gate:
            a_log = torch.zeros(num_v_heads, dtype=torch.float32)
        else:
            a_log = torch.empty(num_v_heads, dtype=torch.float32).uniform_(*A_INIT_RANGE).log()
        self.A_log = nn.Parameter(a_log)
        low, high = (math.log(dt) for dt in DT_INIT_RANGE)
        dt = torch.exp(torch.rand(self.gate_dim, dtype=torch.float32) * (high - low) + low).clamp(min=DT_INIT_FLOOR)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log._no_weight_decay = True
        self.dt_bias._no_weight_decay = True
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, head_v_dim, bias=False), nn.Linear(head_v_dim, self.value_dim, bias=True)
        )
        self.o_norm = RMSNormGated(head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        *,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None, Any | None]:
        """
        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: 0-1 matrix (bool or integers) ``[B, T]``, 0 for padding, at any side; of a longer one the last T
                columns count. Padding neither enters a state nor receives an output (its rows are zero).
            past_key_values: a `KDACache` or flash-linear-attention's cache. States found under `layer_idx` are continued.
            use_cache: store the states after these tokens in `past_key_values`; a new `KDACache` if that is None.
            output_attentions: must be false; there is no attention matrix.
            cu_seqlens: borders ``[N + 1]`` of sequences packed into one row (B = 1), int32 or int64.

        Returns:
            ``(o, None, past_key_values)`` with o ``[B, T, hidden_size]``.

        Raises:
            ValueError: an argument does not fit; the message names it.
        """
        _require(
            hidden_states.dim() == 3 and hidden_states.shape[-1] == self.hidden_size,
            "hidden_states",
            f"shape [B, T, {self.hidden_size}]",
            list(hidden_states.shape),
        )
        _require(not output_attentions, "output_attentions", "False (there is no attention matrix)", output_attentions)
        for name, value in kwargs.items():
            _require(value is None or name in IGNORED_KEYWORDS, name, "no such argument of this layer", value)
        batch, tokens, _ = hidden_states.shape
        if use_cache and past_key_values is None:
            past_key_values = KDACache()
        carried = self._carried_states(past_key_values)
        recurrent_state, conv_states = carried["recurrent_state"], carried["conv_state"]

        padding: _Padding | None = None
        if attention_mask is not None:
            _require(cu_seqlens is None, "attention_mask", "None together with cu_seqlens", "both")
            padding = _Padding(attention_mask, batch, tokens, hidden_states.device)
            hidden_states, cu_seqlens = padding.pack(hidden_states), padding.cu_seqlens
            recurrent_state = padding.add_sequence(recurrent_state)
            conv_states = None if conv_states is None else tuple(padding.add_sequence(s) for s in conv_states)
        elif cu_seqlens is not None:
            _check_cu_seqlens(cu_seqlens, hidden_states)

        inputs, conv_states = self.project(hidden_states, conv_states, bool(use_cache), cu_seqlens)
        o, recurrent_state = chunk_kda(
            **inputs._asdict(),
            **self.operator_arguments(),
            initial_state=recurrent_state,
            output_final_state=bool(use_cache),
            cu_seqlens=cu_seqlens,
        )
        if use_cache:
            if padding is not None:
                recurrent_state = recurrent_state[:-1]
                conv_states = None if conv_states is None else tuple(state[:-1] for state in conv_states)
            past_key_values.update(
                layer_idx=self.layer_idx, recurrent_state=recurrent_state, conv_state=conv_states, offset=tokens
            )
        gate = self.g_proj(hidden_states).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        o = self.o_proj(self.o_norm(o, gate).flatten(-2))
        if padding is not None:
            o = padding.unpack(o)
        return o, None, past_key_values

    def project(
        self,
        hidden_states: torch.Tensor,
        conv_states: ConvStates | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[KDAInputs, ConvStates | None]:
        """The operator's inputs for ``[B, T, hidden_size]``, and the convolutions' states after it (None unless asked for)."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        new_states: ConvStates | None = None
        if self.use_short_conv:
            state_q, state_k, state_v = (None, None, None) if conv_states is None else conv_states
            q, state_q = self.q_conv1d(q, state_q, output_final_state, cu_seqlens)
            k, state_k = self.k_conv1d(k, state_k, output_final_state, cu_seqlens)
            v, state_v = self.v_conv1d(v, state_v, output_final_state, cu_seqlens)
            if output_final_state:
                new_states = (state_q, state_k, state_v)
        else:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        inputs = KDAInputs(
            q=q.unflatten(-1, (self.num_heads, self.head_k_dim)),
            k=k.unflatten(-1, (self.num_heads, self.head_k_dim)),
            v=v.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
            g=self.f_proj(hidden_states).unflatten(-1, (self.num_v_heads, self.head_k_dim)),
            beta=self.b_proj(hidden_states),
        )
        return inputs, new_states

    def operator_arguments(self) -> dict[str, Any]:
        """The arguments of ``chunk_kda`` that do not depend on the tokens."""
        wide = torch.promote_types(self.o_norm.weight.dtype, torch.float32)
        return {
            "A_log": self.A_log.to(wide),
            "dt_bias": self.dt_bias.to(wide),
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": self.allow_neg_eigval,
            "safe_gate": self.safe_gate,
            "lower_bound": self.lower_bound,
            "state_v_first": True,
        }

    def log_gate(self, g: torch.Tensor) -> torch.Tensor:
        """The log-gates, fp32 ``[B, T, HV, K]``, that the operator makes of `KDAInputs.g`."""
        return log_gate(g.float(), self.A_log.float(), self.dt_bias.float(), self.lower_bound)

    def _carried_states(self, past_key_values: Any | None) -> dict[str, Any]:
        entry = None
        if past_key_values is not None:
            _require(self.layer_idx is not None, "layer_idx", "an index given to the constructor to use a cache", None)
            if len(past_key_values) > self.layer_idx:
                entry = past_key_values[self.layer_idx]
        recurrent_state = None if entry is None else entry["recurrent_state"]
        conv_states = None if entry is None else entry["conv_state"]
        if self.use_short_conv:
            both = (recurrent_state is None) == (conv_states is None)
            _require(both, "past_key_values", "recurrent_state and conv_state together", "one of them")
        return {"recurrent_state": recurrent_state, "conv_state": conv_states if self.use_short_conv else None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KimiDeltaAttention:
        """Moves and converts the module, keeping A_log and dt_bias in at least fp32: exp(A_log) in bf16 is off by percents."""
        if recurse:
            for child in self.children():
                child._apply(fn)

        def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            narrowed = result.is_floating_point() and torch.promote_types(result.dtype, torch.float32) != result.dtype
            return tensor.to(result.device) if narrowed else result

        return super()._apply(at_least_fp32, recurse=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Checkpoints of served models carry A_log as [1, 1, HV, 1] and dt_bias as [HV, K].
        for name, parameter in (("A_log", self.A_log), ("dt_bias", self.dt_bias)):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.shape != parameter.shape and loaded.numel() == parameter.numel():
                state_dict[prefix + name] = loaded.reshape(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Padding:
    """A padded batch as sequences packed into one row.

    The tokens of sequence n are packed in order; all padding goes behind them as one more sequence, whose state is thrown
    away. So the row always has B * T tokens: no length is read on the host, and a compiled or captured graph fits any mask.
    """

    def __init__(self, mask: torch.Tensor, batch: int, tokens: int, device: torch.device) -> None:
        _require(
            mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= tokens,
            "attention_mask",
            f"a 0-1 matrix of shape [B, T] = {[batch, tokens]}",
            list(mask.shape),
        )
        integral = not mask.is_floating_point() and not mask.is_complex()
        _require(integral, "attention_mask", "bool or integers (1: token, 0: padding)", mask.dtype)
        _require(mask.device == device, "attention_mask", f"a tensor on {device}", mask.device)
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


def _check_cu_seqlens(cu_seqlens: torch.Tensor, hidden_states: torch.Tensor) -> None:
    batch, tokens, _ = hidden_states.shape
    _require(batch == 1, "hidden_states", "B = 1 (sequences packed into one row) with cu_seqlens", f"B = {batch}")
    good = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1 and cu_seqlens.dtype in (torch.int32, torch.int64)
    got = f"shape {list(cu_seqlens.shape)} of {cu_seqlens.dtype}"
    _require(good, "cu_seqlens", "shape [N + 1] of int32 or int64", got)
    _require(
        cu_seqlens.device == hidden_states.device, "cu_seqlens", f"a tensor on {hidden_states.device}", cu_seqlens.device
    )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        ordered = all(low <= high for low, high in zip(borders, borders[1:], strict=False))
        _require(
            borders[0] == 0 and ordered and borders[-1] == tokens,
            "cu_seqlens",
            f"non-decreasing borders from 0 to T = {tokens}",
            borders if len(borders) <= 16 else f"{borders[:16]}...",
        )


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"KimiDeltaAttention: argument `{argument}`: expected {expected}, got {got}")
