"""Failures that implementations of gated delta rules have had, each as a test: on the CPU, and on the kernels where
there is a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import CHUNK_TOKENS, FAMILIES, make_inputs, run, run_reference, slice_tokens
from torch import Tensor

from kda_cuda import composite
from kda_cuda.accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, relative_rmse

all_families = pytest.mark.parametrize("family", FAMILIES)
OUTPUTS = ("o", "final_state", "chunk_states")


def assert_contract(inputs: dict[str, Any], outputs: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """The outputs of the operator, which keep the accuracy contract."""
    outputs = run(inputs) if outputs is None else outputs
    limits = (O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, STATE_RELATIVE_RMSE)
    for name, limit, actual, expected in zip(OUTPUTS, limits, outputs, run_reference(inputs), strict=True):
        if actual.numel() == 0 and not inputs.get(f"output_{name}", True):
            continue
        assert actual.isfinite().all(), f"{name} is not finite"
        error = relative_rmse(actual, expected)
        assert error <= limit, f"{name}: relative RMSE {error:.2e} > {limit:.1e}"
    return outputs


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and torch.equal(actual, expected)


# --- Sequences --------------------------------------------------------------------------------------------------------


@all_families
def test_sequences_of_one_token_in_a_prefill_batch(device: str, family: str) -> None:
    """They gave NaN."""
    assert_contract(make_inputs(family, lengths=[1, 1, 64, 1, 63, 129, 1], with_state=True, device=device))


@all_families
def test_sequence_boundary_inside_a_tile(device: str, family: str) -> None:
    """A boundary inside a tile overflowed before it was masked. What lies behind it must not matter, not even NaN."""
    lengths = [17, 100, 3, 70]
    inputs = make_inputs(family, lengths=lengths, with_state=True, device=device)
    outputs = assert_contract(inputs)
    begin, end = lengths[0], sum(lengths[:2])
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, begin:end] = torch.nan
    poisoned = run(inputs)
    others = [n for n in range(len(lengths)) if n != 1]
    assert_same_bits(poisoned[1][others], outputs[1][others])
    assert_same_bits(poisoned[0][:, :begin], outputs[0][:, :begin])
    assert_same_bits(poisoned[0][:, end:], outputs[0][:, end:])


@pytest.mark.parametrize("T", [1, 15, 63, 65, 100, 127])
def test_final_partial_chunk_does_not_transform_its_padding(device: str, T: int) -> None:
    """sigmoid(0) = 0.5 and the gate of a zero logit are not neutral: rows past the end have beta 0 and gate 0 after the
    transforms.
    """
    for family in FAMILIES:
        inputs = make_inputs(family, T=T, with_state=True, allow_neg_eigval=True, device=device)
        assert_contract(inputs)


def test_zero_length_sequences_keep_their_state_bit_for_bit(device: str) -> None:
    for state_v_first in (False, True):
        inputs = make_inputs(
            "long",
            lengths=[0, 70, 0, 0, 64, 0],
            with_state=True,
            state_v_first=state_v_first,
            K=64,
            V=128,
            device=device,
        )
        final_state = assert_contract(inputs)[1]
        empty = [0, 2, 3, 5]
        assert_same_bits(final_state[empty], inputs["initial_state"][empty])
        inputs.pop("initial_state")
        assert not run(inputs)[1][empty].any()


# --- Gates ------------------------------------------------------------------------------------------------------------


def test_bounded_gate_at_its_bound(device: str) -> None:
    """-5 on every token is 320 nats a chunk; fp32 ends at 88, and a mid-point shift gives inf * 0 = NaN."""
    inputs = make_inputs("random", T=200, with_state=True, device=device)
    inputs["g"][:] = 100.0
    assert_contract(inputs)
    inputs["g"][:, :, :, ::2] = -100.0  # beside channels that never forget
    assert_contract(inputs)


def test_unbounded_gate_of_a_checkpoint(device: str) -> None:
    """exp(A_log) = 201 and log-gates of -2661 a token, beside tokens that hardly forget."""
    inputs = make_inputs("unbounded", T=200, with_state=True, device=device)
    inputs["A_log"][:] = 5.3033  # ln 201
    inputs["g"][:, ::2] = 13.24
    inputs["g"][:, 1::2] = -12.0
    inputs["dt_bias"][:] = 0.0
    assert_contract(inputs)


@pytest.mark.parametrize("reset", [0, 1, 31, 32, 63, 64, 70, 127])
def test_hard_reset(device: str, reset: int) -> None:
    """g = -inf is alpha = 0: nothing from before is left, and nothing is NaN."""
    inputs = make_inputs("long", T=130, with_state=True, device=device, gate_dtype=torch.float32)
    gates = {name: inputs.pop(name) for name in ("A_log", "dt_bias", "use_gate", "lower_bound")}
    inputs["g"] = gates["lower_bound"] * (inputs["g"] + gates["dt_bias"].view(2, 64)).sigmoid()
    inputs["g"][:, reset] = -torch.inf
    o = assert_contract(inputs)[0]
    rest = slice_tokens(inputs, reset, 130)
    assert relative_rmse(run(rest)[0], o[:, reset:]) <= 2 * O_RELATIVE_RMSE


def test_gates_that_do_not_forget_at_all(device: str) -> None:
    """g = 0: a plain delta rule, whose memory of 64 x 20 tokens is exact."""
    inputs = make_inputs("unbounded_log", T=1280, H=1, with_state=True, device=device)
    inputs["g"][:] = 0.0
    assert_contract(inputs)


def test_memory_that_moves_between_channels(device: str) -> None:
    """The delta rule mixes channels: state survives where each channel's decay over a chunk is strong, but no token's
    weakest is.
    """
    inputs = make_inputs("unbounded_log", T=256, H=1, with_state=True, allow_neg_eigval=True, device=device)
    half = inputs["g"].shape[-1] // 2
    inputs["g"][:] = 0.0
    inputs["g"][:, ::2, :, :half] = -1.5
    inputs["g"][:, 1::2, :, half:] = -1.5
    inputs["beta"][:] = 0.0  # beta 1: each token reflects the state between channels
    assert_contract(inputs)


@all_families
def test_long_memory_is_not_hidden_by_steep_gates(device: str, family: str) -> None:
    """A kernel that is only tested on steep random gates hides all errors of long memory."""
    assert_contract(make_inputs(family, T=1500, H=1, K=128, V=128, with_state=True, device=device))


# --- beta and keys ----------------------------------------------------------------------------------------------------


@all_families
def test_beta_up_to_two(device: str, family: str) -> None:
    """A bound that assumed beta in (0, 1) broke: with 2 sigmoid, entries of Tinv are larger."""
    inputs = make_inputs(family, T=300, with_state=True, allow_neg_eigval=True, device=device)
    inputs["beta"] += 3.0
    assert_contract(inputs)


@pytest.mark.parametrize("beta_logit", [0.0, 8.0])
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_identical_keys(device: str, allow_neg_eigval: bool, beta_logit: float) -> None:
    """Repeated tokens have one key: the entries of Akk are all beta, and its powers, unlike (I + Akk)^-1, grow beyond
    any precision.
    """
    inputs = make_inputs("unbounded_log", T=200, with_state=True, allow_neg_eigval=allow_neg_eigval, device=device)
    inputs["k"][:] = inputs["k"][:, :1].clone()
    inputs["g"][:] = 0.0
    inputs["beta"][:] = beta_logit
    assert_contract(inputs)


def test_zero_keys_and_queries(device: str) -> None:
    """The normalisation of a zero vector is zero."""
    inputs = make_inputs("long", T=100, with_state=True, device=device)
    inputs["k"][:, ::3] = 0.0
    inputs["q"][:, ::5] = 0.0
    assert_contract(inputs)


# --- Memory layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strided", ["fused", "head_major", "last"])
def test_strided_inputs_are_not_read_as_packed(device: str, strided: str) -> None:
    """A strided beta was read as packed. Around the views lie NaN."""
    inputs = make_inputs("long", B=2, T=100, HV=4, with_state=True, strided=strided, device=device)
    assert_contract(inputs)


def test_strided_beta_alone(device: str) -> None:
    inputs = make_inputs("long", B=2, T=100, HV=4, device=device)
    packed = run(inputs)
    projection = torch.full((2, 100, 12), torch.nan, dtype=inputs["beta"].dtype, device=device)
    projection[:, :, 4:8] = inputs["beta"]
    inputs["beta"] = projection[:, :, 4:8]
    for actual, expected in zip(run(inputs), packed, strict=True):
        assert_same_bits(actual, expected)


@all_families
def test_transposed_state_is_not_accepted_silently(device: str, family: str) -> None:
    """K = V hides a transposed state. Asymmetric data in both layouts; where K != V a wrong layout is an error by
    shape.
    """
    inputs = make_inputs(family, T=100, K=64, V=64, with_state=True, device=device)
    o, final_state, chunk_states = assert_contract(inputs)
    transposed = dict(inputs, initial_state=inputs["initial_state"].transpose(-1, -2).contiguous(), state_v_first=True)
    assert_contract(transposed)
    v_first = run(transposed)
    assert_same_bits(v_first[0], o)
    assert_same_bits(v_first[1], final_state.transpose(-1, -2))
    assert_same_bits(v_first[2], chunk_states.transpose(-1, -2))
    wrong = run(dict(inputs, state_v_first=True))
    assert relative_rmse(wrong[2].transpose(-1, -2), chunk_states) > 0.1, (
        "the layouts cannot be told apart: the test is blind"
    )
    for state_v_first in (False, True):
        mismatched = make_inputs(family, T=10, K=64, V=128, with_state=True, state_v_first=state_v_first, device=device)
        with pytest.raises((ValueError, RuntimeError), match="initial_state"):
            run(dict(mismatched, state_v_first=not state_v_first))


def test_strided_offsets_beyond_2_to_the_31(device: str) -> None:
    """int32 offsets wrapped. Token 64 of these views starts 2^31 elements behind token 0; only what is touched takes
    memory on a CPU.
    """
    T, H, D = 80, 1, 64
    inputs = make_inputs("long", T=T, H=H, K=D, V=D, with_state=True, device=device)
    packed = run(inputs)
    stride, width = 2**31 // 64, H * D
    buffer = torch.empty((T - 1) * stride + 4 * width, dtype=torch.bfloat16, device=device)
    for i, name in enumerate(("q", "k", "v", "g")):
        view = buffer[i * width :].as_strided((1, T, H, D), (buffer.numel(), stride, D, 1))
        inputs[name] = view.copy_(inputs[name])
    for actual, expected in zip(run(inputs), packed, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_tensors_beyond_2_to_the_31_elements() -> None:
    """v, g and o of more than 2^31 elements: the last sequence is computed as it is alone, by the same kernels."""
    H, HV, D, last = 1, 64, 128, 1100
    T = 2**31 // (HV * D) + 1000
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)

    inputs: dict[str, Any] = dict(
        q=randn(1, T, H, D),
        k=randn(1, T, H, D),
        v=randn(1, T, HV, D),
        g=randn(1, T, HV, D).abs_().neg_(),
        beta=randn(1, T, HV),
        cu_seqlens=torch.tensor([0, T - last, T], device="cuda"),
        use_qk_l2norm=True,
        use_beta_sigmoid=True,
        output_final_state=True,
    )
    assert inputs["v"].numel() > 2**31
    planned = functools.partial(torch.ops.kda.chunk_fwd_planned, path="stepwise", segment_chunks=0)
    o, final_state, _ = planned(**inputs)
    alone = slice_tokens(inputs, T - last, T)
    o_alone, state_alone, _ = planned(**alone)
    assert_same_bits(o[:, T - last :], o_alone)
    assert_same_bits(final_state[1:], state_alone)
    expected = run_reference(alone)
    assert relative_rmse(o_alone, expected[0]) <= O_RELATIVE_RMSE


# --- States -----------------------------------------------------------------------------------------------------------


def test_chunk_states_are_those_of_the_boundary(device: str) -> None:
    """A state saved after the last token was used as the checkpoint of a page boundary: they differ, and a resumed run
    shows it.
    """
    T = 200
    inputs = make_inputs("long", T=T, H=1, with_state=True, device=device)
    o, final_state, chunk_states = assert_contract(inputs)
    assert chunk_states.shape[1] == -(-T // CHUNK_TOKENS)
    assert_same_bits(chunk_states[:, 0], inputs["initial_state"])
    for chunk in range(1, chunk_states.shape[1]):
        begin = chunk * CHUNK_TOKENS
        resumed = {**slice_tokens(inputs, begin, T), "initial_state": chunk_states[:, chunk]}
        o_rest, state_rest, _ = run(resumed)
        assert relative_rmse(o_rest, o[:, begin:]) <= O_RELATIVE_RMSE
        assert relative_rmse(state_rest, final_state) <= STATE_RELATIVE_RMSE
        prefix = {**slice_tokens(inputs, 0, begin), "initial_state": inputs["initial_state"]}
        assert relative_rmse(run(prefix)[1], chunk_states[:, chunk]) <= STATE_RELATIVE_RMSE
    assert relative_rmse(final_state, run_reference(inputs)[2][:, -1]) > 0.1, "the test cannot tell them apart"


def test_whole_chunks_have_no_state_after_the_last_token(device: str) -> None:
    inputs = make_inputs("long", lengths=[64, 128, 0, 1], H=1, with_state=True, device=device)
    chunk_states = assert_contract(inputs)[2]
    assert chunk_states.shape[:2] == (1, 193 // CHUNK_TOKENS + 4)
    used = {0 + 0, 1 + 1, 1 + 1 + 1, 3 + 3}  # cu_seqlens[n] // 64 + n + chunk
    for slot in range(chunk_states.shape[1]):
        assert bool(chunk_states[0, slot].any()) == (slot in used)


# --- Repeatability ----------------------------------------------------------------------------------------------------


@all_families
def test_same_bits_on_every_run(device: str, family: str) -> None:
    """A pipelined configuration raced, and wrote 1e38 once in many runs."""
    inputs = make_inputs(family, lengths=[300, 1, 64, 500, 17], H=2, HV=4, with_state=True, device=device)
    first = assert_contract(inputs)
    for _ in range(200 if device == "cuda" else 5):
        for actual, expected in zip(run(inputs), first, strict=True):
            assert_same_bits(actual, expected)


def test_inputs_are_left_as_they_are(device: str) -> None:
    """An autotuner wrote in place while timing. Nor may an output share memory with an input."""
    for T in (0, 70):
        inputs = make_inputs("random", T=T, with_state=True, device=device)
        before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
        outputs = run(inputs)
        for name, x in before.items():
            assert_same_bits(inputs[name], x)
        for output in outputs:
            output.fill_(7.0)
        for name, x in before.items():
            assert_same_bits(inputs[name], x)


def test_gradients_leave_inputs_as_they_are(device: str) -> None:
    inputs = make_inputs("random", T=70, with_state=True, device=device, dtype=torch.bfloat16)
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    o, final_state, _ = run({**inputs, **leaves})
    (o.float().sum() + final_state.sum()).backward()
    for name, x in before.items():
        assert_same_bits(tensors[name], x)
        assert leaves[name].grad.isfinite().all()


# --- CUDA graphs and padding ------------------------------------------------------------------------------------------


def test_padded_offsets_do_not_crash() -> None:
    """The composite body with a padded cu_seqlens: trailing sequences are empty, rows behind the last offset zero."""
    inputs = make_inputs("long", T=200, with_state=False)
    inputs["cu_seqlens"] = torch.tensor([0, 70, 130, 130, 130], dtype=torch.int32)
    o, final_state, _ = assert_contract(inputs, composite.chunk_fwd(**inputs))
    assert not o[:, 130:].any() and not final_state[2:].any()


@pytest.mark.gpu
def test_cuda_graph_with_padded_offsets() -> None:
    """A padded cu_seqlens in a CUDA graph crashed. Captured once, replayed with other sequences and other tokens."""
    T, N = 512, 8
    batches = [[100, 1, 64, 130], [512], [3, 0, 200, 64, 65, 1, 1, 1], []]
    static = make_inputs("long", lengths=[T // N] * N, with_state=True, index_dtype=torch.int32, device="cuda")
    tensors = {name: x for name, x in static.items() if isinstance(x, Tensor)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(static)
    for seed, lengths in enumerate(batches):
        padded = lengths + [0] * (N - len(lengths))
        fresh = make_inputs("long", T=T, B=1, seed=seed + 1, device="cuda")
        for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias"):
            tensors[name].copy_(fresh[name])
        tensors["initial_state"].normal_()
        offsets = torch.tensor([0, *padded]).cumsum(0).to(torch.int32)
        tensors["cu_seqlens"].copy_(offsets)
        graph.replay()
        torch.cuda.synchronize()
        assert_contract(static, tuple(x.clone() for x in outputs))
        used = int(offsets[-1])
        assert not outputs[0][:, used:].any()
        for actual, expected in zip(outputs, run(static), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.gpu
def test_no_synchronisation_on_the_hot_path() -> None:
    inputs = make_inputs("long", lengths=[100, 0, 64], with_state=True, device="cuda")
    expected = run(inputs)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for actual, e in zip(outputs, expected, strict=True):
        assert_same_bits(actual, e)


@pytest.mark.gpu
def test_any_stream() -> None:
    """Concurrent calls on several streams do not share anything."""
    calls = [make_inputs("long", T=500, H=4, with_state=True, seed=seed, device="cuda") for seed in range(4)]
    expected = [run(inputs) for inputs in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        results = []
        for inputs, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(inputs))
        torch.cuda.synchronize()
        for outputs, e in zip(results, expected, strict=True):
            for actual, x in zip(outputs, e, strict=True):
                assert_same_bits(actual, x)
