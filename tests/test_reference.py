"""The token recurrence against calculations by hand: it is the ground truth of the other tests."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FAMILIES, make_inputs, run_reference, slice_tokens

from kda_cuda.accuracy import relative_rmse
from kda_cuda.reference import log_gate, recurrent_kda

EXACT = 1e-14  # relative, fp64


def by_hand() -> dict:
    """Three tokens of one head, K = 2, V = 1, in numbers that a reader can follow."""
    row = [1, 3, 1]
    return {
        "q": torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]], dtype=torch.float64).view(*row, 2),
        "k": torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], dtype=torch.float64).view(*row, 2),
        "v": torch.tensor([[4.0], [6.0], [1.0]], dtype=torch.float64).view(*row, 1),
        "g": torch.tensor([[0.0, 0.0], [math.log(0.5), math.log(0.25)], [-math.inf, 0.0]], dtype=torch.float64).view(
            *row, 2
        ),
        "beta": torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64).view(row),
        "scale": 10.0,
    }


def test_three_tokens_by_hand() -> None:
    # t = 0: S = 0;             u = 0.5 (4 - 0) = 2;              S = [2, 0];          o = 10 (1*2 + 2*0) = 20
    # t = 1: S = [1, 0];        u = 1 (6 - (1 + 0)) = 5;          S = [6, 5];          o = 10 (3*6) = 180
    # t = 2: S = [0, 5];        u = 0.25 (1 - 2*5) = -2.25;       S = [0, 5 - 4.5];    o = 10 (0.5) = 5
    o, final_state, chunk_states = recurrent_kda(**by_hand())
    torch.testing.assert_close(o.flatten(), torch.tensor([20.0, 180.0, 5.0], dtype=torch.float64), rtol=EXACT, atol=0)
    torch.testing.assert_close(final_state.flatten(), torch.tensor([0.0, 0.5], dtype=torch.float64), rtol=EXACT, atol=0)
    assert o.shape == (1, 3, 1, 1) and final_state.shape == (1, 1, 2, 1)
    assert chunk_states.shape == (1, 1, 1, 2, 1) and not chunk_states.any()


def test_initial_state_by_hand() -> None:
    # One token, no decay: S = [3, 4]; u = 1 (6 - (3 + 4)) = -1; S = [2, 3]; o = 3*2.
    inputs = {name: x[:, 1:2] if isinstance(x, torch.Tensor) else 1.0 for name, x in by_hand().items()}
    inputs["g"] = torch.zeros_like(inputs["g"])
    state = torch.tensor([3.0, 4.0], dtype=torch.float64)
    o, final_state, chunk_states = recurrent_kda(**inputs, initial_state=state.view(1, 1, 2, 1))
    assert o.item() == 6.0 and final_state.flatten().tolist() == [2.0, 3.0]
    assert chunk_states.flatten().tolist() == [3.0, 4.0]
    _, transposed, entry = recurrent_kda(**inputs, initial_state=state.view(1, 1, 1, 2), state_v_first=True)
    assert transposed.shape == (1, 1, 1, 2) and torch.equal(transposed, final_state.transpose(-1, -2))
    assert torch.equal(entry, chunk_states.transpose(-1, -2))


def test_equation_of_the_paper() -> None:
    """S_t = (I - beta k k^T) Diag(alpha) S + beta k v^T written with matrices, token by token."""
    inputs = make_inputs(
        "unbounded_log", T=5, H=1, K=3, V=2, dtype=torch.float64, use_qk_l2norm=False, use_beta_sigmoid=False
    )
    S = torch.zeros(3, 2, dtype=torch.float64)
    o, final_state, _ = run_reference(inputs)
    for t in range(5):
        q, k, v = (inputs[name][0, t, 0].unsqueeze(1) for name in "qkv")
        alpha, beta = inputs["g"][0, t, 0].exp(), inputs["beta"][0, t, 0]
        S = (torch.eye(3) - beta * k @ k.T) @ torch.diag(alpha) @ S + beta * k @ v.T
        torch.testing.assert_close(o[0, t, 0], 3**-0.5 * (S.T @ q).squeeze(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final_state[0, 0], S, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_continuity(family: str) -> None:
    """Tokens in pieces with carried state give the same as in one run."""
    inputs = make_inputs(family, T=100, HV=4, K=16, V=24, dtype=torch.float64, with_state=True, state_v_first=True)
    o, final_state, _ = run_reference(inputs)
    state, pieces = inputs["initial_state"], []
    for begin, end in ((0, 1), (1, 65), (65, 100)):
        piece, state, _ = run_reference({**slice_tokens(inputs, begin, end), "initial_state": state})
        pieces.append(piece)
    assert relative_rmse(torch.cat(pieces, dim=1), o) <= EXACT and relative_rmse(state, final_state) <= EXACT


def test_packed_sequences_are_independent() -> None:
    lengths = [3, 0, 70, 1]
    inputs = make_inputs("long", lengths=lengths, HV=4, K=8, V=12, with_state=True)
    o, final_state, chunk_states = run_reference(inputs)
    begin = 0
    for n, length in enumerate(lengths):
        alone = {**slice_tokens(inputs, begin, begin + length), "initial_state": inputs["initial_state"][n : n + 1]}
        o_alone, state_alone, entries = run_reference(alone)
        assert relative_rmse(o[:, begin : begin + length], o_alone) <= EXACT
        assert relative_rmse(final_state[n], state_alone[0]) <= EXACT
        slot = begin // 64 + n
        assert relative_rmse(chunk_states[0, slot : slot + entries.shape[1]], entries[0]) <= EXACT
        begin += length


def test_grouped_value_heads() -> None:
    """Value head h reads q and k of head h // (HV / H)."""
    inputs = make_inputs("long", T=20, H=2, HV=6, K=8, V=8)
    grouped = run_reference(inputs)[0]
    repeated = run_reference({**inputs, **{x: inputs[x].repeat_interleave(3, dim=2) for x in "qk"}})[0]
    assert torch.equal(grouped, repeated)


def test_log_gates() -> None:
    x = torch.tensor([-800.0, -40.0, 0.0, 2.0, 50.0], dtype=torch.float64).view(1, 1, 1, 5)
    A_log, bias = torch.tensor([math.log(3.0)], dtype=torch.float64), torch.full((5,), 0.5)
    softplus = torch.tensor([math.log1p(math.exp(y + 0.5)) for y in x.flatten().tolist()], dtype=torch.float64)
    torch.testing.assert_close(log_gate(x, A_log, bias, None).flatten(), -3.0 * softplus, rtol=1e-12, atol=0)
    sigmoid = [math.exp(z) / (1 + math.exp(z)) for z in (3.0 * (y + 0.5) for y in x.flatten().tolist())]
    expected = -5.0 * torch.tensor(sigmoid, dtype=torch.float64)
    torch.testing.assert_close(log_gate(x, A_log, bias, -5.0).flatten(), expected, rtol=1e-12, atol=1e-300)
    with pytest.raises(ValueError, match="A_log"):
        log_gate(x, None, None, None)


def test_relative_rmse() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_rmse(expected, expected) == 0.0
    assert relative_rmse(torch.tensor([3.0, 9.0]), expected) == pytest.approx(1.0)
    assert relative_rmse(torch.tensor([3.0, math.nan]), expected) == math.inf
    assert relative_rmse(torch.ones(2), torch.zeros(2)) == math.inf
    assert relative_rmse(torch.zeros(2), torch.zeros(2)) == 0.0
    with pytest.raises(ValueError, match="shapes"):
        relative_rmse(torch.zeros(2), torch.zeros(3))
