"""What is timed of the backward, and of training: ours, with its composite implementation for the check, and FLA.

The inputs are those of ``kda::chunk_fwd`` by name, and the gradients of its outputs as ``do`` and ``dfinal_state``
(bench.inputs). A backward is timed by itself: its forward has run before. A training step is a forward and a backward.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kda_cuda
from bench.implementations import Call, FlaForward, Implementation, device_facts
from bench.inputs import OUTPUT_GRADIENTS
from bench.shapes import Shape

__all__ = ["backward_implementations", "backward_plan", "training_implementations"]

# The inputs that have a gradient, in the order of kda::chunk_bwd.
DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
# Sums over all tokens and channels of a head, whose terms cancel: relative to its own size one may be far off by
# chance, and says nothing about a call.
NOT_COMPARED = ("A_log",)

Inputs = dict[str, Any]


def backward_plan(shape: Shape, device: torch.device) -> dict[str, Any]:
    """What the planner says of the backward of a shape on a device; see ``kda::plan_chunk_bwd``."""
    sizes = (shape.heads, shape.heads, shape.key_dim, shape.value_dim)
    facts = device_facts(device)
    return json.loads(torch.ops.kda.plan_chunk_bwd(list(shape.lengths), 1, *sizes, "bfloat16", shape.varlen, *facts))


def _arguments(operator: Any, inputs: Inputs) -> list[Any]:
    """By position: what matching names costs is no property of the operator."""
    return [inputs.get(argument.name, argument.default_value) for argument in operator.default._schema.arguments]


def _compared(gradients: tuple[Tensor, ...], names: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    """The gradients by name; those of absent inputs have no elements."""
    found = zip(names, gradients, strict=True)
    return {f"d{name}": x for name, x in found if x.numel() and name not in NOT_COMPARED}


class OurBackward(Implementation):
    """``torch.ops.kda.chunk_bwd``, or its composite implementation."""

    def __init__(self, composite: bool = False) -> None:
        self.name = "ours_composite" if composite else "ours"
        self.label = "kda-cuda, composite" if composite else "kda-cuda"
        self.kind = "forced" if composite else "ours"
        self.slow = composite
        self.method = "events" if composite else "graph"
        self._operator = torch.ops.kda.chunk_bwd_composite if composite else torch.ops.kda.chunk_bwd

    def version(self) -> str:
        return kda_cuda.__version__

    def call(self, inputs: Inputs) -> Call:
        arguments = _arguments(self._operator, inputs)
        return Call(lambda: self._operator(*arguments), _compared)


class OurTraining(Implementation):
    """A forward and ``torch.ops.kda.chunk_bwd``, as autograd calls them.

    The operators are called themselves: recording a graph for autograd is host work, and takes no time of the GPU.
    """

    def __init__(self, mode: str | None = None) -> None:
        """mode: None: only inputs are saved; "saved": as with ``disable_recompute``; "composite": without kernels."""
        self.name = "ours" if mode is None else f"ours_{mode}"
        self.label = "kda-cuda" if mode is None else f"kda-cuda, {mode}"
        self.kind = "ours" if mode is None else "forced"
        self.slow = mode == "composite"
        self.method = "events" if self.slow else "graph"
        self.note = "the forward leaves its intermediates to the backward" if mode == "saved" else ""
        self._saves = mode == "saved"
        forward = {None: "inference_chunk_fwd", "saved": "chunk_fwd_saving", "composite": "chunk_fwd_composite"}[mode]
        self._forward = getattr(torch.ops.kda, forward)
        self._backward = torch.ops.kda.chunk_bwd_composite if self.slow else torch.ops.kda.chunk_bwd

    def version(self) -> str:
        return kda_cuda.__version__

    def call(self, inputs: Inputs) -> Call:
        forward, backward = _arguments(self._forward, inputs), _arguments(self._backward, inputs)

        def run() -> tuple[Tensor, ...]:
            o, final_state, _, *intermediates = self._forward(*forward)
            if self._saves:
                return o, final_state, *self._backward(*backward[:-1], *intermediates)
            return o, final_state, *self._backward(*backward)

        return Call(run, lambda results: {"o": results[0], "final_state": results[1], **_compared(results[2:])})


def _fla_step(inputs: Inputs, **options: Any) -> tuple[Callable[[], Any], list[str], list[Tensor], list[Tensor]]:
    """FLA's forward with a graph for autograd, the names of what has a gradient, these leaves, and do, dfinal_state."""
    names = [name for name in DIFFERENTIABLE if name in inputs]
    leaves = [inputs[name].detach().requires_grad_() for name in names]
    forward = FlaForward.function({**inputs, **dict(zip(names, leaves, strict=True))}, **options)

    def recorded() -> Any:
        with torch.enable_grad():
            return forward()

    return recorded, names, leaves, [inputs[name] for name in OUTPUT_GRADIENTS]


class FlaBackward(FlaForward):
    """The backward of ``fla.ops.kda.chunk_kda``, through autograd, as it is by default: it recomputes."""

    def call(self, inputs: Inputs) -> Call:
        forward, names, leaves, gradients = _fla_step(inputs)
        outputs = forward()
        return Call(
            lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True),
            lambda results: _compared(results, tuple(names)),
        )


class FlaTraining(FlaForward):
    """Forward and backward of ``fla.ops.kda.chunk_kda``."""

    def __init__(self, saved: bool = False) -> None:
        """saved: with ``disable_recompute``."""
        self.name, self.label = ("fla_saved", "FLA, saved") if saved else ("fla", "FLA")
        self._options = {"disable_recompute": saved}

    def call(self, inputs: Inputs) -> Call:
        forward, names, leaves, gradients = _fla_step(inputs, **self._options)

        def run() -> tuple[Tensor, ...]:
            outputs = forward()
            return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

        return Call(
            run,
            lambda results: {
                "o": results[0].detach(),
                "final_state": results[1].detach(),
                **_compared(results[2:], tuple(names)),
            },
        )


def backward_implementations(peers: bool = True) -> list[Implementation]:
    """All columns of the backward's board, ours first."""
    return [OurBackward(), OurBackward(composite=True), *([FlaBackward()] if peers else [])]


def training_implementations(peers: bool = True) -> list[Implementation]:
    """All columns of the board of training steps, ours first."""
    ours = [OurTraining(), OurTraining("saved"), OurTraining("composite")]
    return [*ours, *([FlaTraining(), FlaTraining(saved=True)] if peers else [])]
