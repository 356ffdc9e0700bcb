"""``kda::chunk_fwd_saving`` and ``chunk_kda(disable_recompute=True)``: what is kept from the forward for the backward.
Away from a GPU nothing is, and all else is as with kernels: fakes, autograd, errors.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, backward_arguments, output_gradients
from operator_inputs import ARGUMENTS, make_inputs, positional
from test_autograd import Operators
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import kda_cuda

CASES = {
    "plain": make_inputs(B=1, requires_grad=True),
    "softplus_v_first": make_inputs(
        B=1, gate="softplus", with_state=True, state_v_first=True, output_final_state=True, requires_grad=True
    ),
    "packed": make_inputs(lengths=[3, 0, 67], with_state=True, output_final_state=True, output_chunk_states=True),
    "no_tokens": make_inputs(T=0, output_final_state=True),
}
all_cases = pytest.mark.parametrize("inputs", list(CASES.values()), ids=list(CASES))


@all_cases
def test_opcheck(inputs: dict[str, Any]) -> None:
    torch.library.opcheck(torch.ops.kda.chunk_fwd_saving, positional(inputs))


def test_opcheck_of_the_backward_that_takes_them() -> None:
    inputs = make_inputs(gate="softplus", with_state=True)
    tensors = tuple(inputs.get(name) for name in ARGUMENTS[:9])
    options = (None, None, False, True, False, False, False)
    nothing = torch.empty(0, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.kda.chunk_bwd, (*output_gradients(inputs), *tensors, *options, nothing))


@all_cases
def test_outputs_are_those_of_the_forward(inputs: dict[str, Any]) -> None:
    *outputs, intermediates = torch.ops.kda.chunk_fwd_saving(**inputs)
    for output, expected in zip(outputs, torch.ops.kda.chunk_fwd(**inputs), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert intermediates.shape == (0,) and intermediates.dtype == torch.uint8  # there is no GPU here


def test_schema() -> None:
    forward, saving = (getattr(torch.ops.kda, name).default._schema for name in ("chunk_fwd", "chunk_fwd_saving"))
    assert [(a.name, str(a.type), a.default_value) for a in saving.arguments] == [
        (a.name, str(a.type), a.default_value) for a in forward.arguments
    ]
    assert [r.name for r in saving.returns] == [*(r.name for r in forward.returns), "intermediates"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("features", [{"B": 3, "T": 70}, {"lengths": [1, 0, 200]}, {"B": 0}], ids=str)
def test_fake_states_the_bytes_that_the_planner_states(features: dict[str, Any], dtype: torch.dtype) -> None:
    K, V, HV = 64, 128, 4
    inputs = make_inputs(K=K, V=V, HV=HV, dtype=dtype, **features)
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in inputs.items()}
        intermediates = torch.ops.kda.chunk_fwd_saving(**moved)[3]
    B, T = inputs["q"].shape[:2]
    lengths = features.get("lengths", [T])
    plan = torch.ops.kda.plan_chunk_bwd(lengths, B, 2, HV, K, V, "bfloat16", "lengths" in features, 90, 132)
    expected = json.loads(plan)["intermediate_bytes"] if dtype != torch.float32 else 0
    assert intermediates.shape == (expected,) and intermediates.device.type == "cuda"


def leaves_of(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [inputs[name] for name in DIFFERENTIABLE if name in inputs]


def test_drop_in_saves_where_a_gradient_is_wanted() -> None:
    inputs = make_inputs(B=1, with_state=True, requires_grad=True)
    options = {"output_final_state": True}

    def run(**more: Any) -> tuple[list[str], list[torch.Tensor]]:
        with Operators() as seen:
            o, final_state = kda_cuda.chunk_kda(**inputs, **options, **more)
            loss = o.square().sum() + final_state.square().sum()
            return seen.names, list(torch.autograd.grad(loss, leaves_of(inputs)))

    names, gradients = run(disable_recompute=True)
    assert names[0] == "kda::chunk_fwd_saving" and "kda::chunk_bwd" in names
    default_names, expected = run()
    assert default_names[0] == "kda::chunk_fwd"
    for gradient, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, e, rtol=0, atol=0)
    with torch.no_grad(), Operators() as seen:
        kda_cuda.chunk_kda(**inputs, **options, disable_recompute=True)
    assert seen.names == ["kda::inference_chunk_fwd"]
    with Operators() as seen:
        kda_cuda.chunk_kda(**{name: x.detach() for name, x in inputs.items()}, disable_recompute=True)
    assert seen.names == ["kda::inference_chunk_fwd"]


def test_compiles_for_every_length() -> None:
    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return kda_cuda.chunk_kda(*tensors, disable_recompute=True)[0].square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for T in (5, 64, 129):
        tensors = list(make_inputs(T=T, requires_grad=True).values())
        for gradient, expected in zip(
            torch.autograd.grad(run(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors), strict=True
        ):
            torch.testing.assert_close(gradient, expected)
    assert counter.frame_count == 1


def test_double_backward_is_refused() -> None:
    inputs = make_inputs(B=1, T=5, requires_grad=True)
    o = kda_cuda.chunk_kda(**inputs, disable_recompute=True)[0]
    (dq,) = torch.autograd.grad(o.sum(), inputs["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("intermediates", "message"),
    [
        (torch.empty(0), "expected dtype uint8, got float32"),
        (torch.empty(7, dtype=torch.uint8), r"of shape \[\d+\] or \[0\], got shape \[7\]"),
        (torch.empty((0, 3), dtype=torch.uint8), r"got shape \[0, 3\]"),
        (torch.empty(0, dtype=torch.uint8, device="meta"), "expected device cpu as `q` is, got meta"),
    ],
)
def test_wrong_intermediates(intermediates: torch.Tensor, message: str) -> None:
    inputs = make_inputs()
    do, _ = output_gradients(inputs)
    with pytest.raises(RuntimeError, match=f"kda::chunk_bwd: argument `intermediates`: .*{message}"):
        torch.ops.kda.check_chunk_bwd(do, None, **backward_arguments(inputs), intermediates=intermediates)
