"""The CUDA backward: accuracy of every instantiation and feature, its contract, what it leaves to the composite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, backward_arguments, make_inputs, output_gradients, processed
from gpu_support import (
    DEVICE,
    all_dtypes,
    all_families,
    all_head_sizes,
    assert_same_bits,
    capture,
    gpu_tests,
    needs_cuda,
    odd_strides,
    only_sequence,
    reference,
)
from gradient_support import assert_gradients, backward, composite_fp64, planned
from test_forward_accuracy import draw_call
from test_forward_limits import WRONG_CONTENTS

from kda_cuda import composite
from kda_cuda.accuracy import relative_rmse

pytestmark = gpu_tests

# Enough value heads that a gradient summed over a head, or one that few tokens make up, is not a single lucky draw.
HEADS = 16

# Gradients of fewer numbers, and of shorter inputs, are held to FEW_LIMIT where everything is drawn at random.
FEW_NUMBERS, FEW_LIMIT = 64, 0.25


def check(inputs: dict[str, Any], with_dstate: bool = True) -> dict[str, torch.Tensor]:
    """Runs the kernels and checks them against the composite in fp64; returns the gradients."""
    do, dstate = output_gradients(inputs)
    if not with_dstate:
        dstate = None
    gradients = backward(inputs, do, dstate)
    assert_gradients(inputs, gradients, composite_fp64(inputs, do, dstate))
    return gradients


# --- Accuracy -------------------------------------------------------------------------------------------------------


@all_families
@all_head_sizes
@all_dtypes
def test_every_instantiation(family: str, K: int, V: int, dtype: torch.dtype) -> None:
    """Five chunks and a partial one, from a state and with a gradient of the final state."""
    check(make_inputs(family, T=330, H=HEADS, K=K, V=V, dtype=dtype, with_state=True, device=DEVICE))


@all_families
@all_head_sizes
def test_processed_inputs(family: str, K: int, V: int) -> None:
    """Gates and beta in fp32 as they enter the recurrence, q and k normalised: kernels of their own."""
    check(processed(make_inputs(family, T=330, H=HEADS, K=K, V=V, with_state=True, device=DEVICE)))


@all_families
def test_processed_sequences(family: str) -> None:
    """The same with sequences that end inside a chunk, and rows that belong to none."""
    inputs = processed(make_inputs(family, lengths=[1, 70, 0, 64, 5, 130], H=HEADS, with_state=True, device=DEVICE))
    check(inputs)
    check(inputs | {"cu_seqlens": torch.tensor([0, 1, 70, 70, 134, 139, 200], device=DEVICE)})


@all_families
def test_against_the_recurrence(family: str) -> None:
    """Against autograd through the token-by-token recurrence in fp64."""
    inputs = make_inputs(family, T=150, H=HEADS, K=64, V=128, with_state=True, device=DEVICE)
    do, dstate = output_gradients(inputs)
    names = [name for name in DIFFERENTIABLE if name in inputs]
    wide = {name: inputs[name].detach().double().requires_grad_() for name in names}
    o, state, _ = reference({**inputs, **wide})
    expected = torch.autograd.grad((o, state), tuple(wide.values()), (do.double(), dstate.double()))
    assert_gradients(inputs, backward(inputs, do, dstate), dict(zip(names, expected, strict=True)))


FEATURES: dict[str, dict[str, Any]] = {
    "batch": {"B": 3, "T": 100, "H": 8},
    "whole_rows": {"T": 400, "H": 32, "K": 128, "V": 128, "with_state": True},  # of V a CTA, and stage 4 beside them
    "grouped": {"T": 200, "H": 4, "HV": 16, "with_state": True, "K": 128},
    "packed": {"lengths": [1, 70, 0, 64, 5, 130], "H": HEADS, "with_state": True, "gate_dtype": torch.float32},
    "packed_grouped": {"lengths": [65, 0, 0, 3, 190], "H": 8, "HV": 24, "index_dtype": torch.int32, "V": 128},
    "v_first": {"T": 130, "H": HEADS, "K": 128, "V": 64, "with_state": True, "state_v_first": True},
    "v_first_square": {"T": 130, "H": HEADS, "K": 128, "V": 128, "with_state": True, "state_v_first": True},
    "bf16_state": {"T": 130, "H": HEADS, "with_state": True, "state_dtype": torch.bfloat16},
    "negative_eigenvalues": {"T": 200, "H": HEADS, "K": 128, "allow_neg_eigval": True, "scale": -0.3},
    "fused": {"B": 2, "T": 100, "H": 8, "strided": "fused"},
    "head_major": {"B": 2, "T": 100, "H": 8, "HV": 16, "strided": "head_major"},
}


@all_families
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_features(family: str, features: dict[str, Any]) -> None:
    check(make_inputs(family, device=DEVICE, **features))


@all_families
def test_without_a_gradient_of_the_final_state(family: str) -> None:
    check(make_inputs(family, T=330, H=HEADS, K=128, V=128, device=DEVICE), with_dstate=False)


@all_families
def test_thousands_of_tokens(family: str) -> None:
    """No drift over 65 chunks, in shapes that fill the GPU."""
    check(make_inputs(family, T=4130, H=HEADS, K=128, V=128, with_state=True, device=DEVICE))


@pytest.mark.parametrize("seed", range(60))
def test_features_drawn_at_random(seed: int) -> None:
    """All features together. A gradient of few numbers may be tiny by chance, as dA_log is, a sum over all tokens and
    channels whose terms cancel: then only its size is looked at.
    """
    inputs, said = draw_call(seed)
    inputs.pop("output_final_state"), inputs.pop("output_chunk_states")
    do, dstate = output_gradients(inputs)
    if seed % 3 == 0:
        dstate = None
    expected = composite_fp64(inputs, do, dstate)
    actual = backward(inputs, do, dstate)
    for name in DIFFERENTIABLE:
        if name not in inputs:
            assert actual[name].shape == (0,)
            continue
        assert actual[name].shape == inputs[name].shape and actual[name].dtype == inputs[name].dtype, said
        a, e = actual[name].double(), expected[name].double()
        assert bool(a.isfinite().all()), f"{said}: d{name}"
        if a.numel() == 0:
            continue
        few = a.numel() < FEW_NUMBERS or inputs["q"].shape[1] < FEW_NUMBERS
        error, limit = relative_rmse(a, e), FEW_LIMIT if few or name in ("A_log", "beta") else 1.5e-2
        assert error <= limit, f"{said}: d{name}: {error:.2e}"


def test_beta_of_zero() -> None:
    """Tokens that write nothing still have a gradient of beta; nothing is divided by it."""
    inputs = make_inputs("long", T=200, H=HEADS, K=128, use_beta_sigmoid=False, device=DEVICE)
    inputs["beta"] = inputs["beta"].float().sigmoid()
    inputs["beta"][:, ::3] = 0.0
    gradients = check(inputs)
    assert gradients["beta"][:, ::3].abs().mean() > 0
    inputs["beta"].zero_()
    check(inputs)


def test_a_reset_has_no_gradient() -> None:
    inputs = make_inputs("unbounded_log", T=200, H=HEADS, gate_dtype=torch.float32, device=DEVICE)
    gradients = check(inputs)
    assert bool(gradients["g"].isfinite().all())
    assert bool((gradients["g"][inputs["g"] == -torch.inf] == 0).all())
    inputs["g"].fill_(-200.0)  # alpha is 1e-87: zero in fp32
    gradients = backward(inputs, *output_gradients(inputs))
    assert bool((gradients["g"] == 0).all())


# --- Contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features", [{"T": 700}, {"lengths": [1, 300, 0, 64, 5, 330], "HV": 2 * HEADS}], ids=["even", "packed"]
)
def test_same_bits(features: dict[str, Any]) -> None:
    inputs = make_inputs("long", H=HEADS, K=128, V=128, with_state=True, device=DEVICE, **features)
    do, dstate = output_gradients(inputs)
    first = backward(inputs, do, dstate)
    for _ in range(3):
        for name, gradient in backward(inputs, do, dstate).items():
            assert_same_bits(gradient, first[name], name)


def test_packed_sequences_are_those_alone() -> None:
    """A sequence of a packed call has the bits that it has by itself."""
    inputs = make_inputs("long", lengths=[130, 0, 1, 64, 70], H=4, K=128, with_state=True, device=DEVICE)
    do, dstate = output_gradients(inputs)
    packed = backward(inputs, do, dstate)
    offsets = inputs["cu_seqlens"].tolist()
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        alone = backward(only_sequence(inputs, n), do[:, begin:end], dstate[n : n + 1])
        for name in ("q", "k", "v", "g", "beta"):
            assert_same_bits(packed[name][:, begin:end].contiguous(), alone[name], name)
        assert_same_bits(packed["initial_state"][n : n + 1].contiguous(), alone["initial_state"], "initial_state")


def test_empty_sequences_pass_the_gradient_on() -> None:
    inputs = make_inputs("long", lengths=[0, 70, 0], with_state=True, device=DEVICE)
    do, dstate = output_gradients(inputs)
    gradients = backward(inputs, do, dstate)
    for n in (0, 2):
        assert_same_bits(gradients["initial_state"][n], dstate[n])


@needs_cuda  # on the CPU a padded cu_seqlens is an error
@pytest.mark.parametrize("HV", [2, 6])
def test_tokens_past_the_last_sequence(HV: int) -> None:
    """A padded graph: their gradients are zero, and what lies there changes nothing."""
    inputs = make_inputs("long", lengths=[100, 130, 300], H=2, HV=HV, K=128, device=DEVICE)
    do, dstate = output_gradients(inputs)
    inputs["cu_seqlens"] = torch.tensor([0, 100, 230, 230], device=DEVICE)
    expected = composite_fp64(inputs, do, dstate)
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, 230:] = torch.nan
    do[:, 230:] = torch.nan
    gradients = backward(inputs, do, dstate)
    for name in ("q", "k", "v", "g", "beta"):
        assert bool((gradients[name][:, 230:] == 0).all()), name
        assert relative_rmse(gradients[name], expected[name]) <= 1.5e-2, name


def test_layout_of_the_incoming_gradients() -> None:
    """Expanded, strided, of another type and unaligned ones give the bits of packed ones."""
    inputs = make_inputs("long", B=2, T=100, H=4, with_state=True, device=DEVICE)
    do, dstate = output_gradients(inputs)
    expected = backward(inputs, do, dstate)
    for do_alike in (odd_strides(do), do.float(), do.transpose(1, 2).contiguous().transpose(1, 2)):
        for name, gradient in backward(inputs, do_alike, dstate.transpose(0, 1).contiguous().transpose(0, 1)).items():
            assert_same_bits(gradient, expected[name], name)
    one = torch.ones((), dtype=do.dtype, device=DEVICE)
    expanded = backward(inputs, one.expand(do.shape), None)
    for name, gradient in backward(inputs, torch.ones_like(do), None).items():
        assert_same_bits(expanded[name], gradient, name)


def test_sizes_of_zero() -> None:
    for features in ({"T": 0}, {"B": 0, "T": 70}, {"lengths": []}, {"lengths": [0, 0]}):
        inputs = make_inputs("long", with_state=True, device=DEVICE, **features)
        gradients = backward(inputs, *output_gradients(inputs))
        for name, gradient in gradients.items():
            assert gradient.shape == inputs[name].shape
        assert bool((gradients["A_log"] == 0).all()) and bool((gradients["dt_bias"] == 0).all())


@pytest.mark.parametrize("features", [{"H": 2}, {"H": 1, "HV": 2, "state_v_first": True}], ids=["plain", "grouped"])
def test_opcheck(features: dict[str, Any]) -> None:
    inputs = make_inputs("long", T=70, with_state=True, device=DEVICE, **features)
    given = backward_arguments(inputs)
    names = (*DIFFERENTIABLE, "cu_seqlens", "scale", "lower_bound", "use_qk_l2norm", "use_gate", "use_beta_sigmoid")
    values = [given.get(name) for name in names]
    torch.library.opcheck(
        torch.ops.kda.chunk_bwd,
        (*output_gradients(inputs), *values, False, features.get("state_v_first", False)),
    )


@needs_cuda
def test_in_a_cuda_graph() -> None:
    """Captured once; replayed with other contents of cu_seqlens."""
    inputs = make_inputs("long", lengths=[70, 130], H=4, with_state=True, device=DEVICE)
    do, dstate = output_gradients(inputs)
    graph, captured = capture(lambda: backward(inputs, do, dstate))
    for contents in ([0, 70, 200], [0, 0, 200], [0, 199, 200], [0, 64, 128]):
        inputs["cu_seqlens"].copy_(torch.tensor(contents))
        graph.replay()
        expected = backward(inputs, do, dstate)
        for name, gradient in captured.items():
            assert_same_bits(gradient, expected[name], f"{contents} {name}")


@needs_cuda
@pytest.mark.parametrize("contents", WRONG_CONTENTS.values(), ids=WRONG_CONTENTS)
def test_wrong_contents_harm_nothing(contents: list[int]) -> None:
    """The gradients mean nothing, but the call ends: no stage waits for a chunk that no sequence has."""
    inputs = make_inputs("long", lengths=[100, 0, 200], H=4, with_state=True, device=DEVICE)
    do, dstate = output_gradients(inputs)
    expected = backward(inputs, do, dstate)
    wrong = dict(inputs, cu_seqlens=torch.tensor(contents, device=DEVICE))
    gradients = backward(wrong, do, dstate)
    torch.cuda.synchronize()
    assert {name: x.shape for name, x in gradients.items()} == {name: x.shape for name, x in expected.items()}
    for name, gradient in backward(inputs, do, dstate).items():
        assert_same_bits(gradient, expected[name], name)


@needs_cuda
def test_memory_beyond_the_gradients() -> None:
    """What the planner states, no more."""
    T, H, D = 4096, 8, 128
    inputs = make_inputs("long", T=T, H=H, K=D, V=D, device=DEVICE)
    do, dstate = output_gradients(inputs)
    gradients = backward(inputs, do, dstate)
    size = sum(gradient.numel() * gradient.element_size() for gradient in gradients.values())
    del gradients
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(inputs, do, dstate)
    workspace = planned(inputs, saved=False)["workspace_bytes"]
    assert torch.cuda.max_memory_allocated() - before <= size + workspace + 16 * 2**20  # as the allocator rounds


@needs_cuda
def test_what_no_kernel_covers_warns() -> None:
    composite._warned.clear()
    inputs = make_inputs("long", T=70, K=32, V=32, device=DEVICE)
    with pytest.warns(UserWarning, match="K in"):
        torch.ops.kda.chunk_bwd(*output_gradients(inputs), **backward_arguments(inputs))
