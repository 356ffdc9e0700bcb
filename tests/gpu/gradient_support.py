"""Shared by the GPU tests of the backward: calls, references, limits."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from cases import DIFFERENTIABLE, backward_arguments
from gpu_support import kernels_only
from torch import Tensor

from kda_cuda.accuracy import GRADIENT_RELATIVE_RMSE, relative_rmse


def backward(
    inputs: dict[str, Any], do: Tensor, dfinal_state: Tensor | None, **planned: Any
) -> dict[str, Tensor]:
    """The gradients by the kernels, by the name of their input. planned: arguments of kda::chunk_bwd_planned."""
    with kernels_only("chunk_bwd"):
        operator = torch.ops.kda.chunk_bwd_planned if planned else torch.ops.kda.chunk_bwd
        results = operator(do, dfinal_state, **backward_arguments(inputs), **planned)
    return dict(zip(DIFFERENTIABLE, results, strict=True))


def saving(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """(o, final_state, chunk_states, intermediates), by the kernels."""
    with kernels_only():
        return torch.ops.kda.chunk_fwd_saving(**inputs)


def planned(inputs: dict[str, Any], saved: bool) -> dict[str, Any]:
    """The planner's answer for a backward."""
    (B, T, H, K), (HV, V) = inputs["q"].shape, inputs["v"].shape[2:]
    packed = "cu_seqlens" in inputs
    lengths = inputs["cu_seqlens"].diff().tolist() if packed else [T]
    device = torch.cuda.get_device_properties(inputs["q"].device)
    sizes = (lengths, B, H, HV, K, V, "bfloat16", packed, device.major * 10 + device.minor)
    return json.loads(torch.ops.kda.plan_chunk_bwd(*sizes, device.multi_processor_count, True, saved))


def composite_fp64(inputs: dict[str, Any], do: Tensor, dfinal_state: Tensor | None) -> dict[str, Tensor]:
    """The composite implementation in fp64 on the same inputs: exact, and fast for long sequences."""
    wide = {
        name: x.double() if name in DIFFERENTIABLE and isinstance(x, Tensor) else x
        for name, x in backward_arguments(inputs).items()
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
