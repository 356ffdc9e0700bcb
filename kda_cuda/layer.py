"""The Kimi Delta Attention layer: projections, short convolution, gate, beta, output norm around ``chunk_kda``.

Source: Kimi Linear: An Expressive, Efficient Attention Architecture, https://arxiv.org/abs/2510.26692, section 4.
Parameter names, shapes and initial distributions are those of ``fla.layers.KimiDeltaAttention`` in
flash-linear-attention 0.6.0, so that its state dicts load with ``strict=True``.

Names in shapes: B batch, T tokens, N sequences, H heads of q and k, HV heads of v, K = head_dim,
V = head_dim * expand_v, W = conv_size, D channels of one convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kda_cuda.layer_parts import ConvStates, KDACache, Padding, RMSNormGated, ShortConvolution, require
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
    (
        "cache_position",
        "num_items_in_batch",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
    )
)


class KDAInputs(NamedTuple):
    """What the layer hands to the operator for one run of tokens (all before normalisation and activation)."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    g: torch.Tensor  # [B, T, HV, K], input of the gate
    beta: torch.Tensor  # [B, T, HV], logits


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
            require(size == int(size) and size >= 1, name, "a positive integer", size)
        require(num_v_heads % num_heads == 0, "num_v_heads", f"a multiple of num_heads = {num_heads}", num_v_heads)
        head_v_dim = round(head_dim * expand_v) if math.isfinite(expand_v) else 0
        require(
            head_v_dim >= 1 and math.isclose(head_dim * expand_v, head_v_dim, rel_tol=1e-5),
            "expand_v",
            f"a number whose product with head_dim = {head_dim} is a positive integer",
            expand_v,
        )
        require(mode in MODES, "mode", f"one of {MODES}", mode)
        bound_given = not safe_gate or lower_bound is not None
        require(bound_given, "lower_bound", "a number in [-5, 0) with safe_gate=True", lower_bound)
        in_range = lower_bound is None or LOWEST_GATE <= lower_bound < 0
        require(in_range, "lower_bound", "None or a number in [-5, 0)", lower_bound)

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
            attention_mask: 0-1 matrix (bool or integers) ``[B, T]``, 0 for padding, at any side; of a longer one the
                last T columns count. Padding neither enters a state nor receives an output (its rows are zero).
            past_key_values: a `KDACache` or flash-linear-attention's cache. States found under `layer_idx` are
                continued.
            use_cache: store the states after these tokens in `past_key_values`; a new `KDACache` if that is None.
            output_attentions: must be false; there is no attention matrix.
            cu_seqlens: borders ``[N + 1]`` of sequences packed into one row (B = 1), int32 or int64.

        Returns:
            ``(o, None, past_key_values)`` with o ``[B, T, hidden_size]``.

        Raises:
            ValueError: an argument does not fit; the message names it.
        """
        require(
            hidden_states.dim() == 3 and hidden_states.shape[-1] == self.hidden_size,
            "hidden_states",
            f"shape [B, T, {self.hidden_size}]",
            list(hidden_states.shape),
        )
        require(not output_attentions, "output_attentions", "False (there is no attention matrix)", output_attentions)
        for name, value in kwargs.items():
            require(value is None or name in IGNORED_KEYWORDS, name, "no such argument of this layer", value)
        batch, tokens, _ = hidden_states.shape
        if use_cache and past_key_values is None:
            past_key_values = KDACache()
        carried = self._carried_states(past_key_values)
        recurrent_state, conv_states = carried["recurrent_state"], carried["conv_state"]

        padding: Padding | None = None
        if attention_mask is not None:
            require(cu_seqlens is None, "attention_mask", "None together with cu_seqlens", "both")
            padding = Padding(attention_mask, batch, tokens, hidden_states.device)
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
        """The operator's inputs for ``[B, T, hidden_size]``, and the new states of the convolutions if asked for."""
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
            require(self.layer_idx is not None, "layer_idx", "an index given to the constructor to use a cache", None)
            if len(past_key_values) > self.layer_idx:
                entry = past_key_values[self.layer_idx]
        recurrent_state = None if entry is None else entry["recurrent_state"]
        conv_states = None if entry is None else entry["conv_state"]
        if self.use_short_conv:
            both = (recurrent_state is None) == (conv_states is None)
            require(both, "past_key_values", "recurrent_state together with conv_state", "one without the other")
        else:
            require(conv_states is None, "past_key_values", "no conv_state with use_short_conv=False", "one")
        return {"recurrent_state": recurrent_state, "conv_state": conv_states}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KimiDeltaAttention:
        """Moves and converts the module; A_log and dt_bias stay at least fp32: exp(A_log) in bf16 is percents off."""
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


def _check_cu_seqlens(cu_seqlens: torch.Tensor, hidden_states: torch.Tensor) -> None:
    batch, tokens, _ = hidden_states.shape
    require(batch == 1, "hidden_states", "B = 1 (sequences packed into one row) with cu_seqlens", f"B = {batch}")
    good = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1 and cu_seqlens.dtype in (torch.int32, torch.int64)
    got = f"shape {list(cu_seqlens.shape)} of {cu_seqlens.dtype}"
    require(good, "cu_seqlens", "shape [N + 1] of int32 or int64", got)
    device = hidden_states.device
    require(cu_seqlens.device == device, "cu_seqlens", f"a tensor on {device}", cu_seqlens.device)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        ordered = all(low <= high for low, high in zip(borders, borders[1:], strict=False))
        require(
            borders[0] == 0 and ordered and borders[-1] == tokens,
            "cu_seqlens",
            f"non-decreasing borders from 0 to T = {tokens}",
            borders if len(borders) <= 16 else f"{borders[:16]}...",
        )
