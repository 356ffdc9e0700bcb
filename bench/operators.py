"""The operators of the board. One more is one more entry of OPERATORS: its shapes, inputs, traffic and columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench import implementations, inputs, shapes
from bench.shapes import Shape

__all__ = ["OPERATORS", "Operator"]


@dataclass(frozen=True)
class Operator:
    """What the board needs to know of an operator."""

    name: str  # as in torch.ops.kda, in the JSON and in peers_h200.json
    title: str
    shapes: tuple[Shape, ...]
    quick: tuple[str, ...]  # names of the shapes of a quick run
    families: tuple[str, ...]
    make_inputs: Callable[[Shape, str, int, torch.device | str], dict[str, Any]]  # shape, family, seed, device
    least_bytes: Callable[[Shape], int]
    flop: Callable[[Shape], int]
    plan: Callable[[Shape, torch.device], dict[str, Any]]
    # Columns, with or without peers. The first is ours; the rest is checked against it, and it against REFERENCE.
    implementations: Callable[[bool], list[Any]]
    reference: str  # name of the implementation that ours is checked against


FORWARD = Operator(
    name="chunk_fwd",
    title="forward",
    shapes=shapes.FORWARD_SHAPES,
    quick=shapes.QUICK,
    families=inputs.FAMILIES,
    make_inputs=inputs.make_inputs,
    least_bytes=shapes.least_bytes,
    flop=shapes.flop,
    plan=implementations.forward_plan,
    implementations=implementations.forward_implementations,
    reference="ours_composite",
)

OPERATORS = {operator.name: operator for operator in (FORWARD,)}
