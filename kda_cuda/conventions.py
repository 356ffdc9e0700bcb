"""What the operators' Python implementations, fakes and reference agree on."""

import torch

CHUNK_TOKENS = 64  # of a chunk, and so the distance of the states in chunk_states; C in the formulas
L2NORM_EPS = 1e-6  # q and k become x * rsqrt(sum x^2 + L2NORM_EPS)

# Asked once: torch.compile does not trace the question on torch 2.11.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)
)


def compute_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype of states, and of the composite's arithmetic, for q, k and v in ``activations``."""
    return torch.float64 if activations == torch.float64 else torch.float32
