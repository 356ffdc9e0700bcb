"""The shapes that are measured, and what the hardware must at least do for one: bytes and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "BACKWARD_BOARD",
    "BACKWARD_QUICK",
    "BOARD",
    "CURVES",
    "FORWARD_SHAPES",
    "QUICK",
    "Shape",
    "backward_flop",
    "backward_least_bytes",
    "flop",
    "least_bytes",
    "parse_lengths",
    "select",
    "training_flop",
    "training_least_bytes",
]

CHUNK_TOKENS = 64
ACTIVATION_BYTES = 2  # bf16: q, k, v, g, beta, o
STATE_BYTES = 4  # fp32


@dataclass(frozen=True)
class Shape:
    """One call: the length of each sequence (tokens), and heads. Several sequences are packed with ``cu_seqlens``."""

    name: str
    lengths: tuple[int, ...]
    heads: int  # H, of q and k; and HV, of v, g, beta and the states
    key_dim: int = 128  # K
    value_dim: int = 128  # V
    group: str = "board"  # "board": in the tables and the means; "curve": in the pictures only

    @property
    def tokens(self) -> int:
        """T, of all sequences."""
        return sum(self.lengths)

    @property
    def sequences(self) -> int:
        """N."""
        return len(self.lengths)

    @property
    def varlen(self) -> bool:
        """Whether the call takes ``cu_seqlens``."""
        return len(self.lengths) > 1

    @property
    def lengths_text(self) -> str:
        """``"8 × 1024"``, or ``"1300, 547"``."""
        first = self.lengths[0]
        if self.varlen and set(self.lengths) == {first}:
            return f"{len(self.lengths)} × {first}"
        return ", ".join(map(str, self.lengths))


def least_bytes(shape: Shape) -> int:
    """Bytes that any implementation moves: q, k, v, g, beta and the initial state in, o and the final state out."""
    per_token_and_head = (3 * shape.key_dim + 2 * shape.value_dim + 1) * ACTIVATION_BYTES
    return shape.tokens * shape.heads * per_token_and_head + 2 * _state_bytes(shape)


def flop(shape: Shape) -> int:
    """Floating-point operations of the chunk form's dense products; the triangular solve itself is not counted.

    Per token and head with C = 64: Akk and Aqk (4CK), Tinv times K and V (2CK + 2CV), Aqk U (2CV), three products with
    the state (6KV).
    """
    C, K, V = CHUNK_TOKENS, shape.key_dim, shape.value_dim
    return shape.tokens * shape.heads * (6 * C * K + 4 * C * V + 6 * K * V)


def backward_least_bytes(shape: Shape, gate_bytes: int) -> int:
    """Bytes of a backward, as the recorded table of the peers counts them: q, k, v, g, beta, o, do and both states and
    the final state's gradient in, all gradients out.

    gate_bytes: of an element of g and beta, and of their gradients; 4 for processed gates, 2 for raw ones.
    """
    K, V = shape.key_dim, shape.value_dim
    read = (2 * K + 3 * V) * ACTIVATION_BYTES + (K + 1) * gate_bytes
    written = (2 * K + V) * ACTIVATION_BYTES + (K + 1) * gate_bytes
    return shape.tokens * shape.heads * (read + written) + 4 * _state_bytes(shape)


def backward_flop(shape: Shape) -> int:
    """As :func:`flop`, for what a backward has to multiply if nothing of the forward is computed again.

    Per token and head with C = 64: the pairs' parts of dq and dk (8CK); Aqk^T dO, the solve's product with dU, dO U^T
    and Y U^T (8CV); six products with the states (12KV).
    """
    C, K, V = CHUNK_TOKENS, shape.key_dim, shape.value_dim
    return shape.tokens * shape.heads * (8 * C * K + 8 * C * V + 12 * K * V)


def training_least_bytes(shape: Shape) -> int:
    """Bytes of a forward and a backward, each for itself, processed gates in fp32."""
    K, V, gate_bytes = shape.key_dim, shape.value_dim, 4
    forward = (2 * K + 2 * V) * ACTIVATION_BYTES + (K + 1) * gate_bytes
    return shape.tokens * shape.heads * forward + 2 * _state_bytes(shape) + backward_least_bytes(shape, gate_bytes)


def training_flop(shape: Shape) -> int:
    return flop(shape) + backward_flop(shape)


def _state_bytes(shape: Shape) -> int:
    """Of one state of each sequence and head."""
    return shape.sequences * shape.heads * shape.key_dim * shape.value_dim * STATE_BYTES


# The peers' recorded times (peers_h200.json) are of exactly these.
BOARD = (
    Shape("h96_8192", (8192,), 96),
    Shape("h96_mixed", (1300, 547, 2048, 963, 271, 3063), 96),
    Shape("h96_8x1024", (1024,) * 8, 96),
    Shape("h64_8192", (8192,), 64),
    Shape("h64_8x1024", (1024,) * 8, 64),
    Shape("h32_8192", (8192,), 32),
    Shape("h24_8192", (8192,), 24),
    Shape("h16_8192", (8192,), 16),
    Shape("h12_4x2048", (2048,) * 4, 12),
    Shape("h16_8x2048", (2048,) * 8, 16),
    Shape("h8_4096", (4096,), 8),
    Shape("h12_2048", (2048,), 12),
    Shape("h4_1024", (1024,), 4),
    Shape("h8_65536", (65536,), 8),
    Shape("h4_32768", (32768,), 4),
)

# One shape of each kind: wide, packed, middling, small.
QUICK = ("h96_8192", "h16_8x2048", "h16_8192", "h4_1024")

CURVE_HEADS = 16  # of the curve over lengths
CURVE_TOKENS = 8192  # of the curve over heads


def _curve(tokens: int, heads: int) -> Shape:
    return Shape(f"h{heads}_{tokens}", (tokens,), heads, group="curve")


# With the board's own shapes these make a curve over lengths at H = 16, and one over heads at T = 8192.
CURVES = (
    *(_curve(tokens, CURVE_HEADS) for tokens in (1024, 2048, 4096, 16384, 32768, 65536)),
    *(_curve(CURVE_TOKENS, heads) for heads in (4, 8)),
)

FORWARD_SHAPES = BOARD + CURVES


# Of the backward, and of training: likewise those of the recorded times.
BACKWARD_BOARD = (
    Shape("b12_2048", (2048,), 12),
    Shape("b16_8192", (8192,), 16),
    Shape("b32_8192", (8192,), 32),
    Shape("b96_8192", (8192,), 96),
    Shape("b16_8x2048", (2048,) * 8, 16),
)
BACKWARD_QUICK = ("b12_2048", "b16_8x2048")


def select(shapes: Iterable[Shape], names: Iterable[str]) -> list[Shape]:
    """The shapes of these names, in the order of ``shapes``.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    shapes, names = list(shapes), list(names)
    known = [shape.name for shape in shapes]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown shape {', '.join(unknown)}; known: {', '.join(known)}")
    return [shape for shape in shapes if shape.name in names]


def parse_lengths(text: str) -> tuple[int, ...]:
    """``"1300,547,8x1024"`` -> the length of each sequence.

    Raises:
        ValueError: the text is not of that form, or a number is not positive.
    """
    lengths: list[int] = []
    for item in text.split(","):
        repeat, times, tokens = item.rpartition("x")
        count, length = int(repeat) if times else 1, int(tokens)
        if count < 1 or length < 1:
            raise ValueError(f"expected positive lengths, got {text!r}")
        lengths += [length] * count
    return tuple(lengths)
