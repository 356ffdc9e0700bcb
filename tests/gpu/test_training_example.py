"""examples/train_lm.py on a GPU: the gradients of the whole model are those that the composite implementation gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_support import DEVICE, gpu_tests, kernels_only
from test_backward import FEW_LIMIT, FEW_NUMBERS

from kda_cuda import composite
from kda_cuda.accuracy import GRADIENT_RELATIVE_RMSE, O_RELATIVE_RMSE, relative_rmse

pytest.importorskip("rich")
train_lm = pytest.importorskip("examples.train_lm", reason="the examples are in the source tree only")

pytestmark = gpu_tests

SIZE = train_lm.Size(layers=2, hidden_size=512, heads=8, head_dim=64, batch=4, tokens=200, steps=1)
# Errors of kernels are no independent draws, as those are that the kernels are compared with.
MARGIN = 2.0


def perturbed(x: torch.Tensor, relative_rmse: float) -> torch.Tensor:
    """x and an error of that size, drawn at random."""
    if x.numel() == 0:
        return x
    size = relative_rmse * x.float().square().mean().sqrt()
    return (x.float() + size * torch.randn_like(x, dtype=torch.float32)).to(x.dtype)


class PerturbedOutput(torch.autograd.Function):
    """o with an error as large as the contract allows; its gradient has none of it."""

    @staticmethod
    def forward(ctx: Any, o: torch.Tensor) -> torch.Tensor:
        return perturbed(o, O_RELATIVE_RMSE)

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> torch.Tensor:
        return do


@contextlib.contextmanager
def composite_only(with_errors: bool = False) -> Iterator[None]:
    """Within it the operators that the layer and autograd call are the composite ones.

    with_errors: o and the gradients are as far off as the accuracy contract allows.
    """
    forward, backward = torch.ops.kda.chunk_fwd_composite, composite.chunk_bwd

    def forward_with_errors(*args: Any) -> tuple[torch.Tensor, ...]:
        o, *others = forward(*args)
        return PerturbedOutput.apply(o), *others

    def backward_with_errors(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(map(perturbed, backward(*args), GRADIENT_RELATIVE_RMSE.values()))

    with contextlib.ExitStack() as patches:
        enter = patches.enter_context
        enter(mock.patch.object(torch.ops.kda, "chunk_fwd", forward_with_errors if with_errors else forward))
        enter(mock.patch.object(torch.ops.kda, "chunk_bwd", torch.ops.kda.chunk_bwd_composite))
        if with_errors:
            enter(mock.patch.object(composite, "chunk_bwd", backward_with_errors))
        yield


def gradients_of_a_step(tokens: torch.Tensor, compiled: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a fresh model and the gradient of each parameter, in the precision that the example trains in."""
    torch.manual_seed(0)
    model = train_lm.ByteModel(SIZE).to(DEVICE)
    loss_of = torch.compile(model.loss, fullgraph=True) if compiled else model.loss
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        loss = loss_of(tokens)
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(train_lm.BYTES, (SIZE.batch, SIZE.tokens + 1), generator=generator).to(DEVICE)


def deviations(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative RMSE of each parameter's gradient."""
    assert len(actual) == len(expected) > 10 * SIZE.layers
    return {name: relative_rmse(gradient, expected[name]) for name, gradient in actual.items()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_gradients_of_the_whole_model(tokens: torch.Tensor, compiled: bool) -> None:
    """A model amplifies errors of its layers, how much depends on the model: so the kernels' gradients are held to what
    errors at the limit of the contract make of those of the composite.
    """
    torch._dynamo.reset()
    with composite_only():
        expected_loss, expected = gradients_of_a_step(tokens)
    with composite_only(with_errors=True):
        allowed = deviations(gradients_of_a_step(tokens)[1], expected)
    with kernels_only(), kernels_only("chunk_bwd"):
        loss, gradients = gradients_of_a_step(tokens, compiled)
    assert abs(loss - expected_loss) <= O_RELATIVE_RMSE * expected_loss
    for name, error in deviations(gradients, expected).items():
        # A gradient of few numbers may be tiny by chance: a sum over all tokens whose terms cancel.
        limit = FEW_LIMIT if gradients[name].numel() < FEW_NUMBERS else MARGIN * allowed[name]
        assert error <= limit < 1, f"{name}: relative RMSE {error:.2e} > {limit:.1e}"


def test_loss_falls() -> None:
    """A few steps on a text that repeats itself, as the example takes them."""
    text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8).long()
    torch.manual_seed(1)
    size = train_lm.Size(**{**vars(SIZE), "steps": 30})
    model = train_lm.ByteModel(size).to(DEVICE)
    with kernels_only(), kernels_only("chunk_bwd"):
        losses = train_lm.train(model, text, size, torch.device(DEVICE), 1e-3, compiled=False, seed=2)
    assert losses[-1] < 0.7 * losses[0], losses
