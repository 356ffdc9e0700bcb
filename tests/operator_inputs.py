"""Arguments of ``kda::chunk_fwd`` for the tests of the operators' contract: small, every feature in some call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ARGUMENTS = (
    "q",
    "k",
    "v",
    "g",
    "beta",
    "A_log",
    "dt_bias",
    "initial_state",
    "cu_seqlens",
    "scale",
    "lower_bound",
    "use_qk_l2norm",
    "use_gate",
    "use_beta_sigmoid",
    "allow_neg_eigval",
    "output_final_state",
    "state_v_first",
    "output_chunk_states",
    "check_cu_seqlens",
)


def make_inputs(
    B: int = 2,
    T: int = 70,
    H: int = 2,
    HV: int = 4,
    K: int = 16,
    V: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype | None = None,
    lengths: list[int] | None = None,
    gate: str = "log",
    with_state: bool = False,
    state_dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of ``kda::chunk_fwd``.

    Args:
        gate: "log" (precomputed), "softplus" or "sigmoid" (lower-bounded, without A_log).
        lengths: of sequences packed into one row; replaces B and T.
        options: flags of the operator.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if lengths is not None:
        B, T = 1, sum(lengths)
    inputs: dict[str, Any] = dict(options)
    inputs["q"] = randn(B, T, H, K, dtype=dtype)
    inputs["k"] = torch.nn.functional.normalize(randn(B, T, H, K, dtype=torch.float32), dim=-1).to(dtype)
    inputs["v"] = randn(B, T, HV, V, dtype=dtype)
    logits = randn(B, T, HV, K, dtype=gate_dtype or wide)
    inputs["g"] = torch.nn.functional.logsigmoid(logits) if gate == "log" else logits
    beta = randn(B, T, HV, dtype=gate_dtype or wide)
    inputs["beta"] = beta if options.get("use_beta_sigmoid") else beta.sigmoid()
    if gate != "log":
        inputs["use_gate"] = True
        inputs["dt_bias"] = randn(HV * K, dtype=wide)
    if gate == "softplus":
        inputs["A_log"] = randn(HV, dtype=wide)
    if gate == "sigmoid":
        inputs["lower_bound"] = -5.0
    N = B if lengths is None else len(lengths)
    if with_state:
        matrix = (V, K) if options.get("state_v_first") else (K, V)
        inputs["initial_state"] = randn(N, HV, *matrix, dtype=state_dtype)
    if lengths is not None:
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if requires_grad:
        for value in inputs.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.requires_grad_()
    return inputs


def positional(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """The inputs in the order of the schema, up to the last one given."""
    last = max(ARGUMENTS.index(name) for name in inputs)
    defaults = {
        name: None if index < ARGUMENTS.index("use_qk_l2norm") else False for index, name in enumerate(ARGUMENTS)
    }
    return tuple(inputs.get(name, defaults[name]) for name in ARGUMENTS[: last + 1])
