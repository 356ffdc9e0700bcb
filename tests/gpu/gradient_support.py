"""Shared by the GPU tests of the backward: calls, references, limits."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from gpu_support import ON_CUDA
from torch import Tensor

from kda_cuda import composite
from kda_cuda.accuracy import GRADIENT_RELATIVE_RMSE, relative_rmse

DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
_OPTIONS = (
    "scale",
    "lower_bound",
    "use_qk_l2norm",
    "use_gate",
    "use_beta_sigmoid",
    "allow_neg_eigval",
    "state_v_first",
)


@contextlib.contextmanager
def backward_kernels_only() -> Iterator[None]:
    """Within it a backward that falls back to the composite implementation fails; so does a warning of this project."""
    if not ON_CUDA:
        yield
        return
    refusal = AssertionError("the composite implementation was called where the kernels must be")
    with mock.patch.object(composite, "chunk_bwd", side_effect=refusal), warnings.catch_warnings():
        warnings.filterwarnings("error", message="kda:")
        yield


def arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of kda::chunk_bwd, without the gradients, from those of kda::chunk_fwd."""
    names = (*DIFFERENTIABLE, "cu_seqlens", *_OPTIONS)
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


def backward(inputs: dict[str, Any], do: Tensor, dfinal_state: Tensor | None) -> dict[str, Tensor]:
    """The gradients by the kernels, by the name of their input."""
    with backward_kernels_only():
        results = torch.ops.kda.chunk_bwd(do, dfinal_state, **arguments(inputs))
    return dict(zip(DIFFERENTIABLE, results, strict=True))


def composite_fp64(inputs: dict[str, Any], do: Tensor, dfinal_state: Tensor | None) -> dict[str, Tensor]:
    """The composite implementation in fp64 on the same inputs: exact, and fast for long sequences."""
    wide = {
        name: x.double() if name in DIFFERENTIABLE and isinstance(x, Tensor) else x
        for name, x in arguments(inputs).items()
    }
    dstate = None if dfinal_state is None else dfinal_state.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = torch.ops.kda.chunk_bwd_composite(do.double(), dstate, **wide)
    return dict(zip(DIFFERENTIABLE, results, strict=True))


def assert_gradients(inputs: dict[str, Any], actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The gradients keep the accuracy contract, and have the types and layout of their inputs."""
    for name in DIFFERENTIABLE:
        gradient = actual[name]
        if name not in inputs:
            assert gradient.shape == (0,), f"d{name}: there is no such input"
            continue
        assert gradient.dtype == inputs[name].dtype and gradient.shape == inputs[name].shape, f"d{name}"
        assert gradient.is_contiguous(), f"d{name}"
        error = relative_rmse(gradient, expected[name])
        limit = GRADIENT_RELATIVE_RMSE[name]
        assert error <= limit, f"d{name}: relative RMSE {error:.2e} > {limit:.1e}"
