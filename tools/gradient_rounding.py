#!/usr/bin/env python3
"""Which rounding of the backward brings which error: its stages in fp64, with each operand rounded to bf16 or not.

    python tools/gradient_rounding.py [--family random] [--heads 3] [--tokens 1024]

Prints the relative RMSE of each gradient, in units of 1e-3: with all roundings of the kernels, without each of them and
with each alone. Processed inputs of the board (bench/inputs.py), K = V = 128. The names of the roundings are those of
docs/design.md: what a stage leaves for another one, and operands of its own products. Runs on a CPU, for minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import inputs as bench_inputs  # noqa: E402
from bench.shapes import Shape  # noqa: E402

C, BLOCK = 64, 32
ROUNDINGS = {
    "W": "W, for both recurrences",
    "K_decayed": "K e^(G_C - G), for both",
    "Q_gated": "Q e^G, for the reverse recurrence, but for the first chunk",
    "Aqk": "for the reverse recurrence",
    "S operand": "S in U = U0 - W S",
    "dS operand": "dS' in dU, but for the last chunk",
    "S": "for stage 4",
    "dS": "for stage 4, but for what the last chunk's tokens write",
    "U": "for stage 4, but for that and for beta in the last chunk",
    "dU": "for stage 4, but for the last chunk",
    "inverse": "A^-1, for stage 4",
    "Y": "operand of stage 4",
    "Dqk": "pairs, an operand of stage 4",
    "Dkk": "likewise",
    "q P": "likewise",
    "k P": "likewise",
    "k R": "likewise, of k X, too",
}
GRADIENTS = ("q", "k", "v", "g", "beta", "initial_state")


def make_call(family: str, heads: int, tokens: int) -> dict[str, Tensor]:
    """Inputs [H, T, ...] in fp64, states [H, K, V], and gradients of the outputs."""
    shape = Shape(name="rounding", lengths=(tokens,), heads=heads)
    given = bench_inputs.make_processed_inputs(shape, family, 1, torch.device("cpu"))
    call = {name: given[name][0].transpose(0, 1).double() for name in ("q", "k", "v", "g", "beta", "do")}
    return call | {name: given[name][0].double() for name in ("initial_state", "dfinal_state")}


def gradients(call: dict[str, Tensor], rounded: Collection[str]) -> dict[str, Tensor]:
    """The gradients by the stages of docs/design.md, with the operands that ``rounded`` names in bf16."""

    def take(name: str, x: Tensor) -> Tensor:
        return x.bfloat16().double() if name in rounded else x

    heads, tokens, key_dim = call["k"].shape
    chunks, scale = tokens // C, key_dim**-0.5
    q, k, v, g, do = (call[name].reshape(heads, chunks, C, -1) for name in ("q", "k", "v", "g", "do"))
    beta = call["beta"].reshape(heads, chunks, C, 1)
    G = g.cumsum(2)
    G_C = G[:, :, -1:]
    lower = torch.ones(C, C).tril().double()
    strictly = lower.tril(-1)
    decay = (G[:, :, :, None] - G[:, :, None]).clamp(max=0).exp()

    # Stage 1.
    Akk = torch.einsum("hnik,hnjk,hnijk->hnij", k, k, decay) * strictly * beta
    Aqk = take("Aqk", torch.einsum("hnik,hnjk,hnijk->hnij", q, k, decay) * lower * scale)
    inverse = torch.linalg.inv(torch.eye(C).double() + Akk)
    Tinv = inverse * beta.mT
    W, U0 = take("W", Tinv @ (k * G.exp())), Tinv @ v
    K_decayed, Q_gated = take("K_decayed", k * (G_C - G).exp()), scale * q * G.exp()
    Q_gated[:, 1:] = take("Q_gated", Q_gated[:, 1:])

    # Stages 2 and 3.
    states, values, dstates, dvalues = [], [], [], []
    S, dS = call["initial_state"], call["dfinal_state"]
    for c in range(chunks):
        states.append(take("S", S))
        U = U0[:, c] - W[:, c] @ take("S operand", S)
        values.append(U)
        S = G_C[:, c].exp().mT * S + K_decayed[:, c].mT @ U
    for c in reversed(range(chunks)):
        dstates.append(dS)
        operand = dS if c == chunks - 1 else take("dS operand", dS)
        dU = Aqk[:, c].mT @ do[:, c] + K_decayed[:, c] @ operand
        dvalues.append(dU if c == chunks - 1 else take("dU", dU))
        dS = G_C[:, c].exp().mT * dS + Q_gated[:, c].mT @ do[:, c] - W[:, c].mT @ dU
    S_in, U_ends = torch.stack(states, 1), torch.stack(values, 1)
    dS_ends, dU = torch.stack(dstates[::-1], 1), torch.stack(dvalues[::-1], 1)
    U, dS_out = take("U", U_ends), take("dS", dS_ends)
    U_ends[:, :-1], dS_ends[:, :-1] = U[:, :-1], dS_out[:, :-1]  # exact in the last chunk

    # Stage 4: values, what the states bring, and pairs of tokens by references in the middle of each block.
    Y = take("inverse", inverse).mT @ dU
    dv, dbeta = beta * Y, (Y * U_ends).sum(-1) / beta[..., 0]
    Y = take("Y", Y)
    Dqk, Dkk = scale * (do @ U.mT), take("Dkk", -beta * (Y @ U.mT) * strictly)
    diagonal, Dqk = Dqk.diagonal(dim1=2, dim2=3)[..., None], take("Dqk", Dqk * strictly)
    asked, predicted = scale * G.exp() * (do @ S_in.mT), -beta * G.exp() * (Y @ S_in.mT)
    middle = G[:, :, BLOCK // 2 - 1 :: BLOCK].repeat_interleave(BLOCK, 2)
    P, R = (G - middle).exp(), (middle - G).exp()
    q_P, k_P, k_R = take("q P", q * P), take("k P", k * P), take("k R", k * R)
    written = (U_ends @ dS_ends.mT) * (G_C - middle).exp()
    dq, dk = asked + diagonal * k, predicted + R * written + diagonal * q
    written_key = k * (R * written)
    crossing = written_key.sum(2, keepdim=True) + G_C.exp() * (S_in * dS_out).sum(-1)[:, :, None]
    dG = q * asked + k * predicted - written_key
    first, second = slice(0, BLOCK), slice(BLOCK, C)
    X = (middle[:, :, BLOCK:] - G[:, :, first]).exp()
    k_X = take("k R", k[:, :, first] * X)
    for later, earlier, factor, operand in (
        (first, first, R[:, :, first], k_R[:, :, first]),
        (second, second, R[:, :, second], k_R[:, :, second]),
        (second, first, X, k_X),
    ):
        of_q, of_k = Dqk[:, :, later, earlier], Dkk[:, :, later, earlier]
        x_q, x_k = of_q @ operand, of_k @ operand
        y = of_q.mT @ q_P[:, :, later] + of_k.mT @ k_P[:, :, later]
        dq[:, :, later] += P[:, :, later] * x_q
        dk[:, :, later] += P[:, :, later] * x_k
        dk[:, :, earlier] += factor * y
        dG[:, :, later] += q_P[:, :, later] * x_q + k_P[:, :, later] * x_k
        dG[:, :, earlier] -= operand * y
    dg = dG.flip(2).cumsum(2).flip(2) + crossing
    return dict(zip(GRADIENTS, (dq, dk, dv, dg, dbeta, dS), strict=True))


def errors(call: dict[str, Tensor], exact: dict[str, Tensor], rounded: Collection[str]) -> dict[str, float]:
    """Relative RMSE of each gradient."""
    found = gradients(call, rounded)
    return {name: float((found[name] - e).norm() / e.norm()) for name, e in exact.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("random", "long"), default="random", help="of gates")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {C}")
    args = parser.parse_args()
    if args.heads < 1 or args.tokens < C or args.tokens % C:
        parser.error(f"--heads has to be positive and --tokens a multiple of {C}")
    call = make_call(args.family, args.heads, args.tokens)
    exact = gradients(call, ())
    rows = [("all", tuple(ROUNDINGS))]
    rows += [(f"without {name}", tuple(n for n in ROUNDINGS if n != name)) for name in ROUNDINGS]
    rows += [(f"only {name}", (name,)) for name in ROUNDINGS]
    print(f"{args.family:<20}" + "".join(f"{'d' + name:>15}" for name in GRADIENTS))
    for title, rounded in rows:
        found = errors(call, exact, rounded)
        print(f"{title:<20}" + "".join(f"{1e3 * found[name]:15.2f}" for name in GRADIENTS), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
