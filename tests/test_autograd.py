"""How calls reach autograd: gradients where one is wanted, nothing in between where none is, errors for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE
from operator_inputs import ARGUMENTS, make_inputs, positional
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kda_cuda


class Operators(TorchDispatchMode):
    """Collects the names of this project's operators that calls within it come down to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kda":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def operators_of(call: Callable[[], Any]) -> list[str]:
    with Operators() as operators:
        call()
    return operators.names


def inputs_with_everything() -> dict[str, Any]:
    return make_inputs(T=5, gate="softplus", with_state=True, output_final_state=True)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [torch.ops.kda.chunk_fwd, kda_cuda.chunk_fwd])
def test_without_gradients_autograd_is_not_entered(function: Callable[..., Any], mode: Callable[[], Any]) -> None:
    inputs = inputs_with_everything()
    with mode():
        assert operators_of(lambda: function(**inputs)) == ["kda::inference_chunk_fwd"]
        assert operators_of(lambda: function(*positional(inputs))) == ["kda::inference_chunk_fwd"]
    flags = {"use_gate_in_kernel": True, "A_log": inputs["A_log"]}
    names = ("q", "k", "v", "g", "beta")
    with mode():
        call = {name: inputs[name] for name in names} | flags
        assert operators_of(lambda: kda_cuda.chunk_kda(**call)) == ["kda::inference_chunk_fwd"]


def test_nothing_of_this_project_is_in_the_way_of_inference() -> None:
    """What costs host time is Python at the Autograd keys."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("kda::chunk_fwd", "Autograd")
    for key in ("Autograd", "AutogradCPU", "AutogradCUDA"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key("kda::inference_chunk_fwd", key)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_any_input_that_requires_a_gradient_gets_one(name: str) -> None:
    inputs = inputs_with_everything()
    inputs[name].requires_grad_()
    assert operators_of(lambda: torch.ops.kda.chunk_fwd(**inputs)) == ["kda::chunk_fwd"]
    o, final_state, _ = torch.ops.kda.chunk_fwd(**inputs)
    (gradient,) = torch.autograd.grad((o.sum(), final_state.square().sum()), inputs[name])
    assert gradient.shape == inputs[name].shape and gradient.any()
    with torch.no_grad():
        assert operators_of(lambda: torch.ops.kda.chunk_fwd(**inputs)) == ["kda::inference_chunk_fwd"]
        assert not torch.ops.kda.chunk_fwd(**inputs)[0].requires_grad


def test_the_overload_is_differentiable_by_itself() -> None:
    """Compiled graphs and C++ call it, not what Python calls."""
    inputs = make_inputs(T=5, requires_grad=True)
    gradients = [
        torch.autograd.grad(operator(**inputs)[0].square().sum(), list(inputs.values()))
        for operator in (torch.ops.kda.chunk_fwd, torch.ops.kda.chunk_fwd.default, torch.ops.kda.chunk_fwd_composite)
    ]
    for other in gradients[1:]:
        for gradient, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_all_ways_to_call_give_the_same_bits() -> None:
    inputs = inputs_with_everything()
    expected = torch.ops.kda.inference_chunk_fwd(**inputs)
    complete = tuple(kda_cuda.chunk_fwd.__defaults__ or ())
    given = positional(inputs)
    everything = (*given, *complete[len(given) - len(ARGUMENTS) :]) if len(given) < len(ARGUMENTS) else given
    for outputs in (
        torch.ops.kda.chunk_fwd(**inputs),
        torch.ops.kda.chunk_fwd(*given),
        torch.ops.kda.chunk_fwd(*everything),
        torch.ops.kda.chunk_fwd.default(**inputs),
    ):
        for actual, e in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual, e, rtol=0, atol=0)


def test_the_operator_is_still_torchs() -> None:
    packet = torch.ops.kda.chunk_fwd
    assert isinstance(packet, torch._ops.OpOverloadPacket)
    assert packet.overloads() == ["default"] and str(packet) == "kda.chunk_fwd"
    with pytest.raises(TypeError, match="beta"):
        packet(*[torch.zeros(1, 1, 1, 1)] * 4)
    with pytest.raises(RuntimeError, match="`q`|Tensor"):
        packet(1, 2, 3, 4, 5)


def test_graph_tracing_keeps_the_differentiable_operator() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return torch.ops.kda.chunk_fwd(q, k, v, g, beta)[0]

    graph = torch.fx.symbolic_trace(call)
    inputs = make_inputs(T=5, requires_grad=True)
    torch.testing.assert_close(graph(*inputs.values()), call(*inputs.values()))
    assert graph(*inputs.values()).requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = inputs_with_everything()
    leaves = [inputs[name].requires_grad_() for name in DIFFERENTIABLE]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        o, final_state, _ = torch.ops.kda.chunk_fwd(**{**inputs, **dict(zip(DIFFERENTIABLE, tensors, strict=True))})
        return o.square().sum() + final_state.square().sum()

    def gradients(run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        for leaf in leaves:
            leaf.grad = None
        run(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(call)
    for gradient, e in zip(
        gradients(lambda *x: checkpoint(call, *x, use_reentrant=use_reentrant)), expected, strict=True
    ):
        torch.testing.assert_close(gradient, e, rtol=0, atol=0)


def sum_of_outputs(inputs: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda q: torch.ops.kda.chunk_fwd(**{**inputs, "q": q})[0].sum()


def test_functional_gradients_are_refused() -> None:
    inputs = make_inputs(T=5)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(sum_of_outputs(inputs))(inputs["q"])
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda q: torch.vmap(sum_of_outputs(inputs))(q).sum())(inputs["q"].expand(2, 2, 5, 2, 16))


def test_forward_mode_is_refused() -> None:
    """It used to give a tangent of zero without a word."""
    inputs = make_inputs(T=5)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(sum_of_outputs(inputs), (inputs["q"],), (torch.ones_like(inputs["q"]),))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            sum_of_outputs(inputs)(forward_ad.make_dual(inputs["q"], torch.ones_like(inputs["q"])))
        assert torch.isfinite(sum_of_outputs(inputs)(inputs["q"]))  # a level alone is no obstacle


def test_vmap_runs_call_by_call() -> None:
    inputs = make_inputs(T=5)
    q = torch.stack([inputs["q"], 2 * inputs["q"]])
    found = torch.vmap(sum_of_outputs(inputs))(q)
    torch.testing.assert_close(found, torch.stack([sum_of_outputs(inputs)(x) for x in q]))
