#!/usr/bin/env python3
"""Small calls that reach every kernel instantiation and feature once, forward and backward, for compute-sanitizer.

Each is checked as well.

    compute-sanitizer --tool memcheck python tools/sanitizer_cases.py
    python tools/sanitizer_cases.py [--list] [--only NAME,NAME] [--skip-wrong-contents] [--device cpu]

Every tensor has an allocation of its own, of its own size: torch's caching allocator is off, as its slack would hide
accesses beyond the end. Inputs are made on the host and copied, so that initcheck knows what has been written. What an
operator returns is NaN before it is written, by torch: a result that lacks an element is wrong, under every tool, and
initcheck, which does not see what the copy engine writes, finds no fault with it; so are workspaces
(KDA_FILL_WORKSPACES). Expected results come from the composite implementation on the CPU, in fp32.

Exit status 0: every result keeps the accuracy contract. 1: one does not. 2: wrong arguments, or no device.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from cases import DIFFERENTIABLE, backward_arguments, make_inputs, output_gradients, processed  # noqa: E402
from torch import Tensor  # noqa: E402

import kda_cuda  # noqa: E402
from kda_cuda import composite  # noqa: E402
from kda_cuda.accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, relative_rmse  # noqa: E402

HOST_THREADS = 2  # four tools run this at once
ACTIVATIONS = ("q", "k", "v", "g", "beta")
# Of gradients: what a wrong element would exceed. They are of few tokens, and their accuracy is the GPU tests' matter.
GRADIENT_LIMIT = 2e-2
GRADIENT_LIMIT_OF_SUMS = 0.3  # dA_log, dbeta: few numbers, whose terms cancel
OUTPUTS = {"o": O_RELATIVE_RMSE, "final_state": STATE_RELATIVE_RMSE, "chunk_states": STATE_RELATIVE_RMSE}


@dataclass(frozen=True)
class Case:
    """One call. ``features`` are arguments of make_inputs (tests/cases.py)."""

    name: str
    features: dict[str, Any] = field(default_factory=dict)
    odd: bool = False  # inputs at odd offsets with odd strides: kernels that load single elements
    contents: tuple[int, ...] | None = None  # of cu_seqlens, instead of those of the lengths
    # Of kernels, whatever the planner would choose; empty: its choice. "saving": the forward that saves its
    # intermediates, and the backward that takes them.
    path: str = "staged"
    segment_chunks: int | None = None  # of a cut of the stepwise path or the backward, 0: none; else as planned
    clusters: int | None = None  # of the fused path, at most; None: as many as run side by side
    zero_beta: bool = False  # every third token writes nothing
    processed: bool = False  # transforms are done before
    is_wrong: bool = False  # the contents are no cu_seqlens: nothing to compare, and unwritten workspace may be read


def cases() -> list[Case]:
    """All cases; names are unique."""
    packed = {"lengths": [1, 0, 63, 65, 0, 130], "with_state": True}
    result = [
        Case(
            f"K{K}_V{V}_{str(dtype).removeprefix('torch.')}_{'odd' if odd else 'aligned'}",
            {"T": 70, "H": 1, "HV": 2, "K": K, "V": V, "dtype": dtype, "with_state": True},
            odd=odd,
        )
        for K in (64, 128)
        for V in (64, 128)
        for dtype in (torch.bfloat16, torch.float16)
        for odd in (False, True)
    ]
    result += [
        # The recurrences: more chunks than their rings have stages; V in tiles of 64 and uncut, by 132 multiprocessors.
        *(Case(f"ring_K{K}_V{V}", {"T": 390, "H": 1, "K": K, "V": V}) for K in (64, 128) for V in (64, 128)),
        *(
            Case(f"ring_value_tile_128_K{K}", {"lengths": [330, *[2, 1] * 33], "H": 1, "HV": 2, "K": K, "V": 128})
            for K in (64, 128)
        ),
        Case("ring_value_tile_all_of_64", {"lengths": [330, *[1] * 131], "H": 1, "with_state": True}),
        Case("seventy_sequences", {"lengths": [0, 1, 3, 0, 2, 1, 1] * 10, "H": 1, "index_dtype": torch.int32}),
        # Sequences and states.
        Case("packed_int32", {**packed, "index_dtype": torch.int32}),
        Case("packed_int64_v_first", {**packed, "state_v_first": True, "K": 128}),
        Case("packed_odd", {**packed, "K": 128, "V": 128}, odd=True),
        Case("padded", {"lengths": [50, 50, 50, 50]}, contents=(0, 70, 100, 100, 100)),
        Case("padded_to_nothing", {"lengths": [64, 64]}, contents=(0, 0, 0)),
        Case(
            "batch_v_first_bf16_state",
            {"B": 2, "T": 65, "state_v_first": True, "V": 128, "with_state": True, "state_dtype": torch.bfloat16},
        ),
        Case("one_token", {"T": 1, "with_state": True}),
        Case("only_o", {"T": 65, "output_final_state": False, "output_chunk_states": False}),
        Case("no_tokens", {"B": 2, "T": 0, "with_state": True}),
        Case("no_rows", {"B": 0, "T": 70, "with_state": True}),
        Case("no_sequences", {"lengths": []}),
        Case("empty_sequences", {"lengths": [0, 0], "with_state": True}),
        # Gates, types and layouts.
        Case("gate_random_fp32", {"family": "random", "T": 80, "gate_dtype": torch.float32}),
        Case("gate_unbounded", {"family": "unbounded", "T": 80, "gate_dtype": torch.float16, "HV": 4}),
        Case("gate_log_fp32", {"family": "unbounded_log", "T": 80, "gate_dtype": torch.float32}),
        Case("gate_log_odd", {"family": "unbounded_log", "T": 80, "gate_dtype": torch.float32, "K": 128}, odd=True),
        Case("beta_of_zero", {"T": 80, "K": 128, "use_beta_sigmoid": False}, zero_beta=True),
        Case("negative_eigenvalues", {"T": 80, "allow_neg_eigval": True, "scale": -0.5}),
        Case("not_normalised", {"family": "unbounded", "T": 80, "use_qk_l2norm": False}),
        Case("fused_projection", {"B": 2, "T": 70, "HV": 4, "strided": "fused"}),
        Case("head_major", {"B": 2, "T": 70, "HV": 4, "strided": "head_major"}),
        # Kernels of common kinds of calls, where a key head has one value head; stage 4 beside the recurrences.
        *(
            Case(
                f"{'processed' if is_processed else 'raw'}_K{K}_V{V}",
                {"T": 200, "K": K, "V": V, "with_state": True},
                processed=is_processed,
            )
            for K in (64, 128)
            for V in (64, 128)
            for is_processed in (False, True)
        ),
        Case("processed_packed", {**packed, "K": 128, "V": 128}, processed=True),
        Case("as_planned", {**packed, "K": 128, "V": 128}, path=""),
        *(
            Case(
                f"saving_K{K}_V{V}_{str(dtype).removeprefix('torch.')}",
                {"T": 70, "H": 1, "HV": 2, "K": K, "V": V, "dtype": dtype, "with_state": True},
                path="saving",
            )
            for K in (64, 128)
            for V in (64, 128)
            for dtype in (torch.bfloat16, torch.float16)
        ),
        Case("saving_packed", {**packed, "K": 128, "V": 128}, path="saving"),
        Case("saving_padded", {"lengths": [50, 50, 50, 50]}, contents=(0, 70, 100, 100, 100), path="saving"),
        *backward_cut_cases(),
        *fused_cases(),
        *fused_cut_cases(),
        *stepwise_cases(),
    ]
    wrong = {
        "decreasing": (0, 200, 100, 260),
        "reversed": (260, 200, 100, 0),
        "negative": (-5, -300, 100, 260),
        "not_from_zero": (130, 200, 250, 260),
        "beyond": (0, 100, 261, 5000),
        "extreme": (-(2**62), 2**62, 0, 2**62),
        "alternating": (0, 260, 0, 260),
    }
    features = {"lengths": [60, 100, 100], "with_state": True}
    result += [Case(f"wrong_{name}", features, contents=contents, is_wrong=True) for name, contents in wrong.items()]
    result += [
        stepwise_case(f"wrong_cut_{name}", 1, features, contents=contents, is_wrong=True)
        for name, contents in wrong.items()
    ]
    result += [
        stepwise_case(f"wrong_{name}", 0, features, contents=wrong[name], is_wrong=True)
        for name in ("decreasing", "beyond", "extreme")
    ]
    result += [
        fused_case(f"wrong_{name}", 4, features, contents=contents, is_wrong=True) for name, contents in wrong.items()
    ]
    return result


def backward_cut_cases() -> list[Case]:
    """The recurrences of the backward in segments of so many chunks: summaries of three and more, composed."""
    packed = {"lengths": [1, 0, 64, 330, 65], "with_state": True, "H": 1}
    result = [
        Case(
            f"backward_cut_K{K}_V{V}_{str(dtype).removeprefix('torch.')}",
            {"T": 330, "H": 1, "K": K, "V": V, "dtype": dtype, "with_state": True},
            segment_chunks=1,
        )
        for K in (64, 128)
        for V in (64, 128)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    return [
        *result,
        # More chunks of a segment than its ring has stages; segments that end inside a sequence or with it.
        Case("backward_cut_ring", {"T": 1100, "H": 1, "K": 128, "V": 128}, segment_chunks=6),
        Case("backward_cut_packed", packed, segment_chunks=1),
        Case("backward_cut_packed_saved", {**packed, "lengths": [1, 700, 0, 2000]}, path="saving"),
        Case("backward_cut_empty", {"lengths": [0, 0], "with_state": True}, segment_chunks=1),
        Case("backward_cut_no_tokens", {"B": 2, "T": 0, "with_state": True}, segment_chunks=1),
        Case("wrong_backward_cut", packed, contents=(0, 300, 100, 461, 5000, 2), segment_chunks=1, is_wrong=True),
    ]


def fused_case(name: str, clusters: int | None, features: dict[str, Any], **changes: Any) -> Case:
    return Case(f"fused_{name}", features, path="fused", clusters=clusters, **changes)


def fused_cases() -> list[Case]:
    """The fused kernel: steps of 32 tokens through a ring of four stages, made by the two producer groups of each CTA
    of a cluster in turn. Chains, one for each sequence and value head, go from one cluster to another where their
    number is no multiple of that of the clusters, or lengths differ.
    """
    packed = {"lengths": [1, 0, 31, 33, 0, 130, 64], "with_state": True}
    result = [
        # Three chains for two clusters: each goes round its ring twice, one hands a state over, and the last step of a
        # chain is not full.
        fused_case(
            f"K{K}_V{V}_{str(dtype).removeprefix('torch.')}",
            2,
            {"T": 199, "H": 1, "HV": 3, "K": K, "V": V, "dtype": dtype, "with_state": True},
        )
        for K in (64, 128)
        for V in (64, 128)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    # All kinds of gates, in fp32 and in 16 bits. Pairs take one reference where the gate is bounded, levels elsewhere;
    # those are in fp16 where q and k are normalised, in bf16 elsewhere.
    result += [
        fused_case(f"{family}_{dtype_name}_K{K}", None, {"family": family, "T": 80, "K": K, "gate_dtype": dtype})
        for family in ("random", "unbounded", "unbounded_log")
        for dtype_name, dtype in (("fp32", torch.float32), ("fp16", torch.float16))
        for K in (64, 128)
    ]
    result += [
        fused_case(f"not_normalised_{family}_K{K}", None, {"family": family, "T": 80, "K": K, "use_qk_l2norm": False})
        for family in ("long", "unbounded")
        for K in (64, 128)
    ]
    batch = {"B": 2, "T": 65, "V": 128, "with_state": True, "state_dtype": torch.bfloat16}
    return [
        *result,
        fused_case("packed_int32", 3, {**packed, "index_dtype": torch.int32}),
        fused_case("packed_int64_v_first", 5, {**packed, "state_v_first": True, "K": 128, "V": 128}),
        fused_case("packed_one_cluster", 1, {**packed, "V": 128}),
        # More than a CTA has threads, which count the steps of some sequences each.
        fused_case("many_sequences", 5, {"lengths": [0, 1, 3, 0, 33, 0, 1] * 60, "H": 1, "index_dtype": torch.int32}),
        fused_case("padded", 3, {"lengths": [50, 50, 50, 50]}, contents=(0, 70, 100, 100, 100)),
        fused_case("padded_to_nothing", 3, {"lengths": [64, 64], "V": 128}, contents=(0, 0, 0)),
        fused_case("batch_v_first_bf16_state", 3, {**batch, "state_v_first": True}),
        fused_case("one_token", None, {"T": 1, "with_state": True}),
        fused_case("only_o", None, {"T": 65, "output_final_state": False, "output_chunk_states": False}),
        fused_case("no_tokens", 3, {"B": 2, "T": 0, "with_state": True}),
        fused_case("no_sequences", None, {"lengths": []}),
        fused_case("empty_sequences", 3, {"lengths": [0, 0], "with_state": True}),
        fused_case("negative_eigenvalues", None, {"T": 80, "allow_neg_eigval": True, "scale": -0.5}),
        fused_case("fused_projection", 3, {"B": 2, "T": 70, "HV": 4, "strided": "fused"}),
        fused_case("head_major", 3, {"B": 2, "T": 70, "HV": 4, "strided": "head_major"}),
    ]


def fused_cut_case(name: str, clusters: int, features: dict[str, Any], **changes: Any) -> Case:
    return Case(f"fused_cut_{name}", features, path="fused_cut", clusters=clusters, segment_chunks=2, **changes)


def fused_cut_cases() -> list[Case]:
    """The fused kernel on stretches that begin anywhere in a chain: with gates that forget it does all, with others it
    leaves chains to the kernels of the stepwise path.
    """
    types = [(K, V, dtype) for K in (64, 128) for V in (64, 128) for dtype in (torch.bfloat16, torch.float16)]
    result = [
        fused_cut_case(
            f"{family}_K{K}_V{V}_{str(dtype).removeprefix('torch.')}",
            5,
            {"family": family, "T": 460, "H": 2, "K": K, "V": V, "dtype": dtype, "with_state": True},
        )
        for K, V, dtype in types
        for family in (("random", "long") if K == V and dtype == torch.bfloat16 else ("random",))
    ]
    packed = {"lengths": [0, 1, 330, 0, 64, 400], "with_state": True, "K": 128}
    return [
        *result,
        fused_cut_case("packed", 7, {**packed, "family": "random"}),
        fused_cut_case("packed_long", 7, packed),
        fused_cut_case("gate_fp32", 5, {"family": "random", "T": 460, "K": 128, "gate_dtype": torch.float32}),
        fused_cut_case("padded", 3, {"lengths": [300, 100]}, contents=(0, 210, 210)),
    ]


def stepwise_case(name: str, segment_chunks: int, features: dict[str, Any], **changes: Any) -> Case:
    return Case(f"stepwise_{name}", features, path="stepwise", segment_chunks=segment_chunks, **changes)


def stepwise_cases() -> list[Case]:
    """Factors of steps of 32 tokens, then a scan; maps of segments and their composition where there is a cut. It cuts
    into segments of so many chunks; 0: not at all.
    """
    packed = {"lengths": [1, 0, 31, 33, 0, 130, 64], "with_state": True}
    types = [(K, V, dtype) for K in (64, 128) for V in (64, 128) for dtype in (torch.bfloat16, torch.float16)]
    result = [
        # Four segments, the last one not full: maps that are kept (a long memory), more steps than a ring has stages.
        stepwise_case(
            f"cut_K{K}_V{V}_{str(dtype).removeprefix('torch.')}",
            2,
            {"T": 460, "H": 1, "K": K, "V": V, "dtype": dtype, "with_state": True},
        )
        for K, V, dtype in types
    ]
    # The scan alone, more steps than its deepest ring has stages (7).
    result += [
        stepwise_case(f"uncut_K{K}_V{V}", 0, {"T": 300, "H": 1, "HV": 2, "K": K, "V": V, "with_state": True})
        for K in (64, 128)
        for V in (64, 128)
    ]
    # Maps that fade within the last steps of a segment, and those of which that may not be assumed.
    result += [
        stepwise_case(f"faded_K{K}_V{V}", 3, {"family": "random", "T": 460, "H": 1, "K": K, "V": V, "with_state": True})
        for K, V in ((64, 128), (128, 64))
    ]
    raw = {"family": "random", "T": 460, "H": 1, "K": 128}
    result += [
        stepwise_case("faded_not_normalised", 3, {**raw, "use_qk_l2norm": False}),
        stepwise_case("faded_beta_given", 3, {**raw, "use_beta_sigmoid": False}, zero_beta=True),
        stepwise_case("cut_gate_log", 2, {"family": "unbounded_log", "T": 460, "H": 1, "gate_dtype": torch.float32}),
    ]
    # All kinds of gates, in fp32 and in 16 bits. Pairs take one reference where the gate is bounded, levels elsewhere;
    # those are in fp16 where q and k are normalised, in bf16 elsewhere.
    gates = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    result += [
        stepwise_case(f"{family}_{name}_K{K}", 0, {"family": family, "T": 80, "K": K, "gate_dtype": gates[name]})
        for family, K, name in (
            ("random", 64, "fp32"),
            ("random", 128, "fp16"),
            ("unbounded", 64, "fp16"),
            ("unbounded", 128, "fp32"),
            ("unbounded_log", 64, "fp32"),
            ("unbounded_log", 128, "bf16"),
        )
    ]
    result += [
        stepwise_case(f"not_normalised_{family}_K{K}", 0, {"family": family, "T": 80, "K": K, "use_qk_l2norm": False})
        for family, K in (("long", 128), ("unbounded", 64), ("unbounded", 128))
    ]
    batch = {"B": 2, "T": 65, "V": 128, "with_state": True, "state_dtype": torch.bfloat16}
    several = {**packed, "lengths": [0, 1, 330, 0, 64, 200]}
    return [
        *result,
        stepwise_case("packed_int32", 0, {**packed, "index_dtype": torch.int32}),
        stepwise_case("packed_int64_v_first", 0, {**packed, "state_v_first": True, "K": 128, "V": 128}),
        stepwise_case("packed_cut", 1, several),
        stepwise_case("packed_cut_v_first", 2, {**several, "state_v_first": True, "K": 128, "V": 128}),
        stepwise_case("padded", 0, {"lengths": [50, 50, 50, 50]}, contents=(0, 70, 100, 100, 100)),
        stepwise_case("padded_cut", 1, {"lengths": [100, 100, 100]}, contents=(0, 200, 210, 210)),
        stepwise_case("padded_to_nothing", 1, {"lengths": [64, 64], "V": 128}, contents=(0, 0, 0)),
        stepwise_case("seventy_sequences", 1, {"lengths": [0, 1, 3, 0, 2, 70, 1] * 10, "H": 1}),
        stepwise_case("batch_v_first_bf16_state", 1, {**batch, "state_v_first": True}),
        stepwise_case("one_token", 0, {"T": 1, "with_state": True}),
        stepwise_case("one_token_cut", 1, {"T": 1, "with_state": True}),
        stepwise_case("only_o", 1, {"T": 129, "output_final_state": False, "output_chunk_states": False}),
        stepwise_case("no_tokens", 1, {"B": 2, "T": 0, "with_state": True}),
        stepwise_case("no_sequences", 1, {"lengths": []}),
        stepwise_case("empty_sequences", 1, {"lengths": [0, 0], "with_state": True}),
        stepwise_case("negative_eigenvalues", 1, {"T": 140, "allow_neg_eigval": True, "scale": -0.5}),
        stepwise_case("fused_projection", 0, {"B": 2, "T": 70, "HV": 4, "strided": "fused"}),
        stepwise_case("head_major", 1, {"B": 2, "T": 70, "HV": 4, "strided": "head_major"}),
    ]


def odd_layout(x: Tensor) -> Tensor:
    """The values of ``x`` [B, T, ...] at an odd offset and with an odd token stride, NaN around."""
    if x.numel() == 0:
        return x
    width = x[0, 0].numel()
    wide = torch.full((*x.shape[:2], width + 3), torch.nan, dtype=x.dtype)
    return wide[:, :, 1 : 1 + width].unflatten(2, x.shape[2:]).copy_(x)


def to_device(x: Tensor, device: str) -> Tensor:
    """A copy with the same strides and offset, made by one memory copy of the whole storage; no kernel runs."""
    elements = x.untyped_storage().nbytes() // x.element_size()
    whole = x.as_strided((elements,), (1,), 0).to(device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def make_call(case: Case) -> dict[str, Any]:
    """The arguments of the operator, on the CPU."""
    inputs = make_inputs(**{"family": "long", "H": 2, **case.features})
    if case.contents is not None:
        inputs["cu_seqlens"] = torch.tensor(case.contents, dtype=inputs["cu_seqlens"].dtype)
    if case.zero_beta:
        inputs["beta"] = inputs["beta"].float().sigmoid()
        inputs["beta"][:, ::3] = 0.0
    if case.processed:
        inputs = processed(inputs)
    elif not inputs["use_qk_l2norm"]:
        inputs |= {name: torch.nn.functional.normalize(inputs[name].float(), dim=-1).to(inputs[name]) for name in "qk"}
    if case.odd:
        inputs |= {name: odd_layout(inputs[name]) for name in ACTIVATIONS}
    return inputs


def run_backward(
    case: Case, inputs: dict[str, Any], moved: dict[str, Any], device: str, intermediates: Tensor | None = None
) -> str:
    """The gradients of a call. Returns what is wrong with them."""
    do, dstate = output_gradients(inputs)
    given = {**backward_arguments(moved), "intermediates": intermediates}
    if case.path == "staged" and case.segment_chunks is not None and device != "cpu":
        backward = functools.partial(torch.ops.kda.chunk_bwd_planned, segment_chunks=case.segment_chunks)
    else:
        backward = torch.ops.kda.chunk_bwd
    gradients = [x.cpu() for x in backward(do.to(device), dstate.to(device), **given)]
    if case.is_wrong:
        return ""
    wide = {name: inputs[name].float() for name in ("q", "k", "v")}
    expected = composite.chunk_bwd(do.float(), dstate, **backward_arguments({**inputs, **wide}))
    for name, actual, e in zip(DIFFERENTIABLE, gradients, expected, strict=True):
        if actual.shape != e.shape:
            return f"d{name} has shape {list(actual.shape)}, not {list(e.shape)}"
        limit = GRADIENT_LIMIT_OF_SUMS if name in ("A_log", "beta") else GRADIENT_LIMIT
        if (error := relative_rmse(actual, e)) > limit:
            return f"d{name} misses by {error:.2e}, allowed are {limit:.1e}"
    return ""


def run_case(case: Case, device: str) -> str:
    """Runs a case. Returns what is wrong with the result; empty if nothing is."""
    inputs = make_call(case)
    moved = {name: to_device(x, device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    if device == "cpu" and case.contents is not None:  # the operator itself refuses such contents where it can see them
        return ""
    if reason := torch.ops.kda.composite_reason(**moved):
        return f"no kernel takes this call: {reason}"
    intermediates = None
    if case.path == "saving":
        *outputs, intermediates = torch.ops.kda.chunk_fwd_saving(**moved)
    elif case.path == "" or device == "cpu":
        outputs = kda_cuda.chunk_fwd(**moved)
    else:
        has_segments = case.path in ("stepwise", "fused_cut")
        cut = {"segment_chunks": case.segment_chunks if has_segments else None, "clusters": case.clusters}
        outputs = torch.ops.kda.chunk_fwd_planned(**moved, path=case.path, **cut)
    outputs = tuple(x.cpu() for x in outputs)
    if case.is_wrong:
        return run_backward(case, inputs, moved, device)
    wide = {name: inputs[name].float() for name in ("q", "k", "v")}
    with torch.no_grad():
        expected = composite.chunk_fwd(**{**inputs, **wide})
    for (name, limit), actual, e in zip(OUTPUTS.items(), outputs, expected, strict=True):
        if actual.shape != e.shape:
            return f"{name} has shape {list(actual.shape)}, not {list(e.shape)}"
        if (error := relative_rmse(actual, e)) > limit:
            return f"{name} misses by {error:.2e}, allowed are {limit:.1e}"
    return run_backward(case, inputs, moved, device, intermediates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--only", metavar="NAME[,NAME...]", help="run these cases")
    parser.add_argument("--skip-wrong-contents", action="store_true", help="leave out what initcheck must not see")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries out the cases")
    args = parser.parse_args()
    chosen = cases()
    if args.only:
        names = args.only.split(",")
        if unknown := set(names) - {case.name for case in chosen}:
            parser.error(f"unknown case {', '.join(sorted(unknown))}; --list prints them")
        chosen = [case for case in chosen if case.name in names]
    chosen = [case for case in chosen if not (args.skip_wrong_contents and case.is_wrong)]
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("sanitizer_cases: no CUDA device", file=sys.stderr)
        return 2

    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch reads it when it first allocates on the device
    os.environ["KDA_FILL_WORKSPACES"] = "1"  # likewise read by the operators
    torch.set_num_threads(HOST_THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)  # with which torch.empty is full of NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    failed = 0
    for case in chosen:
        begin = time.perf_counter()
        problem = run_case(case, args.device)
        failed += bool(problem)
        print(f"{time.perf_counter() - begin:6.2f} s  {case.name:<32} {problem or 'right'}", flush=True)
    if args.device == "cuda" and torch.cuda.memory_reserved() > 0:
        print("sanitizer_cases: torch's caching allocator is on, and hides accesses beyond the end", file=sys.stderr)
        return 2
    print(f"{len(chosen) - failed} of {len(chosen)} cases right", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
