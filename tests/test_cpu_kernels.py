"""The C++ forward on the CPU: every instruction set, every type, any number of threads, and how it shares its work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FAMILIES, make_inputs, run, run_reference
from torch import Tensor

from kda_cuda import composite
from kda_cuda.accuracy import relative_rmse

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import build_planner

FP32_RELATIVE_RMSE = 1e-6  # as the tests of the composite implementation ask of any fp32 forward
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
FEATURES: dict[str, dict[str, Any]] = {
    "odd": dict(T=77, H=1, HV=3, K=33, V=7, with_state=True, allow_neg_eigval=True),
    "packed": dict(lengths=[1, 0, 130, 33, 64], K=16, V=72, with_state=True, state_v_first=True),
    "strided": dict(B=2, T=50, K=40, V=24, strided="last", with_state=True, state_dtype=torch.bfloat16),
}


def run_with(instruction_set: str, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs with the kernels of an instruction set; skips the test where the machine does not have it."""
    try:
        return torch.ops.kda.chunk_fwd_cpu(**inputs, instruction_set=instruction_set)
    except RuntimeError as error:
        if "this machine has no" not in str(error):
            raise
        pytest.skip(f"this machine has no {instruction_set}")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_instruction_sets(instruction_set: str, family: str, features: dict[str, Any]) -> None:
    inputs = make_inputs(family, **features, dtype=torch.float32)
    for name, actual, expected in zip(
        ("o", "final_state", "chunk_states"), run_with(instruction_set, inputs), run_reference(inputs), strict=True
    ):
        error = relative_rmse(actual, expected)
        assert error <= FP32_RELATIVE_RMSE, f"{name}: relative RMSE {error:.2e}"


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("strided", [None, "last"])
def test_types_are_converted_without_error(instruction_set: str, dtype: torch.dtype, strided: str | None) -> None:
    """16-bit inputs give what the same values give in fp32, and o is that rounded to nearest: bit for bit. With numbers
    down to the smallest subnormal, and some that overflow."""
    inputs = make_inputs("long", T=70, K=40, V=50, dtype=dtype, strided=strided)
    magnitudes = torch.logspace(-9, 5.5, 50, dtype=torch.float64)
    inputs["v"].copy_(inputs["v"].double() * magnitudes)  # overflows fp16 in the last columns
    inputs["v"].clamp_(-60000, 60000)
    inputs["k"].mul_(0.01)
    inputs["scale"] = 3.0
    wide = {name: x.float() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    expected = run_with(instruction_set, wide)
    actual = run_with(instruction_set, inputs)
    assert torch.equal(actual[0], expected[0].to(dtype))
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[2], expected[2])
    if dtype == torch.float16:
        assert actual[0].isinf().any() and ((actual[0] != 0) & (actual[0].abs() < 6e-5)).any()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_nan_and_infinity_arrive(instruction_set: str, dtype: torch.dtype) -> None:
    inputs = make_inputs("long", T=40, K=16, V=20, dtype=dtype)
    inputs["v"][:, 35, 0, 3] = torch.nan
    inputs["v"][:, 36, 0, 5] = torch.inf
    o, final_state, _ = run_with(instruction_set, inputs)
    assert o[0, 35:, 0, 3].isnan().all() and final_state[0, 0, :, 3].isnan().all()
    assert o[0, :35].isfinite().all() and not o[0, 36:, 0, 5].isfinite().any()
    others = [column for column in range(20) if column not in (3, 5)]
    assert o[:, :, 0, others].isfinite().all() and o[:, :, 1].isfinite().all()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_extreme_logits(instruction_set: str) -> None:
    """Of gates and beta, up to infinity: sigmoid and softplus saturate, nothing overflows."""
    for family in ("random", "unbounded"):
        inputs = make_inputs(family, T=64, K=16, V=16, dtype=torch.float32)
        extremes = torch.tensor([0.0, 1e-30, 1.0, 20.0, 87.0, 89.0, 104.0, 1e4, 1e30, torch.inf])
        values = torch.cat((extremes, -extremes))
        inputs["g"].flatten()[: 16 * 40].copy_(values.repeat(32))
        inputs["beta"].flatten()[:20].copy_(values)
        for actual, expected in zip(run_with(instruction_set, inputs), run_reference(inputs), strict=True):
            assert relative_rmse(actual, expected) <= FP32_RELATIVE_RMSE


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("log_gate", [0.0, -7e-6, -1e-3])
def test_long_memory_in_fp32(instruction_set: str, log_gate: float) -> None:
    """Half-lives of 700 tokens up to forever, and small beta: the same rounding of the state or of its decay at every
    step would add up."""
    inputs = make_inputs("unbounded_log", T=2048, H=1, K=32, V=16, dtype=torch.float32, output_chunk_states=False)
    inputs["g"][:] = log_gate
    inputs["beta"][:] = -6.0
    o, final_state, _ = run_with(instruction_set, inputs)
    expected = run_reference(inputs)
    assert relative_rmse(o, expected[0]) <= FP32_RELATIVE_RMSE
    assert relative_rmse(final_state, expected[1]) <= FP32_RELATIVE_RMSE


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Restores torch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "shape",
    [
        dict(T=700, H=1, V=200),  # one item: shared by panels
        dict(T=400, H=3, K=128, V=128),  # a round left over on two threads
        dict(lengths=[1500, 3, 0, 64, 65, 0, 200], H=1, HV=2, K=128),  # a long one beside short ones
        dict(lengths=[0, 0, 0], H=1),
        dict(B=5, T=100, H=2, K=128, V=128),
        dict(T=100, H=1, K=16, V=16),  # not worth a second thread
    ],
)
@pytest.mark.usefixtures("thread_count")
def test_same_bits_for_any_number_of_threads(shape: dict[str, Any]) -> None:
    inputs = make_inputs("long", **shape, dtype=torch.float32, with_state=True, state_v_first=True)
    torch.set_num_threads(1)
    expected = run(inputs)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for actual, e in zip(run(inputs), expected, strict=True):
            assert torch.equal(actual, e)


def test_every_way_to_the_forward_is_this_one() -> None:
    """The operator, the composite operator and the body of it, for all types but fp64."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = make_inputs("random", T=100, HV=4, with_state=True, dtype=dtype)
        expected = torch.ops.kda.chunk_fwd_cpu(**inputs)
        for call in (torch.ops.kda.chunk_fwd, torch.ops.kda.chunk_fwd_composite, composite.chunk_fwd):
            for actual, e in zip(call(**inputs), expected, strict=True):
                assert torch.equal(actual, e)


def test_subnormal_numbers_are_the_callers_business() -> None:
    """The kernels flush them to 0 for themselves only."""
    smallest = torch.tensor([1e-45])
    run(make_inputs("unbounded", T=100, dtype=torch.float32))
    assert (smallest * 1.0).item() > 0.0


def test_refuses_what_it_cannot_compute() -> None:
    inputs = make_inputs("random", T=10, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="`instruction_set`: expected baseline, avx2, avx512 or nothing, got sse9"):
        torch.ops.kda.chunk_fwd_cpu(**inputs, instruction_set="sse9")
    with pytest.raises(RuntimeError, match="`q`: expected dtype bfloat16, float16 or float32, got float64"):
        torch.ops.kda.chunk_fwd_cpu(**make_inputs("random", T=10, dtype=torch.float64))
    for offsets in ([0, 11], [1, 10], [0, 8, 7, 10], [0, -1]):
        with pytest.raises(RuntimeError, match="`cu_seqlens`"):
            torch.ops.kda.chunk_fwd_cpu(**{**inputs, "cu_seqlens": torch.tensor(offsets)})


# --- How work is shared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "threads", "shared"),
    [
        ([100, 100, 100, 100], 1, 0),  # one thread shares nothing
        ([100, 100, 100, 100], 2, 0),  # balanced as they are
        ([100, 100, 100], 2, 1),  # one together, then one each
        ([100], 2, 1),
        ([100], 64, 1),
        ([100, 100, 100, 100, 100], 4, 1),
        ([100, 100, 100], 4, 3),  # fewer items than threads
        ([1000, 10, 10, 10], 2, 1),  # the long one together
        ([10] * 101, 2, 0),  # an odd one of many is not worth it
        ([0, 0, 0], 2, 0),
        ([], 2, 0),
    ],
)
def test_shared_items(steps: list[int], threads: int, shared: int) -> None:
    """How many items all threads take together before each takes one at a time."""
    assert build_planner.load().shared_items(steps, threads) == shared
