"""tools/gradient_rounding.py: its stages give the gradients, and its roundings the kernels' errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kda_cuda import composite
from kda_cuda.accuracy import GRADIENT_RELATIVE_RMSE, relative_rmse

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "tools").is_dir():
    pytest.skip("the tools are in the source tree only", allow_module_level=True)
sys.path.append(str(ROOT / "tools"))

import gradient_rounding  # noqa: E402


@pytest.mark.parametrize("family", ["random", "long"])
def test_stages_without_rounding_are_exact(family: str) -> None:
    call = gradient_rounding.make_call(family, heads=2, tokens=192)
    found = gradient_rounding.gradients(call, ())
    tokens_first = {name: call[name].transpose(0, 1)[None].float() for name in ("q", "k", "v", "g", "beta", "do")}
    results = composite.chunk_bwd(
        tokens_first.pop("do"),
        call["dfinal_state"][None].float(),
        **tokens_first,
        initial_state=call["initial_state"][None].float(),
    )
    expected = dict(zip(("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"), results, strict=True))
    for name in gradient_rounding.GRADIENTS:
        like = expected[name][0] if name == "initial_state" else expected[name][0].transpose(0, 1)
        assert relative_rmse(found[name].reshape(like.shape), like) < 2e-5, name


def test_each_rounding_shows_somewhere_and_all_keep_the_contract() -> None:
    call = gradient_rounding.make_call("long", heads=1, tokens=128)
    exact = gradient_rounding.gradients(call, ())
    for name in gradient_rounding.ROUNDINGS:
        assert max(gradient_rounding.errors(call, exact, (name,)).values()) > 0, name
    for name, error in gradient_rounding.errors(call, exact, tuple(gradient_rounding.ROUNDINGS)).items():
        assert error <= GRADIENT_RELATIVE_RMSE[name], name


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gradient_rounding", "--tokens", "100"])
    with pytest.raises(SystemExit):
        gradient_rounding.main()
    assert "--tokens a multiple of 64" in capsys.readouterr().err


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gradient_rounding", "--tokens", "64", "--heads", "1"])
    assert gradient_rounding.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(gradient_rounding.ROUNDINGS) and torch.isfinite(
        torch.tensor(float(lines[1].split()[-1]))
    )
