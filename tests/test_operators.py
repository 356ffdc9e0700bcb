"""The operators as PyTorch sees them: schema, fakes, autograd, dispatch, autocast, planning and build information."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from operator_inputs import ARGUMENTS, make_inputs, positional
from torch._subclasses.fake_tensor import FakeTensorMode

import kda_cuda

CASES = {
    "plain": make_inputs(),
    "states": make_inputs(with_state=True, output_final_state=True, output_chunk_states=True),
    "states_v_first": make_inputs(
        with_state=True, output_final_state=True, output_chunk_states=True, state_v_first=True
    ),
    "bf16_state": make_inputs(with_state=True, state_dtype=torch.bfloat16, output_final_state=True),
    "softplus": make_inputs(gate="softplus", use_qk_l2norm=True, use_beta_sigmoid=True, scale=0.3),
    "sigmoid": make_inputs(gate="sigmoid", use_beta_sigmoid=True, allow_neg_eigval=True),
    "bf16": make_inputs(dtype=torch.bfloat16, gate_dtype=torch.bfloat16, output_final_state=True),
    "fp16": make_inputs(dtype=torch.float16, output_final_state=True),
    "fp64": make_inputs(dtype=torch.float64, output_final_state=True, output_chunk_states=True),
    "varlen": make_inputs(lengths=[1, 0, 64, 65], with_state=True, output_final_state=True, output_chunk_states=True),
    "no_tokens": make_inputs(T=0, with_state=True, output_final_state=True, output_chunk_states=True),
    "no_rows": make_inputs(B=0, with_state=True, output_final_state=True, output_chunk_states=True),
    "no_sequences": make_inputs(lengths=[], with_state=True, output_final_state=True, output_chunk_states=True),
}
WITH_GRADIENTS = {
    "plain": make_inputs(B=1, requires_grad=True),
    "states": make_inputs(B=1, with_state=True, output_final_state=True, requires_grad=True),
    "softplus_v_first": make_inputs(
        B=1, gate="softplus", with_state=True, state_v_first=True, output_final_state=True, requires_grad=True
    ),
    "sigmoid_varlen": make_inputs(gate="sigmoid", lengths=[3, 0, 67], use_qk_l2norm=True, requires_grad=True),
}


def cases(table: dict[str, dict]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("inputs", list(table.values()), ids=list(table))


@cases(CASES)
def test_opcheck(inputs: dict) -> None:
    torch.library.opcheck(torch.ops.kda.chunk_fwd, positional(inputs))


@cases(WITH_GRADIENTS)
def test_opcheck_with_gradients(inputs: dict) -> None:
    torch.library.opcheck(torch.ops.kda.chunk_fwd, positional(inputs))


@pytest.mark.parametrize("operator", ["inference_chunk_fwd", "chunk_fwd_composite", "chunk_fwd_cpu", "check_chunk_fwd"])
def test_opcheck_of_variants(operator: str) -> None:
    torch.library.opcheck(getattr(torch.ops.kda, operator), positional(CASES["states"]))


def test_opcheck_of_backward() -> None:
    inputs = make_inputs(gate="softplus", with_state=True, use_qk_l2norm=True)
    do, dfinal_state = torch.randn_like(inputs["v"]), torch.randn_like(inputs["initial_state"])
    tensors = tuple(inputs.get(name) for name in ARGUMENTS[:9])
    for operator in (torch.ops.kda.chunk_bwd, torch.ops.kda.chunk_bwd_composite):
        torch.library.opcheck(operator, (do, dfinal_state, *tensors, None, None, True, True))


@cases(CASES)
def test_fake_matches_real(inputs: dict) -> None:
    real = torch.ops.kda.chunk_fwd(*positional(inputs))
    with FakeTensorMode() as mode:
        fake = torch.ops.kda.chunk_fwd(
            *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in positional(inputs))
        )
    meta = torch.ops.kda.chunk_fwd(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in positional(inputs)))
    for index, name in enumerate(("o", "final_state", "chunk_states")):
        for other in (fake[index], meta[index]):
            assert other.shape == real[index].shape, name
            assert other.dtype == real[index].dtype, name
            assert other.stride() == real[index].stride(), name
    assert fake[0].device == real[0].device
    assert real[0].is_contiguous()


def test_outputs_of_chunk_states_fill_their_slots() -> None:
    """Slot cu_seqlens[n] // 64 + n + c holds the state at entry of chunk c; the others are zero."""
    lengths = [1, 0, 64, 65]
    inputs = make_inputs(lengths=lengths, with_state=True, output_chunk_states=True)
    _, _, states = torch.ops.kda.chunk_fwd(**inputs)
    used = set()
    begin = 0
    for n, length in enumerate(lengths):
        slot = begin // kda_cuda.CHUNK_TOKENS + n
        chunks = -(-length // kda_cuda.CHUNK_TOKENS)
        if chunks:
            torch.testing.assert_close(states[0, slot], inputs["initial_state"][n], rtol=0, atol=0)
        used.update(range(slot, slot + chunks))
        begin += length
    assert len(used) == 4
    unused = [slot for slot in range(states.shape[1]) if slot not in used]
    assert unused
    assert not states[0, unused].any()


def test_schema() -> None:
    schema = torch.ops.kda.chunk_fwd.default._schema
    assert tuple(argument.name for argument in schema.arguments) == ARGUMENTS
    assert not any(argument.kwarg_only for argument in schema.arguments)
    assert [result.name for result in schema.returns] == ["o", "final_state", "chunk_states"]
    described = [(a.name, str(a.type), a.default_value) for a in schema.arguments]
    for variant in ("inference_chunk_fwd", "chunk_fwd_composite", "check_chunk_fwd", "composite_reason"):
        arguments = getattr(torch.ops.kda, variant).default._schema.arguments
        assert [(a.name, str(a.type), a.default_value) for a in arguments] == described


def test_documented_function_has_the_schema() -> None:
    parameters = inspect.signature(kda_cuda.chunk_fwd).parameters
    arguments = torch.ops.kda.chunk_fwd.default._schema.arguments
    assert list(parameters) == [argument.name for argument in arguments]
    for argument in arguments:
        default = parameters[argument.name].default
        assert default == (argument.default_value if argument.has_default_value() else inspect.Parameter.empty)


def test_default_scale_is_that_of_the_head_size() -> None:
    inputs = make_inputs(K=16)
    torch.testing.assert_close(
        torch.ops.kda.chunk_fwd(**inputs)[0], torch.ops.kda.chunk_fwd(**inputs, scale=0.25)[0], rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4, 1), (4, 1)])
def test_A_log_as_checkpoints_carry_it(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(gate="softplus")
    expected = torch.ops.kda.chunk_fwd(**inputs)[0]
    inputs["A_log"] = inputs["A_log"].reshape(shape)
    inputs["dt_bias"] = inputs["dt_bias"].reshape(4, 16)
    torch.testing.assert_close(torch.ops.kda.chunk_fwd(**inputs)[0], expected, rtol=0, atol=0)


def test_gradients_against_finite_differences() -> None:
    inputs = make_inputs(
        B=1,
        T=66,
        H=1,
        HV=2,
        K=3,
        V=4,
        dtype=torch.float64,
        gate="softplus",
        with_state=True,
        state_dtype=torch.float64,
        use_qk_l2norm=True,
        use_beta_sigmoid=True,
        output_final_state=True,
        requires_grad=True,
    )
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.kda.chunk_fwd(**{**inputs, **dict(zip(names, tensors, strict=True))})[:2]

    assert torch.autograd.gradcheck(run, [inputs[name] for name in names], fast_mode=True)


def test_gradients_of_some_inputs_only() -> None:
    inputs = make_inputs(with_state=True, output_final_state=True)
    inputs["v"].requires_grad_()
    o, final_state, chunk_states = torch.ops.kda.chunk_fwd(**inputs, output_chunk_states=True)
    assert o.requires_grad and final_state.requires_grad
    assert not chunk_states.requires_grad
    final_state.sum().backward()
    assert inputs["v"].grad.abs().sum() > 0
    assert inputs["q"].grad is None


def test_double_backward_is_refused() -> None:
    inputs = make_inputs(T=4, requires_grad=True)
    o = torch.ops.kda.chunk_fwd(**inputs)[0]
    (dq,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(dq.sum(), inputs["q"])


def test_inference_mode_and_no_grad() -> None:
    inputs = make_inputs()
    expected = torch.ops.kda.chunk_fwd(**inputs)[0]
    with torch.inference_mode():
        torch.testing.assert_close(torch.ops.kda.chunk_fwd(**inputs)[0], expected, rtol=0, atol=0)
    inputs["q"].requires_grad_()
    with torch.no_grad():
        assert not torch.ops.kda.chunk_fwd(**inputs)[0].requires_grad


def test_autocast_leaves_the_inside_of_the_operator_alone() -> None:
    inputs = make_inputs(requires_grad=True)
    expected = torch.ops.kda.chunk_fwd(**inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = torch.ops.kda.chunk_fwd(**inputs)[0]
        torch.testing.assert_close(o, expected, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(o.sum(), inputs["q"])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), inputs["q"])
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


def test_outputs_share_no_memory_with_inputs() -> None:
    inputs = make_inputs(T=0, with_state=True, output_final_state=True)
    _, final_state, _ = torch.ops.kda.chunk_fwd(**inputs)
    torch.testing.assert_close(final_state, inputs["initial_state"], rtol=0, atol=0)
    final_state.zero_()
    assert inputs["initial_state"].abs().sum() > 0


def test_no_warning_on_the_cpu(recwarn: pytest.WarningsRecorder) -> None:
    inputs = make_inputs(K=5, V=7, requires_grad=True)
    torch.ops.kda.chunk_fwd(**inputs)[0].sum().backward()
    assert torch.ops.kda.composite_reason(**inputs) == ""
    assert not recwarn.list


def test_plan() -> None:
    call = ([1024], 8, 96, 96, 128, 128, "bfloat16", False, 90, 132)
    plan = json.loads(torch.ops.kda.plan_chunk_fwd(*call))
    assert plan["path"] == "fused" and plan["scans"] == 66 and plan["stage_ctas"] == {"fused_scan": 132}
    assert 0 < plan["workspace_bytes"] - 66 * 128 * 128 * 4 <= 1024  # a state for each cluster, and flags
    plan = json.loads(torch.ops.kda.plan_chunk_fwd(*call, False))
    assert plan["path"] == "stepwise" and "below that of the fused" in plan["reason"]
    assert plan["workspace_bytes"] > 0 and plan["scans"] == 0
    plan = json.loads(torch.ops.kda.plan_chunk_fwd([3, 0, 5], 1, 4, 8, 80, 128, "float16", True, 90, 132))
    assert plan["path"] == "composite"
    assert "K" in plan["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([8], 1, 4, 4, 64, 64, "int8", False, 90, 132), "`activation_dtype`.*int8"),
        (([8, 8], 2, 4, 4, 64, 64, "bfloat16", False, 90, 132), "`lengths`.*one length"),
        (([8, 8], 2, 4, 4, 64, 64, "bfloat16", True, 90, 132), "`batch`.*1.*2"),
        (([-8], 1, 4, 4, 64, 64, "bfloat16", True, 90, 132), "`lengths`.*-8"),
        (([8], -1, 4, 4, 64, 64, "bfloat16", False, 90, 132), "`batch`.*-1"),
        (([8], 1, 0, 4, 64, 64, "bfloat16", False, 90, 132), "`heads`.*0"),
        (([8], 1, 3, 4, 64, 64, "bfloat16", False, 90, 132), "`value_heads`.*multiple of 3.*4"),
        (([8], 1, 4, 4, 0, 64, "bfloat16", False, 90, 132), "`key_dim`.*0"),
    ],
)
def test_plan_refuses_wrong_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kda.plan_chunk_fwd(*arguments)


def test_build_info() -> None:
    info = kda_cuda.build_info()
    assert info["version"] == kda_cuda.__version__
    assert info["cuda_kernels"] == bool(info["architectures"])
    assert (info["cuda_version"] > 0) == info["cuda_kernels"]
    assert info["torch_built_with"]
