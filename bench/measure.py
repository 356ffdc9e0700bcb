"""Everything that is measured of one case: a shape with one family of gates, by all implementations."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.devices import Device
from bench.inputs import check_hygiene, input_bytes, rotation_sets
from bench.operators import Operator
from bench.shapes import Shape
from bench.timing import Budget, host_time, peak_memory, time_events, time_graph

__all__ = ["CHECK_LIMIT", "measure_case"]

# Largest relative RMSE of an output against ours. Loose: implementations differ in rounding, a wrong call by far more.
CHECK_LIMIT = 2e-2
SLOW_BUDGET = Budget(total_us=100e3, fewest=3, most=11)

Json = dict[str, Any]


def measure_case(
    device: Device,
    operator: Operator,
    shape: Shape,
    family: str,
    implementations: list[Any],
    budget: Budget,
    advance: Callable[[str], None] = lambda name: None,
) -> Json:
    """Checks and times each implementation.

    Args:
        implementations: ours first.
        advance: told the name of each implementation before its turn.

    Returns: the case as it stands in the file of a run. An implementation that raised, declined or gave another
        result than ours has an "error" instead of times.
    """
    seed = zlib.crc32(f"{operator.name} {shape.name} {family}".encode())
    sets = [operator.make_inputs(shape, family, seed, device.torch_device)]
    count = rotation_sets(input_bytes(sets[0]), device.l2_bytes)
    sets += [operator.make_inputs(shape, family, seed + i, device.torch_device) for i in range(1, count)]
    check_hygiene(sets, device.l2_bytes)

    expected = reference = _reference_outputs(operator, implementations, sets[0])
    measurements: dict[str, Json] = {}
    for implementation in implementations:
        advance(implementation.name)
        try:
            measurement, outputs = _measure(device, implementation, shape, sets, expected, budget)
            if outputs is not None and reference is not None:
                measurement["reference_errors"] = check(outputs, reference)
        except Exception as error:  # whatever a peer raises, out of memory included: it stands in the file
            measurement, outputs = {"error": _one_line(error)}, None
            device.release()
        measurements[implementation.name] = measurement
        if implementation is implementations[0] and outputs is not None:
            expected = outputs  # from here on the others against ours
        device.synchronize()
    device.release()
    return {
        "operator": operator.name,
        "shape": shape.name,
        "group": shape.group,
        "family": family,
        "lengths": list(shape.lengths),
        "heads": shape.heads,
        "key_dim": shape.key_dim,
        "value_dim": shape.value_dim,
        "least_bytes": operator.least_bytes(shape),
        "flop": operator.flop(shape),
        "input_sets": len(sets),
        "input_bytes": input_bytes(sets[0]),
        "plan": operator.plan(shape, device.torch_device),
        "measurements": measurements,
    }


def _reference_outputs(operator: Operator, implementations: list[Any], inputs: Json) -> dict[str, Tensor] | None:
    """Of the implementation that ours is checked against; None if it cannot compute this case."""
    for implementation in implementations:
        if implementation.name == operator.reference:
            try:
                call = implementation.call(inputs)
                return call.outputs(call.run())
            except Exception:  # out of memory, say: it then reports so in its own turn
                return None
    return None


def _measure(
    device: Device,
    implementation: Any,
    shape: Shape,
    sets: list[Json],
    expected: dict[str, Tensor] | None,
    budget: Budget,
) -> tuple[Json, dict[str, Tensor] | None]:
    """Times and errors of one implementation, and its outputs for the first set of inputs."""
    if reason := implementation.declines(shape):
        return {"error": f"declined: {reason}"}, None
    calls = [implementation.call(inputs) for inputs in sets]
    outputs = {name: x.clone() for name, x in calls[0].outputs(calls[0].run()).items()}
    errors = check(outputs, expected)
    finite = {name: error for name, error in errors.items() if math.isfinite(error)}
    if wrong := {name: error for name, error in errors.items() if not error <= CHECK_LIMIT}:
        text = ", ".join(f"{name} {error:.2e}" for name, error in wrong.items())
        return {"error": f"wrong result, not timed: relative RMSE of {text}", "errors": finite}, None

    runs = [call.run for call in calls]
    take = time_graph if implementation.method == "graph" else time_events
    output_bytes = sum(x.numel() * x.element_size() for x in outputs.values())
    measurement: Json = {"errors": errors, "peak_bytes": peak_memory(device, runs[0]), "output_bytes": output_bytes}
    has_host_time = device.asynchronous and not implementation.slow
    measurement["host_us"] = host_time(device, runs).as_json() if has_host_time else None
    if has_host_time and calls[0].same:
        measurement["same_host_us"] = {
            name: host_time(device, [call.same[name] for call in calls]).as_json() for name in calls[0].same
        }
    measurement["gpu"] = take(device, runs, SLOW_BUDGET if implementation.slow else budget).as_json()
    return measurement, outputs


def check(outputs: dict[str, Tensor], expected: dict[str, Tensor] | None) -> dict[str, float]:
    """Relative RMSE of each output on its own device; infinite for NaN, infinity or another shape. Empty if there is
    nothing to compare with.
    """
    if expected is None:
        return {}
    errors = {}
    for name, reference in expected.items():
        errors[name] = math.inf
        if outputs[name].shape == reference.shape:
            difference = torch.linalg.vector_norm(outputs[name].float() - reference.float(), dtype=torch.float64)
            error = float(difference / torch.linalg.vector_norm(reference.float(), dtype=torch.float64))
            errors[name] = error if math.isfinite(error) else math.inf
    return errors


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300] if text else type(error).__name__
