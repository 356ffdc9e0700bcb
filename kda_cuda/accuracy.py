"""The accuracy contract: one measure and its limits, shared by the tests and the demo."""

import torch
from torch import Tensor

# Largest relative RMSE of a bf16 run against the fp64 token recurrence on the same inputs, on every family of gates.
O_RELATIVE_RMSE = 4.5e-3
STATE_RELATIVE_RMSE = 4.0e-3

# The same for the gradients, by the input that they belong to.
GRADIENT_RELATIVE_RMSE = {
    "q": 6e-3,
    "k": 6e-3,
    "v": 6e-3,
    "g": 1e-2,
    "beta": 6e-3,
    "A_log": 6e-3,
    "dt_bias": 6e-3,
    "initial_state": 6e-3,
}


def relative_rmse(actual: Tensor, expected: Tensor) -> float:
    """RMS of ``actual - expected`` over RMS of ``expected``, in fp64 on the CPU.

    Infinite if ``actual`` has a NaN or an infinity; if ``expected`` is all zeros, 0.0 when ``actual`` is too, else
    infinite.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"relative_rmse: shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    actual, expected = (x.detach().to("cpu", torch.float64) for x in (actual, expected))
    if actual.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    error, size = float((actual - expected).square().mean().sqrt()), float(expected.square().mean().sqrt())
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size
