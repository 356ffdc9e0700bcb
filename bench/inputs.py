"""Inputs of the benchmarks: gate families, rotation through more memory than the L2 cache holds, and their hygiene."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.shapes import Shape
from kda_cuda.reference import log_gate

__all__ = [
    "FAMILIES",
    "OUTPUT_GRADIENTS",
    "bounded_gate",
    "check_hygiene",
    "input_bytes",
    "log_decay",
    "make_inputs",
    "make_processed_inputs",
    "make_raw_inputs",
    "rotation_sets",
]

# Both with the lower-bounded gate, log-decay = LOWER_BOUND * sigmoid(exp(A_log) * (g + dt_bias)).
#   random  g ~ N(0, 1), A_log ~ U(0, 1), dt_bias ~ U(0, 1): mean log-decay -3.2, a memory of a token or less
#   long    as a layer initialises it: A_log = 0, dt = exp(U(ln 0.001, ln 0.1)) per channel, dt_bias = dt +
#           ln(-expm1(-dt)), g ~ N(0, 0.5^2): half-lives of 1 to 220 tokens, median 14
FAMILIES = ("random", "long")

LOWER_BOUND = -5.0
SMALLEST_DT, LARGEST_DT = 0.001, 0.1
LONG_SIGMA = 0.5
INITIAL_STATE_SIGMA = 0.3  # about the size of a state that random keys and values build up

GRADIENT_SEED = 1 << 32  # apart from the seeds of inputs
L2_MULTIPLE = 3  # the sets of a rotation hold that many times the L2 cache
MOST_ZEROS = 0.01  # share of exact zeros in a tensor of random numbers; bf16 rounds none of N(0, 1) to zero
OUTPUT_GRADIENTS = ("do", "dfinal_state")  # beside the arguments of the forward
# A_log is 0 by definition in the family `long`.
RANDOM_TENSORS = ("q", "k", "v", "g", "beta", "initial_state", *OUTPUT_GRADIENTS)


def bounded_gate(
    family: str,
    shape: Sequence[int],
    randn: Callable[..., Tensor],
    uniform: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits g [B, T, HV, K], A_log [HV] and dt_bias [HV * K] of a family, in the dtype of the generators.

    Args:
        shape: B, T, HV, K.
        randn: draws N(0, 1) of a shape. uniform: draws from [low, high) of a shape, ``uniform(low, high, *shape)``.

    Raises:
        ValueError: the family is unknown.
    """
    HV, K = shape[-2:]
    if family == "random":
        g = randn(*shape)
        return g, uniform(0, 1, HV), uniform(0, 1, HV * K)
    if family == "long":
        g = LONG_SIGMA * randn(*shape)
        dt = uniform(math.log(SMALLEST_DT), math.log(LARGEST_DT), HV * K).exp()
        return g, torch.zeros(HV, dtype=g.dtype, device=g.device), dt + torch.log(-torch.expm1(-dt))
    raise ValueError(f"unknown gate family {family!r}: expected one of {', '.join(FAMILIES)}")


def make_inputs(shape: Shape, family: str, seed: int, device: torch.device | str) -> dict[str, Any]:
    """Arguments of ``kda::chunk_fwd`` by name: bf16 activations, raw gate and beta logits, q and k not normalised,
    transforms fused, fp32 initial state, final state requested, ``cu_seqlens`` int32 for several sequences.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, device=device)

    T, H, K, V = shape.tokens, shape.heads, shape.key_dim, shape.value_dim
    g, A_log, dt_bias = bounded_gate(family, (1, T, H, K), randn, uniform)
    inputs: dict[str, Any] = {
        "q": randn(1, T, H, K).bfloat16(),
        "k": randn(1, T, H, K).bfloat16(),
        "v": randn(1, T, H, V).bfloat16(),
        "g": g.bfloat16(),
        "beta": randn(1, T, H).bfloat16(),
        "A_log": A_log,
        "dt_bias": dt_bias,
        "initial_state": INITIAL_STATE_SIGMA * randn(shape.sequences, H, K, V),
        "lower_bound": LOWER_BOUND,
        "use_qk_l2norm": True,
        "use_gate": True,
        "use_beta_sigmoid": True,
        "output_final_state": True,
    }
    if shape.varlen:
        starts = [sum(shape.lengths[:n]) for n in range(shape.sequences + 1)]
        inputs["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=device)
    return inputs


def make_raw_inputs(shape: Shape, family: str, seed: int, device: torch.device | str) -> dict[str, Any]:
    """:func:`make_inputs`, and the gradients of its outputs: do in bf16, dfinal_state in fp32."""
    inputs = make_inputs(shape, family, seed, device)
    generator = torch.Generator(device).manual_seed(seed + GRADIENT_SEED)
    for name, like in zip(OUTPUT_GRADIENTS, (inputs["v"], inputs["initial_state"]), strict=True):
        inputs[name] = torch.randn(like.shape, generator=generator, device=device).to(like.dtype)
    return inputs


def make_processed_inputs(shape: Shape, family: str, seed: int, device: torch.device | str) -> dict[str, Any]:
    """The same call with its transforms done: log-gate and beta in fp32, q and k normalised."""
    raw = make_raw_inputs(shape, family, seed, device)
    kept = ("v", "initial_state", "cu_seqlens", "output_final_state", *OUTPUT_GRADIENTS)
    return {name: raw[name] for name in kept if name in raw} | {
        "q": torch.nn.functional.normalize(raw["q"].float(), dim=-1).bfloat16(),
        "k": torch.nn.functional.normalize(raw["k"].float(), dim=-1).bfloat16(),
        "g": log_decay(raw),
        "beta": raw["beta"].float().sigmoid(),
    }


def log_decay(inputs: dict[str, Any]) -> Tensor:
    """Log-decay of every token, head and channel [B, T, HV, K], fp32."""
    return log_gate(inputs["g"].float(), inputs["A_log"], inputs["dt_bias"], inputs["lower_bound"])


def input_bytes(inputs: dict[str, Any]) -> int:
    """Bytes of all tensors among the arguments."""
    return sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))


def rotation_sets(bytes_of_a_set: int, l2_bytes: int) -> int:
    """How many sets of inputs to rotate through, so that no call finds its inputs in the L2 cache."""
    return max(1, math.ceil(L2_MULTIPLE * l2_bytes / bytes_of_a_set))


def check_hygiene(sets: Sequence[dict[str, Any]], l2_bytes: int) -> None:
    """Finds inputs that would flatter: zeros, constants, values that are not finite, shared buffers, too few bytes.

    Raises:
        ValueError: naming what is wrong.
    """
    total = sum(input_bytes(inputs) for inputs in sets)
    if total < L2_MULTIPLE * l2_bytes:
        caches = f"{L2_MULTIPLE} L2 caches of {l2_bytes}"
        raise ValueError(f"{len(sets)} sets of inputs hold {total} bytes, less than {caches}")
    pointers = [inputs[name].data_ptr() for inputs in sets for name in RANDOM_TENSORS if name in inputs]
    if len(set(pointers)) != len(pointers):
        raise ValueError("sets of inputs share buffers")
    for name in RANDOM_TENSORS:
        if name not in sets[0]:
            continue
        # One transfer to the host for each tensor's name: zeros, finite, and spread of every set.
        facts = torch.stack(
            [
                torch.stack([(x == 0).float().mean(), x.isfinite().all().float(), x.float().std()])
                for x in (inputs[name] for inputs in sets)
            ]
        ).tolist()
        for zeros, finite, spread in facts:
            if not finite:
                raise ValueError(f"input {name} has values that are not finite")
            if zeros > MOST_ZEROS or not spread > 0:
                raise ValueError(f"input {name} is degenerate: {zeros:.1%} zeros, standard deviation {spread:.3g}")
