"""The cut of the backward's recurrences into segments, forced onto calls that the planner would not cut: the contract
of any call, whatever the length of a segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, backward_arguments, make_inputs, output_gradients
from gpu_support import (
    DEVICE,
    all_families,
    all_head_sizes,
    assert_contract,
    assert_same_bits,
    gpu_tests,
    kernels_only,
    needs_cuda,
    reference,
)
from gradient_support import assert_gradients, backward, composite_fp64, planned, saving

from kda_cuda.accuracy import GRADIENT_RELATIVE_RMSE, relative_rmse

pytestmark = [*gpu_tests, needs_cuda]

HEADS = 16  # as in test_backward.py

all_segments = pytest.mark.parametrize("segment_chunks", [1, 2, 5])


def check(inputs: dict[str, Any], segment_chunks: int, with_dstate: bool = True) -> dict[str, torch.Tensor]:
    """Runs the cut and checks it against the composite in fp64; returns the gradients."""
    do, dstate = output_gradients(inputs)
    if not with_dstate:
        dstate = None
    gradients = backward(inputs, do, dstate, segment_chunks=segment_chunks)
    assert_gradients_as_uncut(inputs, gradients, do, dstate)
    return gradients


def assert_gradients_as_uncut(
    inputs: dict[str, Any], gradients: dict[str, torch.Tensor], do: torch.Tensor, dstate: torch.Tensor | None
) -> None:
    """The contract; for dA_log, a number for each head whose terms cancel, it or what the same call has uncut: a draw
    of few heads can miss it either way, and test_backward.py holds the uncut recurrences to it where they are many."""
    expected = composite_fp64(inputs, do, dstate)
    uncut = backward(inputs, do, dstate, segment_chunks=0)
    if "A_log" in inputs:
        error, error_uncut = (relative_rmse(x["A_log"], expected["A_log"]) for x in (gradients, uncut))
        assert error <= max(GRADIENT_RELATIVE_RMSE["A_log"], 1.25 * error_uncut), f"dA_log {error:.2e}"
        expected = {**expected, "A_log": gradients["A_log"]}
    assert_gradients(inputs, gradients, expected)


@all_families
@all_head_sizes
@all_segments
def test_every_instantiation(family: str, K: int, V: int, segment_chunks: int) -> None:
    """Ten chunks and a partial one, grouped heads, from a state, in both layouts."""
    for v_first in (False, True):
        check(
            make_inputs(
                family, T=650, H=8, HV=HEADS, K=K, V=V, with_state=True, state_v_first=v_first, device=DEVICE
            ),
            segment_chunks,
        )


@all_families
@all_segments
def test_packed_sequences(family: str, segment_chunks: int) -> None:
    """One long sequence among short and empty ones, of each remainder of a segment; the gradient of an empty one's
    state is that of its final state."""
    lengths = [0, 1, 64 * segment_chunks, 0, 700, 64 * segment_chunks + 1, 63, 129, 0]
    for index_dtype in (torch.int32, torch.int64):
        inputs = make_inputs(
            family, lengths=lengths, H=HEADS, K=64, V=128, with_state=True, index_dtype=index_dtype, device=DEVICE
        )
        gradients = check(inputs, segment_chunks)
        dstate = output_gradients(inputs)[1]
        for n in (n for n, length in enumerate(lengths) if length == 0):
            assert_same_bits(gradients["initial_state"][n], dstate[n])


def test_many_sequences() -> None:
    """Hundreds of sequences, more than one round of the search for a slot's sequence."""
    lengths = [(37 * n) % 190 if n % 3 else 0 for n in range(300)] + [900]
    check(make_inputs("long", lengths=lengths, H=4, with_state=True, device=DEVICE), 1)


@pytest.mark.parametrize(
    "features",
    [
        dict(use_qk_l2norm=True, use_beta_sigmoid=True, allow_neg_eigval=True),
        dict(with_state=False),
        dict(with_state=True, state_dtype=torch.bfloat16),
        dict(dtype=torch.float16, gate_dtype=torch.float32, with_state=True),
        dict(B=3, H=8),
    ],
    ids=["negative_eigenvalues", "no_state", "bf16_state", "fp16", "batch"],
)
@pytest.mark.parametrize("with_dstate", [True, False], ids=["dstate", "no_dstate"])
@all_families
def test_features(family: str, with_dstate: bool, features: dict[str, Any]) -> None:
    inputs = make_inputs(family, **{"T": 450, "H": HEADS, "K": 128, "V": 64, "device": DEVICE, **features})
    check(inputs, 2, with_dstate)


@all_families
def test_the_plan_cuts_few_heads(family: str) -> None:
    """A long sequence of two heads as the planner cuts it: the same bits twice, with and without what the forward has
    saved, which is cut likewise."""
    inputs = make_inputs(family, T=6000, H=2, K=128, V=128, with_state=True, device=DEVICE)
    assert planned(inputs, saved=False)["segment_chunks"] > 0
    do, dstate = output_gradients(inputs)
    gradients = backward(inputs, do, dstate)
    assert_gradients_as_uncut(inputs, gradients, do, dstate)
    *outputs, intermediates = saving(inputs)
    assert_contract(inputs, tuple(outputs), reference(inputs))
    again = backward(inputs, do, dstate)
    with kernels_only("chunk_bwd"):
        saved = torch.ops.kda.chunk_bwd(do, dstate, **backward_arguments(inputs), intermediates=intermediates)
    for name, gradient in zip(DIFFERENTIABLE, saved, strict=True):
        assert_same_bits(again[name], gradients[name], f"d{name}")
        assert_same_bits(gradient, gradients[name], f"d{name}, saved")


@all_families
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("value_tile", [64, 128])
def test_value_tiles(family: str, K: int, value_tile: int) -> None:
    """Of uncut recurrences; that of the state makes U0 itself where it takes all of V. Twice with the same bits."""
    inputs = make_inputs(family, T=330, H=HEADS, K=K, V=128, with_state=True, device=DEVICE)
    do, dstate = output_gradients(inputs)
    gradients = backward(inputs, do, dstate, segment_chunks=0, value_tile=value_tile)
    assert_gradients_as_uncut(inputs, gradients, do, dstate)
    for name, again in backward(inputs, do, dstate, segment_chunks=0, value_tile=value_tile).items():
        assert_same_bits(again, gradients[name], f"d{name}")


@pytest.mark.parametrize(
    ("planned", "message"),
    [
        (dict(segment_chunks=-1), "argument `segment_chunks`: expected at least 0, got -1"),
        (dict(value_tile=96), "argument `value_tile`: expected 64 or 128, at most V = 64, got 96"),
        (dict(value_tile=128), "argument `value_tile`: expected 64 or 128, at most V = 64, got 128"),
    ],
)
def test_wrong_plans_are_refused(planned: dict[str, int], message: str) -> None:
    inputs = make_inputs("long", T=100, V=64, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        backward(inputs, *output_gradients(inputs), **planned)


def test_a_cut_takes_tiles_of_64() -> None:
    inputs = make_inputs("long", T=300, K=128, V=128, device=DEVICE)
    with pytest.raises(RuntimeError, match="argument `value_tile`: expected none or 64 where .* cut, got 128"):
        backward(inputs, *output_gradients(inputs), segment_chunks=1, value_tile=128)
