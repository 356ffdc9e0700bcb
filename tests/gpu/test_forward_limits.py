"""The edges of the CUDA forward: memory that a call takes and leaves behind, tensors beyond 2^31 elements, grids beyond
2^16, contents of cu_seqlens that no caller should pass, several GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CHUNK_TOKENS, make_inputs, slice_tokens
from gpu_support import (
    DEVICE,
    all_paths,  # noqa: F401  (a fixture)
    assert_all_same_bits,
    assert_contract,
    assert_same_bits,
    call,
    gpu_tests,
    needs_cuda,
    odd_strides,
    plan,
    reference,
)

from kda_cuda.accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE

pytestmark = gpu_tests

GIB = 2**30

SHAPES: dict[str, dict[str, Any]] = {
    "batch": dict(B=3, T=150, H=2, HV=4, K=128, V=64),
    "packed": dict(lengths=[1, 0, 64, 65, 200], H=2, K=64, V=128),
    "one_token": dict(T=1, K=128, V=128),
    "no_tokens": dict(T=0),
    "large": dict(T=3000, H=16, K=128, V=128),
}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# --- Memory ---------------------------------------------------------------------------------------------------------


@needs_cuda
@all_shapes
@pytest.mark.parametrize("states", [False, True], ids=["o", "states"])
def test_memory_of_a_call(shape: dict[str, Any], states: bool) -> None:
    """A call allocates its outputs and one workspace of the planned size, to the byte, if it needs one, and keeps the
    outputs alone.
    """
    inputs = make_inputs(
        "long", with_state=True, output_final_state=states, output_chunk_states=states, device=DEVICE, **shape
    )
    call(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    outputs = call(inputs)
    after = torch.cuda.memory_stats()
    kept = [x.numel() * x.element_size() for x in outputs if x.numel() > 0]
    planned = plan(inputs)["workspace_bytes"]
    workspace = [planned] if inputs["q"].numel() > 0 and planned > 0 else []

    def grown(name: str) -> int:
        return after[name] - before[name]

    assert grown("requested_bytes.all.allocated") == sum(kept + workspace)
    assert grown("allocation.all.allocated") == len(kept + workspace)
    assert grown("allocation.all.freed") == len(workspace)
    assert after["requested_bytes.all.peak"] - before["requested_bytes.all.current"] == sum(kept + workspace)
    assert grown("requested_bytes.all.current") == sum(kept)


def workspace_bytes(inputs: dict[str, Any]) -> int:
    """What a call allocates beside its outputs, and gives back."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    outputs = call(inputs)
    kept = sum(x.numel() * x.element_size() for x in outputs)
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - kept


@needs_cuda
@all_shapes
@pytest.mark.usefixtures("all_paths")
@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
def test_every_byte_that_is_read_was_written(shape: dict[str, Any], odd: bool) -> None:
    """Outputs and workspace full of NaN before the call: the same bits, and no NaN in any output."""
    inputs = make_inputs("long", with_state=True, device=DEVICE, **shape)
    if odd:
        inputs |= {name: odd_strides(inputs[name]) for name in ("q", "k", "v", "g", "beta") if inputs[name].numel()}
    expected = call(inputs)
    sizes = [x.numel() * x.element_size() for x in expected] + [workspace_bytes(inputs)]
    # The allocator gives the same blocks to the same sequence of requests, once it has them all: those of the second
    # round are those of the call.
    for _ in range(2):
        poison = [torch.empty(size, dtype=torch.uint8, device=DEVICE).fill_(0xFF) for size in sizes]
        addresses = [x.data_ptr() for x in poison[:3]]
        del poison
    outputs = call(inputs)
    poisoned = [x.data_ptr() == address for x, address in zip(outputs, addresses, strict=True) if x.numel() > 0]
    assert all(poisoned), "the outputs lie elsewhere: the test is blind"
    assert all(x.isfinite().all() for x in outputs)
    assert_all_same_bits(outputs, expected)


@needs_cuda
def test_a_thousand_calls_leave_nothing_behind() -> None:
    inputs = make_inputs("long", lengths=[70, 0, 130], with_state=True, device=DEVICE)
    call(inputs)
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        call(inputs)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated  # less, if Python collects what other tests left
    assert torch.cuda.memory_reserved() <= reserved + 64 * 2**20  # at most what two generations of outputs need


# --- Large ----------------------------------------------------------------------------------------------------------


def need_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free / GIB:.0f}")


@needs_cuda
@pytest.mark.slow
@pytest.mark.usefixtures("all_paths")
def test_q_and_states_beyond_2_to_the_31_elements() -> None:
    """q, k, v, g, o, a workspace and chunk_states all pass 2^31 elements: the last tokens have the bits that they
    have as a call of their own from the state on the way, and keep the contract."""
    need_memory(85)
    H, D, tail = 128, 128, 1024
    T = 2**31 // (H * D) + CHUNK_TOKENS + tail
    begin = T - tail
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        for block in x.view(-1).split(2**28):
            block.normal_(generator=generator)
        return x

    inputs: dict[str, Any] = {name: randn(1, T, H, D) for name in ("q", "k", "v", "g")}
    inputs |= dict(
        beta=randn(1, T, H),
        A_log=torch.zeros(H, device=DEVICE),
        dt_bias=torch.full((H * D,), -4.0, device=DEVICE),
        lower_bound=-5.0,
        use_gate=True,
        use_qk_l2norm=True,
        use_beta_sigmoid=True,
        output_final_state=True,
        output_chunk_states=True,
    )
    o, final_state, chunk_states = call(inputs)
    assert min(x.numel() for x in (inputs["q"], inputs["v"], o, chunk_states)) > 2**31
    assert begin * H * D > 2**31 and (begin // CHUNK_TOKENS) * H * D * D > 2**31
    state = chunk_states[:, begin // CHUNK_TOKENS].clone()
    last_states = chunk_states[:, begin // CHUNK_TOKENS :].clone()
    del chunk_states
    rest = {**slice_tokens(inputs, begin, T), "initial_state": state}
    assert_all_same_bits(call(rest), (o[:, begin:].contiguous(), final_state, last_states))
    assert_contract(rest, call(rest), reference(rest))
    offsets = torch.tensor([0, begin, begin, T], dtype=torch.int32, device=DEVICE)  # of tokens, not of elements
    packed = dict(inputs, cu_seqlens=offsets, output_chunk_states=False)
    o_packed, state_packed, _ = call(packed)
    fresh = call({**slice_tokens(inputs, begin, T), "output_chunk_states": False})
    assert_same_bits(o_packed[:, begin:].contiguous(), fresh[0])
    assert_same_bits(state_packed[2:], fresh[1])
    assert_same_bits(o_packed[:, begin - tail : begin].contiguous(), o[:, begin - tail : begin].contiguous())
    del inputs, o, o_packed, packed, rest
    torch.cuda.empty_cache()


def relative_rmse_on_device(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@needs_cuda
def test_seventy_thousand_sequences() -> None:
    """More CTAs than 2^16, and a search for the sequence of each. One token each: o = scale beta (q k) v."""
    N, D = 70_000, 64
    inputs = make_inputs("long", T=N, H=1, K=D, V=D, output_chunk_states=False, device=DEVICE)
    inputs["cu_seqlens"] = torch.arange(N + 1, dtype=torch.int32, device=DEVICE)
    o, final_state, _ = call(inputs)
    q, k = (torch.nn.functional.normalize(inputs[name][0, :, 0].float(), dim=-1) for name in ("q", "k"))  # [N, D]
    u = inputs["beta"][0].float().sigmoid() * inputs["v"][0, :, 0].float()  # [N, D]
    expected = D**-0.5 * (q * k).sum(-1, keepdim=True) * u
    assert relative_rmse_on_device(o[0, :, 0], expected) <= O_RELATIVE_RMSE
    assert relative_rmse_on_device(final_state[:, 0], k.unsqueeze(-1) * u.unsqueeze(-2)) <= STATE_RELATIVE_RMSE


@needs_cuda
@pytest.mark.usefixtures("all_paths")
def test_many_heads_in_a_batch() -> None:
    """2^17 sequences and value heads of a batch: rows of equal contents have equal bits."""
    B, HV = 512, 256
    row = make_inputs("long", T=3, H=64, HV=HV, with_state=True, device=DEVICE)
    expected = call(row)
    batch = dict(row)
    for name in ("q", "k", "v", "g", "beta", "initial_state"):
        batch[name] = row[name].repeat(B, *(1 for _ in row[name].shape[1:]))
    for output, e in zip(call(batch), expected, strict=True):
        assert_same_bits(output, e.expand_as(output))


# --- Contents of cu_seqlens that are wrong --------------------------------------------------------------------------

T_WRONG = 300
WRONG_CONTENTS: dict[str, list[int]] = {
    "decreasing": [0, 200, 100, T_WRONG],
    "reversed": [T_WRONG, 200, 100, 0],
    "negative": [0, -5, 100, T_WRONG],
    "all_negative": [-400, -300, -200, -100],
    "not_from_zero": [130, 200, 250, T_WRONG],
    "beyond": [0, 100, 301, 5000],
    "all_beyond": [1000, 2000, 3000, 4000],
    "largest": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    "smallest": [-(2**31), -(2**31), 0, 2**31 - 1],
    "alternating": [0, T_WRONG, 0, T_WRONG],
    "all_of_it_thrice": [0, T_WRONG, T_WRONG, 0],
}


@needs_cuda
@pytest.mark.parametrize("contents", WRONG_CONTENTS.values(), ids=WRONG_CONTENTS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_wrong_contents_harm_nothing(contents: list[int], index_dtype: torch.dtype) -> None:
    """Without the check the outputs mean nothing, but no memory is touched that is not the call's (the sanitizer set
    has these calls too): the call ends, the inputs are as they were, and the next call is right."""
    inputs = make_inputs("long", lengths=[100, 0, 200], HV=4, with_state=True, index_dtype=index_dtype, device=DEVICE)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    expected = call(inputs)
    if index_dtype == torch.int64:
        contents = [x << 31 if abs(x) >= 2**31 - 1 else x for x in contents]
    wrong = dict(inputs, cu_seqlens=torch.tensor(contents, dtype=index_dtype, device=DEVICE))
    outputs = call(wrong)
    torch.cuda.synchronize()
    assert [x.shape for x in outputs] == [x.shape for x in expected]
    for name, x in before.items():
        assert_same_bits(inputs[name], x, name)
    assert_all_same_bits(call(inputs), expected)


# --- Several GPUs ---------------------------------------------------------------------------------------------------


@needs_cuda
def test_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = make_inputs("long", lengths=[70, 0, 130], with_state=True, device="cuda:0")
    expected = call(inputs)
    there = {name: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with torch.cuda.device(0):
        outputs = call(there)
        assert torch.cuda.current_device() == 0
        assert torch.ones(1, device="cuda").device.index == 0
        assert_all_same_bits(call(inputs), expected)
    assert all(x.device == torch.device("cuda:1") for x in outputs)
    assert_all_same_bits(tuple(x.to("cuda:0") for x in outputs), expected)
    mixed = dict(inputs, beta=there["beta"])
    with pytest.raises(RuntimeError, match="argument `beta`: expected device cuda:0 as `q` is, got cuda:1"):
        call(mixed)
