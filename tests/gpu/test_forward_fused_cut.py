"""The fused kernel on stretches that begin anywhere in a chain of (sequence, value head): it does the chains whose
gates forget all that was before the cuts, and leaves the others to the stages of the stepwise path."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import make_inputs
from gpu_support import (
    BY_TOKEN,
    DEVICE,
    all_dtypes,
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
    plan,
    redraw,
)
from torch import Tensor

pytestmark = [*gpu_tests, needs_cuda]

CLUSTERS = (None, 1, 3, 7)
STEP_TOKENS = 32
SLOW_LOGIT = -12.0  # of a bounded gate: hardly any decay


def fused_cut(
    inputs: dict[str, Any], clusters: int | None = None, segment_chunks: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, chunk_states) on at most so many clusters, and with such segments for what these leave."""
    return call_by("fused_cut", inputs, clusters=clusters, segment_chunks=segment_chunks)


def stepwise(inputs: dict[str, Any], segment_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    return call_by("stepwise", inputs, segment_chunks=segment_chunks)


def check(inputs: dict[str, Any], counts: tuple[int | None, ...] = CLUSTERS) -> None:
    """Any number of clusters against the composite implementation, twice: the same bits on every run."""
    expected = composite_fp32(inputs)
    for clusters in counts:
        outputs = fused_cut(inputs, clusters)
        assert_contract(inputs, outputs, expected)
        assert_all_same_bits(fused_cut(inputs, clusters), outputs, f"{clusters} clusters, again")


def with_slow_heads(inputs: dict[str, Any], first: int = 0, step: int = 2) -> dict[str, Any]:
    """Gates of every second head, or of others, hardly decay; those without a bound stay as they are."""
    if "lower_bound" not in inputs:
        return inputs
    g = inputs["g"].clone()
    g[:, :, first::step] += SLOW_LOGIT
    return inputs | {"g": g}


# --- Gates that forget, that remember, and both ---------------------------------------------------------------------


@all_families
@all_head_sizes
@all_dtypes
@pytest.mark.parametrize("state_v_first", [False, True])
def test_every_instantiation(family: str, K: int, V: int, dtype: torch.dtype, state_v_first: bool) -> None:
    """Four value heads of two key heads, 21 steps each, from a state."""
    options: dict[str, Any] = dict(with_state=True, state_v_first=state_v_first, device=DEVICE)
    check(make_inputs(family, T=650, H=2, HV=4, K=K, V=V, dtype=dtype, **options))


@all_head_sizes
@pytest.mark.parametrize(("first", "step"), [(0, 2), (1, 2), (3, 5), (0, 5)])
def test_some_heads_remember(K: int, V: int, first: int, step: int) -> None:
    """Each chain is taken from the kernels that its own gates choose."""
    inputs = make_inputs("random", T=650, H=5, K=K, V=V, with_state=True, device=DEVICE)
    check(with_slow_heads(inputs, first, step))


def test_gates_that_remember_at_one_cut() -> None:
    """Steep gates but for a stretch of tokens: wherever that lies, whole chains are right."""
    for first in range(0, 1900, 130):
        inputs = make_inputs("random", T=2048, H=2, K=128, V=128, with_state=True, device=DEVICE)
        g = inputs["g"].clone()
        g[:, first : first + 100, 1] += SLOW_LOGIT
        check(inputs | {"g": g}, (None, 5))


@all_families
@all_head_sizes
def test_what_is_left_is_that_of_the_stepwise_path(family: str, K: int, V: int) -> None:
    """Bit for bit, with the same segments: all of a call with gates that hardly decay."""
    inputs = make_inputs(family, T=1000, H=3, K=K, V=V, with_state=True, device=DEVICE)
    if family != "long":
        inputs = with_slow_heads(inputs, step=1)
    for segment_chunks in (0, 3):
        expected = stepwise(inputs, segment_chunks)
        for clusters in (5, None):
            outputs = fused_cut(inputs, clusters, segment_chunks)
            assert_contract(inputs, outputs, expected)
            if family == "long":
                assert_all_same_bits(outputs, expected, f"{segment_chunks} chunks, {clusters} clusters")


@all_head_sizes
def test_gates_that_only_seem_to_forget(K: int, V: int) -> None:
    """Each channel decays steeply at every second token, so that none keeps anything by itself; but keys that lie in
    two channels move the state from one to the other, and half of it is left of each token. The map of the steps says
    so, where the decays of the channels do not.
    """
    inputs = make_inputs("random", T=2000, H=2, K=K, V=V, with_state=True, device=DEVICE)
    tokens, channels = torch.arange(2000, device=DEVICE), torch.arange(K, device=DEVICE)
    decays = (tokens[:, None] + channels[None, :]) % 2 == 0
    inputs["g"] = torch.where(decays, 30.0, -30.0)[None, :, None, :].expand_as(inputs["g"]).to(inputs["g"]).contiguous()
    inputs["A_log"], inputs["dt_bias"] = torch.zeros_like(inputs["A_log"]), torch.zeros_like(inputs["dt_bias"])
    inputs["k"] = torch.where(channels < 2, 1.0, 0.0).expand_as(inputs["k"]).to(inputs["k"]).contiguous()
    inputs["beta"] = torch.full_like(inputs["beta"], 8.0)
    check(inputs)
    assert_all_same_bits(fused_cut(inputs, None, 3), stepwise(inputs, 3), "left to the stepwise stages")


# --- Wherever the cuts lie ------------------------------------------------------------------------------------------


@all_families
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_packed_sequences(family: str, index_dtype: torch.dtype) -> None:
    """Empty sequences and lone tokens at the ends, between long ones and side by side; an empty one keeps its state."""
    lengths = [0, 1, 700, 0, 65, 1, 1, 0, 0, 1300, 33, 32, 0]
    inputs = make_inputs(
        family, lengths=lengths, HV=4, K=128, V=128, with_state=True, index_dtype=index_dtype, device=DEVICE
    )
    check(inputs)
    check(with_slow_heads(inputs), (None, 5))
    _, final_state, _ = fused_cut(inputs)
    for n in (n for n, length in enumerate(lengths) if length == 0):
        assert_same_bits(final_state[n], inputs["initial_state"][n])


@pytest.mark.parametrize("family", ["random", "long"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (128, 64)])
def test_every_place_of_a_cut(family: str, K: int, V: int) -> None:
    """The first sequence grows step by step, so that the cuts move over all steps of the others, over the places where
    one chain ends and the next begins, and over an empty one.
    """
    for steps in range(0, 24):
        lengths = [STEP_TOKENS * steps + 7, 300, 0, 96, 1]
        inputs = make_inputs(family, lengths=lengths, H=2, K=K, V=V, with_state=True, device=DEVICE)
        check(inputs, (2, 5, 9))


@pytest.mark.parametrize("family", ["random", "long"])
def test_rows_of_a_batch(family: str) -> None:
    """Equal lengths without cu_seqlens, whose shares are computed without a look at any."""
    for T in (1, 31, 65, 417, 1600):
        check(make_inputs(family, B=3, T=T, H=2, HV=4, K=128, V=128, with_state=True, device=DEVICE))


def test_many_sequences() -> None:
    """More sequences than a CTA has threads."""
    lengths = [(37 * n) % 190 if n % 3 else 0 for n in range(500)] + [3000]
    for family in ("random", "long"):
        check(make_inputs(family, lengths=lengths, H=1, with_state=True, device=DEVICE), (None, 7))


@pytest.mark.parametrize(
    "features",
    [
        dict(allow_neg_eigval=True),
        dict(with_state=False),
        dict(with_state=True, state_dtype=torch.bfloat16),
        dict(output_final_state=False, output_chunk_states=False),
        dict(dtype=torch.float16, gate_dtype=torch.float32),
        dict(gate_dtype=torch.float32, with_state=True),
        dict(strided="head_major", with_state=True),
    ],
    ids=["negative_eigenvalues", "no_state", "bf16_state", "only_o", "fp16", "gates_in_fp32", "head_major"],
)
@all_families
def test_features(family: str, features: dict[str, Any]) -> None:
    check(make_inputs(family, **{"T": 900, "H": 3, "K": 128, "V": 64, "device": DEVICE, **features}))


# --- The plan -------------------------------------------------------------------------------------------------------


def test_gates_may_change_between_replays() -> None:
    """What is left is found anew in each replay of a graph."""
    steep = make_inputs("random", T=3000, H=4, K=128, V=128, with_state=True, device=DEVICE)
    gates = [steep["g"], with_slow_heads(steep)["g"], with_slow_heads(steep, step=1)["g"], steep["g"]]
    static = steep | {"g": steep["g"].clone()}
    graph, outputs = capture(lambda: fused_cut(static))
    for g in gates:
        static["g"].copy_(g)
        graph.replay()
        assert_contract(static, outputs, composite_fp32(static))


@pytest.mark.parametrize("family", ["random", "long"])
def test_sequences_may_change_between_replays(family: str) -> None:
    """Captured once with cu_seqlens; NaN lie behind the last sequence, whose rows of o are zero."""
    inputs = make_inputs(family, lengths=[700, 100, 200, 24], H=2, K=128, V=128, with_state=True, device=DEVICE)
    graph, outputs = capture(lambda: fused_cut(inputs))
    for offsets in ([0, 700, 800, 1000, 1024], [0, 0, 900, 900, 1000], [0, 33, 34, 400, 401], [0, 64, 64, 64, 64]):
        end = redraw(inputs, torch.tensor(offsets), outputs)
        graph.replay()
        used = inputs | {name: inputs[name][:, :end] for name in BY_TOKEN}
        expected = composite_fp32(used)
        assert not outputs[0][:, end:].any()
        slots = expected[2].shape[1]
        assert_contract(used, (outputs[0][:, :end], outputs[1], outputs[2][:, :slots]), expected)


def test_kernels_of_a_call() -> None:
    """One launch of each stage, whatever is left, and nothing else."""
    stages = ("fused_scan", "step_factors", "segment_summary", "segment_compose", "state_scan")
    for family in ("random", "long"):
        inputs = make_inputs(family, T=1000, H=2, K=128, V=128, with_state=True, device=DEVICE)
        check_launches(
            functools.partial(fused_cut, inputs, segment_chunks=3), tuple(f"{stage}_kernel" for stage in stages)
        )


@pytest.mark.parametrize("family", ["random", "long"])
def test_a_call_takes_it_unasked(family: str) -> None:
    """Few heads of a long sequence, whose gates are bounded."""
    inputs = make_inputs(family, T=8192, H=16, K=128, V=128, with_state=True, device=DEVICE)
    assert plan(inputs)["path"] == "fused_cut"
    outputs = call(inputs)
    assert_contract(inputs, outputs, composite_fp32(inputs))


@pytest.mark.parametrize("given", [dict(use_qk_l2norm=False), dict(use_beta_sigmoid=False)], ids=["keys", "beta"])
def test_states_that_may_grow_are_refused(given: dict[str, bool]) -> None:
    """No map says what is left of a state that the tokens before may have enlarged."""
    inputs = make_inputs("random", T=300, device=DEVICE, **given)
    if not inputs["use_beta_sigmoid"]:
        inputs["beta"] = inputs["beta"].float().sigmoid()
    with pytest.raises(RuntimeError, match="argument `path`: q and k are not normalised, or beta"):
        fused_cut(inputs)
