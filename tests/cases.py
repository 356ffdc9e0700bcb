"""Inputs of ``kda::chunk_fwd`` for the tests of numerics: gate families, shapes and memory layouts, seeded, on any
device.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

import kda_cuda
from kda_cuda.reference import log_gate, recurrent_kda

CHUNK_TOKENS = 64

# How the gates are drawn. An error that only long memory shows hides behind steep gates, and the other way round: every
# test of accuracy takes all of them.
#   random         lower-bounded gate, mean log-decay -3.2 a token: a memory of a token or less
#   long           lower-bounded gate as a KDA layer initialises it: half-lives of 1 to 220 tokens
#   unbounded      softplus gate as in checkpoints: exp(A_log) up to 201, log-gates down to thousands a token
#   unbounded_log  log-gates as they are, from 0 through -1e4 to -inf, with tokens that reset a whole head
FAMILIES = ("random", "long", "unbounded", "unbounded_log")

# The inputs that have a gradient, in the order in which kda::chunk_bwd returns them.
DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
_BACKWARD_OPTIONS = (
    "scale",
    "lower_bound",
    "use_qk_l2norm",
    "use_gate",
    "use_beta_sigmoid",
    "allow_neg_eigval",
    "state_v_first",
)

LOWER_BOUND = -5.0
LONGEST_DT, SHORTEST_DT = 0.001, 0.1  # of the softplus^-1 initialisation: the smaller the longer the memory
LARGEST_RATE = 201.0  # exp(A_log) seen in a checkpoint


def _gates(family: str, B: int, T: int, HV: int, K: int, generator: torch.Generator) -> dict[str, Any]:
    """g, and the gate's parameters, of a family; in fp32."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    g = randn(B, T, HV, K)
    if family == "random":
        A_log, dt_bias = uniform(0, 1, HV), uniform(0, 1, HV * K)
        return {"g": g, "A_log": A_log, "dt_bias": dt_bias, "use_gate": True, "lower_bound": LOWER_BOUND}
    if family == "long":
        dt = uniform(math.log(LONGEST_DT), math.log(SHORTEST_DT), HV * K).exp()
        dt_bias = dt + torch.log(-torch.expm1(-dt))
        return {
            "g": 0.5 * g,
            "A_log": torch.zeros(HV),
            "dt_bias": dt_bias,
            "use_gate": True,
            "lower_bound": LOWER_BOUND,
        }
    if family == "unbounded":
        A_log = uniform(-4.0, math.log(LARGEST_RATE), HV)
        A_log[-1] = math.log(LARGEST_RATE)
        return {"g": 3.0 * g, "A_log": A_log, "dt_bias": uniform(-6.0, 1.0, HV * K), "use_gate": True}
    if family == "unbounded_log":
        g = -torch.exp(3.0 * g - 3.0)
        g[torch.rand(g.shape, generator=generator) < 0.01] = -torch.inf
        g[torch.rand(g.shape, generator=generator) < 0.01] = 0.0
        g[torch.rand((B, T, HV), generator=generator) < 0.01] = -torch.inf
        return {"g": g}
    raise ValueError(f"unknown gate family {family!r}: expected one of {FAMILIES}")


def _strided(x: Tensor, how: str | None) -> Tensor:
    """The values of ``x`` [B, T, ...] in another memory layout.

    how: None as it is; "fused" as a slice of a wider projection, odd offset; "head_major" with the heads outside the
    tokens; "last" with a last dimension that is not contiguous.
    """
    if how is None:
        return x
    if how == "fused":
        width = math.prod(x.shape[2:])
        offset = 24  # elements of another projection before this one, and after it
        wide = torch.full((*x.shape[:2], width + 2 * offset), torch.nan, dtype=x.dtype, device=x.device)
        view = wide[:, :, offset : offset + width].unflatten(2, x.shape[2:])
        return view.copy_(x)
    if how == "head_major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "last":
        return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]
    raise ValueError(f"unknown layout {how!r}")


def make_inputs(
    family: str = "random",
    B: int = 1,
    T: int = 200,
    H: int = 2,
    HV: int | None = None,
    K: int = 64,
    V: int = 64,
    *,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gate_dtype: torch.dtype | None = None,
    with_state: bool = False,
    state_dtype: torch.dtype = torch.float32,
    state_v_first: bool = False,
    index_dtype: torch.dtype = torch.int64,
    strided: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of ``kda::chunk_fwd``; the values depend on the seed and shapes alone, not on the device.

    Args:
        family: of gates, see FAMILIES.
        lengths: of sequences packed into one row; replaces B and T.
        dtype: of q, k, v. gate_dtype: of g and beta; None: as ``dtype``.
        strided: memory layout of q, k, v, g, beta, see _strided.
        options: further arguments of the operator. By default q and k are normalised and beta is a logit; outputs are
            all requested.
    """
    generator = torch.Generator().manual_seed(seed)
    HV = H if HV is None else HV
    if lengths is not None:
        B, T = 1, sum(lengths)
    N = B if lengths is None else len(lengths)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    inputs: dict[str, Any] = {
        "q": torch.randn((B, T, H, K), generator=generator).to(dtype),
        "k": torch.randn((B, T, H, K), generator=generator).to(dtype),
        "v": torch.randn((B, T, HV, V), generator=generator).to(dtype),
        **_gates(family, B, T, HV, K, generator),
        "beta": torch.randn((B, T, HV), generator=generator).to(gate_dtype or dtype),
    }
    inputs["g"] = inputs["g"].to(gate_dtype or dtype)
    for name in ("A_log", "dt_bias"):
        if name in inputs:
            inputs[name] = inputs[name].to(wide)
    if with_state:
        matrix = (V, K) if state_v_first else (K, V)
        inputs["initial_state"] = torch.randn((N, HV, *matrix), generator=generator).to(state_dtype)
    if lengths is not None:
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    inputs |= {
        "use_qk_l2norm": True,
        "use_beta_sigmoid": True,
        "output_final_state": True,
        "output_chunk_states": True,
        "state_v_first": state_v_first,
        **options,
    }
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name] = _strided(inputs[name], strided)
    return inputs


def processed(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call with its transforms done: log-gate and beta in fp32, q and k normalised in their type."""
    done = {"use_qk_l2norm": False, "use_gate": False, "use_beta_sigmoid": False}
    result = {name: x for name, x in inputs.items() if name not in ("A_log", "dt_bias", "lower_bound", *done)}
    if inputs.get("use_gate"):
        gate = (inputs.get(name) for name in ("A_log", "dt_bias", "lower_bound"))
        result["g"] = log_gate(inputs["g"].float(), *gate)
    result["g"] = result["g"].float()
    result["beta"] = inputs["beta"].float().sigmoid()
    for name in ("q", "k"):
        result[name] = torch.nn.functional.normalize(inputs[name].float(), dim=-1).to(inputs[name].dtype)
    return result


def run(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, chunk_states) of the operator."""
    return kda_cuda.chunk_fwd(**inputs)


_REFERENCE_ARGUMENTS = frozenset(inspect.signature(recurrent_kda).parameters)


def run_reference(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, chunk_states) of the token recurrence in fp64, on the CPU."""
    arguments = {name: x for name, x in inputs.items() if name in _REFERENCE_ARGUMENTS}
    return recurrent_kda(**{name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments.items()})


def slice_tokens(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """The inputs of the tokens begin .. end - 1 of every row, without cu_seqlens and initial_state."""
    cut = {name: inputs[name][:, begin:end] for name in ("q", "k", "v", "g", "beta")}
    return {name: x for name, x in (inputs | cut).items() if name not in ("cu_seqlens", "initial_state")}


def backward_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of kda::chunk_bwd, without the gradients, from those of kda::chunk_fwd."""
    names = (*DIFFERENTIABLE, "cu_seqlens", *_BACKWARD_OPTIONS)
    return {name: inputs[name] for name in names if name in inputs}


def output_gradients(inputs: dict[str, Any], seed: int = 1) -> tuple[Tensor, Tensor]:
    """do and dfinal_state, drawn at random."""
    q, v = inputs["q"], inputs["v"]
    generator = torch.Generator(q.device).manual_seed(seed)
    sequences = inputs["cu_seqlens"].numel() - 1 if "cu_seqlens" in inputs else q.shape[0]
    K, V = q.shape[-1], v.shape[-1]
    matrix = (V, K) if inputs.get("state_v_first") else (K, V)
    do = torch.randn(v.shape, generator=generator, device=q.device).to(v.dtype)
    return do, torch.randn(sequences, v.shape[2], *matrix, generator=generator, device=q.device)
