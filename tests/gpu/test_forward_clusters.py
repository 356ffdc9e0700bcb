"""The fused kernel deals the chains of (sequence, value head) out to clusters in equal shares, and a chain that crosses
a cut is begun by one and finished by another: the same bits whatever the number of clusters is, hence wherever the cuts
lie."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import CHUNK_TOKENS, make_inputs
from gpu_support import (
    BY_TOKEN,
    DEVICE,
    HEAD_SIZES,
    all_dtypes,
    all_families,
    all_head_sizes,
    assert_all_same_bits,
    assert_contract,
    assert_same_bits,
    call,
    call_by,
    capture,
    composite_fp32,
    gpu_tests,
    kernels_only,
    needs_cuda,
    only_sequence,
    plan,
    redraw,
)
from torch import Tensor

pytestmark = [*gpu_tests, needs_cuda]

CLUSTERS = (1, 2, 3, 5)
STEP_TOKENS = 32

both_index_dtypes = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])


def dealt(inputs: dict[str, Any], clusters: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, chunk_states) by the fused kernel on at most so many clusters; None: as many as the plan has."""
    return call_by("fused", inputs, clusters=clusters)


def check(inputs: dict[str, Any], counts: tuple[int | None, ...] = (*CLUSTERS, None)) -> tuple[Tensor, Tensor, Tensor]:
    """Checks one number of clusters against the composite implementation, and all of them against each other."""
    outputs = dealt(inputs, counts[0])
    assert_contract(inputs, outputs, composite_fp32(inputs))
    for clusters in counts[1:]:
        assert_all_same_bits(dealt(inputs, clusters), outputs, f"{clusters} clusters")
    return outputs


# --- Wherever the cuts lie ------------------------------------------------------------------------------------------


@all_families
@all_head_sizes
@all_dtypes
@pytest.mark.parametrize("state_v_first", [False, True])
def test_every_instantiation(family: str, K: int, V: int, dtype: torch.dtype, state_v_first: bool) -> None:
    """Seven value heads of one key head, seven steps each: no number of clusters but one has whole chains."""
    options: dict[str, Any] = dict(with_state=True, state_v_first=state_v_first, device=DEVICE)
    check(make_inputs(family, T=200, H=1, HV=7, K=K, V=V, dtype=dtype, **options))


@all_families
@all_head_sizes
@both_index_dtypes
def test_packed_sequences(family: str, K: int, V: int, index_dtype: torch.dtype) -> None:
    """Empty sequences and lone tokens at the ends, between long ones and side by side; an empty one keeps its state."""
    lengths = [0, 1, 300, 0, 65, 1, 1, 0, 0, 130, 33, 32, 0]
    for state_v_first in (False, True):
        inputs = make_inputs(
            family,
            lengths=lengths,
            H=2,
            HV=4,
            K=K,
            V=V,
            with_state=True,
            state_v_first=state_v_first,
            index_dtype=index_dtype,
            device=DEVICE,
        )
        _, final_state, _ = check(inputs)
        for n in (n for n, length in enumerate(lengths) if length == 0):
            assert_same_bits(final_state[n], inputs["initial_state"][n])


@pytest.mark.parametrize("rows", [2, 3])
@all_head_sizes
def test_rows_of_a_batch(rows: int, K: int, V: int) -> None:
    """Equal lengths without cu_seqlens, whose shares are computed without a look at any."""
    for T in (1, 31, 65, 417):
        check(make_inputs("long", B=rows, T=T, H=2, HV=4, K=K, V=V, with_state=True, device=DEVICE))


@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128)])
def test_every_place_of_a_cut(K: int, V: int) -> None:
    """The first sequence grows step by step, so that the cuts move over all steps of the others, over the places where
    one chain ends and the next begins, and over an empty one.
    """
    for steps in range(24):
        lengths = [STEP_TOKENS * steps + 7, 170, 0, 96, 1]
        inputs = make_inputs("long", lengths=lengths, H=1, K=K, V=V, with_state=True, device=DEVICE)
        expected = dealt(inputs, 1)
        for clusters in (2, 3, 4, 5):
            assert_all_same_bits(dealt(inputs, clusters), expected, f"{lengths}, {clusters} clusters")


@pytest.mark.parametrize("place", range(5))
def test_no_share_is_shorter_than_the_longest_chain(place: int) -> None:
    """One long sequence among short ones: its chain is as long as a share, and the last clusters may have nothing."""
    lengths = [3, 0, 40, 1]
    lengths.insert(place, 1500)
    check(make_inputs("long", lengths=lengths, H=1, HV=2, K=128, V=128, with_state=True, device=DEVICE))


@pytest.mark.parametrize(
    "features",
    [
        dict(allow_neg_eigval=True),
        dict(with_state=False),
        dict(with_state=True, state_dtype=torch.bfloat16),
        dict(output_final_state=False, output_chunk_states=False),
        dict(with_state=True, output_final_state=False),
        dict(dtype=torch.float16, gate_dtype=torch.float32),
        dict(strided="fused"),
        dict(strided="head_major"),
    ],
    ids=["negative_eigenvalues", "no_state", "bf16_state", "only_o", "no_final_state", "fp16", "strided", "head_major"],
)
@all_families
def test_features(family: str, features: dict[str, Any]) -> None:
    for shape in ({"B": 3, "T": 230}, {"lengths": [230, 0, 1, 70, 129]}):
        check(make_inputs(family, H=2, HV=4, K=128, V=128, device=DEVICE, **{**shape, **features}))


def test_chunk_states_resume_the_run() -> None:
    """Those of a chain that was handed over as well: each, as the initial state of the rest, leads to the same bits."""
    lengths = [700, 0, 130, 600]
    inputs = make_inputs("long", lengths=lengths, H=1, HV=2, K=128, V=128, with_state=True, device=DEVICE)
    o, final_state, chunk_states = check(inputs, (3, 2))
    for n, (begin, end) in enumerate(pairwise(inputs["cu_seqlens"].tolist())):
        alone = only_sequence(inputs, n)
        for chunk, cut in enumerate(range(begin, end, CHUNK_TOKENS)):
            rest = {name: inputs[name][:, cut:end] for name in BY_TOKEN}
            state = chunk_states[:, begin // CHUNK_TOKENS + n + chunk]
            o_rest, last, _ = dealt({**alone, **rest, "initial_state": state})
            assert_same_bits(o_rest, o[:, cut:end], f"sequence {n} from {cut}")
            assert_same_bits(last, final_state[n : n + 1], f"sequence {n} from {cut}")


# --- Many sequences, and what lies behind the last one --------------------------------------------------------------


@both_index_dtypes
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128)])
def test_far_more_sequences_than_threads(index_dtype: torch.dtype, K: int, V: int) -> None:
    """Each thread counts the steps of several. All of them short; and a few long ones among them."""
    short = [(7 * n + n // 5) % 4 for n in range(2000)]
    some_long = [400 if n % 397 == 11 else length for n, length in enumerate(short)]
    for lengths in (short, some_long):
        check(
            make_inputs(
                "long", lengths=lengths, H=1, K=K, V=V, with_state=True, index_dtype=index_dtype, device=DEVICE
            ),
            (1, 5, None),
        )


@both_index_dtypes
@pytest.mark.parametrize("lengths", [[200, 70, 1, 330], [0, 0, 5], [(5 * n) % 4 for n in range(2000)]], ids=len)
def test_padded_cu_seqlens(lengths: list[int], index_dtype: torch.dtype) -> None:
    """Offsets that end before T, and repeat: rows behind the last sequence are zero, whatever they hold; the others
    have the bits of the call without them.
    """
    padding, more = 150, 40
    tight = make_inputs(
        "long", lengths=lengths, HV=4, K=64, V=128, with_state=True, index_dtype=index_dtype, device=DEVICE
    )
    o, final_state, _ = check(tight, (1, 3, None))
    padded = dict(tight)
    for name in BY_TOKEN:
        x = tight[name]
        padded[name] = torch.cat((x, x.new_full((1, padding, *x.shape[2:]), torch.nan)), dim=1)
    end = tight["cu_seqlens"][-1:]
    padded["cu_seqlens"] = torch.cat((tight["cu_seqlens"], end.expand(more)))
    state = tight["initial_state"]
    padded["initial_state"] = torch.cat((state, torch.randn_like(state[:1]).expand(more, *state.shape[1:])))
    for clusters in (*CLUSTERS, None):
        o_padded, final_padded, chunk_states = dealt(padded, clusters)
        assert not o_padded[:, sum(lengths) :].any()
        assert chunk_states.isfinite().all()
        assert_same_bits(o_padded[:, : sum(lengths)], o, f"{clusters} clusters")
        assert_same_bits(final_padded[: len(lengths)], final_state, f"{clusters} clusters")
        assert_same_bits(final_padded[len(lengths) :], padded["initial_state"][len(lengths) :], "empty sequences")


# --- Other contents, other times, other calls -----------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [1, 3, 5])
@both_index_dtypes
def test_graph_replays_with_other_sequences(clusters: int, index_dtype: torch.dtype) -> None:
    """One graph; the cuts lie elsewhere at each replay, and every sequence has the bits that it has alone. NaN lie
    behind the last one.
    """
    tokens = 900
    inputs = make_inputs(
        "long",
        lengths=[225] * 4,
        H=1,
        HV=2,
        K=128,
        V=128,
        with_state=True,
        index_dtype=index_dtype,
        device=DEVICE,
    )
    graph, outputs = capture(lambda: dealt(inputs, clusters))
    for lengths in ([900, 0, 0, 0], [0, 899, 1, 0], [64, 128, 129, 500], [0, 0, 0, 0], [300, 300, 100, 100], [1] * 4):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        redraw(inputs, offsets, outputs)
        for _ in range(2):  # the second one finds the flags as the first has left them
            graph.replay()
        o, final_state, chunk_states = outputs
        assert o.shape[1] == tokens and not o[:, sum(lengths) :].any()
        for n, (begin, end) in enumerate(pairwise(offsets.tolist())):
            o_alone, final_alone, states_alone = dealt(only_sequence(inputs, n), 1)
            slot = begin // CHUNK_TOKENS + n
            states = chunk_states[:, slot : slot + states_alone.shape[1]]
            views = (o[:, begin:end], final_state[n : n + 1], states)
            assert_all_same_bits(views, (o_alone, final_alone, states_alone), f"{lengths}: sequence {n}")


@pytest.mark.parametrize("clusters", [2, 5, None])
@pytest.mark.parametrize(("K", "V"), HEAD_SIZES)
def test_same_bits_every_time(clusters: int | None, K: int, V: int) -> None:
    """With the workspace at other addresses, and full of NaN before."""
    lengths = [700, 1, 0, 64, 333, 1500]
    inputs = make_inputs("long", lengths=lengths, H=16, HV=32, K=K, V=V, with_state=True, device=DEVICE)
    expected, held = dealt(inputs, clusters), []
    for n in range(20):
        held.append(torch.full((1 + n << 18,), torch.nan, device=DEVICE))
        if n % 3 == 2:
            held.clear()
        assert_all_same_bits(dealt(inputs, clusters), expected)


def test_calls_side_by_side() -> None:
    """Clusters that wait for a state leave room for those that it comes from, also if other calls hand over as well."""
    count = 6
    calls = [
        make_inputs(
            "long", B=2, T=300 + 64 * i, H=1 + 2 * i, K=128, V=(64, 128)[i % 2], with_state=True, seed=i, device=DEVICE
        )
        for i in range(count)
    ]
    clusters = [1 + 4 * i for i in range(count)]  # one less than there are chains
    expected = [dealt(inputs, 1) for inputs in calls]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                outputs = torch.ops.kda.chunk_fwd_planned(**calls[i], path="fused", clusters=clusters[i])
                assert_all_same_bits(outputs, expected[i], f"thread {i}")
        stream.synchronize()

    with kernels_only(), ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, i) for i in range(count)]:
            done.result()


@all_families
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_a_full_device_hands_over_unasked(family: str, packed: bool) -> None:
    """More chains than clusters, and no multiple of them: the plan has room for what is handed over."""
    shape: dict[str, Any] = {"lengths": [500, 0, 300, 1, 1200]} if packed else {"T": 700}
    inputs = make_inputs(family, H=97, K=128, V=128, with_state=True, device=DEVICE, **shape)
    if not packed and inputs.get("lower_bound") is not None:
        planned = plan(inputs)
        assert planned["path"] == "fused" and planned["workspace_bytes"] > 0
        outputs = call(inputs)
    else:
        outputs = dealt(inputs)
    assert_contract(inputs, outputs, composite_fp32(inputs))
    assert_all_same_bits(dealt(inputs, 7), outputs)
