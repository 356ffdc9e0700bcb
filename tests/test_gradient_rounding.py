"""tools/gradient_rounding.py: its stages give the gradients, and its roundings the kernels' errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kda_cuda import composite
from kda_cuda.accuracy import GRADIENT_RELATIVE_RMSE, relative_rmse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradient_rounding", ROOT / "tools" / "gradient_rounding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["random", "long"])
def test_stages_without_rounding_are_exact(tool: ModuleType, family: str) -> None:
    call = tool.make_call(family, heads=2, tokens=192)
    found = tool.gradients(call, ())
    tokens_first = {name: call[name].transpose(0, 1)[None].float() for name in ("q", "k", "v", "g", "beta", "do")}
    results = composite.chunk_bwd(
        tokens_first.pop("do"),
        call["dfinal_state"][None].float(),
        **tokens_first,
        initial_state=call["initial_state"][None].float(),
    )
    expected = dict(zip(("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"), results, strict=True))
    for name in tool.GRADIENTS:
        like = expected[name][0] if name == "initial_state" else expected[name][0].transpose(0, 1)
        assert relative_rmse(found[name].reshape(like.shape), like) < 2e-5, name


def test_each_rounding_shows_somewhere_and_all_keep_the_contract(tool: ModuleType) -> None:
    call = tool.make_call("long", heads=1, tokens=128)
    exact = tool.gradients(call, ())
    for name in tool.ROUNDINGS:
        assert max(tool.errors(call, exact, (name,)).values()) > 0, name
    for name, error in tool.errors(call, exact, tuple(tool.ROUNDINGS)).items():
        assert error <= GRADIENT_RELATIVE_RMSE[name], name


def test_wrong_arguments(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gradient_rounding", "--tokens", "100"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "--tokens a multiple of 64" in capsys.readouterr().err


def test_table(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gradient_rounding", "--tokens", "64", "--heads", "1"])
    assert tool.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(tool.ROUNDINGS) and torch.isfinite(torch.tensor(float(lines[1].split()[-1])))
