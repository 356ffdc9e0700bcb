"""Shared by the GPU tests: where they run, calls that only kernels may answer, references on the device, the checks.

``KDA_TEST_DEVICE=cpu python -m pytest tests/gpu`` rehearses the tests on a machine without a GPU: the same functions
then run the composite implementation, and what looks at CUDA itself is skipped.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cases import FAMILIES, run
from torch import Tensor

from kda_cuda import composite
from kda_cuda.accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, relative_rmse
from kda_cuda.reference import recurrent_kda

DEVICE = os.environ.get("KDA_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")

# `pytestmark` of every module of this folder, and the mark of tests that a rehearsal cannot run.
gpu_tests = [pytest.mark.gpu] if ON_CUDA else []
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="looks at CUDA itself")

# What the kernels are instantiated for.
HEAD_SIZES = [(64, 64), (64, 128), (128, 64), (128, 128)]
DTYPES = [torch.bfloat16, torch.float16]

# Inputs with a row for each token.
BY_TOKEN = ("q", "k", "v", "g", "beta")

all_families = pytest.mark.parametrize("family", FAMILIES)
all_head_sizes = pytest.mark.parametrize(("K", "V"), HEAD_SIZES, ids=[f"K{K}-V{V}" for K, V in HEAD_SIZES])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])

OUTPUTS = ("o", "final_state", "chunk_states")
REQUESTED_BY = {"final_state": "output_final_state", "chunk_states": "output_chunk_states"}

# The composite implementation in fp32 against the fp64 recurrence; rounding alone.
FP32_RELATIVE_RMSE = 1e-5

# The contract is on the RMSE over a whole tensor, in which an error of a few elements drowns. So a block of
# LOCAL_TOKENS tokens of one head (or of as many rows of a state) may miss by LOCAL_FACTOR times the contract at most,
# relative to the size of the block, or to a share LOCAL_FLOOR of the whole tensor's if the block is smaller. Emulated
# bf16 rounding stays below 1.8 times the contract; one wrong element of 16 x 64 is at 7 times.
LOCAL_TOKENS = 16
LOCAL_FACTOR = 3.0
LOCAL_FLOOR = 0.25

_REFERENCE_ARGUMENTS = frozenset(inspect.signature(recurrent_kda).parameters)


@contextlib.contextmanager
def kernels_only(function: str = "chunk_fwd") -> Iterator[None]:
    """Within it a ``function`` (chunk_fwd, chunk_bwd) that falls back to the composite implementation fails; so does a
    warning of this project.
    """
    if not ON_CUDA:
        yield
        return
    refusal = AssertionError("the composite implementation was called where the kernels must be")
    with mock.patch.object(composite, function, side_effect=refusal), warnings.catch_warnings():
        warnings.filterwarnings("error", message="kda:")
        yield


_forced_path: str | None = None  # of call(), see all_paths

PATHS = ("stepwise", "fused", "staged")  # without a cut


@pytest.fixture(params=PATHS)
def all_paths(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each path of the kernels: :func:`call` takes it, whatever the planner would choose, and does
    not cut sequences (test_forward_segments.py and test_forward_fused_cut.py do).
    """
    global _forced_path
    if not ON_CUDA and request.param != PATHS[0]:
        pytest.skip("the composite implementation has one path")
    _forced_path = request.param
    yield request.param
    _forced_path = None


def is_aligned(inputs: dict[str, Any]) -> bool:
    """Whether the fused and the stepwise path take these inputs: see `aligned_inputs` in csrc/kda/plan.h."""
    for x in (inputs[name] for name in ("q", "k", "v", "g")):
        steps = [stride * x.element_size() for stride in x.stride()[:-1]]
        expanded = any(step == 0 and size > 1 for step, size in zip(steps, x.shape, strict=False))
        if expanded or x.data_ptr() % 16 or any(step % 16 for step in steps):
            return False
    return True


def call(inputs: dict[str, Any], **grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, chunk_states) of the operator, by the kernels.

    Args:
        grid: in a test of all paths, what the path of the test has to choose: ``value_tile``, V columns of a CTA of the
            staged path; ``clusters`` of the fused kernel.
    """
    with kernels_only():
        return launch(inputs, **grid)


def launch(inputs: dict[str, Any], **grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`call` without its guard, which is not for several threads at once."""
    if not ON_CUDA or _forced_path is None:
        return run(inputs)
    path = _forced_path if is_aligned(inputs) else "staged"
    return torch.ops.kda.chunk_fwd_planned(**inputs, path=path, segment_chunks=0, **grid)


def call_by(path: str, inputs: dict[str, Any], **grid: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, chunk_states) by the kernels of one path; grid: what the planner would choose."""
    with kernels_only():
        return torch.ops.kda.chunk_fwd_planned(**inputs, path=path, **grid)


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the function, and its static outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def redraw(inputs: dict[str, Any], offsets: Tensor, outputs: Iterable[Tensor]) -> int:
    """For a replay of a captured call: other cu_seqlens and tokens, and NaN behind the last sequence and in what the
    replay has to write. Returns where the last sequence ends."""
    end = int(offsets[-1])
    inputs["cu_seqlens"].copy_(offsets)
    for name in BY_TOKEN:
        inputs[name].normal_()
        inputs[name][:, end:] = torch.nan
    for output in outputs:
        output.fill_(torch.nan)
    return end


def reference(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The token recurrence in fp64, on the device of the inputs; differentiable."""
    return recurrent_kda(**{name: x for name, x in inputs.items() if name in _REFERENCE_ARGUMENTS})


def composite_fp32(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The composite implementation on the same inputs, with fp32 outputs: a second opinion, fast for long sequences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = {name: inputs[name].float() for name in ("q", "k", "v")}
        return torch.ops.kda.chunk_fwd_composite(**{**inputs, **wide})


def _block_rms(x: Tensor, name: str) -> Tensor:
    """RMS of x by blocks: of o [B, T, HV, V] by LOCAL_TOKENS tokens, of a state [.., rows, columns] by as many rows."""
    x = x.movedim(1, -2) if name == "o" else x  # o: [B, HV, T, V]
    rows = x.shape[-2]
    squares = torch.nn.functional.pad(x.double().square().mean(-1), (0, -rows % LOCAL_TOKENS))
    counts = torch.full((squares.shape[-1] // LOCAL_TOKENS,), float(LOCAL_TOKENS), dtype=torch.float64, device=x.device)
    if rows % LOCAL_TOKENS:
        counts[-1] = rows % LOCAL_TOKENS
    return (squares.unflatten(-1, (-1, LOCAL_TOKENS)).sum(-1) / counts).sqrt()


def local_error(name: str, actual: Tensor, expected: Tensor) -> float:
    """The largest error of a block, see LOCAL_FACTOR."""
    if actual.numel() == 0:
        return 0.0
    error = _block_rms(actual.double() - expected.double(), name)
    whole = expected.double().square().mean().sqrt()
    size = _block_rms(expected, name).clamp(min=LOCAL_FLOOR * float(whole))
    return float(torch.where(error == 0, 0.0, error / size).max())


def assert_contract(inputs: dict[str, Any], outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The outputs keep the accuracy contract, as a whole and block by block, and have the promised types and layout."""
    limits = {"o": O_RELATIVE_RMSE, "final_state": STATE_RELATIVE_RMSE, "chunk_states": STATE_RELATIVE_RMSE}
    for name, actual, e in zip(OUTPUTS, outputs, expected, strict=True):
        assert actual.dtype == (inputs["v"].dtype if name == "o" else torch.float32), name
        assert actual.is_contiguous(), name
        if not inputs.get(REQUESTED_BY.get(name, ""), name == "o"):
            assert actual.shape == (0,), f"{name} was not requested"
            continue
        error, local = relative_rmse(actual, e), local_error(name, actual, e)
        assert error <= limits[name], f"{name}: relative RMSE {error:.2e} > {limits[name]:.1e}"
        assert local <= LOCAL_FACTOR * limits[name], (
            f"{name}: a block misses by {local:.2e}, all of it by {error:.2e} only"
        )


def bits(x: Tensor) -> Tensor:
    """The tensor as integers, so that equality tells -0 from 0 and a NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    different = bits(actual) != bits(expected)
    assert not different.any(), f"{what}: {int(different.sum())} of {actual.numel()} elements differ in their bits"


def assert_all_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str = "") -> None:
    for name, a, e in zip(OUTPUTS, actual, expected, strict=True):
        assert_same_bits(a, e, f"{what} {name}".strip())


def plan(inputs: dict[str, Any]) -> dict[str, Any]:
    """The planner's answer for a call whose inputs are aligned."""
    B, T, H, K = inputs["q"].shape
    HV, V = inputs["v"].shape[2:]
    cu_seqlens = inputs.get("cu_seqlens")
    lengths = [T] if cu_seqlens is None else [T, *(0 for _ in range(cu_seqlens.numel() - 2))]  # contents do not matter
    device = torch.cuda.get_device_properties(inputs["q"].device)
    return json.loads(
        torch.ops.kda.plan_chunk_fwd(
            lengths,
            B,
            H,
            HV,
            K,
            V,
            str(inputs["q"].dtype).removeprefix("torch."),
            cu_seqlens is not None,
            device.major * 10 + device.minor,
            device.multi_processor_count,
            bool(inputs.get("use_gate")) and inputs.get("lower_bound") is not None,
            bool(inputs.get("use_qk_l2norm")) and bool(inputs.get("use_beta_sigmoid")),
        )
    )


def check_launches(run_call: Callable[[], object], kernels: tuple[str, ...], memsets: int = 0) -> None:
    """A call launches each of the kernels once, and nothing else but so many memsets."""
    run_call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run_call()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    for kernel in kernels:
        assert sum(kernel in name for name in on_device) == 1, on_device
    others = [name for name in on_device if not any(kernel in name for kernel in kernels)]
    assert len(others) == memsets and all("memset" in name.lower() for name in others), others


def odd_strides(x: Tensor) -> Tensor:
    """The values of ``x`` [B, T, ...] at an odd offset and with an odd token stride: nothing is aligned. NaN around."""
    width = x[0, 0].numel()
    wide = torch.full((*x.shape[:2], width + 3), torch.nan, dtype=x.dtype, device=x.device)
    return wide[:, :, 1 : 1 + width].unflatten(2, x.shape[2:]).copy_(x)


def spread_last(x: Tensor) -> Tensor:
    """The values of ``x`` with a last dimension that is not contiguous, NaN between."""
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


def only_sequence(inputs: dict[str, Any], n: int) -> dict[str, Any]:
    """Sequence ``n`` of a packed call, as a call of its own."""
    begin, end = inputs["cu_seqlens"][n : n + 2].tolist()
    alone = {name: x for name, x in inputs.items() if name != "cu_seqlens"}
    alone |= {name: inputs[name][:, begin:end] for name in ("q", "k", "v", "g", "beta")}
    if "initial_state" in inputs:
        alone["initial_state"] = inputs["initial_state"][n : n + 1]
    return alone
