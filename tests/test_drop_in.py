"""``kda_cuda.chunk_kda`` in the place of ``fla.ops.kda.chunk_kda``: arguments, returns and refusals of FLA 0.6.0."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from operator_inputs import make_inputs

from kda_cuda import CHUNK_TOKENS, chunk_fwd, chunk_kda

REQUIRED = inspect.Parameter.empty
FLA_SIGNATURE = [
    ("q", REQUIRED),
    ("k", REQUIRED),
    ("v", REQUIRED),
    ("g", REQUIRED),
    ("beta", REQUIRED),
    ("scale", None),
    ("initial_state", None),
    ("output_final_state", False),
    ("use_qk_l2norm_in_kernel", False),
    ("use_gate_in_kernel", False),
    ("use_beta_sigmoid_in_kernel", False),
    ("allow_neg_eigval", False),
    ("safe_gate", False),
    ("lower_bound", None),
    ("disable_recompute", False),
    ("return_intermediate_states", False),
    ("state_v_first", False),
    ("cu_seqlens", None),
    ("cu_seqlens_cpu", None),
    ("cp_context", None),
    ("use_graph", False),
    ("max_num_seqs", None),
]
FLA_KEYWORDS = {"A_log", "dt_bias", "chunk_size", "transpose_state_layout"}

ACTIVATIONS = ("q", "k", "v", "g", "beta")


def activations(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [inputs[name] for name in ACTIVATIONS]


def same(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_signature() -> None:
    parameters = inspect.signature(chunk_kda).parameters
    positional = [p for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == FLA_SIGNATURE
    assert {p.name for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY} == FLA_KEYWORDS


def test_returns() -> None:
    inputs = make_inputs(with_state=True)
    result = chunk_kda(*activations(inputs), initial_state=inputs["initial_state"])
    assert isinstance(result, tuple) and len(result) == 2 and result[1] is None
    o, final_state = chunk_kda(*activations(inputs), initial_state=inputs["initial_state"], output_final_state=True)
    expected = chunk_fwd(**inputs, output_final_state=True)
    same(o, expected[0])
    same(final_state, expected[1])
    assert final_state.dtype == torch.float32


@pytest.mark.parametrize("gate", ["softplus", "sigmoid"])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_every_option_reaches_the_operator(gate: str, state_v_first: bool) -> None:
    inputs = make_inputs(
        lengths=[3, 80, 0],
        gate=gate,
        with_state=True,
        state_v_first=state_v_first,
        use_qk_l2norm=True,
        use_beta_sigmoid=True,
        allow_neg_eigval=True,
        scale=0.7,
        output_final_state=True,
    )
    o, final_state = chunk_kda(
        *activations(inputs),
        scale=0.7,
        initial_state=inputs["initial_state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
        safe_gate=gate == "sigmoid",
        lower_bound=inputs.get("lower_bound"),
        state_v_first=state_v_first,
        cu_seqlens=inputs["cu_seqlens"],
        cu_seqlens_cpu=inputs["cu_seqlens"],
        A_log=inputs.get("A_log"),
        dt_bias=inputs["dt_bias"],
        chunk_size=CHUNK_TOKENS,
        use_graph=True,
        max_num_seqs=3,
        disable_recompute=True,
    )
    expected = chunk_fwd(**inputs)
    same(o, expected[0])
    same(final_state, expected[1])


def test_gate_parameters_without_the_gate_are_ignored() -> None:
    inputs = make_inputs()
    o, _ = chunk_kda(
        *activations(inputs), lower_bound=-5.0, A_log=torch.zeros(4), dt_bias=torch.ones(64), safe_gate=True
    )
    same(o, chunk_fwd(**inputs)[0])


def test_half_precision_parameters() -> None:
    """FLA takes them in any type; conversion to fp32 loses nothing, and gradients come back in theirs."""
    inputs = make_inputs(gate="softplus")
    A_log = inputs["A_log"].bfloat16().requires_grad_()
    o, _ = chunk_kda(*activations(inputs), use_gate_in_kernel=True, A_log=A_log, dt_bias=inputs["dt_bias"].half())
    inputs["A_log"], inputs["dt_bias"] = A_log.detach().float(), inputs["dt_bias"].half().float()
    same(o, chunk_fwd(**inputs)[0])
    o.sum().backward()
    assert A_log.grad.dtype == torch.bfloat16


def test_deprecated_name_of_the_layout() -> None:
    inputs = make_inputs(with_state=True, state_v_first=True, output_final_state=True)
    with pytest.warns(DeprecationWarning, match="transpose_state_layout.*state_v_first"):
        o, final_state = chunk_kda(
            *activations(inputs),
            initial_state=inputs["initial_state"],
            output_final_state=True,
            transpose_state_layout=True,
        )
    same(final_state, chunk_fwd(**inputs)[1])
    with pytest.raises(ValueError, match="`transpose_state_layout`"):
        chunk_kda(*activations(inputs), state_v_first=True, transpose_state_layout=True)


@torch.inference_mode()
def test_intermediate_states() -> None:
    inputs = make_inputs(T=130, dtype=torch.bfloat16, with_state=True, state_dtype=torch.float32)
    o, final_state, h = chunk_kda(
        *activations(inputs), initial_state=inputs["initial_state"], return_intermediate_states=True
    )
    assert final_state is None
    assert h.dtype == torch.bfloat16
    _, _, expected = chunk_fwd(**inputs, output_chunk_states=True)
    same(h, expected.bfloat16())


def expected_chunks(lengths: list[int], inputs: dict[str, Any]) -> torch.Tensor:
    """The states of all chunks one after the other, from one call for each sequence."""
    states, begin = [], 0
    for n, length in enumerate(lengths):
        part = {name: inputs[name][:, begin : begin + length] for name in ACTIVATIONS}
        part["initial_state"] = inputs["initial_state"][n : n + 1]
        states.append(chunk_fwd(**part, output_chunk_states=True)[2])
        begin += length
    return torch.cat(states, dim=1)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[3, 80, 0, 64, 65, 1], [0, 0, 5], [128], [70, 0]])
@pytest.mark.parametrize("on_host", [False, True])
def test_intermediate_states_of_packed_sequences(lengths: list[int], on_host: bool) -> None:
    inputs = make_inputs(lengths=lengths, with_state=True)
    arguments = {"initial_state": inputs["initial_state"], "cu_seqlens": inputs["cu_seqlens"]}
    if on_host:
        arguments["cu_seqlens_cpu"] = inputs["cu_seqlens"]
    _, _, h = chunk_kda(*activations(inputs), **arguments, return_intermediate_states=True)
    expected = expected_chunks(lengths, inputs)
    torch.testing.assert_close(h, expected)
    # A fixed number of chunks for graph capture, zeros behind the last one.
    _, _, padded = chunk_kda(*activations(inputs), **arguments, return_intermediate_states=True, use_graph=True)
    assert padded.shape[1] == -(-sum(lengths) // CHUNK_TOKENS) + len(lengths) - 1
    torch.testing.assert_close(padded[:, : h.shape[1]], expected)
    assert not padded[:, h.shape[1] :].any()


def test_autocast_casts_what_matrix_products_take() -> None:
    inputs = make_inputs(use_beta_sigmoid=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = chunk_kda(*activations(inputs), use_beta_sigmoid_in_kernel=True)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].bfloat16()
    same(o, chunk_fwd(**inputs)[0])


def test_meta_device() -> None:
    inputs = make_inputs()
    o, final_state = chunk_kda(*(x.to("meta") for x in activations(inputs)), output_final_state=True)
    assert o.is_meta and o.shape == inputs["v"].shape
    assert final_state.shape == (2, 4, 16, 24)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "cp_context": ({"cp_context": object()}, NotImplementedError, "cp_context"),
    "chunk_size_32": ({"chunk_size": 32}, NotImplementedError, "chunk_size.*32"),
    "chunk_size_16": ({"chunk_size": 16}, ValueError, "chunk_size.*16"),
    "safe_gate": ({"safe_gate": True, "use_gate_in_kernel": True, "A_log": torch.zeros(4)}, ValueError, "lower_bound"),
    "lower_bound": ({"lower_bound": -6.0, "use_gate_in_kernel": True}, RuntimeError, r"lower_bound.*\[-5, 0\), got -6"),
    "A_log": ({"use_gate_in_kernel": True}, ValueError, "A_log"),
    "neg_eigval": ({"allow_neg_eigval": True}, ValueError, "allow_neg_eigval"),
    "with_gradients": ({"return_intermediate_states": True}, ValueError, "return_intermediate_states.*inference_mode"),
    "host_only": ({"cu_seqlens_cpu": torch.tensor([0, 70])}, ValueError, "cu_seqlens_cpu.*cu_seqlens"),
    "batch": ({"cu_seqlens": torch.tensor([0, 70])}, RuntimeError, "B = 1"),
    "state": ({"initial_state": torch.zeros(2, 4, 24, 16)}, RuntimeError, "initial_state"),
    "unknown": ({"chunk_sise": 64}, TypeError, "chunk_sise"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_refused(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        chunk_kda(*activations(make_inputs()), **arguments)


VARLEN_REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "host_values": ({"cu_seqlens_cpu": torch.tensor([0, 30, 60])}, RuntimeError, "end at T = 70, got 60"),
    "host_shape": ({"cu_seqlens_cpu": torch.tensor([0, 70])}, ValueError, r"cu_seqlens_cpu.*\[3\].*\[2\]"),
    "host_dtype": ({"cu_seqlens_cpu": torch.tensor([0.0, 30.0, 70.0])}, ValueError, "cu_seqlens_cpu.*float32"),
    "host_device": ({"cu_seqlens_cpu": torch.zeros(3, device="meta")}, ValueError, "cu_seqlens_cpu.*meta"),
    "max_num_seqs": ({"use_graph": True, "max_num_seqs": 4}, ValueError, "max_num_seqs.*2, got 4"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), list(VARLEN_REFUSED.values()), ids=list(VARLEN_REFUSED))
def test_refused_for_packed_sequences(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    inputs = make_inputs(lengths=[30, 40])
    with pytest.raises(kind, match=message):
        chunk_kda(*activations(inputs), cu_seqlens=inputs["cu_seqlens"], **arguments)
