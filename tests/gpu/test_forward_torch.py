"""The CUDA operators as PyTorch sees them: opcheck, torch.compile, and training with the kernels in both passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, FAMILIES, make_inputs, output_gradients
from gpu_support import (
    DEVICE,
    assert_all_same_bits,
    assert_same_bits,
    call,
    gpu_tests,
    kernels_only,
    needs_cuda,
)
from gradient_support import backward
from operator_inputs import make_inputs as make_operator_inputs
from operator_inputs import positional
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import kda_cuda
from kda_cuda.accuracy import relative_rmse

pytestmark = gpu_tests

# Between gradients in bf16 of two ways to the same call: their own rounding is 1.7e-3.
BF16_GRADIENT_RELATIVE_RMSE = 3e-3

# --- opcheck --------------------------------------------------------------------------------------------------------

OPERATOR_CASES: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "states": dict(with_state=True, output_final_state=True, output_chunk_states=True),
    "v_first": dict(with_state=True, state_v_first=True, output_final_state=True, output_chunk_states=True),
    "softplus": dict(gate="softplus", use_qk_l2norm=True, use_beta_sigmoid=True, scale=0.3),
    "sigmoid": dict(gate="sigmoid", use_beta_sigmoid=True, allow_neg_eigval=True),
    "fp16": dict(dtype=torch.float16, output_final_state=True),
    "packed": dict(lengths=[1, 0, 64, 65], with_state=True, output_final_state=True, output_chunk_states=True),
    "no_tokens": dict(T=0, with_state=True, output_final_state=True, output_chunk_states=True),
    "no_rows": dict(B=0, with_state=True, output_final_state=True, output_chunk_states=True),
    "training": dict(B=1, gate="softplus", with_state=True, output_final_state=True, requires_grad=True),
    "training_packed": dict(gate="sigmoid", lengths=[3, 0, 67], use_qk_l2norm=True, requires_grad=True),
    "no_kernel": dict(K=16, V=24, dtype=torch.float32, output_final_state=True),
}


def operator_arguments(features: dict[str, Any]) -> tuple[Any, ...]:
    inputs = make_operator_inputs(
        **{"K": 64, "V": 128, "dtype": torch.bfloat16, "gate_dtype": torch.bfloat16, **features}
    )
    moved = (
        x.detach().to(DEVICE).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in positional(inputs)
    )
    return tuple(moved)


@pytest.mark.parametrize("features", OPERATOR_CASES.values(), ids=OPERATOR_CASES)
def test_opcheck(features: dict[str, Any]) -> None:
    torch.library.opcheck(torch.ops.kda.chunk_fwd, operator_arguments(features))


@pytest.mark.parametrize("features", OPERATOR_CASES.values(), ids=OPERATOR_CASES)
def test_fake_outputs_are_like_real_ones(features: dict[str, Any]) -> None:
    arguments = operator_arguments(features)
    with torch.no_grad():
        real = torch.ops.kda.chunk_fwd(*arguments)
        meta = torch.ops.kda.chunk_fwd(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
    for r, m in zip(real, meta, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())
        assert r.device.type == torch.device(DEVICE).type


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, ...]:
    """Doubling is exact, so that generated code around the operator changes no bit."""
    return kda_cuda.chunk_kda(
        2 * q,
        k,
        v,
        g,
        2 * beta,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=-5.0,
    )


def forward_arguments(T: int, B: int = 2) -> tuple[Tensor, ...]:
    inputs = make_inputs("long", B=B, T=T, HV=4, device=DEVICE)
    return tuple(inputs[name] for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias"))


@needs_cuda
def test_one_compiled_graph_serves_every_length(fresh_compiler: None) -> None:
    """fullgraph, dynamic, code by Inductor around the kernels: no break, no recompilation, the same bits."""
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    with kernels_only():
        for T in (70, 5, 64, 129, 300):
            arguments = forward_arguments(T)
            for actual, expected in zip(compiled(*arguments), forward(*arguments), strict=True):
                assert_same_bits(actual, expected, f"T = {T}")
    assert counter.frame_count == 1


@needs_cuda
def test_compiled_into_cuda_graphs(fresh_compiler: None) -> None:
    """mode="reduce-overhead": the compiled function itself is captured and replayed, with other inputs each time."""
    compiled = torch.compile(forward, fullgraph=True, mode="reduce-overhead")
    with kernels_only(), torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            q, *others = forward_arguments(130)
            arguments = (torch.randn_like(q), *others)
            torch.compiler.cudagraph_mark_step_begin()
            outputs = tuple(x.clone() for x in compiled(*arguments))
            for actual, expected in zip(outputs, forward(*arguments), strict=True):
                assert_same_bits(actual, expected, f"replay {seed}")
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_compiled_training(fresh_compiler: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for T in (70, 129):
        leaves = [x.requires_grad_() for x in forward_arguments(T, B=1)]
        results = []
        for function in (compiled, forward):
            o, state = function(*leaves)
            results.append(torch.autograd.grad((o.float().square().sum(), state.square().sum()), leaves))
        for actual, expected in zip(*results, strict=True):
            assert relative_rmse(actual, expected) <= BF16_GRADIENT_RELATIVE_RMSE
    assert counter.frame_count == 1


# --- Training -------------------------------------------------------------------------------------------------------

TRAINING: dict[str, dict[str, Any]] = {
    "plain": dict(T=130),
    "grouped_v_first": dict(T=100, H=1, HV=3, V=128, with_state=True, state_v_first=True, allow_neg_eigval=True),
    "packed": dict(lengths=[1, 70, 0, 64, 5], with_state=True, gate_dtype=torch.float32),
    "strided": dict(B=2, T=70, K=128, strided="fused"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", TRAINING.values(), ids=TRAINING)
def test_gradients(family: str, features: dict[str, Any]) -> None:
    """Autograd gives each input the gradient that the kernels of the backward give it (test_backward.py: how exact)."""
    inputs = make_inputs(family, output_chunk_states=False, device=DEVICE, **features)
    leaves = {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in inputs}
    o, final_state, _ = call({**inputs, **leaves})
    do, dstate = output_gradients(inputs)
    with kernels_only("chunk_bwd"):
        actual = torch.autograd.grad((o, final_state), tuple(leaves.values()), (do, dstate))
    expected = backward(inputs, do, dstate)
    for name, gradient in zip(leaves, actual, strict=True):
        assert_same_bits(gradient, expected[name], name)


@needs_cuda
def test_backward_does_not_warn() -> None:
    inputs = make_inputs("long", T=70, device=DEVICE)
    inputs["v"].requires_grad_()
    with kernels_only("chunk_bwd"):
        call(inputs)[0].float().sum().backward()


def test_forward_is_the_same_with_and_without_gradients() -> None:
    inputs = make_inputs("long", T=130, with_state=True, device=DEVICE)
    expected = call(inputs)
    inputs["k"].requires_grad_()
    outputs = call(inputs)
    assert outputs[0].requires_grad and outputs[1].requires_grad and not outputs[2].requires_grad
    assert_all_same_bits(tuple(x.detach() for x in outputs), expected)


def test_training_lowers_a_loss() -> None:
    """Twenty steps of AdamW: a projection learns to reproduce the outputs of another one, through the operator."""
    torch.manual_seed(0)
    H, D, width = 2, 64, 32
    x = torch.randn(2, 130, width, device=DEVICE)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.nn.Linear(width, 4 * H * D, device=DEVICE)
            self.beta = torch.nn.Linear(width, H, device=DEVICE)
            self.A_log = torch.nn.Parameter(torch.zeros(H, device=DEVICE))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
                q, k, v, g = self.projection(x).unflatten(-1, (4, H, D)).unbind(2)
                flags = {f"use_{name}_in_kernel": True for name in ("qk_l2norm", "gate", "beta_sigmoid")}
                return kda_cuda.chunk_kda(q, k, v, g, self.beta(x), A_log=self.A_log, **flags)[0]

    teacher, student = Model(), Model()
    with torch.no_grad():
        target = teacher(x).float()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    with kernels_only(), kernels_only("chunk_bwd"):
        for _ in range(20):
            loss = (student(x).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0], losses
