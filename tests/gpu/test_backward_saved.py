"""The backward with what the forward has saved for it, ``chunk_kda(disable_recompute=True)``: the same bits as without,
and the memory that is documented for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, FAMILIES, backward_arguments, make_inputs, output_gradients
from gpu_support import (
    DEVICE,
    ON_CUDA,
    REQUESTED_BY,
    assert_contract,
    assert_same_bits,
    capture,
    gpu_tests,
    kernels_only,
    needs_cuda,
    reference,
)
from gradient_support import backward, planned, saving

import kda_cuda

pytestmark = gpu_tests

FEATURES: dict[str, dict[str, Any]] = {
    "batch": {"B": 3, "T": 100, "H": 4, "K": 128, "V": 128, "with_state": True},
    "grouped": {"T": 200, "H": 2, "HV": 6, "K": 128, "V": 64, "with_state": True},
    "packed": {"lengths": [1, 70, 0, 64, 5, 130], "H": 4, "K": 64, "V": 128, "with_state": True},
    "packed_grouped": {"lengths": [65, 0, 0, 3, 190], "H": 2, "HV": 4, "index_dtype": torch.int32},
    "v_first": {"T": 130, "H": 4, "K": 128, "V": 64, "with_state": True, "state_v_first": True},
    "fp16_odd": {"B": 2, "T": 100, "H": 4, "dtype": torch.float16, "strided": "fused"},
    "whole_rows": {"T": 200, "H": 32, "K": 128, "V": 128, "with_state": True},  # of V a CTA, unless saved
    "long": {"T": 4130, "H": 8, "K": 128, "V": 128, "with_state": True},
}
all_features = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)


@all_features
@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradients_bit_for_bit(family: str, features: dict[str, Any]) -> None:
    """Twice, as the first must not have written to what is saved."""
    inputs = make_inputs(family, device=DEVICE, **features)
    intermediates = saving(inputs)[3]
    assert (intermediates.numel() > 0) == ON_CUDA
    do, dstate = output_gradients(inputs)
    expected = backward(inputs, do, dstate)
    for _ in range(2):
        with kernels_only("chunk_bwd"):
            gradients = torch.ops.kda.chunk_bwd(do, dstate, **backward_arguments(inputs), intermediates=intermediates)
        for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
            assert_same_bits(gradient, expected[name], f"d{name}")


@all_features
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_keep_the_contract(family: str, features: dict[str, Any]) -> None:
    inputs = make_inputs(family, device=DEVICE, **features)
    assert_contract(inputs, saving(inputs)[:3], reference(inputs))


def test_outputs_that_are_not_requested_are_empty() -> None:
    inputs = make_inputs("long", T=70, device=DEVICE)
    o, final_state, chunk_states, _ = saving({**inputs, **dict.fromkeys(REQUESTED_BY.values(), False)})
    assert_same_bits(o, saving(inputs)[0], "o")
    assert final_state.shape == chunk_states.shape == (0,)


def call_drop_in(inputs: dict[str, Any], disable_recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the final state of ``chunk_kda`` with transforms fused."""
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
    return kda_cuda.chunk_kda(
        **{name: inputs[name] for name in names if name in inputs},
        use_gate_in_kernel="A_log" in inputs,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        output_final_state=True,
        disable_recompute=disable_recompute,
    )


def gradients_of(run: Callable[..., Any], inputs: dict[str, Any], disable_recompute: bool) -> list[torch.Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in inputs}
    with kernels_only(), kernels_only("chunk_bwd"):
        outputs = run({**inputs, **leaves}, disable_recompute)
        return list(torch.autograd.grad(outputs, tuple(leaves.values()), output_gradients(inputs)))


@all_features
def test_drop_in_trains_to_the_same_bits(features: dict[str, Any]) -> None:
    inputs = make_inputs("long", device=DEVICE, **features)
    if "state_v_first" in features:
        pytest.skip("the same as without")
    expected = gradients_of(call_drop_in, inputs, False)
    for gradient, e in zip(gradients_of(call_drop_in, inputs, True), expected, strict=True):
        assert_same_bits(gradient, e)


def test_compiled() -> None:
    torch._dynamo.reset()
    inputs = make_inputs("long", T=200, H=4, with_state=True, device=DEVICE)
    run = torch.compile(call_drop_in, fullgraph=True)
    expected = gradients_of(call_drop_in, inputs, True)
    for gradient, e in zip(gradients_of(run, inputs, True), expected, strict=True):
        assert_same_bits(gradient, e)


def test_opcheck() -> None:
    """Without the comparison of a compiled call's outputs: bytes of slots without a chunk are not written."""
    inputs = make_inputs("long", lengths=[70, 0, 5], with_state=True, device=DEVICE)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.kda.chunk_fwd_saving, (), inputs, test_utils=tests)
    intermediates = saving(inputs)[3]
    given = {**backward_arguments(inputs), "intermediates": intermediates}
    torch.library.opcheck(torch.ops.kda.chunk_bwd, output_gradients(inputs), given)


@needs_cuda
def test_intermediates_of_another_shape_are_refused() -> None:
    inputs, other = (make_inputs("long", T=T, device=DEVICE) for T in (200, 300))
    do, dstate = output_gradients(inputs)
    with pytest.raises(RuntimeError, match="argument `intermediates`: expected what chunk_fwd_saving returned"):
        torch.ops.kda.chunk_bwd(do, dstate, **backward_arguments(inputs), intermediates=saving(other)[3])


@needs_cuda
def test_in_a_cuda_graph() -> None:
    """Forward and backward captured once; replayed with other contents of cu_seqlens."""
    inputs = make_inputs("long", lengths=[70, 130], H=4, with_state=True, device=DEVICE)
    do, dstate = output_gradients(inputs)

    def step() -> tuple[torch.Tensor, ...]:
        intermediates = saving(inputs)[3]
        return torch.ops.kda.chunk_bwd(do, dstate, **backward_arguments(inputs), intermediates=intermediates)

    graph, captured = capture(step)
    for contents in ([0, 70, 200], [0, 0, 200], [0, 199, 200], [0, 64, 128]):
        inputs["cu_seqlens"].copy_(torch.tensor(contents))
        graph.replay()
        expected = backward(inputs, do, dstate)
        for name, gradient in zip(DIFFERENTIABLE, captured, strict=True):
            assert_same_bits(gradient, expected[name], f"{contents} d{name}")


# --- Memory ---------------------------------------------------------------------------------------------------------

# What torch's allocator may round a tensor up by, and how many tensors a step has.
ROUNDING, TENSORS = 2 << 20, 16
MEMORY_SHAPES: dict[str, dict[str, Any]] = {
    "one_sequence": {"T": 4096, "H": 8, "K": 128, "V": 128},
    "grouped": {"T": 4096, "H": 2, "HV": 8, "K": 128, "V": 128},
    "packed": {"lengths": [1000, 2096, 1000], "H": 8, "K": 64, "V": 128},
}
all_memory_shapes = pytest.mark.parametrize("features", MEMORY_SHAPES.values(), ids=MEMORY_SHAPES)


def bytes_of(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def peaks_of_a_step(inputs: dict[str, Any], function: Callable[..., Any]) -> tuple[int, int]:
    """Bytes held between forward and backward, and the most of the whole step: beyond inputs, outputs and gradients."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in inputs}
    do, dstate = output_gradients(inputs)

    def step() -> tuple[int, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = function({**inputs, **leaves})
        kept = torch.cuda.memory_allocated() - before - bytes_of(outputs)
        gradients = torch.autograd.grad(outputs, tuple(leaves.values()), (do, dstate))
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before - bytes_of(outputs) - bytes_of(gradients)
        return kept, peak

    for _ in range(2):  # kernels are loaded, and tuned where they are
        measured = step()
    return measured


@needs_cuda
@all_memory_shapes
@pytest.mark.parametrize("disable_recompute", [False, True], ids=["recomputed", "saved"])
def test_peak_memory_is_what_the_planner_states(features: dict[str, Any], disable_recompute: bool) -> None:
    """Recomputed: nothing is held, and the backward takes its workspace. Saved: the intermediates are held, and the
    backward takes the rest.
    """
    inputs = make_inputs("long", with_state=True, device=DEVICE, **features)
    kept, peak = peaks_of_a_step(inputs, lambda given: call_drop_in(given, disable_recompute))
    plan = planned(inputs, disable_recompute)
    saved = plan["intermediate_bytes"] if disable_recompute else 0
    assert saved <= kept <= saved + ROUNDING * TENSORS
    expected = saved + plan["workspace_bytes"]
    assert abs(peak - expected) <= ROUNDING * TENSORS, f"{peak} bytes, planned {expected}"
    # As documented: 2568 bytes for each token and value head of K = V = 128, the sums of grouped heads that do not fit
    # into what is of no more use, U0 where the recurrences run side by side, maps and states of a cut, and what bf16
    # leaves out at the ends of sequences.
    if inputs["v"].shape[3] == inputs["q"].shape[3] == 128 and not disable_recompute:
        T, HV = inputs["v"].shape[1:3]
        of_cut = 256 * 1024 * HV * plan["segment_slots"] if plan["segment_chunks"] else 0
        of_ends = 80 * 1024 * HV * inputs["initial_state"].shape[0]
        assert plan["workspace_bytes"] <= (2713 + 512 * plan["side_by_side"]) * T * HV + of_cut + of_ends


@needs_cuda
@pytest.mark.slow  # FLA tunes its kernels
@pytest.mark.parametrize("disable_recompute", [False, True], ids=["recomputed", "saved"])
def test_peak_memory_is_at_most_that_of_fla(disable_recompute: bool) -> None:
    """A step of the same call by FLA, in the same mode."""
    fla = pytest.importorskip("fla.ops.kda", reason="FLA is not installed")
    inputs = make_inputs("long", with_state=True, device=DEVICE, **MEMORY_SHAPES["one_sequence"])

    def by_fla(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
        return fla.chunk_kda(
            **{name: given[name] for name in names if name in given},
            use_gate_in_kernel=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            safe_gate=True,
            output_final_state=True,
            disable_recompute=disable_recompute,
        )

    ours = peaks_of_a_step(inputs, lambda given: call_drop_in(given, disable_recompute))
    theirs = peaks_of_a_step(inputs, by_fla)
    assert ours[1] <= theirs[1], f"peak {ours[1]} bytes, FLA {theirs[1]}"
