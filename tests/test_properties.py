"""Random shapes and all features together: the operator against the token recurrence (property-based, on the CPU)."""

from __future__ import annotations

from typing import Any

import torch
from cases import FAMILIES, make_inputs, run, run_reference, slice_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from kda_cuda.accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, relative_rmse

FP32_RELATIVE_RMSE = 1e-5
EXAMPLES = 150

lengths = st.lists(
    st.one_of(st.integers(0, 3), st.integers(0, 200), st.sampled_from([63, 64, 65, 127, 128, 129])), max_size=6
)
head_sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 128]))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of the operator."""
    packed = draw(st.booleans())
    H = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    beta_sigmoid = draw(st.booleans())
    inputs = make_inputs(
        draw(st.sampled_from(FAMILIES)),
        B=draw(st.integers(0, 3)),
        T=draw(st.integers(0, 150)),
        H=H,
        HV=H * draw(st.integers(1, 3)),
        K=draw(head_sizes),
        V=draw(head_sizes),
        lengths=draw(lengths) if packed else None,
        dtype=dtype,
        gate_dtype=draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        with_state=draw(st.booleans()),
        state_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        state_v_first=draw(st.booleans()),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        strided=draw(st.sampled_from([None, "fused", "head_major", "last"])),
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from([None, 1.0, -0.3])),
        use_beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=beta_sigmoid and draw(st.booleans()),
        use_qk_l2norm=True,
    )
    if not beta_sigmoid:
        inputs["beta"] = inputs["beta"].sigmoid()
    if not draw(st.booleans()):  # already normalised
        inputs["use_qk_l2norm"] = False
        for name in "qk":
            inputs[name] = torch.nn.functional.normalize(inputs[name].float(), dim=-1).to(dtype)
    if draw(st.booleans()) and inputs.get("lower_bound") is not None:
        inputs.pop("A_log")  # optional with a bound
    if draw(st.booleans()):
        inputs.pop("dt_bias", None)
    return inputs


def limits(inputs: dict[str, Any]) -> tuple[float, float]:
    """Of o and of the states. States are fp32 whatever the activations are."""
    o_limit = FP32_RELATIVE_RMSE if inputs["q"].dtype == torch.float32 else O_RELATIVE_RMSE
    return o_limit, min(FP32_RELATIVE_RMSE, STATE_RELATIVE_RMSE)


@settings(max_examples=EXAMPLES)
@given(inputs=calls())
def test_any_call_matches_the_recurrence(inputs: dict[str, Any]) -> None:
    o_limit, state_limit = limits(inputs)
    actual, expected = run(inputs), run_reference(inputs)
    for name, limit, a, e in zip(
        ("o", "final_state", "chunk_states"), (o_limit, state_limit, state_limit), actual, expected, strict=True
    ):
        assert a.is_contiguous()
        error = relative_rmse(a, e)
        assert error <= limit, f"{name}: relative RMSE {error:.2e} > {limit:.1e}"
    assert actual[0].dtype == inputs["v"].dtype and actual[1].dtype == torch.float32


@settings(max_examples=EXAMPLES // 3)
@given(inputs=calls())
def test_any_call_twice_gives_the_same_bits(inputs: dict[str, Any]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(run(inputs), run(inputs), strict=True))


@settings(max_examples=EXAMPLES // 3)
@given(inputs=calls(), data=st.data())
def test_any_cut_with_carried_state_gives_the_same(inputs: dict[str, Any], data: st.DataObject) -> None:
    """The first sequence or the rows in two pieces, the state of the first carried into the second."""
    offsets = inputs.pop("cu_seqlens", None)
    tokens = inputs["q"].shape[1] if offsets is None else int(offsets[1]) if len(offsets) > 1 else 0
    state = inputs.pop("initial_state", None)
    if state is not None:
        state = state[: inputs["q"].shape[0]] if offsets is None or len(offsets) > 1 else None
    whole = {**slice_tokens(inputs, 0, tokens), "initial_state": state}
    cut = data.draw(st.integers(0, tokens))
    o, final_state, _ = run(whole)
    first, carried, _ = run({**slice_tokens(whole, 0, cut), "initial_state": state})
    second, last, _ = run({**slice_tokens(whole, cut, tokens), "initial_state": carried})
    o_limit, state_limit = limits(inputs)
    assert relative_rmse(torch.cat((first, second), dim=1), o) <= o_limit
    assert relative_rmse(last, final_state) <= state_limit
