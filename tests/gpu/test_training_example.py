"""examples/train_lm.py on a GPU: the gradients of the whole model are those that the composite implementation gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from gpu_support import DEVICE, gpu_tests, kernels_only
from test_backward import FEW_LIMIT, FEW_NUMBERS

from kda_cuda.accuracy import GRADIENT_RELATIVE_RMSE, O_RELATIVE_RMSE, relative_rmse

pytest.importorskip("rich")
train_lm = pytest.importorskip("examples.train_lm", reason="the examples are in the source tree only")

pytestmark = gpu_tests

SIZE = train_lm.Size(layers=2, hidden_size=512, heads=8, head_dim=64, batch=4, tokens=200, steps=1)
# What a layer may be off by, forward and backward, added up over the layers.
LIMIT = SIZE.layers * (O_RELATIVE_RMSE + max(GRADIENT_RELATIVE_RMSE.values()))


@contextlib.contextmanager
def composite_only() -> Iterator[None]:
    """Within it the operators that the layer and autograd call are the composite ones."""
    with contextlib.ExitStack() as patches:
        for name in ("chunk_fwd", "chunk_bwd"):
            composite = getattr(torch.ops.kda, f"{name}_composite")
            patches.enter_context(mock.patch.object(torch.ops.kda, name, composite))
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


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_gradients_of_the_whole_model(tokens: torch.Tensor, compiled: bool) -> None:
    torch._dynamo.reset()
    with composite_only():
        expected_loss, expected = gradients_of_a_step(tokens)
    with kernels_only(), kernels_only("chunk_bwd"):
        loss, gradients = gradients_of_a_step(tokens, compiled)
    assert abs(loss - expected_loss) <= O_RELATIVE_RMSE * expected_loss
    assert len(gradients) == len(expected) > 10 * SIZE.layers
    for name, gradient in gradients.items():
        assert gradient is not None and bool(gradient.isfinite().all()), name
        # A gradient of few numbers may be tiny by chance: a sum over all tokens whose terms cancel.
        limit = FEW_LIMIT if gradient.numel() < FEW_NUMBERS else LIMIT
        error = relative_rmse(gradient, expected[name])
        assert error <= limit, f"{name}: relative RMSE {error:.2e} > {limit:.1e}"


def test_loss_falls() -> None:
    """A few steps on a text that repeats itself, as the example takes them."""
    text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8).long()
    torch.manual_seed(1)
    size = train_lm.Size(**{**vars(SIZE), "steps": 30})
    model = train_lm.ByteModel(size).to(DEVICE)
    with kernels_only(), kernels_only("chunk_bwd"):
        losses = train_lm.train(model, text, size, torch.device(DEVICE), 1e-3, compiled=False, seed=2)
    assert losses[-1] < 0.7 * losses[0], losses
