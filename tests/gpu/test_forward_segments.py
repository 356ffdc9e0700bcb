"""The cut of sequences into segments, forced onto calls that the planner would not cut: the contract of any call,
whatever the length of a segment, and what the cut itself promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CHUNK_TOKENS, make_inputs
from gpu_support import (
    BY_TOKEN,
    DEVICE,
    OUTPUTS,
    all_families,
    all_head_sizes,
    assert_all_same_bits,
    assert_contract,
    assert_same_bits,
    call,
    call_by,
    capture,
    check_launches,
    composite_fp32,
    gpu_tests,
    needs_cuda,
    odd_strides,
    plan,
    redraw,
    reference,
)
from torch import Tensor

from kda_cuda.accuracy import relative_rmse

pytestmark = [*gpu_tests, needs_cuda]

SEGMENT_CHUNKS = [1, 2, 5]

all_segments = pytest.mark.parametrize("segment_chunks", SEGMENT_CHUNKS)


def cut(inputs: dict[str, Any], segment_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, chunk_states) by the stepwise kernels with segments of so many chunks; 0: not cut."""
    return call_by("stepwise", inputs, segment_chunks=segment_chunks)


def check(inputs: dict[str, Any], segment_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the cut and checks it against the recurrence; returns its outputs."""
    outputs = cut(inputs, segment_chunks)
    assert_contract(inputs, outputs, reference(inputs))
    return outputs


@all_families
@all_head_sizes
@all_segments
def test_every_instantiation(family: str, K: int, V: int, segment_chunks: int) -> None:
    """Ten chunks and a partial one, grouped heads, from a state, in both layouts."""
    for v_first in (False, True):
        inputs = make_inputs(family, T=650, H=2, HV=4, K=K, V=V, with_state=True, state_v_first=v_first, device=DEVICE)
        check(inputs, segment_chunks)


@all_families
@all_segments
def test_packed_sequences(family: str, segment_chunks: int) -> None:
    """One long sequence among short and empty ones, of each remainder of a segment; an empty one keeps its state."""
    lengths = [0, 1, 64 * segment_chunks, 0, 700, 64 * segment_chunks + 1, 63, 129, 0]
    for index_dtype in (torch.int32, torch.int64):
        inputs = make_inputs(
            family, lengths=lengths, HV=4, K=64, V=128, with_state=True, index_dtype=index_dtype, device=DEVICE
        )
        _, final_state, _ = check(inputs, segment_chunks)
        for n in (n for n, length in enumerate(lengths) if length == 0):
            assert_same_bits(final_state[n], inputs["initial_state"][n])


@pytest.mark.parametrize("segment_chunks", [1, 3])
def test_many_sequences(segment_chunks: int) -> None:
    """Hundreds of sequences, more than one round of the search for a slot's sequence."""
    lengths = [(37 * n) % 190 if n % 3 else 0 for n in range(300)] + [900]
    inputs = make_inputs("long", lengths=lengths, H=1, with_state=True, device=DEVICE)
    check(inputs, segment_chunks)


@pytest.mark.parametrize(
    "features",
    [
        dict(use_qk_l2norm=True, use_beta_sigmoid=True, allow_neg_eigval=True),
        dict(with_state=False),
        dict(with_state=True, state_dtype=torch.bfloat16),
        dict(output_final_state=False, output_chunk_states=False),
        dict(dtype=torch.float16, gate_dtype=torch.float32),
        dict(B=3),
    ],
    ids=["negative_eigenvalues", "no_state", "bf16_state", "only_o", "fp16", "batch"],
)
@all_families
def test_features(family: str, features: dict[str, Any]) -> None:
    check(make_inputs(family, **{"T": 450, "K": 128, "V": 64, "device": DEVICE, **features}), 2)


def test_inputs_that_are_not_aligned_are_not_cut() -> None:
    """The stepwise path does not take them, and the staged one does not cut: what was asked for is refused."""
    inputs = make_inputs("long", T=450, K=128, V=128, with_state=True, device=DEVICE)
    odd = inputs | {name: odd_strides(inputs[name]) for name in BY_TOKEN}
    with pytest.raises(RuntimeError, match="argument `path`: .*16 bytes"):
        cut(odd, 2)
    with pytest.raises(RuntimeError, match="argument `segment_chunks`: expected none or 0"):
        torch.ops.kda.chunk_fwd_planned(**odd, segment_chunks=2)


@pytest.mark.parametrize("rate", [1e-3, 0.05, 0.5, 1.0, 1.05, 1.1, 1.2, 2.0, 20.0])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128)])
def test_memory_that_ends_inside_a_segment(rate: float, K: int, V: int) -> None:
    """A map is given up where its last 64 tokens leave less than 2^-100: rates that let it fade early, that are just
    enough or just not, and that never do. Also where that may not be looked at.
    """
    inputs = make_inputs("unbounded_log", T=1500, H=2, K=K, V=V, with_state=True, device=DEVICE)
    inputs["g"] = torch.full_like(inputs["g"], -rate)
    for use_beta_sigmoid in (True, False):
        beta = inputs["beta"] if use_beta_sigmoid else inputs["beta"].sigmoid()
        check({**inputs, "beta": beta, "use_beta_sigmoid": use_beta_sigmoid}, 5)


def test_maps_that_fade_beside_maps_that_do_not() -> None:
    """One head forgets within two tokens and one hardly ever; a third forgets in every second segment, by turns with a
    fourth: whether a map has faded is looked at for each head and segment.
    """
    segment_chunks, T = 2, 900
    inputs = make_inputs("unbounded_log", T=T, H=4, K=64, V=128, with_state=True, device=DEVICE)
    is_even = torch.arange(T, device=DEVICE) // (segment_chunks * CHUNK_TOKENS) % 2 == 0
    steep, shallow = torch.full((T,), -20.0, device=DEVICE), torch.full((T,), -1e-3, device=DEVICE)
    rates = [steep, shallow, torch.where(is_even, steep, shallow), torch.where(is_even, shallow, steep)]
    inputs["g"] = torch.stack(rates, -1)[None, :, :, None].expand_as(inputs["g"]).to(inputs["g"].dtype).contiguous()
    check(inputs, segment_chunks)


def test_a_channel_that_remembers_among_those_that_forget() -> None:
    """One channel of the keys carries the state over whole segments: the map has not faded, whatever the others do."""
    inputs = make_inputs("unbounded_log", T=900, H=2, K=128, V=64, with_state=True, device=DEVICE)
    inputs["g"] = torch.full_like(inputs["g"], -20.0)
    inputs["g"][..., 77] = 0.0
    inputs["initial_state"] = 100.0 * inputs["initial_state"]
    check(inputs, 2)


def growing_inputs(of_keys: bool) -> dict[str, Any]:
    """Segments of 128 tokens whose first half multiplies the state along one key by (1 - beta |k|^2)^64, about 2^101,
    and whose second half hardly writes and decays by 2^-102.
    """
    T = 640
    inputs = make_inputs(
        "unbounded_log", T=T, H=2, K=64, V=64, with_state=True, gate_dtype=torch.float32, device=DEVICE
    )
    grows = (torch.arange(T, device=DEVICE) % 128 < 64)[None, :, None]
    inputs["g"] = torch.where(grows[..., None], 0.0, -1.1).expand_as(inputs["g"]).contiguous()
    unit = torch.nn.functional.normalize(inputs["k"][:, :1].float(), dim=-1)
    inputs["initial_state"] = 64.0 * inputs["initial_state"]
    if of_keys:  # of norm 2
        inputs |= {"k": (2.0 * unit).expand_as(inputs["k"]).to(inputs["k"].dtype), "use_qk_l2norm": False}
        inputs["q"] = 0.1 * inputs["q"]
        inputs["beta"] = torch.where(grows, 12.0, -8.0).expand_as(inputs["beta"]).contiguous()
    else:  # of beta of 4
        inputs["k"] = unit.expand_as(inputs["k"]).to(inputs["k"].dtype)
        inputs |= {"beta": torch.where(grows, 4.0, 3e-4).expand_as(inputs["beta"]).contiguous()}
        inputs["use_beta_sigmoid"] = False
    return inputs | {"k": inputs["k"].contiguous()}


@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "beta"])
def test_maps_that_grow_are_not_given_up(of_keys: bool) -> None:
    """Keys of norm 2, or beta of 4: the map of the last tokens is negligible, that of the segment is not. What bf16
    operands cost there they cost without a cut as well; a map that was taken as 0 would miss by all of it.
    """
    inputs = growing_inputs(of_keys=of_keys)
    expected = reference(inputs)
    for segment_chunks in (0, 2):
        for name, actual, e in zip(OUTPUTS, cut(inputs, segment_chunks), expected, strict=True):
            assert actual.isfinite().all(), name
            assert relative_rmse(actual, e) <= 0.3, f"{name}, segments of {segment_chunks} chunks"


@pytest.mark.parametrize("segment_chunks", [1, 2, 5])
def test_keys_that_repeat(segment_chunks: int) -> None:
    """No forgetting and beta near 2: a map is a product of reflections, whose sums cancel. What bf16 operands cost
    there they cost without a cut as well; the cut adds nothing."""
    inputs = make_inputs("unbounded_log", T=640, H=2, with_state=True, allow_neg_eigval=True, device=DEVICE)
    inputs["g"] = torch.zeros_like(inputs["g"])
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 7.6)
    expected = reference(inputs)
    for name, actual, uncut, e in zip(OUTPUTS, cut(inputs, segment_chunks), cut(inputs, 0), expected, strict=True):
        assert relative_rmse(actual, e) <= 1.1 * relative_rmse(uncut, e), name


@all_families
@pytest.mark.parametrize("segment_chunks", [8, 32])
def test_thousands_of_tokens(family: str, segment_chunks: int) -> None:
    """No drift over 17 segments."""
    inputs = make_inputs(family, T=8300, H=2, HV=4, K=128, V=128, with_state=True, device=DEVICE)
    assert_contract(inputs, cut(inputs, segment_chunks), composite_fp32(inputs))


@all_families
def test_one_segment_is_no_cut(family: str) -> None:
    """With segments as long as the sequence the arithmetic is that of the uncut recurrence, and so are all bits."""
    inputs = make_inputs(family, lengths=[300, 0, 130], with_state=True, device=DEVICE)
    assert_all_same_bits(cut(inputs, 5), cut(inputs, 0))


def test_chunk_states_resume_the_run() -> None:
    """The states at the borders of segments are those that the recurrence goes on from: the same bits."""
    segment_chunks = 2
    inputs = make_inputs("long", T=500, H=2, K=64, V=128, with_state=True, device=DEVICE)
    o, final_state, chunk_states = cut(inputs, segment_chunks)
    begin = 3 * segment_chunks * CHUNK_TOKENS  # of the last segment
    rest = inputs | {name: inputs[name][:, begin:] for name in BY_TOKEN}
    o_rest, final_rest, _ = cut({**rest, "initial_state": chunk_states[:, 3 * segment_chunks]}, 0)
    assert_same_bits(o_rest, o[:, begin:])
    assert_same_bits(final_rest, final_state)


@pytest.mark.parametrize("segment_chunks", [1, 4])
def test_same_bits_every_time(segment_chunks: int) -> None:
    inputs = make_inputs(
        "long", lengths=[2000, 1, 0, 64, 333, 1500], H=8, HV=16, K=128, V=128, with_state=True, device=DEVICE
    )
    expected, held = cut(inputs, segment_chunks), []
    for n in range(10):
        held.append(torch.full((1 + n << 18,), torch.nan, device=DEVICE))
        assert_all_same_bits(cut(inputs, segment_chunks), expected)


def test_graph_replays_with_other_sequences() -> None:
    """One graph; at each replay every sequence has the bits that it has alone. NaN lie behind the last one."""
    segment_chunks, tokens = 2, 900
    inputs = make_inputs("long", lengths=[300] * 3, K=64, V=64, with_state=True, device=DEVICE)
    graph, outputs = capture(lambda: cut(inputs, segment_chunks))
    for lengths in ([900, 0, 0], [0, 899, 1], [64, 128, 129], [0, 0, 0], [700, 100, 100]):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        redraw(inputs, offsets, outputs)
        graph.replay()
        o, final_state, _ = outputs
        assert not o[:, sum(lengths) :].any() and o.shape[1] == tokens
        for n, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
            alone = {name: x for name, x in inputs.items() if name != "cu_seqlens"}
            alone |= {name: inputs[name][:, begin:end] for name in BY_TOKEN}
            alone["initial_state"] = inputs["initial_state"][n : n + 1]
            o_alone, final_alone, _ = cut(alone, segment_chunks)
            assert_same_bits(o[:, begin:end], o_alone, f"{lengths}: sequence {n}")
            assert_same_bits(final_state[n : n + 1], final_alone, f"{lengths}: sequence {n}")


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_a_cut_call_is_four_kernels(packed: bool) -> None:
    shape: dict[str, Any] = {"lengths": [70, 0, 330]} if packed else {"B": 2, "T": 300}
    inputs = make_inputs("long", with_state=True, device=DEVICE, output_chunk_states=False, **shape)
    check_launches(
        lambda: cut(inputs, 1),
        ("step_factors_kernel", "segment_summary_kernel", "segment_compose_kernel", "state_scan_kernel"),
    )


@all_families
def test_a_long_sequence_is_cut_unasked(family: str) -> None:
    """Few heads and a long sequence: the plan has segments, and the call keeps the contract."""
    inputs = make_inputs(family, T=16384 + 100, H=2, K=128, V=128, with_state=True, device=DEVICE)
    planned = plan(inputs)
    assert planned["path"] in ("stepwise", "fused_cut") and planned["segment_chunks"] > 0
    assert_contract(inputs, call(inputs), composite_fp32(inputs))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(path="other"), "argument `path`: expected stepwise, fused_cut, fused, staged or nothing, got other"),
        (dict(segment_chunks=-1), "argument `segment_chunks`: expected at least 0, got -1"),
        (
            dict(path="fused", segment_chunks=1),
            "argument `segment_chunks`: expected none or 0 with path fused or staged",
        ),
        (
            dict(path="staged", segment_chunks=1),
            "argument `segment_chunks`: expected none or 0 with path fused or staged",
        ),
        (
            dict(path="stepwise", value_tile=64),
            "argument `value_tile`: expected none with path stepwise, fused_cut or fused",
        ),
        (
            dict(path="fused", value_tile=64),
            "argument `value_tile`: expected none with path stepwise, fused_cut or fused",
        ),
        (dict(value_tile=64), "argument `value_tile`: expected none with path stepwise, fused_cut or fused"),
        (dict(path="staged", value_tile=48), "argument `value_tile`: expected 64 or 128"),
        (dict(path="staged", value_tile=128), "argument `value_tile`: .* at most V = 64, got 128"),
        (dict(path="fused", clusters=0), "argument `clusters`: expected at least 1, got 0"),
        (dict(path="stepwise", clusters=2), "argument `clusters`: expected none with path stepwise or staged, got 2"),
        (
            dict(path="fused_cut", value_tile=64),
            "argument `value_tile`: expected none with path stepwise, fused_cut or fused",
        ),
        (dict(path="fused_cut", clusters=0), "argument `clusters`: expected at least 1, got 0"),
        (dict(path="staged", clusters=2), "argument `clusters`: expected none with path stepwise or staged, got 2"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_wrong_plans_are_refused(wrong: dict[str, Any], message: str) -> None:
    """Nothing that is asked for is ignored."""
    inputs = make_inputs("long", T=70, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kda.chunk_fwd_planned(**inputs, **wrong)


def test_what_a_path_does_not_have_may_be_said() -> None:
    """No segments are all that the fused and the staged path know."""
    inputs = make_inputs("long", T=70, device=DEVICE)
    expected = reference(inputs)
    for path in ("fused", "staged", "stepwise", "fused_cut"):
        assert_contract(inputs, torch.ops.kda.chunk_fwd_planned(**inputs, path=path, segment_chunks=0), expected)
