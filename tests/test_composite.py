"""The chunked implementation against the token recurrence: outputs, states, gradients, time and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, FAMILIES, make_inputs, run, run_reference, slice_tokens
from torch import Tensor

import kda_cuda
from kda_cuda import composite
from kda_cuda.accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, relative_rmse
from kda_cuda.reference import recurrent_kda

# What the dtype of the computation allows, well inside the accuracy contract, so that a slip in a formula cannot hide
# in it.
FP32_RELATIVE_RMSE = 1e-6
FP64_RELATIVE_RMSE = 1e-13
# Of gradients in fp32 and in bf16 (there the gradients themselves are rounded to bf16: 1.7e-3). The peers agree to 1e-3
# .. 8e-3.
FP32_GRADIENT_RELATIVE_RMSE = 1e-4
BF16_GRADIENT_RELATIVE_RMSE = 3e-3

FEATURES: dict[str, dict[str, Any]] = {
    "one_token": dict(T=1),
    "below_a_chunk": dict(T=63),
    "one_chunk": dict(T=64),
    "above_a_chunk": dict(T=65),
    "batch": dict(B=3, T=130),
    "many_chunks": dict(T=700, H=1),
    "grouped_heads": dict(T=100, H=2, HV=6),
    "odd_head_sizes": dict(T=100, K=33, V=7),
    "wide_values": dict(T=100, K=16, V=200),
    "packed": dict(lengths=[1, 130, 0, 64, 3, 65, 0, 200]),
    "packed_int32": dict(lengths=[5, 70], index_dtype=torch.int32),
    "only_empty_sequences": dict(lengths=[0, 0]),
    "many_sequences": dict(lengths=[1 + 7 * i % 90 for i in range(150)], H=1, K=16, V=16),
    "state": dict(T=100, with_state=True),
    "state_v_first": dict(T=100, K=16, V=40, with_state=True, state_v_first=True),
    "packed_state_v_first": dict(lengths=[0, 100, 1], K=40, V=16, with_state=True, state_v_first=True),
    "bf16_state": dict(T=100, with_state=True, state_dtype=torch.bfloat16),
    "negative_eigenvalues": dict(T=150, allow_neg_eigval=True),
    "no_normalisation": dict(T=20, K=16, use_qk_l2norm=False),
    "scale": dict(T=70, scale=-1.5),
    "fused_projection": dict(B=2, T=100, strided="fused"),
    "head_major": dict(B=2, T=100, strided="head_major"),
    "strided_last_dimension": dict(T=100, strided="last"),
    "no_tokens": dict(T=0, B=2, with_state=True),
    "no_sequences": dict(lengths=[], with_state=True),
    "no_rows": dict(B=0, T=70, with_state=True),
}


def with_features(family: str, features: dict[str, Any], **others: Any) -> dict[str, Any]:
    """Inputs; raw keys of unit variance would make the recurrence itself explode, so without normalisation they are
    small.
    """
    inputs = make_inputs(family, **features, **others)
    if not inputs["use_qk_l2norm"]:
        inputs["k"] = (inputs["k"] * 0.2).to(inputs["k"].dtype)
    return inputs


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], o_limit: float, state_limit: float) -> None:
    for name, limit, a, e in zip(
        ("o", "final_state", "chunk_states"), (o_limit, state_limit, state_limit), actual, expected, strict=True
    ):
        error = relative_rmse(a, e)
        assert error <= limit, f"{name}: relative RMSE {error:.2e} > {limit:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_matches_the_recurrence(family: str, features: dict[str, Any]) -> None:
    inputs = with_features(family, features, dtype=torch.float32)
    outputs = run(inputs)
    assert_close(outputs, run_reference(inputs), FP32_RELATIVE_RMSE, FP32_RELATIVE_RMSE)
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in outputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_accuracy_contract(family: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(family, lengths=[1000, 33, 400], H=2, HV=4, K=128, V=128, dtype=dtype, with_state=True)
    outputs = run(inputs)
    assert_close(outputs, run_reference(inputs), O_RELATIVE_RMSE, STATE_RELATIVE_RMSE)
    assert outputs[0].dtype == dtype and outputs[1].dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_fp64_is_fp64_inside(family: str) -> None:
    inputs = make_inputs(family, T=300, HV=4, K=24, V=40, dtype=torch.float64, with_state=True)
    outputs = run(inputs)
    assert_close(outputs, run_reference(inputs), FP64_RELATIVE_RMSE, FP64_RELATIVE_RMSE)
    assert all(x.dtype == torch.float64 for x in outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_continuity(family: str) -> None:
    """One run gives what the same tokens in pieces with carried state give."""
    inputs = make_inputs(family, T=500, HV=4, K=32, V=48, dtype=torch.float32, with_state=True, state_v_first=True)
    o, final_state, _ = run(inputs)
    state, pieces = inputs["initial_state"], []
    for begin, end in ((0, 1), (1, 100), (100, 164), (164, 500)):
        piece, state, _ = run({**slice_tokens(inputs, begin, end), "initial_state": state})
        pieces.append(piece)
    assert relative_rmse(torch.cat(pieces, dim=1), o) <= FP32_RELATIVE_RMSE
    assert relative_rmse(state, final_state) <= FP32_RELATIVE_RMSE


def test_segments_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the chunks are cut into segments: many sequences a segment, or many segments a sequence."""
    inputs = make_inputs(
        "long", lengths=[300, 1, 64, 0, 500, 65], H=2, HV=4, K=16, V=24, with_state=True, dtype=torch.float64
    )
    expected = run_reference(inputs)
    for tiles in (1, 4, 12, 1000):
        monkeypatch.setattr(composite, "SEGMENT_TILES_CPU", tiles)
        assert_close(run(inputs), expected, FP64_RELATIVE_RMSE, FP64_RELATIVE_RMSE)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_nan_stays_in_its_sequence(name: str) -> None:
    """Other sequences follow in the same work memory."""
    lengths = [300, 130, 64, 200]
    inputs = make_inputs(lengths=lengths, K=16, V=24, with_state=True, dtype=torch.float32)
    clean = run(inputs)
    begin, end = 300, 430  # of the second sequence
    inputs[name][:, begin:end] = torch.nan
    o, final_state, _ = run(inputs)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[begin:end] = False
    assert o[:, begin:end].isnan().all()
    assert torch.equal(o[:, others], clean[0][:, others])
    assert torch.equal(final_state[[0, 2, 3]], clean[1][[0, 2, 3]])


def test_outputs_that_are_not_requested_are_empty() -> None:
    inputs = make_inputs(T=70, output_final_state=False, output_chunk_states=False)
    o, final_state, chunk_states = run(inputs)
    assert o.shape == (1, 70, 2, 64) and final_state.shape == (0,) and chunk_states.shape == (0,)


def test_sequences_behind_the_last_offset_are_not_computed() -> None:
    """A padded cu_seqlens: the operator refuses it on the CPU, the body leaves the rows behind it zero."""
    inputs = make_inputs(T=150, dtype=torch.float32)
    inputs["v"][:, 100:] = torch.nan
    inputs["cu_seqlens"] = torch.tensor([0, 70, 100, 100, 100])
    o, final_state, chunk_states = composite.chunk_fwd(**inputs)
    expected = run_reference({**inputs, "v": inputs["v"].nan_to_num()})
    assert_close((o, final_state, chunk_states), expected, FP32_RELATIVE_RMSE, FP32_RELATIVE_RMSE)
    assert not o[:, 100:].any() and not final_state[2:].any()
    for wrong in ([1, 150], [0, 100, 90, 150], [0, 151]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            composite.chunk_fwd(**{**inputs, "cu_seqlens": torch.tensor(wrong)})


# --- Gradients --------------------------------------------------------------------------------------------------------

GRADIENT_FEATURES: dict[str, dict[str, Any]] = {
    "plain": dict(T=150),
    "grouped_state": dict(T=100, H=1, HV=3, K=20, V=36, with_state=True, state_v_first=True, allow_neg_eigval=True),
    "packed": dict(lengths=[1, 130, 0, 64, 5], K=16, V=24, with_state=True),
    "batch_strided": dict(B=2, T=70, strided="fused", use_qk_l2norm=False, K=16, V=16),
}


def gradients(inputs: dict[str, Any], call: Any) -> dict[str, Tensor]:
    """Gradients of a weighted sum of o and final_state; the weights depend on the shapes, and the dtype of ``v``,
    alone.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in inputs}
    o, final_state, _ = call({**inputs, **leaves})
    generator = torch.Generator().manual_seed(1)
    do, dstate = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (o, final_state))
    loss_gradients = (do.to(inputs["v"].dtype).to(o.dtype), dstate.float().to(final_state.dtype))
    return dict(zip(leaves, torch.autograd.grad((o, final_state), tuple(leaves.values()), loss_gradients), strict=True))


def assert_gradients(inputs: dict[str, Any], limit: float) -> None:
    actual, expected = gradients(inputs, run), gradients(inputs, run_reference)
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name].dtype and gradient.shape == inputs[name].shape
        error = relative_rmse(gradient, expected[name])
        assert error <= limit, f"d{name}: relative RMSE {error:.2e} > {limit:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", GRADIENT_FEATURES.values(), ids=GRADIENT_FEATURES)
def test_gradients_fp64(family: str, features: dict[str, Any]) -> None:
    assert_gradients(with_features(family, features, dtype=torch.float64), FP64_RELATIVE_RMSE * 10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", GRADIENT_FEATURES.values(), ids=GRADIENT_FEATURES)
def test_gradients_fp32(family: str, features: dict[str, Any]) -> None:
    assert_gradients(with_features(family, features, dtype=torch.float32), FP32_GRADIENT_RELATIVE_RMSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_bf16(family: str) -> None:
    inputs = make_inputs(family, T=200, HV=4, K=32, V=48, with_state=True, gate_dtype=torch.float32)
    assert_gradients(inputs, BF16_GRADIENT_RELATIVE_RMSE)


def test_gradients_do_not_depend_on_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("long", lengths=[200, 1, 0, 300], K=16, V=24, with_state=True, dtype=torch.float64)
    for tiles in (1, 6):
        monkeypatch.setattr(composite, "SEGMENT_TILES_CPU", tiles)
        assert_gradients(inputs, FP64_RELATIVE_RMSE * 10)


def test_gradients_at_saturated_gates() -> None:
    """alpha = 0 and alpha = 1 exactly: finite gradients, those of the recurrence."""
    inputs = make_inputs("unbounded_log", T=130, K=16, V=16, dtype=torch.float64)
    inputs["g"][:, ::3] = -torch.inf
    inputs["g"][:, 1::3] = 0.0
    assert_gradients(inputs, FP64_RELATIVE_RMSE * 10)
    inputs = make_inputs("unbounded", T=130, K=16, V=16, dtype=torch.float64)
    inputs["g"][:, ::2] = 300.0
    inputs["g"][:, 1::4] = -800.0
    assert_gradients(inputs, FP64_RELATIVE_RMSE * 10)


def test_gradients_of_empty_inputs() -> None:
    inputs = make_inputs("random", lengths=[0, 0], K=16, V=16, with_state=True, dtype=torch.float32)
    result = gradients(inputs, run)
    generator = torch.Generator().manual_seed(1)
    torch.randn(inputs["v"].shape, generator=generator, dtype=torch.float64)
    expected = torch.randn(inputs["initial_state"].shape, generator=generator, dtype=torch.float64).float()
    assert torch.equal(result["initial_state"], expected)
    assert result["q"].shape == inputs["q"].shape and not result["A_log"].any()


def test_backward_returns_empty_gradients_for_absent_inputs() -> None:
    inputs = make_inputs("unbounded_log", T=70, dtype=torch.float32)
    with torch.inference_mode():
        results = torch.ops.kda.chunk_bwd(
            torch.ones_like(inputs["v"]), None, *(inputs[x] for x in ("q", "k", "v", "g", "beta"))
        )
    assert [x.shape for x in results[5:]] == [(0,)] * 3
    assert all(x.isfinite().all() for x in results)


# --- Time and memory --------------------------------------------------------------------------------------------------


REQUIRED_SPEEDUP = 20  # over the token loop; 35 on a quiet machine
ROUNDS = 3  # of the comparison of times: all are run, so that neither side stops at its luckiest


@pytest.mark.slow
def test_is_20_times_faster_than_the_token_loop() -> None:
    """T = 4096, H = 4, K = V = 128. The best of a few runs of each, taken in turns: other work only adds time."""
    inputs = make_inputs("long", T=4096, H=4, K=128, V=128, dtype=torch.float32, output_chunk_states=False)
    arguments = {name: x for name, x in inputs.items() if not name.startswith("output")}

    def seconds(call: Any, **kwargs: Any) -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            call(**kwargs)
        return time.perf_counter() - begin

    chunked, loop = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(ROUNDS):
            chunked += [seconds(kda_cuda.chunk_fwd, **inputs) for _ in range(5)]
            loop += [seconds(recurrent_kda, **arguments) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    ratio = min(loop) / min(chunked)
    times = f"{min(chunked) * 1e3:.1f} ms by chunks, {min(loop) * 1e3:.1f} ms token by token"
    assert ratio >= REQUIRED_SPEEDUP, f"{ratio:.1f} times faster: {times}"


_PEAK = """
import resource, sys, torch
sys.path[:0] = {path!r}
from cases import make_inputs, run
T, backward = {T}, {backward}
inputs = make_inputs("long", T=T, H=2, K=64, V=64, dtype=torch.float32, gate_dtype=torch.float32,
                     output_chunk_states=False)
if backward:
    inputs["v"].requires_grad_()
o = run(inputs)[0]
if backward:
    torch.autograd.grad(o, inputs["v"], torch.ones_like(o))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_linear(backward: bool) -> None:
    """Peak memory of a process grows with T by no more than a small multiple of inputs and outputs."""
    tokens = (8192, 16384, 32768)
    code = [_PEAK.format(path=sys.path, T=T, backward=backward) for T in tokens]
    peaks = [
        int(subprocess.run([sys.executable, "-c", c], check=True, capture_output=True, text=True).stdout) for c in code
    ]
    token_bytes = 2 * 5 * 64 * 4  # H * (q, k, v, g, o) * D * fp32
    allowed = (6 if backward else 4) * token_bytes  # generation of the inputs holds a copy too
    for (T0, peak0), (T1, peak1) in zip(
        zip(tokens, peaks, strict=True), list(zip(tokens, peaks, strict=True))[1:], strict=False
    ):
        growth = (peak1 - peak0) / (T1 - T0)
        assert growth <= allowed, f"{growth:.0f} bytes a token from T = {T0} to {T1}, allowed {allowed}"
