"""The operators of the board. One more is one more entry of OPERATORS: its shapes, inputs, traffic and columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import backward_implementations, implementations, inputs, shapes
from bench.shapes import Shape

__all__ = ["BACKWARD", "FORWARD", "OPERATORS", "RAW_BACKWARD", "TRAINING", "Operator"]


@dataclass(frozen=True)
class Operator:
    """What the board needs to know of an operator."""

    name: str  # in the JSON and in peers_h200.json
    title: str
    conditions: str  # types and transforms, for the documents
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
    in_full: bool = False  # in the README with all shapes and a picture; else by its means alone
    pictures: bool = True  # of it in docs/benchmarks.md


FORWARD = Operator(
    name="chunk_fwd",
    title="forward",
    conditions="fp32 states in and out, transforms fused",
    shapes=shapes.FORWARD_SHAPES,
    quick=shapes.QUICK,
    families=inputs.FAMILIES,
    make_inputs=inputs.make_inputs,
    least_bytes=shapes.least_bytes,
    flop=shapes.flop,
    plan=implementations.forward_plan,
    implementations=implementations.forward_implementations,
    reference="ours_composite",
    in_full=True,
)

_PROCESSED = (
    "log-gate, β and their gradients in fp32, q and k normalised, initial state and final state's gradient given"
)

BACKWARD = Operator(
    name="chunk_bwd",
    title="backward",
    conditions=_PROCESSED,
    shapes=shapes.BACKWARD_BOARD,
    quick=shapes.BACKWARD_QUICK,
    families=inputs.FAMILIES,
    make_inputs=inputs.make_processed_inputs,
    least_bytes=lambda shape: shapes.backward_least_bytes(shape, gate_bytes=4),
    flop=shapes.backward_flop,
    plan=backward_implementations.backward_plan,
    implementations=backward_implementations.backward_implementations,
    reference="ours_composite",
)

RAW_BACKWARD = replace(
    BACKWARD,
    name="chunk_bwd_raw",
    title="backward with transforms fused",
    conditions="gate and β logits in bf16, q and k not normalised, initial state and final state's gradient given",
    make_inputs=inputs.make_raw_inputs,
    least_bytes=lambda shape: shapes.backward_least_bytes(shape, gate_bytes=2),
    pictures=False,
)

TRAINING = replace(
    BACKWARD,
    name="training",
    title="forward and backward",
    least_bytes=shapes.training_least_bytes,
    flop=shapes.training_flop,
    implementations=backward_implementations.training_implementations,
)

OPERATORS = {operator.name: operator for operator in (FORWARD, BACKWARD, RAW_BACKWARD, TRAINING)}
