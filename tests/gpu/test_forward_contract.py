"""What the CUDA forward promises beside accuracy: the same bits always, streams and CUDA graphs, states that continue a
run, cu_seqlens whose contents change, errors that name the argument, and a warning where no kernel is."""

from __future__ import annotations

import functools
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import CHUNK_TOKENS, FAMILIES, make_inputs, run, slice_tokens
from gpu_support import (
    BY_TOKEN,
    DEVICE,
    OUTPUTS,
    all_head_sizes,
    all_paths,  # noqa: F401  (a fixture)
    assert_all_same_bits,
    assert_contract,
    assert_same_bits,
    call,
    capture,
    check_launches,
    gpu_tests,
    kernels_only,
    launch,
    needs_cuda,
    odd_strides,
    only_sequence,
    redraw,
    reference,
    spread_last,
)
from operator_inputs import make_inputs as make_operator_inputs
from test_errors import CASES
from torch import Tensor

import kda_cuda
from kda_cuda import composite

pytestmark = [*gpu_tests, pytest.mark.usefixtures("all_paths")]

KERNELS = {
    "stepwise": ("step_factors_kernel", "state_scan_kernel"),
    "fused": ("fused_scan_kernel",),
    "staged": ("intra_chunk_solve_kernel", "state_recurrence_kernel", "output_gemm_kernel"),
}
SLEEP_CYCLES = 200_000_000  # about 0.1 s


def tensors_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


# --- Which kernels ran ----------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_kernels_of_a_call(packed: bool, all_paths: str) -> None:  # noqa: F811
    """One launch of each stage, or one in all; a memset more with cu_seqlens and chunk_states; nothing else."""
    shape: dict[str, Any] = {"lengths": [70, 0, 130]} if packed else {"B": 2, "T": 100}
    inputs = make_inputs("long", with_state=True, device=DEVICE, **shape)
    check_launches(lambda: call(inputs), KERNELS[all_paths], memsets=1 if packed else 0)


@needs_cuda
def test_kernels_of_a_call_that_hands_over() -> None:
    """One memset more: of the flags."""
    inputs = make_inputs("long", lengths=[70, 0, 130], with_state=True, device=DEVICE)
    planned = functools.partial(torch.ops.kda.chunk_fwd_planned, **inputs, path="fused", clusters=2)
    check_launches(planned, KERNELS["fused"], memsets=2)


def test_nothing_falls_back_silently() -> None:
    """The operator says before the call what it will do: nothing to say where there are kernels."""
    for lengths in (None, [3, 0, 70]):
        inputs = make_inputs("long", lengths=lengths, with_state=True, device=DEVICE)
        assert torch.ops.kda.composite_reason(**inputs) == ""


UNCOVERED: dict[str, tuple[dict[str, Any], str, str]] = {  # features, tensor to spread, clause of the reason
    "fp32": (dict(dtype=torch.float32), "", "fp32"),
    "fp64": (dict(dtype=torch.float64), "", "fp64"),
    "K": (dict(K=96), "", "K in {64, 128}"),
    "V": (dict(V=80), "", "V in {64, 128}"),
    "q": (dict(), "q", "last dimension of `q`"),
    "k": (dict(), "k", "last dimension of `k`"),
    "v": (dict(), "v", "last dimension of `v`"),
    "g": (dict(), "g", "last dimension of `g`"),
    "state": (dict(), "initial_state", "`initial_state`"),
}


@needs_cuda
@pytest.mark.parametrize(("features", "spread", "clause"), UNCOVERED.values(), ids=UNCOVERED)
def test_one_warning_where_there_is_no_kernel(
    features: dict[str, Any], spread: str, clause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composite, "_warned", set())
    inputs = make_inputs("long", lengths=[70, 3], with_state=True, device=DEVICE, **features)
    if spread:
        inputs[spread] = spread_last(inputs[spread])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = run(inputs), run(inputs)
    messages = [str(w.message) for w in caught if "kda" in str(w.message)]
    assert len(messages) == 1 and clause in messages[0], messages
    assert clause in torch.ops.kda.composite_reason(**inputs)
    assert_all_same_bits(first, second)
    if inputs["v"].dtype == torch.bfloat16:
        assert_contract(inputs, first, reference(inputs))


# --- The same bits --------------------------------------------------------------------------------------------------


@needs_cuda
@all_head_sizes
def test_same_bits_wherever_the_memory_lies(K: int, V: int) -> None:
    """20 runs of a call that fills the GPU, with workspace and outputs at other addresses, full of NaN before."""
    inputs = make_inputs(
        "long", lengths=[700, 1, 0, 64, 333, 1500], H=16, HV=32, K=K, V=V, with_state=True, device=DEVICE
    )
    expected, rng, held = call(inputs), random.Random(0), []
    for _ in range(20):
        held.append(torch.full((rng.randrange(1, 32) << 18,), torch.nan, device=DEVICE))
        if len(held) > 4:
            held.pop(rng.randrange(len(held)))
        assert_all_same_bits(call(inputs), expected)


@needs_cuda
def test_threads_with_streams_of_their_own() -> None:
    """No state that calls share: eight threads at once, other shapes each."""
    count = 8
    calls = [
        make_inputs(
            FAMILIES[i % 4], T=100 + 64 * i, H=1 + i, K=(64, 128)[i % 2], with_state=True, seed=i, device=DEVICE
        )
        for i in range(count)
    ]
    expected = [call(inputs) for inputs in calls]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(25):
                assert_all_same_bits(launch(calls[i]), expected[i], f"thread {i}")
        stream.synchronize()

    with kernels_only(), ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, i) for i in range(count)]:
            done.result()


# --- Streams and graphs ---------------------------------------------------------------------------------------------


@needs_cuda
def test_follows_its_stream_and_does_not_wait() -> None:
    """On a busy stream the call returns at once, and reads what the stream wrote before it."""
    inputs = make_inputs("long", lengths=[100, 0, 64], H=4, with_state=True, device=DEVICE)
    fresh = make_inputs("random", lengths=[64, 90, 10], H=4, with_state=True, seed=1, device=DEVICE)
    expected = call(fresh)  # loads the kernels too, which may wait
    call(inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, x in tensors_of(inputs).items():
            x.copy_(fresh[name])
        outputs = call(inputs)
        done = stream.query()
    stream.synchronize()
    assert not done, "the call waited for the device"
    assert_all_same_bits(outputs, expected)


@needs_cuda
@all_head_sizes
def test_graph_replays_with_other_inputs(K: int, V: int) -> None:
    inputs = make_inputs("long", B=2, T=200, HV=4, K=K, V=V, with_state=True, state_v_first=True, device=DEVICE)
    graph, outputs = capture(lambda: call(inputs))
    for seed in (1, 2, 3):
        fresh = make_inputs("long", B=2, T=200, HV=4, K=K, V=V, with_state=True, state_v_first=True, seed=seed)
        for name, x in tensors_of(inputs).items():
            x.copy_(fresh[name])
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        assert_all_same_bits(outputs, call(inputs), f"replay {seed}")


@needs_cuda
def test_graph_of_several_layers() -> None:
    """Three calls in one graph, each with the output and state of the one before; their workspaces share memory."""
    inputs = make_inputs("long", T=130, with_state=True, output_chunk_states=False, device=DEVICE)

    def layers() -> tuple[Tensor, ...]:
        v, state = inputs["v"], inputs["initial_state"]
        for _ in range(3):
            v, state, _ = call({**inputs, "v": v, "initial_state": state})
        return v, state

    graph, outputs = capture(layers)
    for seed in (1, 2):
        for name in ("q", "k", "v", "initial_state"):
            inputs[name].copy_(torch.randn_like(inputs[name]) * seed)
        graph.replay()
        for actual, expected in zip(outputs, layers(), strict=True):
            assert_same_bits(actual, expected)


PADDED = {  # lengths of the sequences of one graph of 8 sequences in 400 tokens
    "full": [50] * 8,
    "padded": [70, 64, 1, 130],
    "one": [399],
    "empty_between": [0, 0, 65, 0, 63, 0, 0, 128],
    "ones": [1] * 8,
    "none": [],
}


@needs_cuda
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_graph_replays_with_other_sequences(index_dtype: torch.dtype, state_v_first: bool) -> None:
    """Captured once; at each replay every sequence has the bits that it has alone. NaN lie behind the last one."""
    N = len(PADDED["full"])
    options: dict[str, Any] = dict(HV=4, K=64, V=128, with_state=True, state_v_first=state_v_first, device=DEVICE)
    inputs = make_inputs("long", lengths=PADDED["full"], index_dtype=index_dtype, **options)
    graph, outputs = capture(lambda: call(inputs))
    for name, lengths in PADDED.items():
        offsets = torch.tensor([0, *lengths, *[0] * (N - len(lengths))]).cumsum(0)
        end = redraw(inputs, offsets, outputs)
        graph.replay()
        o, final_state, chunk_states = outputs
        assert not o[:, end:].any(), f"{name}: rows behind the last sequence"
        used = set()
        for n, length in enumerate([*lengths, *[0] * (N - len(lengths))]):
            if length == 0:
                assert_same_bits(final_state[n], inputs["initial_state"][n], f"{name}: empty sequence {n}")
                continue
            alone = call(only_sequence(inputs, n))
            begin, slot = int(offsets[n]), int(offsets[n]) // CHUNK_TOKENS + n
            slots = range(slot, slot + alone[2].shape[1])
            used.update(slots)
            views = (o[:, begin : begin + length], final_state[n : n + 1], chunk_states[:, slots.start : slots.stop])
            assert_all_same_bits(views, alone, f"{name}: sequence {n}")
        unused = [slot for slot in range(chunk_states.shape[1]) if slot not in used]
        assert not chunk_states[:, unused].any(), f"{name}: slots without a chunk"


# --- Continuity -----------------------------------------------------------------------------------------------------


def run_in_pieces(inputs: dict[str, Any], cuts: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o and final state of the tokens in pieces with carried state, and the states at the cuts."""
    T = inputs["q"].shape[1]
    state, pieces, carried = inputs.get("initial_state"), [], []
    for begin, end in zip([0, *cuts], [*cuts, T], strict=True):
        piece = slice_tokens(inputs, begin, end)
        o, state, _ = call({**piece, "initial_state": state})
        pieces.append(o)
        carried.append(state)
    return torch.cat(pieces, dim=1), state, carried[:-1]


@pytest.mark.parametrize("family", FAMILIES)
@all_head_sizes
def test_pieces_of_whole_chunks_have_the_same_bits(family: str, K: int, V: int) -> None:
    """Cut between chunks, with the fp32 state carried, the arithmetic is the same, and so are all bits."""
    inputs = make_inputs(family, B=2, T=500, HV=4, K=K, V=V, with_state=True, state_v_first=K < V, device=DEVICE)
    o, final_state, chunk_states = call(inputs)
    cuts = [64, 128, 320]
    o_pieces, last, carried = run_in_pieces(inputs, cuts)
    assert_same_bits(o_pieces, o)
    assert_same_bits(last, final_state)
    for cut, state in zip(cuts, carried, strict=True):
        assert_same_bits(state, chunk_states[:, cut // CHUNK_TOKENS])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuts", [[1], [63, 65], [1, 100, 333], list(range(1, 40))], ids=str)
def test_any_pieces_keep_the_contract(family: str, cuts: list[int]) -> None:
    inputs = make_inputs(family, T=400, HV=4, K=64, V=128, with_state=True, output_chunk_states=False, device=DEVICE)
    o, final_state, _ = run_in_pieces(inputs, cuts)
    assert_contract(inputs, (o, final_state, o.new_empty(0, dtype=torch.float32)), reference(inputs))


def test_every_chunk_state_resumes_the_run() -> None:
    """Each state of a packed call, from its slot, as the initial state of the rest: the same bits."""
    for v_first in (False, True):
        inputs = make_inputs(
            "long", lengths=[130, 0, 64, 200], K=128, V=64, with_state=True, state_v_first=v_first, device=DEVICE
        )
        o, final_state, chunk_states = call(inputs)
        for n, (begin, end) in enumerate(((0, 130), (130, 130), (130, 194), (194, 394))):
            for chunk, cut in enumerate(range(begin, end, CHUNK_TOKENS)):
                state = chunk_states[:, begin // CHUNK_TOKENS + n + chunk]
                o_rest, last, _ = call({**slice_tokens(inputs, cut, end), "initial_state": state})
                assert_same_bits(o_rest, o[:, cut:end])
                assert_same_bits(last, final_state[n : n + 1])


def test_several_sequences_in_two_calls() -> None:
    """A packed prefill in two calls, each sequence cut between chunks: the bits of one call."""
    lengths, heads = [130, 70, 0, 200], [64, 64, 0, 128]
    inputs = make_inputs("long", lengths=lengths, HV=4, with_state=True, output_chunk_states=False, device=DEVICE)
    o, final_state, _ = call(inputs)
    begins = [0, 130, 200, 200]
    first = [t for begin, head in zip(begins, heads, strict=True) for t in range(begin, begin + head)]
    second = [t for t in range(sum(lengths)) if t not in set(first)]
    state = inputs["initial_state"]
    for tokens, parts in ((first, heads), (second, [n - h for n, h in zip(lengths, heads, strict=True)])):
        piece = dict(inputs, initial_state=state, cu_seqlens=torch.tensor([0, *parts], device=DEVICE).cumsum(0))
        piece |= {name: inputs[name][:, tokens] for name in BY_TOKEN}
        o_piece, state, _ = call(piece)
        assert_same_bits(o_piece, o[:, tokens])
    assert_same_bits(state, final_state)


# --- Sizes of zero, special values ----------------------------------------------------------------------------------

EMPTY = {
    "no_tokens": dict(B=3, T=0),
    "no_rows": dict(B=0, T=70),
    "no_sequences": dict(lengths=[]),
    "empty_sequences": dict(lengths=[0, 0, 0]),
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("v_first", [False, True])
def test_nothing_to_compute(shape: dict[str, Any], v_first: bool) -> None:
    inputs = make_inputs("long", K=64, V=128, with_state=True, state_v_first=v_first, device=DEVICE, **shape)
    outputs = call(inputs)
    for name, actual, expected in zip(OUTPUTS, outputs, reference(inputs), strict=True):
        assert actual.shape == expected.shape, name
    assert_same_bits(outputs[1], inputs["initial_state"])
    inputs.pop("initial_state")
    assert not call(inputs)[1].any()


@pytest.mark.parametrize("v_first", [False, True])
def test_state_of_an_empty_sequence_is_copied_bit_for_bit(v_first: bool) -> None:
    """Whatever it holds: -0, subnormal numbers, infinities, NaN with a payload."""
    inputs = make_inputs("long", lengths=[70, 0], with_state=True, state_v_first=v_first, device=DEVICE)
    special = torch.tensor([-0.0, 1e-45, -1e-40, torch.inf, -torch.inf, torch.nan, 3.4e38], device=DEVICE)
    special = torch.cat((special, torch.tensor([0x7FC12345], dtype=torch.int32, device=DEVICE).view(torch.float32)))
    inputs["initial_state"][1].view(-1).copy_(special.repeat(inputs["initial_state"][1].numel() // special.numel()))
    o, final_state, _ = call(inputs)
    assert_same_bits(final_state[1], inputs["initial_state"][1])
    assert o.isfinite().all() and final_state[0].isfinite().all()


# --- cu_seqlens on the device ---------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("end", [0, 1, 63, 64, 65, 130, 255, 256])
def test_rows_behind_the_last_sequence_are_zero(end: int) -> None:
    """cu_seqlens may end before T: NaN in the tokens behind it change nothing, and their o is zero."""
    T = 257
    inputs = make_inputs("long", T=T, K=64, V=128, output_chunk_states=True, device=DEVICE)
    for name in BY_TOKEN:
        inputs[name][:, end:] = torch.nan
    for offsets in ([0, end], [0, end // 2, end, end, end]):
        packed = dict(inputs, cu_seqlens=torch.tensor(offsets, device=DEVICE, dtype=torch.int32))
        o, final_state, chunk_states = call(packed)
        assert not o[:, end:].any()
        assert o.isfinite().all() and final_state.isfinite().all() and chunk_states.isfinite().all()
        tight = call({**packed, **{name: packed[name][:, :end] for name in BY_TOKEN}})
        assert_same_bits(o[:, :end], tight[0])
        assert_same_bits(final_state, tight[1])


@needs_cuda
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 100, 300], "start at 0"),
        ([0, 200, 100, 300], "never decrease"),
        ([0, -1, 300], "never decrease"),
        ([0, 100, 299], "end at T = 300"),
        ([0, 100, 301], "end at T = 300"),
    ],
    ids=str,
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_contents_are_checked_on_request(contents: list[int], message: str, index_dtype: torch.dtype) -> None:
    inputs = make_inputs("long", lengths=[300], device=DEVICE)
    inputs["cu_seqlens"] = torch.tensor(contents, dtype=index_dtype, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"kda::chunk_fwd: argument `cu_seqlens`: expected .*{message}"):
        run({**inputs, "check_cu_seqlens": True})
    inputs["cu_seqlens"] = torch.tensor([0, 100, 300], dtype=index_dtype, device=DEVICE)
    assert_all_same_bits(call({**inputs, "check_cu_seqlens": True}), call(inputs))


# --- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "wrong", "argument", "expected", "got"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_wrong_argument_on_the_gpu(
    features: dict[str, Any], wrong: dict[str, Any], argument: str, expected: str, got: str
) -> None:
    """The same message as on the CPU, and no trace of it in the next call."""

    def moved(arguments: dict[str, Any]) -> dict[str, Any]:
        on_cpu = (name for name, x in arguments.items() if isinstance(x, Tensor) and x.device.type == "cpu")
        return arguments | {name: arguments[name].to(DEVICE) for name in on_cpu}

    right = moved(make_operator_inputs(2, 70, 2, 4, 16, 24, **features))
    with pytest.raises(RuntimeError) as error:
        torch.ops.kda.chunk_fwd(**{**right, **moved(wrong), "check_cu_seqlens": True})
    message = str(error.value)
    assert message.startswith(f"kda::chunk_fwd: argument `{argument}`: expected "), message
    expected = expected.replace("cpu as `q`", f"{right['q'].device} as `q`")
    assert expected in message.split(", got ")[0] + ", got ", message
    assert got in message.split(", got ", 1)[1], message
    torch.ops.kda.check_chunk_fwd(**right)


@needs_cuda
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens"])
def test_one_tensor_on_the_cpu(name: str) -> None:
    inputs = make_inputs("random", lengths=[70, 3], with_state=True, device=DEVICE)
    inputs[name] = inputs[name].cpu()
    expected, got = ("cpu", "cuda:0") if name == "q" else ("cuda:0", "cpu")
    with pytest.raises(RuntimeError, match=f"argument `.*`: expected device {expected} as `q` is, got {got}"):
        run(inputs)


@needs_cuda
def test_everything_on_the_cpu_but_one() -> None:
    inputs = make_inputs("random", T=70, with_state=True)
    with pytest.raises(RuntimeError, match="argument `beta`: expected device cpu as `q` is, got cuda:0"):
        run({**inputs, "beta": inputs["beta"].to(DEVICE)})


# --- The function with FLA's arguments ------------------------------------------------------------------------------


def test_drop_in_runs_on_the_kernels() -> None:
    """chunk_kda is the operator; under autocast fp32 activations become bf16, and so are covered."""
    inputs = make_inputs("random", lengths=[70, 0, 130], HV=4, with_state=True, device=DEVICE)
    o, final_state, chunk_states = run(inputs)
    arguments = {name: inputs[name] for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")}
    arguments |= dict(
        cu_seqlens=inputs["cu_seqlens"],
        cu_seqlens_cpu=inputs["cu_seqlens"].cpu(),
        lower_bound=inputs["lower_bound"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
    )
    with kernels_only(), torch.inference_mode():
        o_kda, state_kda, h = kda_cuda.chunk_kda(**arguments, return_intermediate_states=True)
        wide = {name: arguments[name].float() for name in ("q", "k", "v")}
        with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
            o_autocast, state_autocast = kda_cuda.chunk_kda(**{**arguments, **wide})
    assert_same_bits(o_kda, o)
    assert_same_bits(state_kda, final_state)
    assert_same_bits(o_autocast, o)
    assert_same_bits(state_autocast, final_state)
    slots = [0, 1, 3, 4, 5]  # chunks of 70 tokens, of none, of 130 that begin at token 70
    assert_same_bits(h, chunk_states[:, slots].to(h.dtype))


def test_inference_mode_no_grad_and_odd_memory() -> None:
    """The same bits with autograd off in either way; off alignment the contract."""
    inputs = make_inputs("long", T=130, with_state=True, device=DEVICE)
    expected = call(inputs)
    with torch.inference_mode():
        assert_all_same_bits(call(inputs), expected)
    inputs["q"].requires_grad_()
    with torch.no_grad():
        assert_all_same_bits(call(inputs), expected)
    inputs["q"] = odd_strides(inputs["q"].detach())
    assert_contract(inputs, call(inputs), reference(inputs))
