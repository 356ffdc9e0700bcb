"""``torch.compile(fullgraph=True)``: no graph break, one graph for all lengths, the numbers of the eager run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_inputs import make_inputs
from torch._dynamo.testing import CompileCounterWithBackend

import kda_cuda

LENGTHS = (5, 64, 70, 129, 200)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], dynamic: bool | None
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """The function compiled without graph breaks, and the counter of the graphs that it took.

    The backend runs AOTAutograd, which is where operators meet their fakes and their autograd formulas; code generation
    for the PyTorch operators around them is not this project's.
    """
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic), counter


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    o, final_state = kda_cuda.chunk_kda(
        q * 2, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True
    )
    return o.sum(-1) + final_state.sum()


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_serves_every_length(training: bool) -> None:
    run, counter = compiled(forward, dynamic=True)
    for T in LENGTHS:
        inputs = make_inputs(T=T, use_beta_sigmoid=True, requires_grad=training)
        del inputs["use_beta_sigmoid"]
        tensors = list(inputs.values())
        out = run(*tensors)
        expected = forward(*tensors)
        torch.testing.assert_close(out, expected)
        if training:
            gradients = torch.autograd.grad(out.sum(), tensors)
            for gradient, other in zip(gradients, torch.autograd.grad(expected.sum(), tensors), strict=True):
                torch.testing.assert_close(gradient, other)
    assert counter.frame_count == 1


def test_lengths_that_turn_out_dynamic_cost_one_more_graph() -> None:
    """Without a hint torch compiles the first shape as it is, then once more for all."""
    run, counter = compiled(forward, dynamic=None)
    for T in LENGTHS:
        inputs = make_inputs(T=T)
        torch.testing.assert_close(run(*inputs.values()), forward(*inputs.values()))
    assert counter.frame_count == 2


def test_one_graph_serves_every_batch_of_sequences() -> None:
    """Neither the number of sequences nor their lengths are part of the graph."""

    def packed(**inputs: Any) -> tuple[torch.Tensor, ...]:
        return torch.ops.kda.chunk_fwd(**inputs, output_final_state=True, output_chunk_states=True)

    run, counter = compiled(packed, dynamic=True)
    # The first sizes all differ: torch takes equal ones for the same symbol, and compiles again where they are not.
    for lengths in ([30, 20, 5, 1, 9], [1, 0, 64, 65], [200, 3, 5]):
        inputs = make_inputs(lengths=lengths, with_state=True)
        for result, expected in zip(run(**inputs), packed(**inputs), strict=True):
            torch.testing.assert_close(result, expected)
    assert counter.frame_count == 1


FEATURES = {
    "softplus": {"gate": "softplus"},
    "sigmoid": {"gate": "sigmoid"},
    "varlen": {"lengths": [3, 70, 0, 1]},
}


@pytest.mark.parametrize("features", list(FEATURES.values()), ids=list(FEATURES))
def test_drop_in_compiles_with_every_feature(features: dict[str, Any]) -> None:
    inputs = make_inputs(with_state=True, state_v_first=True, **features)
    arguments = {name: inputs[name] for name in ("q", "k", "v", "g", "beta", "initial_state", "state_v_first")}
    arguments |= {name: inputs[name] for name in ("A_log", "dt_bias", "lower_bound", "cu_seqlens") if name in inputs}
    if "cu_seqlens" in inputs:
        arguments["cu_seqlens_cpu"] = inputs["cu_seqlens"]
    arguments["use_gate_in_kernel"] = "use_gate" in inputs

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return kda_cuda.chunk_kda(**arguments, output_final_state=True, safe_gate="lower_bound" in arguments)

    run, counter = compiled(call, dynamic=None)
    for result, expected in zip(run(), call(), strict=True):
        torch.testing.assert_close(result, expected)
    assert counter.frame_count == 1


def test_compiles_under_autocast() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return kda_cuda.chunk_kda(q, k, v, g, beta)[0]

    inputs = make_inputs(requires_grad=True)
    run, _ = compiled(call, dynamic=None)
    o = run(*inputs.values())
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o, call(*inputs.values()))
    o.float().sum().backward()
    assert inputs["q"].grad.dtype == torch.float32


@pytest.mark.slow
def test_training_step_with_inductor() -> None:
    """Code generation and all: a layer around the operator trains as it does in eager mode."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.nn.Linear(8, 4 * 16)
            self.beta = torch.nn.Linear(8, 2)
            self.A_log = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v, g = self.projection(x).unflatten(-1, (2, 32)).split([8, 8, 8, 8], -1)
            o, _ = kda_cuda.chunk_kda(
                q,
                k,
                v,
                g,
                self.beta(x),
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True,
                A_log=self.A_log,
            )
            return o.square().mean()

    torch.manual_seed(0)
    model = Model()
    step = torch.compile(model, fullgraph=True, dynamic=True)
    for T in (33, 100):
        x = torch.randn(2, T, 8)
        expected = torch.autograd.grad(model(x), list(model.parameters()))
        gradients = torch.autograd.grad(step(x), list(model.parameters()))
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other)


def test_export() -> None:
    class Call(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
        ) -> torch.Tensor:
            return kda_cuda.chunk_kda(q, k, v, g, beta)[0]

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = {name: {1: tokens} for name in ("q", "k", "v", "g", "beta")}
    program = torch.export.export(Call(), tuple(make_inputs(T=70).values()), dynamic_shapes=shapes)
    inputs = tuple(make_inputs(T=131).values())
    torch.testing.assert_close(program.module()(*inputs), Call()(*inputs))
